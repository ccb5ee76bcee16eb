"""The command line: parse, call one function, say what to do next. Results go to stdout, talk to stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def main() -> None:
    """Entry point of `unclip`: a UserError is one line and exit code 2, an interrupted training exits 128 + signal."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        try:
            sys.exit(run())
        except KeyboardInterrupt:  # a second Ctrl-C, while the first one was being answered
            sys.exit(130)
    from clip_train.ranks import leave

    try:
        code = run()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    leave(code)


def run() -> int:
    """The command that the arguments name; returns the exit code."""
    from clip_train.settings import Interrupted, UserError

    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        say("unclip: stopped; run the same command again to go on")
        return 130
    except click.ClickException as error:
        if is_main():
            error.show()
        return error.exit_code
    except Interrupted as stop:
        say(f"unclip: {stop}")
        return 128 + stop.number
    except UserError as error:
        complain(error, " ".join(str(error).split()))
        return 2
    except OSError as error:  # a full disk, a folder that went away: not bugs, and they have a line of their own
        where = f"{error.filename}: " if error.filename else ""
        complain(error, f"{where}{error.strerror or error}")
        return 2


def complain(error: Exception, text: str) -> None:
    """Say what went wrong, on whichever rank it did; what the main rank says itself is not said again."""
    if is_main():
        say(f"unclip: {text}")
    elif type(error).__name__ != "ToldByMain":
        click.echo(f"unclip: rank {os.environ['RANK']}: {text}", err=True)


def is_main() -> bool:
    """Whether this is the process that talks; torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Talk to the person, not to the pipe; on a line of its own, below a bar that was still moving."""
    if Bars.moving is not None:
        Bars.moving.close()
    if is_main():
        click.echo(text, err=True)


class Bars:
    """Progress bars on stderr, one per `task`, with rate and remaining time; plain lines now and then in a log file."""

    moving: "Bars | None" = None  # the one on the screen

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = None
        self.shown = ("", 0)

    def __call__(self, done: int, total: int, **numbers: Any) -> None:
        """on_progress of the library's long calls; text among the numbers (which part of the work) names the bar."""
        from tqdm import tqdm

        if not is_main():
            return
        words = [value for value in numbers.values() if isinstance(value, str)]
        title = " ".join([self.title, *words])
        if self.bar is not None and self.shown != (title, total):
            self.close()
        if self.bar is None:
            quiet = 0.1 if sys.stderr.isatty() else 15.0
            self.bar = tqdm(total=total, desc=title, initial=done, mininterval=quiet, dynamic_ncols=True)
            self.shown, Bars.moving = (title, total), self
        figures = {name: value for name, value in numbers.items() if not isinstance(value, str)}
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar, Bars.moving = None, None


def device_option(command: Callable) -> Callable:
    """--device"""
    text = "cpu, cuda, cuda:1, mps, or auto: the best there is."
    return click.option("--device", default="auto", show_default=True, help=text)(command)


def out_option(default: str) -> Callable:
    """--out"""
    text = "Folder to write; an unfinished one is resumed."
    return click.option("--out", default=default, show_default=True, type=click.Path(path_type=Path), help=text)


def training_options(command: Callable) -> Callable:
    """What the three trainers share."""
    for option in (
        click.option("--steps", type=click.IntRange(1), help="Optimizer steps."),
        click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train for about this long instead."),
        click.option("--batch-size", type=click.IntRange(1), help="Samples per step, all ranks together."),
        click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate."),
        click.option("--seed", type=click.IntRange(0), help="Seed of everything random."),
        click.option("--caption-mix", help="Weights of a sample's 1st, 2nd, ... caption, e.g. 0.3,0.7."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; repeatable."),
        device_option,
    ):
        command = option(command)
    return command


def training_settings(steps, minutes, batch_size, lr, seed, caption_mix, settings) -> list[str]:
    """The named training options as --set pairs."""
    from clip_train.settings import UserError

    if steps and minutes:
        raise UserError(f"--steps {steps} and --minutes {minutes} contradict each other; give one")
    pairs = []
    if steps:
        pairs += [f"steps={steps}", "minutes=0"]
    if minutes:
        pairs += [f"minutes={minutes}", "steps=0"]
    if caption_mix:
        pairs.append(f"caption_mix={json.dumps(numbers_in(caption_mix, '--caption-mix'))}")
    named = {"batch_size": batch_size, "lr": lr, "seed": seed}
    return pairs + [f"{k}={v}" for k, v in named.items() if v is not None] + list(settings)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="unclip")
