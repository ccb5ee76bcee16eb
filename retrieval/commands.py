"""The commands around the index: index (add, delete, compact), search, classify, serve, dedup, cluster.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import Any

import click

from clip_train.console import CONTEXT, Bars, Whole, device_option, out_option, print_table, put, say, write_figures


@click.group(invoke_without_command=True, context_settings=CONTEXT)
@click.option("--embeddings", type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@out_option("index")
@click.option("--recall", default=0.95, show_default=True, type=click.FloatRange(0, 1), help="Recall@10 to reach.")
@click.option("--memory", help="The most both indexes may take when loaded, e.g. 500MB.")
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "flat", "ivf", "pq", "rabitq", "opq", "hnsw"]),
    help="What to try; flat is exact.",
)
@click.option("--workers", default=1, show_default=True, type=Whole(1), help="Processes that add vectors.")
@click.option(
    "--engine",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="Where they run; ray: on a cluster that sees the folders.",
)
@click.option("--report", is_flag=True, help="Print the table of all that was tried.")
@click.pass_context
def index(context: click.Context, embeddings: Path | None, out: Path, report: bool, **options: Any) -> None:
    """Build a FAISS index and measure its recall against exact search.

    \b
    Example:  unclip index --embeddings emb --out index --recall 0.95 --report
    """
    if context.invoked_subcommand:
        return
    if embeddings is None:
        raise click.UsageError("Missing option '--embeddings'.")
    from retrieval.index import build_index

    made = build_index(embeddings, out, **options, on_progress=Bars("index")).result
    if report:
        names = ("kind", "knob", "value", "k_factor", "recall", "queries_per_second")
        lines = [(m, *(row.get(name, "") for name in names)) for m in ("image", "text") for row in made[m]["tried"]]
        print_table(("index", *names), lines)
    for modality in ("image", "text"):
        chosen = made[modality]
        measured = f"recall@10 {chosen['recall']:.3f}, {chosen['queries_per_second']:.0f} queries/s of one core"
        say(f"{out}/{modality}.index: {chosen['kind']}, {measured}")
    say(f'next: unclip search "a red fox" --index {out}')


@click.command("add", context_settings=CONTEXT)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@click.option("--replace", is_flag=True, help="A key that is there already moves: its old row is deleted.")
@click.option("--workers", default=1, show_default=True, type=Whole(1), help="Processes that add rows.")
def index_add(folder: Path, embeddings: Path, **options: Any) -> None:
    """Add embeddings of the same CLIP to an index, without building it again.

    \b
    Example:  unclip index add --index index --embeddings more
    """
    from retrieval.changes import add

    done = add(folder, embeddings, **options, on_progress=Bars("index add"))
    moved = f", {done.deleted} rows replaced" if done.deleted else ""
    say(f"{folder}/: {done.added} rows added{moved}" if done.added else f"{folder}/ has {embeddings}/ already")
    say(done.left(folder))


@click.command("delete", context_settings=CONTEXT)
@click.argument("keys", nargs=-1)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option("--keys", "lines", type=click.Path(path_type=Path), help="Text file of keys, one a line.")
@click.option("--where", metavar="FILTER", help="Delete the rows whose metadata says so; as for unclip search.")
@click.option("--dry-run", is_flag=True, help="Only say how many rows there are to delete.")
def index_delete(keys: tuple[str, ...], folder: Path, lines: Path | None, where: str | None, dry_run: bool) -> None:
    """Delete rows from an index by their KEYS or by their metadata: no search finds them any more.

    \b
    Example:  unclip index delete 000001234 000001235 --index index
              unclip index delete --keys drop.txt
              unclip index delete --where "license == 'unknown' or width < 64" --dry-run
    """
    from clip_train.settings import UserError
    from clip_train.zeroshot import read_lines
    from retrieval.changes import delete

    wanted = [*keys, *(read_lines(lines, "keys") if lines else [])]
    if not wanted and where is None:
        raise UserError("nothing to delete; give keys, --keys FILE or --where FILTER")
    done = delete(folder, wanted, where, dry_run=dry_run)
    say(f"{folder}/: {done.deleted} rows {'to delete' if dry_run else 'deleted'}")
    if done.missing:
        more = ", ..." if len(done.missing) > 5 else ""
        say(f"{len(done.missing)} keys are not there (any more): {', '.join(done.missing[:5])}{more}")
    say(done.left(folder))


@click.command("compact", context_settings=CONTEXT)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option(
    "--embeddings", multiple=True, type=click.Path(path_type=Path), help="Where embeddings are that moved; repeatable."
)
@click.option("--recall", type=click.FloatRange(0, 1), help="Recall@10 to reach; by default as before.")
@click.option("--memory", help="The most the index may take, e.g. 500MB; by default as before.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "ivf", "pq", "rabitq", "opq", "hnsw"]),
    help="As for unclip index; by default as before.",
)
def index_compact(folder: Path, **options: Any) -> None:
    """Make one plain index again of what was built, added and deleted, and measure its recall anew.

    \b
    Example:  unclip index compact --index index
    """
    from retrieval.changes import compact

    made = compact(folder, **options, on_progress=Bars("index compact")).result
    for modality in ("image", "text"):
        chosen = made[modality]
        say(f"{folder}/{modality}.index: {made['rows']} rows, {chosen['kind']}, recall@10 {chosen['recall']:.3f}")


@click.command(context_settings=CONTEXT)
@click.argument("queries", nargs=-1)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option("--clip", help="CLIP folder (or name); by default where the index says it was.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture to search with.")
@click.option("--key", "keys", multiple=True, help="A sample of the index to search with, by its key.")
@click.option("--vector", type=click.Path(path_type=Path), help="A .npy of (Q, D) vectors to search with.")
@click.option("--file", "lines", type=click.Path(path_type=Path), help="Text file of queries, one a line.")
@click.option("--plus", multiple=True, metavar="TERM", help="Add this to every query: a text, image:FILE or key:KEY.")
@click.option("--minus", multiple=True, metavar="TERM", help="Take this off every query.")
@click.option("--weight", default=1.0, show_default=True, type=float, help="Of what --plus and --minus name.")
@click.option("--literal", is_flag=True, help="QUERIES are texts as they stand: no signs, no image: or key:.")
@click.option("--together", is_flag=True, help="One query, the sum of all that is given, in place of one for each.")
@click.option("--where", multiple=True, metavar="FILTER", help="Only rows whose metadata says so; several: all.")
@click.option("--distinct", type=float, metavar="COSINE", help="Leave out hits nearer than this to a better one.")
@click.option("-k", default=10, show_default=True, type=Whole(1), help="Hits per query.")
@click.option(
    "--modality", default="image", show_default=True, type=click.Choice(["image", "text"]), help="Rows to rank."
)
@click.option("--json", "as_json", is_flag=True, help="Print the hits as json.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the hits as CSV, with all metadata.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the hits to this .json or .csv file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet of the hits to this PNG.")
@click.option("--open", "show", is_flag=True, help="Look at the contact sheet.")
@device_option
def search(
    queries, folder, clip, vector, lines, where, distinct, k, modality, as_json, as_csv, out, sheet, show, device,
    **options: Any,
) -> None:  # fmt: skip
    """Find the nearest pictures for captions, pictures, samples, vectors, or sums of them.

    QUERIES are captions. Signs between spaces make a sum: "king - man + 0.5*woman"; a term may be image:FILE, key:KEY
    or vector:FILE.npy. FILTER: license == 'MIT' and width >= 64, 'fox' in caption, label is not null.

    \b
    Example:  unclip search "a red fox" "two hearts" --index index --sheet hits.png
              unclip search --image fox.jpg --plus "in the snow" --minus cartoon --where "license == 'MIT'"
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from clip_train.store import read_vectors
    from clip_train.zeroshot import read_lines
    from retrieval import answers
    from retrieval.query import Term, describe, parse_algebra, questions
    from retrieval.search import Searcher

    if as_json and as_csv:
        raise UserError("--json and --csv contradict each other; give one")
    if out:
        answers.writer_of(out)  # refused before the search
    texts = [*queries, *(read_lines(lines, "queries") if lines else [])]
    rows = [(f"{vector}[{i}]", row) for i, row in enumerate(read_vectors(vector))] if vector else []
    asked = questions(texts, vectors=rows, **options)
    if not asked:
        raise UserError('nothing to search for; give a caption, --image, --key or --vector: unclip search "a red fox"')
    for text in [] if options["literal"] else texts:
        if (terms := parse_algebra(text)) != [Term("text", text)]:
            say(f"{text!r} is read as {describe(terms)}; --literal takes it as it stands")
    searcher = Searcher.open(folder, clip, pick_device(device))
    both = " and ".join(f"({one})" for one in where) if len(where) > 1 else "".join(where)
    hits = searcher.queries([terms for _, terms in asked], k, modality, where=both or None, distinct=distinct)
    if where and not any(hits):
        say(f"no row of {folder}/ passes the filter")
    if out:
        answers.write(out, asked, hits)
        say(f"wrote {out}")
    if sheet or show:
        shown = answers.save_sheet(asked, hits, searcher, sheet)
        say(f"wrote {shown}")
        if show:
            click.launch(str(shown))
    if as_json or as_csv:
        put(answers.to_csv(asked, hits) if as_csv else answers.to_json(asked, hits), nl=as_json)
        return
    for (name, _), (head, cells) in zip(asked, answers.tables(hits), strict=True):
        if len(asked) > 1:
            put(name, bold=True)
        print_table(head, cells)


