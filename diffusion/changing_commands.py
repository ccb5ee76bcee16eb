"""The commands that change a given picture: edit, img2img, inpaint, outpaint.

Each parses, calls one function, and says what to do next. Heavy imports are inside, so that --help answers at once.
"""

from typing import TYPE_CHECKING, Any

import click

from clip_train.console import CONTEXT, Whole
from diffusion.drawing_options import FILE, Drawing, model_options, numbers, sampling_options

if TYPE_CHECKING:
    import numpy as np

    from diffusion.source import Source

count_option = click.option("--count", default=1, show_default=True, type=Whole(1), help="Pictures.")
repeats_option = click.option(
    "--repeats",
    type=Whole(1),
    help="How often each stretch of steps is walked: more fits better.  [default: 4]",
)


@click.command(context_settings=CONTEXT)
@click.argument("picture", required=False)
@click.option("--key", help="Of a sample of --embeddings, in place of PICTURE.")
@click.option("--to", "text", required=True, help="What the picture is to become, e.g. 'a dog'.")
@click.option("--from", "source", help="What it is, e.g. 'a cat'; the empty caption unless told.")
@click.option("--strength", default="0.3,0.5,0.7", show_default=True, help="0 nothing to 1 all the way; one or more.")
@model_options
@sampling_options
def edit(picture, key, text, source, strength, **options: Any) -> None:
    """Change a picture by the difference of two captions (text diffs), what they do not say staying as it was.

    The picture's own noise is found first (DDIM inversion); its embedding is turned towards the difference: of the
    texts, or with --prior of what the prior makes of them, which stays nearer to pictures. A sample of --embeddings
    has an embedding only, and is drawn from a seed.

    \b
    Example:  unclip edit cat.jpg --from "a cat" --to "a dog" --prior prior --decoder decoder --sheet cat-dog.png
    """
    from clip_train.settings import UserError
    from diffusion.inversion import FAITHFUL
    from diffusion.manipulate import edit

    strengths = numbers(strength, "--strength")
    if bool(picture) == bool(key):
        raise UserError("give a picture, or a sample's --key: one of the two")
    drawing = Drawing("edit", options, sees=True, base=None if key else FAITHFUL, given=[picture], count=len(strengths))
    point = drawing.point(f"key:{key}" if key else f"image:{picture}")
    made = edit(
        drawing.generator, point.row, text, drawing.seed, drawing.how, source=source, strength=strengths,
        picture=point.picture, on_step=drawing.steps(),
    )  # fmt: skip
    drawing.write(made, [f"strength {one:g}" for one in strengths], [point])


@click.command(context_settings=CONTEXT)
@click.argument("picture", type=FILE)
@click.argument("caption", required=False)
@click.option(
    "--strength", default=0.7, show_default=True, type=click.FloatRange(0, 1, min_open=True),
    help="Share of the picture that is drawn over: small changes little, 1 all.",
)  # fmt: skip
@count_option
@model_options
@sampling_options
def img2img(picture, caption, strength, count, **options: Any) -> None:
    """Draw a picture over, towards a caption (or its own embedding): its large shapes stay (SDEdit).

    \b
    Example:  unclip img2img sketch.png "a red fox" --strength 0.7 --prior prior --decoder decoder
    """
    from diffusion.img2img import img2img
    from diffusion.source import Source

    given = Source.open(picture)
    drawing = Drawing("img2img", options, sees=True, given=[picture], count=count)
    rows, seeds, captions = towards(drawing, given, caption, count)
    made = img2img(
        drawing.generator, rows, given, seeds, drawing.how, captions=captions, strength=strength,
        on_step=drawing.steps(),
    )  # fmt: skip
    drawing.write(made, [f"seed {seed}" for seed in seeds], [given])