def cli() -> None:
    """Train CLIP on your own captioned pictures, search them, and generate new ones from the same space.

    \b
    See the whole loop run on real pictures:  unclip quickstart
    On your own:  shard -> train clip -> embed -> index -> search
                  -> train prior -> train decoder -> generate
    """


@cli.command(context_settings=CONTEXT)
@click.argument("source", type=click.Path(path_type=Path))
@out_option("shards")
@click.option("--caption-column", "caption_columns", multiple=True, help="Column of captions; repeatable, in order.")
@click.option("--image-column", default="", help="Column of the pictures: paths, bytes or (with --fetch) addresses.")
@click.option("--resize", type=click.IntRange(1), help="Scale down to this many pixels on the short side.")
@click.option("--min-size", type=click.IntRange(1), help="Reject pictures whose short side has fewer pixels.")
@click.option("--drop-duplicates", is_flag=True, help="Reject pictures that came before, byte for byte.")
@click.option("--fetch", is_flag=True, help="Download pictures that are given as http(s) addresses.")
@click.option("--fetch-private", is_flag=True, help="With --fetch: from addresses in your own network, too.")
@click.option("--per-shard", default=1000, show_default=True, type=click.IntRange(1), help="Rows per tar.")
@click.option("--prefix", default="", help="Put before keys and tar names, to use several sources together.")
@click.option("--threads", type=click.IntRange(1), help="Read and decode so many at once; by default one per core.")
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


@cli.group(context_settings=CONTEXT)
def data() -> None:
    """Look at shards before training on them."""


@data.command("check", context_settings=CONTEXT)
@click.argument("shards")
@click.option("--batch-size", type=click.IntRange(1), help="Samples per step that training is to use, all ranks.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Processes that are to train.")
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Reading processes per rank.")
@click.option("--context-length", default=77, show_default=True, type=click.IntRange(3), help="Tokens the model reads.")
@click.option("--distance", default=4, show_default=True, type=click.IntRange(0, 12), help="Bits between look-alikes.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the whole report to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write groups of look-alikes to this PNG.")
@click.option("--threads", type=click.IntRange(1), help="Decode so many pictures at once; by default one per core.")
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


@data.command("bench", context_settings=CONTEXT)
@click.option("--shards", required=True, help="As for unclip train clip; URLs and pipe: commands too.")
@click.option("--clip", type=click.Path(path_type=Path), help="Folder of the model to time, in place of a preset.")
@click.option("--preset", default="tiny", show_default=True, help="tiny, small, vit-b-32 or vit-b-16.")
@click.option("--batch-size", type=click.IntRange(2), help="Samples per step of one device; the preset's by default.")
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
    from clip_train import databench, train
    from clip_train.model import Clip
    from clip_train.ranks import pick_device

    config, fit_config = train.preset(preset)
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


@cli.group(context_settings=CONTEXT)
def train() -> None:
    """Train CLIP, the prior, or the decoder."""


@train.command("clip", context_settings=CONTEXT)
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

    from clip_train import train, zeroshot
    from clip_train.settings import UserError

    pairs = training_settings(**options)
    pairs += [f"init={init}"] if init else []
    config, fit_config = train.preset(preset, pairs)
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
        on_warning=lambda line: say(f"warning: {line}"),
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


def numbers_in(text: str | None, option: str) -> list[float]:
    """ "3,1" as [3.0, 1.0]."""
    from clip_train.settings import UserError

    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UserError(f"{option} {text}: expected numbers with commas between, e.g. 3,1") from error


@cli.command("wise-ft", context_settings=CONTEXT)
@click.argument("base")
@click.argument("tuned")
@click.option("--shards", required=True, help="Shards of the new data, kept from the fine-tuning.")
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


@train.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Folder made by unclip embed.")
@out_option("prior")
@click.option("--preset", default="tiny", show_default=True, help="tiny (CPU, a minute) or small (one GPU).")
@training_options
def train_prior(embeddings: Path, out: Path, preset: str, device: str, **options: Any) -> None:
    """Train the diffusion prior: text embedding -> image embedding.

    \b
    Example:  unclip train prior --embeddings emb --out prior
    """
    from clip_train.ranks import start
    from diffusion import train

    config, fit_config = train.settings(train.PRIOR_PRESETS, preset, training_settings(**options))
    bars = Bars("train prior")
    made = train.train_prior(
        embeddings, out, config=config, fit_config=fit_config, device=start(device), on_progress=bars
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f"next: unclip train decoder --shards shards --clip {made.input_path('clip') or 'clip'} --out decoder")