@click.command(context_settings=CONTEXT)
@click.argument("classes", nargs=-1)
@click.option("--index", type=click.Path(path_type=Path), help="Index whose pictures get labels.  [default: index]")
@click.option("--embeddings", type=click.Path(path_type=Path), help="Or embeddings whose pictures get labels.")
@click.option("--classnames", type=click.Path(path_type=Path), help="Classes, one a line; by default the labels.")
@click.option("--templates", type=click.Path(path_type=Path), help="Prompts, one a line, {c} where the class goes.")
@click.option("--label-field", help="Column of the metadata with the right classes, to say how many were found.")
@click.option("--where", metavar="FILTER", help="Only rows whose metadata says so.")
@click.option("--clip", help="CLIP folder (or name); by default where the index says it was.")
@click.option(
    "--out", default="labels.parquet", show_default=True, type=click.Path(path_type=Path), help="File to write."
)
@click.option("--sheet", "sheets", type=click.Path(path_type=Path), help="Folder for a contact sheet of each class.")
@device_option
def classify(classes, index, embeddings, classnames, templates, out, device, **options: Any) -> None:
    """Label every picture of a set by the nearest of CLASSES, without training: a Parquet file of a row each.

    Columns: key, label, score (cosine), probability (among the classes), match (that it is right at all; calibrated
    CLIPs), runner_up, margin (score above the runner-up's).

    \b
    Example:  unclip classify fox cat dog --index index --out labels.parquet
              unclip classify --embeddings emb --classnames classes.txt --label-field label --sheet sheets
    """
    from clip_train import zeroshot
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from retrieval.classify import classify

    if index and embeddings:
        raise UserError(f"--index {index} and --embeddings {embeddings} contradict each other; give one")
    names = [*classes, *(zeroshot.read_lines(classnames, "classes") if classnames else [])]
    said = zeroshot.read_lines(templates, "templates") if templates else zeroshot.TEMPLATES
    made = classify(
        embeddings or index or Path("index"),
        out,
        names or None,
        templates=said,
        device=pick_device(device),
        on_progress=Bars("classify"),
        **options,
    )
    most = sorted(made["counts"].items(), key=lambda item: -item[1])[:20]
    print_table(("class", "pictures", "share"), [(name, n, f"{n / made['rows']:.1%}") for name, n in most])
    if "accuracy" in made:
        say(f"{made['accuracy']:.3f} of {made['labelled']} labelled pictures are right (chance {made['chance']:.3f})")
        say(f"{made['mean_per_class_recall']:.3f} as a mean of the classes; {made['without_class']} have no class")
    elif options["label_field"]:
        say(f"none of the pictures has a {options['label_field']!r} that is a class")
    if options["sheets"]:
        say(f"{options['sheets']}/: a sheet of each of {len(made['sheets'])} classes")
    say(f"{out}: {made['rows']} pictures, {made['classes']} classes")


