"""The commands around CLIP: shard, data, train clip, wise-ft, embed, evaluate clip, export.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

import os
import shlex
from pathlib import Path
from typing import Any

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    Whole,
    device_option,
    numbers_in,
    out_option,
    print_table,
    say,
    shards_option,
    training_options,
    training_settings,
    warn,
    write_figures,
)


@click.command(context_settings=CONTEXT)
@click.argument("source", type=click.Path(path_type=Path))
@out_option("shards")
@click.option("--caption-column", "caption_columns", multiple=True, help="Column of captions; repeatable, in order.")
@click.option("--image-column", default="", help="Column of the pictures: paths, bytes or (with --fetch) addresses.")
@click.option("--resize", type=Whole(1), help="Scale down to this many pixels on the short side.")
@click.option("--min-size", type=Whole(1), help="Reject pictures whose short side has fewer pixels.")
@click.option("--drop-duplicates", is_flag=True, help="Reject pictures that came before, byte for byte.")
@click.option("--fetch", is_flag=True, help="Download pictures that are given as http(s) addresses.")
@click.option("--fetch-private", is_flag=True, help="With --fetch: from addresses in your own network, too.")
@click.option("--per-shard", default=1000, show_default=True, type=Whole(1), help="Rows per tar.")
@click.option("--prefix", default="", help="Put before keys and tar names, to use several sources together.")
@click.option("--threads", type=Whole(1), help="Read and decode so many at once; by default one per core.")
def shard(source: Path, out: Path, fetch: bool, fetch_private: bool, **options: Any) -> None:
    """Pack captioned pictures into tar shards.

    SOURCE is a folder of pictures with KEY.txt or KEY.json beside them (or in folders named after their class), a
    Hugging Face imagefolder (metadata.csv, .jsonl or .parquet), a folder of tars from img2dataset, or a .csv, .tsv,
    .jsonl or .parquet table with a picture and a caption column. What cannot be used is listed with its reason in
    OUT/rejected.csv.

    \b
    Example:  unclip shard pictures --out shards
    Columns:  unclip shard pictures.csv --out shards --caption-column title --caption-column description
    Web:      unclip shard laion.parquet --out shards --fetch --resize 256
    Again:    unclip shard img2dataset_output --out shards --min-size 200 --resize 256 --drop-duplicates
    """
    from clip_train.ingest import shard_source
    from clip_train.settings import UserError

    if fetch_private and not fetch:
        raise UserError("--fetch-private says where --fetch may go; give --fetch, too")
    if fetch:
        from clip_train.fetch import FetchConfig

        options["fetch_config"] = FetchConfig(allow_private=fetch_private)
    made = shard_source(source, out, **options, on_progress=Bars("shard")).result
    reasons = ", ".join(f"{n} {reason}" for reason, n in made["reasons"].items())
    say(
        f"{out}/: {made['samples']} samples in {made['shards']} shards, "
        f"{made['rejected']} rejected" + (f" ({reasons}; see {out}/rejected.csv)" if reasons else "")
    )
    say(f"next: unclip train clip --shards {out} --out clip")


@click.command("check", context_settings=CONTEXT)
@click.argument("shards")
@click.option("--batch-size", type=Whole(1), help="Samples per step that training is to use, all ranks.")
@click.option("--ranks", default=1, show_default=True, type=Whole(1), help="Processes that are to train.")
@click.option("--workers", default=0, show_default=True, type=Whole(0), help="Reading processes per rank.")
@click.option("--context-length", default=77, show_default=True, type=Whole(3), help="Tokens the model reads.")
@click.option("--distance", default=4, show_default=True, type=click.IntRange(0, 12), help="Bits between look-alikes.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the whole report to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write groups of look-alikes to this PNG.")
@click.option("--threads", type=Whole(1), help="Decode so many pictures at once; by default one per core.")
def data_check(shards: str, out: Path | None, sheet: Path | None, **options: Any) -> None:
    """Find what is wrong with SHARDS: damage, captions, pictures, duplicates; exit code 2 if training cannot work.

    SHARDS is a folder of tars, a tar, a glob or a {000..010} range; join several with '::'.

    \b
    Example:  unclip data check shards --batch-size 256 --out report.json --sheet near.png
    """
    from clip_train.check import check_shards, duplicate_sheet
    from clip_train.settings import UserError

    report = check_shards(shards, **options, on_progress=Bars("check"))
    findings = report.table() or [("note", "nothing to mend", 0, "", "")]
    print_table(("severity", "finding", "count", "examples", "what to do"), findings)
    click.echo()
    figures = [(room, name, _figure(v)) for room, some in report.statistics.items() for name, v in some.items()]
    print_table(("about", "what", "figures"), figures)
    if out:
        report.save(out)
        say(f"{out}: the whole report")
    if sheet and report.near:
        from clip_train.sheet import save_sheet

        save_sheet(duplicate_sheet(report), sheet)
        say(f"{sheet}: groups that look alike")
    elif sheet:
        say(f"{sheet} was not written: no pictures look alike")
    say(f"{shards}: {report.samples} samples with picture and caption in {len(report.shards)} tars")
    if report.errors:
        raise UserError(f"{shards}: training cannot work: " + "; ".join(f.what for f in report.errors))


@click.command("bench", context_settings=CONTEXT)
@shards_option("As for unclip train clip; URLs and pipe: commands too.")
@click.option("--clip", type=click.Path(path_type=Path), help="Folder of the model to time, in place of a preset.")
@click.option("--preset", default="tiny", show_default=True, help="tiny, small, vit-b-32 or vit-b-16.")
@click.option("--batch-size", type=Whole(2), help="Samples per step of one device; the preset's by default.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0), help="Time for the model's part.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@click.option("--json", "as_json", is_flag=True, help="Print json, as when the output is piped.")
@click.option("--allow-http", is_flag=True, help="Allow shards that are http:// or https:// URLs.")
@device_option
def data_bench(shards, clip, preset, batch_size, seconds, out, as_json, allow_http, device) -> None:
    """Time reading, decoding, tokenising and the model's step on your own shards, and say what to change.

    \b
    Example:  unclip data bench --shards shards --preset small
    """
    from clip_train import databench, presets, train
    from clip_train.model import Clip
    from clip_train.ranks import pick_device

    config, fit_config = presets.preset(preset)
    figures = databench.bench(
        shards,
        Clip.load(clip) if clip else train.build(config),
        batch_size=batch_size or min(fit_config.batch_size, 1024),
        seconds=seconds,
        device=pick_device(device),
        precision=fit_config.precision,
        augment=config.augment,
        cache_gb=config.cache_gb,
        allow_http=allow_http,
        on_progress=Bars("bench"),
    )
    rows = [(s["stage"], s["what"], f"{s['microseconds']:.0f}", f"{s['share']:.1%}") for s in figures["stages"]]
    head = ("stage", "", "us a sample", "share")
    write_figures(figures, out, None if as_json else [(f"{shards}: {figures['picture']}", head, rows)])
    loader, model = figures["loader_per_core_second"], figures["model_per_second"]
    say(f"one core loads {loader:.0f} samples a second; the model takes {model:.0f} on {figures['device']}")
    say(f"{figures['bottleneck']} takes {figures['bottleneck_share']:.0%}; {figures['advice']}")


def _figure(value: Any) -> str:
    """A figure of a report in one line."""
    if isinstance(value, dict):
        if "least" in value and value["least"] == value["most"]:
            return f"all {value['least']:g}"
        return ", ".join(f"{name}: {_figure(v)}" for name, v in value.items())
    if isinstance(value, list):
        return "; ".join(f"{times} x {text}" for text, times in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command("clip", context_settings=CONTEXT)
@click.option("--shards", multiple=True, required=True, help="Folder, tar, glob, {000..010} range or URL; repeatable.")
@click.option("--mix", help="Shares of several --shards in each batch, e.g. 3,1; without it they are one set.")
@out_option("clip")
@click.option("--preset", default="tiny", show_default=True, help="tiny, small, vit-b-32 or vit-b-16.")
@click.option("--init", help="Start from this clip/ folder or open_clip tag, e.g. ViT-B-32:laion2b_s34b_b79k.")
@click.option("--val", help="Shards kept from training, to measure retrieval and zero-shot on meanwhile.")
@click.option("--classnames", type=click.Path(path_type=Path), help="Classes of the zero-shot figures, one a line.")
@click.option("--templates", type=click.Path(path_type=Path), help="Prompts with {c} for the class, one a line.")
@click.option("--track", multiple=True, help="tensorboard, wandb or none; by default tensorboard where installed.")
@click.option("--allow-http", is_flag=True, help="Let --shards be http(s) addresses.")
@click.option("--dry-run", is_flag=True, help="Print the whole config, size, FLOPs, memory and time; train nothing.")
@training_options
def train_clip(
    shards, mix, out, preset, init, val, classnames, templates, track, allow_http, dry_run, device,
    **options: Any,
) -> None:  # fmt: skip
    """Train CLIP on tar shards; under torchrun, on all its processes.

    \b
    Example:  unclip train clip --shards shards --out clip --minutes 20
              unclip train clip --shards shards --init ViT-B-32:openai --set lora_rank=8 --out tuned
              unclip train clip --shards shards --preset vit-b-32 --dry-run
    """

    from clip_train import presets, train, zeroshot
    from clip_train.settings import UserError

    pairs = training_settings(**options)
    pairs += [f"init={init}"] if init else []
    config, fit_config = presets.preset(preset, pairs)
    weights = numbers_in(mix, "--mix")
    if not val and (classnames or templates or fit_config.validate_every):
        raise UserError("--classnames, --templates and validate_every are about --val, shards kept from training")
    if dry_run:
        from clip_train.estimate import render

        click.echo(
            render(train.dry_run(shards, config, fit_config, weights=weights, allow_http=allow_http, device=device))
        )
        return
    kept = None
    if val:
        from dataclasses import replace

        fit_config = replace(fit_config, validate_every=fit_config.validate_every or 200)
        names = zeroshot.read_lines(classnames, "class names") if classnames else None
        said = zeroshot.read_lines(templates, "templates") if templates else zeroshot.TEMPLATES
        kept = train.Kept(shards=val, classnames=names, templates=zeroshot.checked_templates(said))
    made = train.train_clip(
        shards,
        out,
        config,
        fit_config,
        weights=weights,
        kept=kept,
        track=track or ("auto",),
        allow_http=allow_http,
        device=device,
        on_progress=Bars("train clip"),
        on_warning=warn,
    )
    done = made.result
    if done["bad_pictures"]:
        named = "; ".join(f"{key}: {why}" for key, why in done["bad_first"])
        say(f"{done['bad_pictures']} pictures could not be read and were left out ({named})")
    for name, value in done["validation"].items():
        say(f"{name.removeprefix('val_')} {value:.3f}")
    say(f"{out}/: loss {done['loss']:.3f} after {done['steps']} steps (chance {done['chance']:.2f})")
    if done["pairs"] is not None:  # streamed shards are not embedded
        say(f"next: unclip embed --shards {shlex.quote('::'.join(shards))} --clip {out} --out emb")


@click.command("wise-ft", context_settings=CONTEXT)
@click.argument("base")
@click.argument("tuned")
@shards_option("Shards of the new data, kept from the fine-tuning.")
@click.option("--keep-shards", help="Shards whose scores are not to be lost.")
@click.option(
    "--keep-loss", default=0.01, show_default=True, type=float, help="The most of the base's kept score to lose."
)
@click.option("--classnames", type=click.Path(path_type=Path), help="Classes of --shards, one a line.")
@click.option("--keep-classnames", type=click.Path(path_type=Path), help="Classes of --keep-shards, one a line.")
@click.option("--templates", type=click.Path(path_type=Path), help="Prompts with {c} for the class, one a line.")
@click.option("--label-field", default="label", show_default=True, help="Json field of the labels; cls: KEY.cls.")
@click.option("--alphas", help="Mixes to measure, besides 0 and 1.  [default: 0.1,0.2,...,0.9]")
@click.option("--alpha", default="best", show_default=True, help="The mix to write: best, or a number such as 0.5.")
@click.option("--metric", default="", help="What best goes by.  [default: zero_shot_acc1 with classes, else t2i_R@1]")
@out_option("mixed")
@device_option
def wise_ft(
    base, tuned, shards, out, alphas, alpha, classnames, keep_classnames, templates, device, **options: Any
) -> None:
    """Mix a CLIP with its fine-tuned self: a table of scores along the mix, and the best as a clip/ folder.

    BASE and TUNED are clip/ folders or open_clip tags of one architecture. The table and a plot are in OUT as well.

    \b
    Example:  unclip wise-ft ViT-B-32:openai tuned --shards new-val --keep-shards old-val --out mixed
    """
    from clip_train import wise_ft, zeroshot
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError

    try:
        chosen = None if alpha == "best" else float(alpha)
    except ValueError as error:
        raise UserError(f"--alpha {alpha}: best, or a number from 0 to 1") from error
    made = wise_ft.wise_ft(
        base,
        tuned,
        shards,
        out,
        alphas=numbers_in(alphas, "--alphas") if alphas else wise_ft.ALPHAS,
        alpha=chosen,
        classnames=zeroshot.read_lines(classnames, "classes") if classnames else None,
        keep_classnames=zeroshot.read_lines(keep_classnames, "classes") if keep_classnames else None,
        templates=zeroshot.checked_templates(zeroshot.read_lines(templates, "templates"))
        if templates
        else zeroshot.TEMPLATES,
        device=pick_device(device),
        on_progress=Bars("wise-ft"),
        **options,
    )
    print_table(*wise_ft.rows_of(made.result))
    how = f"best by {made.result['metric']}" if alpha == "best" else "as asked"
    say(f"{out}/: alpha {made.result['alpha']:g}, {how}; plot: {out / wise_ft.PLOT}")
    say(f"next: unclip evaluate clip --shards {shards} --clip {out}")


@click.command(context_settings=CONTEXT)
@shards_option("Folder of tars, a tar, a glob or a {000..010} range.")
@click.option("--clip", required=True, help="CLIP folder, or open_clip's MODEL:TAG, as ViT-B-32:laion2b_s34b_b79k.")
@out_option("emb")
@click.option("--batch-size", default=256, show_default=True, type=Whole(1), help="Pictures at a time.")
@click.option("--workers", default=1, show_default=True, type=Whole(1), help="Processes; of Ray, actors.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "local", "ranks", "ray"]),
    help="ranks: this rank's share of the shards (torchrun, SLURM array). auto: ranks if there are any, else local.",
)
@click.option("--precision", default="auto", show_default=True, help="fp32, bf16, fp16; auto: bf16 if the rows allow.")
@click.option("--compile", is_flag=True, help="Translate the image tower by torch.compile first (about a minute).")
@device_option
def embed(shards: str, clip: str, out: Path, engine: str, device: str, **options: Any) -> None:
    """Embed every picture and caption of the shards, one part per shard; finished parts are not made again.

    \b
    Example:  unclip embed --shards shards --clip clip --out emb
    On a GPU: unclip embed --shards 'S/{00000..00999}.tar' --clip ViT-B-32:laion2b_s34b_b79k --workers 8
    Many:     torchrun --nproc-per-node 8 --no-python unclip embed --shards shards --clip clip
    """
    from clip_train.embed import embed
    from clip_train.engines import Share
    from clip_train.memory import keep_freed_memory

    share = Share.of(os.environ if engine in ("auto", "ranks") else {})
    bars = Bars("embed")
    engine = engine if engine != "auto" else "ranks" if share.ranks > 1 else "local"
    told = []

    def on_progress(done: int, total: int, resumed: int, **numbers: Any) -> None:
        if resumed and not told:
            told.append(say(f"{out}/: {resumed} shards ({done} of {total} samples) are embedded already; going on"))
        bars(done, total, **numbers)

    keep_freed_memory()
    if options["workers"] > 1:
        say(f"starting {options['workers']} processes, each of which loads the CLIP")
    made = embed(shards, clip, out, engine=engine, device=device, on_progress=on_progress, **options)
    if made is None:
        say(f"rank {share.rank} of {share.ranks}: its shards are embedded; the last rank to finish completes {out}/")
        return
    made = made.result
    say(f"{out}/: {made['rows']} rows of width {made['dim']}; {made['bad']} bad pictures, {made['skipped']} skipped")
    if made["bad"] or made["skipped"]:
        say(f"their keys, and why: {out / 'bad.csv'}")
    say(f"next: unclip index --embeddings {out} --out index   and   unclip train prior --embeddings {out} --out prior")
    say(f"or, into an index that is there: unclip index add --index index --embeddings {out}")


@click.command("clip", context_settings=CONTEXT)
@shards_option("Shards kept from training.", required=False)
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder.")
@click.option("--label-field", default="label", show_default=True, help="Json field of the labels; cls: KEY.cls.")
@click.option(
    "--captions", default="first", show_default=True, help="Queries: first, all, lines (of KEY.txt), or none."
)
@click.option("--pairs-only", is_flag=True, help="Only a picture's own captions are right, whatever the labels.")
@click.option("--classnames", type=click.Path(path_type=Path), help="Classes, one a line; by default the labels.")
@click.option("--templates", type=click.Path(path_type=Path), help="Prompts, one a line, {c} where the class goes.")
@click.option("--probe", metavar="SHARDS", help="Train a linear classifier of the labels on these shards as well.")
@click.option("--calibrate", is_flag=True, help="Fit cosine -> probability of a match, kept in the CLIP folder.")
@click.option(
    "--match-rate",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of pairs that match, for --calibrate.",
)
@click.option("--arithmetic", multiple=True, metavar="'A - B + C'", help="Rank words by a sum instead; repeatable.")
@click.option("--words", type=click.Path(path_type=Path), help="Words for --arithmetic; by default of the captions.")
@click.option("--batch-size", default=256, show_default=True, type=Whole(1), help="Pictures at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print json, as when the output is piped.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@device_option
def evaluate_clip(clip, shards, classnames, templates, arithmetic, words, as_json, out, device, **options) -> None:
    """Retrieval with many right answers: recall@1, 5, 10 both ways beside chance; zero-shot classes; and more.

    A table in a terminal, json in a pipe. Pictures of one label are right answers for each other. --calibrate lets
    `unclip search` print probabilities.

    \b
    Example:  unclip evaluate clip --shards 'shards/val-*.tar' --clip clip --calibrate
              unclip evaluate clip --shards val --clip clip --classnames classes.txt --templates templates.txt
              unclip evaluate clip --shards shards --clip clip --arithmetic "person with hat - person"
    """
    from clip_train import evaluate, zeroshot
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError

    device, size = pick_device(device), options["batch_size"]
    if arithmetic:
        words = zeroshot.read_lines(words, "words") if words else None
        answers = evaluate.arithmetic_answers(
            arithmetic, clip, words=words, shards=shards, batch_size=size, device=device
        )
        write_figures({"arithmetic": answers}, out, None if as_json else evaluate.arithmetic_tables(answers))
        if out:
            from clip_train.arithmetic import plot

            plot(out.with_suffix(".png"), answers)
            say(f"wrote {out} and {out.with_suffix('.png')}")
        return
    if not shards:
        raise UserError("give the shards to evaluate on: --shards 'shards/val-*.tar'")
    if words:
        raise UserError("--words belongs to --arithmetic; leave it out")
    classnames = zeroshot.read_lines(classnames, "classes") if classnames else None
    templates = zeroshot.read_lines(templates, "templates") if templates else zeroshot.TEMPLATES
    figures = evaluate.evaluate_clip(
        shards,
        clip,
        **options,
        classnames=classnames,
        templates=zeroshot.checked_templates(templates),
        device=device,
        on_progress=Bars("evaluate"),
    )
    write_figures(figures, out, None if as_json else evaluate.tables(figures))


@click.command("hf", context_settings=CONTEXT)
@click.argument("clip", type=click.Path(path_type=Path))
@out_option("clip-hf")
def export_hf(clip: Path, out: Path) -> None:
    """A transformers folder: CLIPModel, CLIPProcessor and CLIPTokenizer load it with from_pretrained.

    For CLIPs whose towers are open_clip's own transformers (presets vit-b-32, vit-b-16); others are refused.

    \b
    Example:  unclip export hf clip --out clip-hf
    """
    from clip_train.export import export_hf

    made = export_hf(clip, out).result
    say(f"{out}/: transformers' CLIPModel, tokenizer and preprocessor; captions are cut at {made['context']} tokens")
    if made["logit_bias_left_out"] is not None:
        say(f"CLIPModel has no place for the logit bias {made['logit_bias_left_out']:.2f}; embeddings do not need it")


@click.command("onnx", context_settings=CONTEXT)
@click.argument("clip", type=click.Path(path_type=Path))
@out_option("clip-onnx")
def export_onnx(clip: Path, out: Path) -> None:
    """Both towers as ONNX models, for any batch size, checked against torch; needs pip install 'unclip[onnx]'.

    Pictures go in as uint8 RGB, resized and cropped but not normalised. OUT/README.md has an example.

    \b
    Example:  unclip export onnx clip --out clip-onnx
    """
    from clip_train.export import export_onnx

    made = export_onnx(clip, out).result
    say(f"{out}/: image.onnx (cosine to torch {made['image_cosine']:.7f}), text.onnx ({made['text_cosine']:.7f})")