@train.command("decoder", context_settings=CONTEXT)
@click.option("--shards", required=True, help="Folder of tars, a tar, a glob or a {000..010} range; join with '::'.")
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder that makes the embeddings.")
@out_option("decoder")
@click.option("--preset", default="tiny", show_default=True, help="tiny (32 px, CPU) or small (64 px, one GPU).")
@training_options
def train_decoder(shards: str, clip: Path, out: Path, preset: str, device: str, **options: Any) -> None:
    """Train the decoder: image embedding -> picture.

    \b
    Example:  unclip train decoder --shards shards --clip clip --out decoder --minutes 30
    """
    from clip_train.ranks import start
    from diffusion import train

    config, fit_config = train.settings(train.DECODER_PRESETS, preset, training_settings(**options))
    bars = Bars("train decoder")
    made = train.train_decoder(
        shards, clip, out, config=config, fit_config=fit_config, device=start(device), on_progress=bars
    )
    say(f"{out}/: loss {made.result['loss']:.3f} after {made.result['steps']} steps")
    say(f'next: unclip generate "a red fox" --prior prior --decoder {out} --out fox.png')


@cli.command(context_settings=CONTEXT)
@click.option("--shards", required=True, help="Folder of tars, a tar, a glob or a {000..010} range; join with '::'.")
@click.option("--clip", required=True, type=click.Path(path_type=Path), help="CLIP folder.")
@out_option("emb")
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
@device_option
def embed(shards: str, clip: Path, out: Path, batch_size: int, device: str) -> None:
    """Embed every picture and caption of the shards, one part per shard; finished parts are not made again.

    \b
    Example:  unclip embed --shards shards --clip clip --out emb
    """
    from clip_train.embed import embed
    from clip_train.ranks import pick_device

    bars = Bars("embed")
    made = embed(shards, clip, out, batch_size=batch_size, device=pick_device(device), on_progress=bars).result
    say(f"{out}/: {made['rows']} rows of width {made['dim']}; {made['bad']} bad pictures, {made['skipped']} skipped")
    say(f"next: unclip index --embeddings {out} --out index   and   unclip train prior --embeddings {out} --out prior")


@cli.command(context_settings=CONTEXT)
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


@cli.command(context_settings=CONTEXT)
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


def print_table(head: tuple[str, ...], rows: list[tuple]) -> None:
    """Columns as wide as they need to be; the last one is cut at the edge of the terminal."""
    import shutil

    lines = [tuple(" ".join(str(cell).split()) for cell in row) for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    edge = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()[:edge])


@cli.command(context_settings=CONTEXT)
@click.argument("captions", nargs=-1)
@click.option("--file", "caption_file", type=click.Path(path_type=Path), help="Text file with a caption on each line.")
@click.option("--embedding", type=click.Path(path_type=Path), help="A .npy of (N, 512) image embeddings.")
@click.option("--again", type=click.Path(path_type=Path), help="Make this picture again, from its own record.")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder.")
@click.option("--prior", type=click.Path(path_type=Path), help="Prior folder; needed for captions.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@click.option(
    "--out", default="generated", show_default=True, type=click.Path(path_type=Path), help="PNG, or a folder."
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet to this PNG as well.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="Pictures per caption.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first picture.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps of the decoder.")
@click.option("--sampler", help="heun, ddim, ddpm or euler.")
@click.option("--guidance", type=click.FloatRange(0), help="1 follows the embedding as trained, more overshoots.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting; repeatable.")
@device_option
def generate(
    captions, caption_file, embedding, again, decoder, prior, clip, out, sheet, count, seed, batch_size, settings,
    device, **named: Any,
) -> None:  # fmt: skip
    """Make pictures from captions or from image embeddings; each PNG holds the record it can be made again from.

    \b
    Example:  unclip generate "a red fox" "two hearts" --prior prior --decoder decoder --out pictures
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError, override
    from diffusion.generate import Generator, Sampling, read_captions, read_provenance, save_png

    if sum(map(bool, (captions or caption_file, embedding, again))) != 1:
        raise UserError("give captions (or --file), or --embedding, or --again: one of the three")
    texts = [*captions, *(read_captions(caption_file) if caption_file else [])]
    if texts and not prior:
        raise UserError("captions need a prior; pass --prior prior (made by unclip train prior)")
    asked = count != 1 or seed != 0 or settings or any(value is not None for value in named.values())
    if again and asked:
        raise UserError("--again makes the picture as its record says; leave the other options of how to draw it out")
    if out.suffix.lower() == ".png" and (embedding or len(texts) * count > 1):
        raise UserError(f"{out} is the name of one picture; give a folder for several")
    (how,) = override([Sampling()], [f"{k}={v}" for k, v in named.items() if v is not None] + list(settings))
    record = read_provenance(again) if again else None
    generator = Generator.open(decoder, prior, clip, device=pick_device(device))
    bars = Bars("generate")
    if record:
        made = [generator.regenerate(record)]
    elif embedding:
        from clip_train.store import read_vectors

        rows = read_vectors(embedding).repeat(count, 0)
        seeds = range(seed, seed + len(rows))
        made = generator.from_embeddings(rows, seeds, how, batch_size=batch_size, on_progress=bars)
    else:
        texts = [text for text in texts for _ in range(count)]
        seeds = range(seed, seed + len(texts))
        made = generator.from_captions(texts, seeds, how, batch_size=batch_size, on_progress=bars)
    paths = [out] if out.suffix.lower() == ".png" else [out / f"{i:05d}.png" for i in range(len(made))]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for one, path in zip(made, paths, strict=True):
        save_png(one.picture, path, one.provenance)
        click.echo(path)
    if sheet:
        from clip_train.sheet import contact_sheet, save_sheet

        labels = [one.provenance.get("caption", f"seed {one.provenance['seed']}") for one in made]
        save_sheet(contact_sheet([one.picture for one in made], labels), sheet)
        say(f"wrote {sheet}")


@cli.group(context_settings=CONTEXT)
def evaluate() -> None:
    """Put a number on CLIP, the prior, or the whole loop."""


@evaluate.command("clip", context_settings=CONTEXT)
@click.option("--shards", help="Shards kept from training.")
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
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
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


@evaluate.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Embeddings kept from training.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@device_option
def evaluate_prior(embeddings: Path, prior: Path, out: Path | None, device: str) -> None:
    """The prior beside what it must beat: cosine to the true image embedding, and the true picture's rank.

    \b
    Example:  unclip evaluate prior --embeddings emb-val --prior prior
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_prior_folder

    write_figures(evaluate_prior_folder(embeddings, prior, device=pick_device(device)), out)


