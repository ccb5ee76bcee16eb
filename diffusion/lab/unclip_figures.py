"""The figures of `lab unclip`. Each is made in style.drawing()."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffusion.generate import Generated
from diffusion.lab.mosaic import mosaic
from diffusion.lab.pairs import wrapped
from diffusion.lab.style import COLOURS, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SHOWN = 8  # pictures of three_ways
WAYS = {  # what the decoder is given -> words beside its pictures, colour
    "true": ("from its own\nembedding", COLOURS["image"]),
    "prior": ("from its caption,\nby the prior", COLOURS["model"]),
    "text": ("from the caption's\nown embedding", COLOURS["text"]),
}


def crossing(along: Mapping[str, np.ndarray]) -> "Canvas":
    """Three histograms over one line, one above the other."""
    names = {"text": "captions", "prior": "the prior's guesses", "true": "pictures"}
    colours = {"text": COLOURS["text"], "prior": COLOURS["model"], "true": COLOURS["image"]}
    figure, axes = panels(3, 1, width=7.5, height=1.7, sharex=True)
    every = np.concatenate(list(along.values()))
    edges = np.linspace(every.min(), every.max(), 49)
    for one, name in zip(axes[:, 0], names, strict=True):
        one.hist(along[name], edges, color=colours[name])
        one.axvline(float(along[name].mean()), color="black", linewidth=1.5, linestyle="--")
        one.set_yticks([])
        one.set_ylabel(names[name].replace("the prior's ", "the prior's\n"), rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("along the line from the captions' centre to the pictures' (dashed: mean)")
    first, guess, last = (float(along[name].mean()) for name in names)
    crossed = (guess - first) / (last - first)
    axes[0, 0].set_title(f"The prior takes captions {crossed:.0%} of the way to the pictures")
    return figure


def three_ways(
    real: Sequence[Image.Image], made: Mapping[str, Sequence[Generated]], captions: Sequence[str]
) -> "Canvas":
    """Captions across; the real picture and each way down."""
    count = len(real)
    rows = [list(real), *([one.picture for one in made[way][:count]] for way in WAYS)]
    columns = [wrapped(caption, 13) for caption in captions[:count]]
    return mosaic(rows, ["real", *(words for words, _ in WAYS.values())], columns, groups=[1],
                  colours=[COLOURS["data"], *(colour for _, colour in WAYS.values())],
                  title="One caption, three ways to a picture")  # fmt: skip


def seeds(real: Image.Image, groups: Mapping[str, Sequence[Generated]], caption: str) -> "Canvas":
    """Seeds across, what the decoder was given down."""
    rows = [[real if number == 0 else None, *(one.picture for one in made)]
            for number, made in enumerate(groups.values())]  # fmt: skip
    columns = ["real", *(f"start {n + 1}" for n in range(len(rows[0]) - 1))]
    title = textwrap.shorten(caption, 40, placeholder="…")
    return mosaic(rows, [name.replace(" ", "\n", 1) for name in groups], columns,
                  colours=[COLOURS["image"], COLOURS["model"]], title=f"{title}: what the seed decides")  # fmt: skip


def strips(ways: Sequence[tuple[Sequence[Image.Image], np.ndarray]]) -> "Canvas":
    """A row each; the cosines to both ends below."""
    below = [["real", *(f"{a:.2f} / {b:.2f}" for a, b in cosines), "real"] for _, cosines in ways]
    return mosaic([list(pictures) for pictures, _ in ways], below=below,
                  title="From one embedding to another, one seed")  # fmt: skip