@click.command(context_settings=CONTEXT)
@click.argument("picture", type=FILE)
@click.argument("caption", required=False)
@click.option("--mask", required=True, type=FILE, help="Picture of the same size: white is painted anew, black stays.")
@repeats_option
@count_option
@model_options
@sampling_options
def inpaint(picture, caption, mask, repeats, count, **options: Any) -> None:
    """Paint part of a picture anew, towards a caption (or its own embedding), so that it fits the rest (RePaint).

    \b
    Example:  unclip inpaint fox.png "a fox with a hat" --mask hat.png --prior prior --decoder decoder --count 4
    """
    from diffusion.inpaint import REPEATS, inpaint
    from diffusion.source import Source, mask_pixels, read_mask

    given, masked = Source.open(picture), Source.open(mask)
    marks = read_mask(masked, given)
    drawing = Drawing("inpaint", options, sees=True, given=[picture, mask], count=count)
    mask_pixels(marks, drawing.generator.size)  # complain before the prior is at work
    rows, seeds, captions = towards(drawing, given, caption, count)
    repeats = repeats or REPEATS
    made = inpaint(
        drawing.generator, rows, given, marks, seeds, drawing.how, captions=captions, mask_told=masked.told,
        repeats=repeats, on_step=drawing.steps(repeats * drawing.how.steps),
    )  # fmt: skip
    drawing.write(made, [f"seed {seed}" for seed in seeds], [given])


@click.command(context_settings=CONTEXT)
@click.argument("picture", type=FILE)
@click.argument("caption", required=False)
@click.option("--left", default=0, type=Whole(0), help="Pixels of the picture to add there; so the others.")
@click.option("--right", default=0, type=Whole(0), help="See --left.")
@click.option("--top", default=0, type=Whole(0), help="See --left.")
@click.option("--bottom", default=0, type=Whole(0), help="See --left.")
@click.option("--factor", type=click.FloatRange(1, min_open=True), help="Make it so many times as wide and high.")
@repeats_option
@count_option
@model_options
@sampling_options
def outpaint(picture, caption, left, right, top, bottom, factor, repeats, count, **options: Any) -> None:
    """Continue a picture beyond its edges, towards a caption (or its own embedding).

    The new picture's short side is the decoder's size; a long one is drawn through windows that overlap.

    \b
    Example:  unclip outpaint fox.png --right 40 --decoder decoder
              unclip outpaint fox.png "a fox in the snow" --factor 1.5 --prior prior --decoder decoder
    """
    from clip_train.settings import UserError
    from diffusion.inpaint import REPEATS
    from diffusion.outpaint import canvas, margins_of, outpaint
    from diffusion.source import Source

    margins, given = [left, right, top, bottom], Source.open(picture)
    if factor:
        if any(margins):
            raise UserError(
                "--factor and --left, --right, --top, --bottom contradict each other; give the one or the others"
            )
        margins = margins_of(given.picture, factor)
    canvas(given.picture, margins, 64)  # complain before anything is loaded
    drawing = Drawing("outpaint", options, sees=True, given=[picture], count=count)
    rows, seeds, captions = towards(drawing, given, caption, count)
    repeats = repeats or REPEATS
    made = outpaint(
        drawing.generator, rows, given, margins, seeds, drawing.how, captions=captions, repeats=repeats,
        on_step=drawing.steps(repeats * drawing.how.steps),
    )  # fmt: skip
    drawing.write(made, [f"seed {seed}" for seed in seeds], [given])


def towards(
    drawing: Drawing, picture: "Source", caption: str | None, count: int
) -> "tuple[np.ndarray, list[int], list[str] | None]":
    """Embeddings (count, D), seeds and captions: of the caption by the prior, or of the picture if there is none."""
    import numpy as np

    seeds = list(range(drawing.seed, drawing.seed + count))
    if caption is None:
        return np.stack([picture.row(drawing.generator.clip)] * count), seeds, None
    captions = [caption] * count
    return drawing.generator.image_embeddings(captions, seeds, drawing.how).numpy(), seeds, captions
