"""The commands that draw: generate.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from pathlib import Path
from typing import Any

import click

from clip_train.console import (
    CONTEXT,
    Bars,
    device_option,
    say,
)


@click.command(context_settings=CONTEXT)
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