@click.command(context_settings=CONTEXT)
@click.option(
    "--index", "indexes", multiple=True, metavar="[NAME=]FOLDER", help="An index to serve; repeatable. Default: index."
)
@click.option("--clip", help="CLIP folder (or name); by default where the index says it was.")
@click.option("--decoder", type=click.Path(path_type=Path), help="Decoder folder, to draw pictures of embeddings.")
@click.option("--prior", type=click.Path(path_type=Path), help="Prior folder, to draw pictures of prompts.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with the token that requests must bring.")
@click.option("--origin", "origins", multiple=True, help="Web pages of this origin may ask, too; '*': all.")
@click.option("--allow-image-urls", is_flag=True, help="Let /knn-service fetch pictures from public addresses.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any limit, e.g. queue=64; repeatable.")
@device_option
def serve(indexes, clip, decoder, prior, host, port, token_file, origins, allow_image_urls, settings, device) -> None:
    """Serve indexes and a generator over HTTP: a page, clip-retrieval's API, OpenAI's API.

    \b
    Example:  unclip serve --index index --prior prior --decoder decoder
              unclip serve --index photos=index1 --index drawings=index2 --host 0.0.0.0 --token-file token
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError, override
    from retrieval import server

    if prior and not decoder:
        raise UserError(f"--prior {prior} draws nothing without a decoder; name one with --decoder")
    folders = server.named(indexes or ("index",))
    token = server.read_token(token_file) if token_file else None
    config = server.ServeConfig(host=host, port=port, token=token, origins=origins, image_urls=allow_image_urls)
    (config,) = override([config], settings)
    if config.exposed:
        say(f"anybody who can reach {config.host} may use this server: guard it with --token-file")
    sock = server.listen(config)
    app = server.open_app(
        folders, clip=clip, decoder=decoder, prior=prior, device=str(pick_device(device)), config=config
    )
    say(f"serving {', '.join(folders)} at {server.address(sock)}")
    server.run(app, sock)
    say("stopped")


@click.command(context_settings=CONTEXT)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option("--threshold", type=float, help="Cosine from which on rows are duplicates.  [default: 0.98]")
@click.option(
    "--modality", default="image", show_default=True, type=click.Choice(["image", "text"]), help="Rows to compare."
)
@click.option("--keep", "prefer", metavar="COLUMN", help="Keep the row with the largest number there, e.g. width.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the groups to this .parquet or .csv file.")
@click.option("--drop", type=click.Path(path_type=Path), help="Write the keys that may go to this text file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write groups, the doubtful first, to this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print json, as when the output is piped.")
def dedup(folder: Path, threshold, modality, prefer, out, drop, sheet, as_json) -> None:
    """Find near-duplicates in the whole set, and which of them may go.

    Prints how many rows have a duplicate at which threshold. What counts as one depends on the CLIP: look at --sheet,
    whose first rows are the doubtful ones, and choose --threshold so that they are duplicates to you.

    \b
    Example:  unclip dedup --index index --sheet near.png
              unclip dedup --index index --threshold 0.99 --out groups.parquet --drop drop.txt
              unclip index delete --keys drop.txt
    """
    from retrieval.dedup import THRESHOLD, find_duplicates, refuse_suffix

    if out:
        refuse_suffix(out)
    threshold = THRESHOLD if threshold is None else threshold
    found = find_duplicates(folder, threshold=threshold, modality=modality, prefer=prefer, on_progress=Bars("dedup"))
    if out:
        found.save(out)
        say(f"{out}: {len(found.rows)} rows in {found.groups} groups")
    if sheet and found.groups:
        from clip_train.sheet import save_sheet

        save_sheet(found.sheet(), sheet)
        say(f"{sheet}: groups, the doubtful first")
    rows = [(f"{at:g}", count, f"{share:.1%}") for at, count, share in found.advice()]
    head = ("cosine", "rows with another that near", "share")
    write_figures(found.figures(), None, None if as_json else [(f"{folder}: {len(found.nearest)} rows", head, rows)])
    say(
        f"at {threshold:g}: {found.groups} groups, {len(found.dropped)} rows may go; "
        f"{found.chains} groups are chains, of which more than one row stays"
    )
    if found.found is not None:
        say(f"{found.found:.1%} of the near pairs that a sample of rows is in are in one group")
    if drop:
        found.save_keys(drop)
        say(f"next: unclip index delete --index {folder} --keys {drop}")


@click.command(context_settings=CONTEXT)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@out_option("clusters")
@click.option("--count", type=Whole(1), help="Clusters; by default as many as halves of the set agree on.")
@click.option(
    "--modality", default="image", show_default=True, type=click.Choice(["image", "text"]), help="Rows to cluster."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of everything random.")
@click.option("--sheets/--no-sheets", default=True, show_default=True, help="A contact sheet for each cluster.")
def cluster(folder: Path, out: Path, **options: Any) -> None:
    """Sort the whole set into clusters, with a contact sheet and typical words for each.

    \b
    Example:  unclip cluster --index index --out clusters --count 32
    """
    from retrieval import cluster as clusters

    made = clusters.cluster(folder, out, clusters.ClusterConfig(**options), Bars("cluster")).result
    if agreed := made.get("agreement"):
        say(f"two halves of the set agree best on {made['count']} clusters ({agreed[str(made['count'])]:.2f} of 1)")
    about = [(c["cluster"], c["rows"], c["cosine"], c["key"], " ".join(c["words"])) for c in made["clusters"]]
    print_table(("cluster", "rows", "cosine", "nearest", "words"), about)
    say(f"{out}/clusters.parquet: {made['rows']} rows; look at {out}/overview.png")
