"""The commands that measure: evaluate prior, decoder, generation, loop, ablation, sweep, copies.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    Whole,
    device_option,
    numbers_in,
    say,
    shards_option,
    write_figures,
)

FOLDER = click.Path(path_type=Path)


def examining_options(command: Callable) -> Callable:
    """What the commands that draw held-out pictures share."""
    for option in (
        click.option("--decoder", required=True, type=FOLDER, help="Decoder folder."),
        click.option("--embeddings", type=FOLDER, help="Embeddings of pictures kept from training."),
        shards_option("Their tars; default: those that the embeddings were made from.", required=False),
        click.option("--clip", type=FOLDER, help="CLIP folder; by default where the decoder says it was."),
        click.option("--features", "features", multiple=True, default=("clip",), show_default=True,
                     help="clip (the decoder's), clip:FOLDER, open_clip:MODEL:TAG, efficientnet-lite0 or inception; "
                          "repeatable."),
        click.option("--count", default=500, show_default=True, type=Whole(20), help="Pictures drawn."),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which, and noise."),
        click.option("--batch-size", default=64, show_default=True, type=Whole(1), help="Pictures at a time."),
        device_option,
    ):  # fmt: skip
        command = option(command)
    return command


def drawing_options(command: Callable) -> Callable:
    """How to draw, where there is one way to; and where the answers go."""
    for option in (
        click.option("--steps", type=Whole(1), help="Sampling steps of the decoder."),
        click.option("--sampler", help="One of diffusion.samplers.SAMPLERS, such as heun, ddim or dpmpp_2m."),
        click.option("--guidance", type=click.FloatRange(0), help="1 follows the embedding as trained."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting."),
        click.option("--pictures", "keep", type=FOLDER, help="Keep the pictures here; a killed run goes on from them."),
        click.option("--sheet", type=FOLDER, help="Write real and drawn pictures, side by side, to this PNG."),
        click.option("--out", type=FOLDER, help="Write the figures to this json file."),
    ):
        command = option(command)
    return command


@click.command("prior", context_settings=CONTEXT)
@click.option("--embeddings", required=True, type=click.Path(path_type=Path), help="Embeddings kept from training.")
@click.option(
    "--prior", "priors", required=True, multiple=True, type=click.Path(path_type=Path), help="Prior folder; repeatable."
)
@click.option("--train", type=click.Path(path_type=Path), help="Fit baselines to these; default: the prior's own.")
@click.option("--steps", default=16, show_default=True, type=Whole(1), help="Sampling steps.")
@click.option("--guidance", default=1.0, show_default=True, type=click.FloatRange(0), help="Guidance of the prior.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@device_option
def evaluate_prior(embeddings, priors, train, steps, guidance, out, device) -> None:
    """Priors beside what they must beat: nearness to the true image embedding, the true picture's rank, the gap.

    \b
    Example:  unclip evaluate prior --embeddings emb-val --prior prior
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate_prior import evaluate_prior_folder, table_of

    made = evaluate_prior_folder(
        embeddings,
        priors,
        train=train,
        steps=steps,
        guidance=guidance,
        device=pick_device(device),
        on_progress=Bars("evaluate prior"),
    )
    write_figures(made.figures | {"best": made.sentence}, out, [table_of(made)])
    say(made.sentence)


@click.command("decoder", context_settings=CONTEXT)
@examining_options
@drawing_options
@click.option("--upsampler", type=FOLDER, help="Upsampler folder, to judge the pictures it makes.")
def evaluate_decoder(decoder, embeddings, shards, clip, upsampler, keep, sheet, out, device, **options: Any) -> None:
    """The decoder alone: pictures from true embeddings, beside real ones: distances, round trip, CLIP score.

    \b
    Example:  unclip evaluate decoder --decoder decoder --embeddings emb-val
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_decoder_folders

    figures, made = evaluate_decoder_folders(
        decoder,
        clip,
        embeddings=embeddings,
        shards=shards,
        upsampler=upsampler,
        settings=_settings(options),
        exam=_exam(options),
        keep=keep,
        device=pick_device(device),
        on_progress=Bars("evaluate decoder"),
    )
    _tell(figures, made, sheet, out)


@click.command("generation", context_settings=CONTEXT)
@click.option("--prior", required=True, type=FOLDER, help="Prior folder, or text, shift, ridge, knn, mean.")
@click.option("--train", type=FOLDER, help="Embeddings that such a baseline is fitted to.")
@examining_options
@drawing_options
@click.option("--upsampler", type=FOLDER, help="Upsampler folder, to judge the pictures it makes.")
def evaluate_generation(
    prior, train, decoder, embeddings, shards, clip, upsampler, keep, sheet, out, device, **options: Any
) -> None:
    """Captions to pictures, through a prior: distances to real pictures, round trip, CLIP score.

    \b
    Example:  unclip evaluate generation --prior prior --decoder decoder --embeddings emb-val
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate import evaluate_generation_folders

    figures, made = evaluate_generation_folders(
        decoder,
        prior,
        clip,
        embeddings=embeddings,
        shards=shards,
        fit=train,
        upsampler=upsampler,
        settings=_settings(options),
        exam=_exam(options),
        keep=keep,
        device=pick_device(device),
        on_progress=Bars("evaluate generation"),
    )
    _tell(figures, made, sheet, out)


