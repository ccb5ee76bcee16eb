"""The commands around the index: index, search.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from clip_train.console import CONTEXT, Bars, device_option, out_option, print_table, say


@click.command(context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@out_option("index")
@click.option("--recall", default=0.95, show_default=True, type=click.FloatRange(0, 1), help="Recall@10 to reach.")
@click.option("--memory", help="The most the index may take, e.g. 500MB.")
@click.option("--kind", default="auto", show_default=True, help="auto, flat (exact), ivf or hnsw.")
def index(embeddings: Path, out: Path, **options: Any) -> None:
    """Build a FAISS index and measure its recall against exact search.

    \b
    Example:  unclip index --embeddings emb --out index --recall 0.95
    """
    from retrieval.index import build_index

    made = build_index(embeddings, out, **options, on_progress=Bars("index")).result
    for modality in ("image", "text"):
        chosen = made[modality]
        measured = f"recall@10 {chosen['recall']:.3f}, {chosen['queries_per_second']:.0f} queries/s"
        say(f"{out}/{modality}.index: {chosen['kind']}, {measured}")
    say(f'next: unclip search "a red fox" --index {out}')


@click.command(context_settings=CONTEXT)
@click.argument("queries", nargs=-1)
@click.option("--index", "folder", default="index", show_default=True, type=click.Path(path_type=Path), help="Index.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the index says it was.")
@click.option("--image", multiple=True, type=click.Path(path_type=Path), help="A picture as a query; repeatable.")
@click.option("--vector", type=click.Path(path_type=Path), help="A .npy of (Q, D) vectors as queries.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Hits per query.")
@click.option(
    "--modality", default="image", show_default=True, type=click.Choice(["image", "text"]), help="Rows to rank."
)
@click.option("--json", "as_json", is_flag=True, help="Print the hits as json.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet of the hits to this PNG.")
@device_option
def search(queries, folder, clip, image, vector, k, modality, as_json, sheet, device) -> None:
    """Find the nearest pictures for captions, pictures or vectors.

    \b
    Example:  unclip search "a red fox" "two hearts" --index index --sheet hits.png
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from clip_train.store import read_vectors
    from retrieval.search import Searcher

    if not (queries or image or vector):
        raise UserError('nothing to search for; give a caption, --image or --vector: unclip search "a red fox"')
    searcher = Searcher.open(folder, clip, pick_device(device))
    names, hits = [], []
    if queries:
        names += queries
        hits += searcher.text(list(queries), k, modality)
    if image:
        names += [str(path) for path in image]
        hits += searcher.picture(list(image), k, modality)
    if vector:
        rows = read_vectors(vector)
        names += [f"{vector}[{i}]" for i in range(len(rows))]
        hits += searcher.vectors(rows, k, modality)
    if sheet:
        from clip_train.sheet import query_sheet, save_sheet

        pictures = [[searcher.picture_of(hit.row) for hit in row] for row in hits]
        save_sheet(query_sheet(names, pictures, [[hit.caption for hit in row] for row in hits]), sheet)
        say(f"wrote {sheet}")
    if as_json:
        found = [{"query": n, "hits": [vars(hit) for hit in row]} for n, row in zip(names, hits, strict=True)]
        click.echo(json.dumps(found, indent=1, ensure_ascii=False, default=str))
    else:
        for name, row in zip(names, hits, strict=True):
            if len(names) > 1:
                click.echo(click.style(name, bold=True))
            sure = [f"{h.probability:.2f}" for h in row if h.probability is not None]  # all of a row have one, or none
            head = ("rank", "score", *(["match"] if sure else []), "key", "caption")
            cells = [(h.rank, f"{h.score:.3f}", *sure[i : i + 1], h.key, h.caption) for i, h in enumerate(row)]
            print_table(head, cells)