@evaluate.command("loop", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Rows to generate from and to rank.")
@click.option("--prior", required=True, type=click.Path(path_type=Path), help="Prior folder.")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="Decoder folder.")
@click.option("--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(1), help="Captions tried.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which captions.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures of all three ways to this PNG.")
@device_option
def evaluate_loop(embeddings, prior, decoder, clip, count, seed, out, sheet, device) -> None:
    """The round trip: generate, embed the picture, rank the true one; from true, prior and text embeddings.

    \b
    Example:  unclip evaluate loop --embeddings emb --prior prior --decoder decoder
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_loop_folders

    figures, drawn = evaluate_loop_folders(
        embeddings, prior, decoder, clip, count=count, seed=seed, device=pick_device(device), on_progress=Bars("loop")
    )
    if sheet:
        from clip_train.sheet import save_sheet

        save_sheet(drawn, sheet)
        say(f"wrote {sheet}")
    write_figures(figures, out)


@cli.group(context_settings=CONTEXT)
def export() -> None:
    """Write a CLIP in the formats of other tools.

    open_clip needs no export: it reads the folder itself, as "local-dir:clip".
    """


@export.command("hf", context_settings=CONTEXT)
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


@export.command("onnx", context_settings=CONTEXT)
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


def write_figures(figures: dict[str, Any], out: Path | None, tables: list[tuple] | None = None) -> None:
    """Figures in a json file if one is named, and on stdout: as tables in a terminal if there are any, else as json."""
    text = json.dumps(figures, indent=1)
    if out:
        from clip_train.folder import write_file

        write_file(out, text.encode())
    if tables is None or not sys.stdout.isatty():
        click.echo(text)
        return
    for n, (title, head, rows) in enumerate(tables):
        if n:
            click.echo()
        if title:
            click.echo(click.style(title, bold=True))
        print_table(head, rows)


@cli.command(context_settings=CONTEXT)
@out_option("quickstart")
@click.option("--minutes", default=8.5, show_default=True, type=click.FloatRange(0.1), help="Time for all stages.")
@click.option("--size", default=32, show_default=True, type=click.Choice([32, 64]), help="Side of generated pictures.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of everything random.")
@device_option
def quickstart(out: Path, minutes: float, size: int, seed: int, device: str) -> None:
    """The whole loop on real pictures: shard, train CLIP, embed, index, search, train prior and decoder, generate.

    The pictures are the Twemoji drawings (CC-BY-4.0) with their Unicode names, from pip install 'unclip[demo]'.
    Writes OUT/report.html to look at and OUT/report.json to read; a second run resumes, or finds everything done.

    \b
    Example:  unclip quickstart --minutes 5
    """
    from diffusion.quickstart import run_quickstart

    report = run_quickstart(out, minutes=minutes, image_size=size, seed=seed, device=device, bars=Bars, say=say)
    say(f"look at: {report}")


if __name__ == "__main__":
    main()