@click.command("loop", context_settings=CONTEXT)
@click.option(
    "--embeddings", required=True, multiple=True, type=FOLDER,
    help="Rows to generate from and to rank. Repeatable: figures by the folder's name then.",
)  # fmt: skip
@click.option("--among", multiple=True, type=FOLDER, help="Rank the true picture among these as well. Repeatable.")
@click.option("--prior", required=True, type=FOLDER, help="Prior folder, or text, shift, ridge, knn, mean.")
@click.option("--train", type=FOLDER, help="Embeddings that such a baseline is fitted to.")
@click.option("--decoder", required=True, type=FOLDER, help="Decoder folder.")
@click.option("--clip", type=FOLDER, help="CLIP folder; by default where the decoder says it was.")
@click.option("--count", default=100, show_default=True, type=Whole(1), help="Captions tried.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides which captions.")
@click.option("--steps", type=Whole(1), help="Sampling steps of the decoder.")
@click.option("--sampler", help="One of diffusion.samplers.SAMPLERS, such as heun, ddim or dpmpp_2m.")
@click.option("--guidance", type=click.FloatRange(0), help="1 follows the embedding as trained.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting; repeatable.")
@click.option("--out", type=FOLDER, help="Write the figures to this json file.")
@click.option("--sheet", type=FOLDER, help="Write the pictures of all three ways to this PNG.")
@device_option
def evaluate_loop(
    embeddings, among, prior, train, decoder, clip, count, seed, out, sheet, device, **options: Any
) -> None:
    """The round trip: generate, embed the picture, rank the true one; from true, prior and text embeddings.

    \b
    Example:  unclip evaluate loop --embeddings emb --embeddings emb-val --prior prior --decoder decoder
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from diffusion.evaluate import evaluate_loop_folders

    if len({folder.name for folder in embeddings}) < len(embeddings):
        raise UserError("--embeddings: two folders of one name; their figures could not be told apart")
    figures = {}
    for folder in embeddings:
        bars = Bars("loop" if len(embeddings) == 1 else f"loop {folder.name}")
        figures[folder.name], drawn = evaluate_loop_folders(
            folder, prior, decoder, clip, among=among, fit=train, count=count, seed=seed, settings=_settings(options),
            device=pick_device(device), on_progress=bars,
        )  # fmt: skip
        if sheet:
            from clip_train.sheet import save_sheet

            path = sheet if len(embeddings) == 1 else sheet.with_name(f"{sheet.stem}-{folder.name}{sheet.suffix}")
            save_sheet(drawn, path)
            say(f"wrote {path}")
    from diffusion.report_figures import loop_tables

    write_figures(figures if len(figures) > 1 else figures[embeddings[0].name], out, loop_tables(figures))


@click.command("ablation", context_settings=CONTEXT)
@click.option("--prior", required=True, type=FOLDER, help="Prior folder, or text, shift, ridge, knn, mean.")
@click.option("--train", type=FOLDER, help="Embeddings that such a baseline is fitted to.")
@click.option("--text-decoder", type=FOLDER, help="A decoder trained on text embeddings, for a row of its own.")
@examining_options
@drawing_options
def evaluate_ablation(
    prior, train, text_decoder, decoder, embeddings, shards, clip, keep, sheet, out, device, **options: Any
) -> None:
    """What the prior is worth (unCLIP, section 5.1): the decoder on text, prior's and true embeddings.

    \b
    Example:  unclip evaluate ablation --prior prior --decoder decoder --embeddings emb-val --features clip \\
                  --features efficientnet-lite0 --sheet ablation.png
    """
    from clip_train.ranks import pick_device
    from diffusion.ablation import ablate

    figures, made = ablate(
        decoder,
        prior,
        clip,
        text_decoder=text_decoder,
        embeddings=embeddings,
        shards=shards,
        fit=train,
        settings=_settings(options),
        exam=_exam(options),
        keep=keep,
        device=pick_device(device),
        on_progress=Bars("evaluate ablation"),
    )
    _tell(figures, made, sheet, out)


@click.command("sweep", context_settings=CONTEXT)
@examining_options
@click.option("--prior", type=FOLDER, help="Draw from captions through this prior, not from true embeddings.")
@click.option("--train", type=FOLDER, help="Embeddings that a baseline prior is fitted to.")
@click.option("--steps", default="10,20,50,100", show_default=True, help="Sampling steps, commas between.")
@click.option("--eta", default="0", show_default=True, help="For the samplers that know it, e.g. 0,0.5,1.")
@click.option("--sampler", default="ddim", show_default=True, help="Names, e.g. ddim,heun,dpmpp_2m.")
@click.option("--guidance", help="Numbers, e.g. 1,2,4.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other sampling setting; repeatable.")
@click.option("--out", default="sweep", show_default=True, type=FOLDER, help="Folder to write; resumed row by row.")
def evaluate_sweep(
    decoder,
    embeddings,
    shards,
    clip,
    prior,
    train,
    steps,
    eta,
    sampler,
    guidance,
    settings,
    out,
    device,
    **options: Any,
) -> None:
    """Sampler x steps x eta x guidance: one table and one plot, each row the same pictures drawn in another way.

    \b
    Example:  unclip evaluate sweep --decoder decoder --embeddings emb-val --sampler ddim,dpmpp_2m --eta 0,0.5,1
    """
    import json

    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from diffusion.examine import Way, drawing, open_generator, open_held
    from diffusion.report_figures import sweep_table
    from diffusion.sweep import plan, sweep

    counts = numbers_in(steps, "--steps")
    if not all(number.is_integer() for number in counts):
        raise UserError(f"--steps {steps}: steps are whole numbers")
    generator = open_generator(decoder, prior, clip, embeddings=train, device=pick_device(device))
    rows = plan(
        drawing(generator, settings),
        [name.strip() for name in sampler.split(",")],
        [int(number) for number in counts],
        numbers_in(eta, "--eta"),
        numbers_in(guidance, "--guidance"),
    )
    held = open_held(embeddings, shards, generator, Bars("evaluate sweep"))
    way = Way(generator, "prior" if prior else "true")
    sweep(way, held, rows, out, _exam(options), on_progress=Bars("evaluate sweep"))
    table = json.loads((out / "table.json").read_text())
    write_figures(table, None, [sweep_table(table)])
    say(f"look at: {out}/plot.png and {out}/sheet.png; the table: {out}/table.csv")


@click.command("copies", context_settings=CONTEXT)
@click.argument("pictures", nargs=-1, type=FOLDER)
@click.option("--train", required=True, type=FOLDER, help="Embeddings of the training pictures.")
@click.option("--clip", type=FOLDER, help="CLIP folder; by default where the embeddings say it was.")
@click.option("--held", type=FOLDER, help="Embeddings kept from training: how many of those are called near.")
@click.option(
    "--quantile",
    default=0.95,
    show_default=True,
    type=click.FloatRange(0.5, 1),
    help="Share of training pictures that are farther from one another than what is called near.",
)
@shards_option("Tars of the training pictures; default: where the embeddings were made from.", required=False)
@click.option("--no-pixels", is_flag=True, help="Leave the pixels out: CLIP alone.")
@click.option("--sheet", type=FOLDER, help="Write made picture | nearest training picture to this PNG.")
@click.option("--out", type=FOLDER, help="Write the figures and every verdict to this json file.")
@device_option
def evaluate_copies(
    pictures, train, clip, held, quantile, shards, no_pixels, sheet, out, device
) -> None:  # fmt: skip
    """Are made pictures training pictures over again? PICTURES: PNG files, or folders of them.

    \b
    Example:  unclip evaluate copies pictures --train emb --held emb-val --sheet copies.png
    """
    from dataclasses import asdict

    from clip_train.folder import read_manifest
    from clip_train.model import Clip
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from clip_train.store import EmbeddingStore
    from diffusion.copies import CopyCheck
    from diffusion.evaluate_copies import copies_sheet, find_copies, read_pictures
    from diffusion.heldout import HeldOut

    made, names = read_pictures(pictures)
    where = clip or read_manifest(train, "embeddings").input_path("clip")
    if where is None:
        raise UserError(f"the CLIP that {train}/ was made with is not where it was; say where: --clip")
    bars = Bars("evaluate copies")
    check = CopyCheck.open(train, quantile=quantile)
    training = None if no_pixels and not sheet else HeldOut.open(train, shards)
    figures, verdicts = find_copies(
        made,
        names,
        Clip.load(where, pick_device(device)),
        check,
        None if no_pixels else training,
        held_rows=EmbeddingStore.open(held).image() if held else None,
        on_progress=bars,
    )
    if sheet:
        from clip_train.sheet import save_sheet

        save_sheet(copies_sheet(made, verdicts, training), sheet)
        say(f"wrote {sheet}")
    write_figures(figures | {"pictures": [asdict(one) for one in verdicts]}, out)


def _exam(options: dict[str, Any]) -> Any:
    """What the options ask of every way to a picture."""
    from diffusion.examine import Exam

    names = ("count", "seed", "batch_size")
    return Exam(features=tuple(options["features"]), **{name: options[name] for name in names})


def _settings(options: dict[str, Any]) -> list[str]:
    """How to draw, as --set pairs on top of what the decoder does by itself."""
    named = [f"{k}={options[k]}" for k in ("steps", "sampler", "guidance") if options.get(k) is not None]
    return named + list(options["settings"])


def _tell(figures: dict[str, Any], made: dict[str, Any], sheet: Path | None, out: Path | None) -> None:
    """Tables in a terminal, json in a pipe; and the sheet."""
    from diffusion.report_figures import exam_tables

    if sheet:
        from clip_train.sheet import save_sheet
        from diffusion.evaluate import exam_sheet

        save_sheet(exam_sheet(made, figures.pop("captions")), sheet)
        say(f"wrote {sheet}")
    figures.pop("captions", None)
    write_figures(figures, out, exam_tables(figures))
