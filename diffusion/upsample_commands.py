"""The commands of the upsampler: enlarge, evaluate upsampler.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path

import click

from clip_train.console import CONTEXT, Bars, Whole, device_option, say, shards_option, write_figures


@click.command(context_settings=CONTEXT)
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--upsampler", required=True, type=click.Path(path_type=Path), help="Upsampler folder.")
@click.option(
    "--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the upsampler says it was."
)
@click.option("--blind", is_flag=True, help="Enlarge without an embedding of the picture, so without a CLIP.")
@click.option("--out", default="large", show_default=True, type=click.Path(path_type=Path), help="PNG, or a folder.")
@click.option("--steps", default=8, show_default=True, type=Whole(1), help="1: the mean, sure but soft.")
@click.option(
    "--noise-level", default=0.05, show_default=True, type=click.FloatRange(0), help="Noise that hides flaws before."
)
@click.option("--guidance", default=1.0, show_default=True, type=click.FloatRange(0), help="By the embedding.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first picture.")
@device_option
def enlarge(pictures, upsampler, clip, blind, out, steps, noise_level, guidance, seed, device) -> None:
    """Make PICTURES four times as wide and high, at their own size.

    \b
    Example:  unclip enlarge fox.png --upsampler upsampler --out large.png
    """
    from clip_train.ranks import pick_device
    from clip_train.settings import UserError
    from diffusion.enlarge import enlarge_files

    if out.suffix.lower() == ".png" and len(pictures) > 1:
        raise UserError(f"{out} is the name of one picture; give a folder for several")
    if len({path.stem for path in pictures}) < len(pictures):
        raise UserError("two of the pictures have the same name; enlarge them one by one")
    paths = [out] if out.suffix.lower() == ".png" else [out / f"{path.stem}.png" for path in pictures]
    how = {"steps": steps, "noise_level": noise_level, "guidance": guidance, "seed": seed}
    made = enlarge_files(upsampler, pictures, paths, clip=clip, blind=blind, device=pick_device(device), **how)
    for path in made:
        click.echo(path)


@click.command("upsampler", context_settings=CONTEXT)
@click.option("--upsampler", required=True, type=click.Path(path_type=Path), help="Upsampler folder.")
@shards_option("Shards kept from the training.")
@click.option(
    "--clip", type=click.Path(path_type=Path), help="CLIP folder; by default where the upsampler says it was."
)
@click.option("--features", default="", help="What compares: clip:FOLDER, efficientnet-lite0, ...; default: the CLIP.")
@click.option("--count", default=256, show_default=True, type=Whole(40), help="Crops, one of a picture.")
@click.option("--steps", default=8, show_default=True, type=Whole(1), help="Of the samples.")
@click.option("--noise-level", default=0.05, show_default=True, type=click.FloatRange(0), help="Of the second samples.")
@click.option("--guidance", default=1.0, show_default=True, type=click.FloatRange(0), help="Of the samples.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Which crops, and what noise.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this json file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write small, enlarged and true crops to this PNG.")
@device_option
def evaluate_upsampler(
    upsampler, shards, clip, features, count, steps, noise_level, guidance, seed, out, sheet, device
) -> None:
    """The upsampler beside bicubic and Lanczos: its mean by squared error, its samples by their likeness.

    \b
    Example:  unclip evaluate upsampler --upsampler upsampler --shards val
    """
    from clip_train.ranks import pick_device
    from diffusion.evaluate_upsampler import evaluate_upsampler_folder, table_of

    figures, drawn = evaluate_upsampler_folder(
        upsampler, shards, clip=clip, features=features, count=count, seed=seed, steps=steps, noise_level=noise_level,
        guidance=guidance, device=pick_device(device), on_progress=Bars("upsampler"),
    )  # fmt: skip
    if sheet:
        from clip_train.sheet import save_sheet

        save_sheet(drawn, sheet)
        say(f"wrote {sheet}")
    write_figures(figures, out, [table_of(figures)])
