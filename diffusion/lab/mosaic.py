"""Mosaic: pictures in rows and columns with words beside, above and below them, as one figure of the lab."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from clip_train.sheet import fit_picture
from diffusion.generate import to_pixels
from diffusion.lab.style import BLACK, DPI, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

CELL, GAP, BREAK = 132, 10, 26  # pixels: side of a picture, white between two, and before a row that starts a group
LINE = 24  # pixels: one line of words below a picture
MARGIN = 12  # pixels: white around the whole
WORDS = 12.0  # points

Cells = Sequence[Sequence[Image.Image | None]]  # rows of pictures; None leaves a place empty


def mosaic(
    pictures: Cells,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    title: str = "",
    below: Sequence[Sequence[str]] = (),
    groups: Sequence[int] = (),
    colours: Sequence[str] = (),
) -> "Canvas":
    """A figure of pictures, every one in a square of CELL pixels.

    rows: words beside each row. columns: above each column. below: under each picture; a row of "" takes no room.
    groups: the rows that something new begins with. colours: of the words beside the rows. Make it in style.drawing().
    """
    width, height = _extent(pictures, below, groups)
    figure, axes = panels(width=width / DPI, height=height / DPI)
    draw_mosaic(axes[0, 0], pictures, rows, columns, below=below, groups=groups, colours=colours)
    if title:
        axes[0, 0].set_title(title, pad=12, fontsize=WORDS + 2.5, parse_math=False)
    _fit(figure, axes[0, 0], width, height)
    return figure


def _fit(figure: "Canvas", axes: "Axes", width: int, height: int) -> None:
    """Set the figure's edges around all that is drawn; the axes stay width x height pixels, so no picture is scaled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    box = axes.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    left, under = round(MARGIN - box.x0), round(MARGIN - box.y0)
    whole = round(left + box.x1 + MARGIN), round(under + box.y1 + MARGIN)
    figure.set_size_inches(whole[0] / DPI, whole[1] / DPI)
    axes.set_position((left / whole[0], under / whole[1], width / whole[0], height / whole[1]))


def draw_mosaic(
    axes: "Axes",
    pictures: Cells,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    below: Sequence[Sequence[str]] = (),
    groups: Sequence[int] = (),
    colours: Sequence[str] = (),
) -> None:
    """The same on axes that are there already."""
    canvas = np.full((*_extent(pictures, below, groups)[::-1], 3), 255, np.uint8)
    tops = _tops(pictures, below, groups)
    for row, (top, cells) in enumerate(zip(tops, pictures, strict=True)):
        for column, picture in enumerate(cells):
            left = column * (CELL + GAP)
            if picture is not None:
                fitted = np.asarray(fit_picture(picture, CELL))
                y, x = top + (CELL - fitted.shape[0]) // 2, left + (CELL - fitted.shape[1]) // 2
                canvas[y : y + fitted.shape[0], x : x + fitted.shape[1]] = fitted
            if below and below[row][column]:
                axes.text(left + CELL / 2, top + CELL + 3, below[row][column], ha="center", va="top",
                          fontsize=WORDS - 1, parse_math=False)  # fmt: skip
    axes.imshow(canvas)
    axes.set_xticks([column * (CELL + GAP) + CELL / 2 for column in range(len(columns))], columns, parse_math=False)
    axes.set_yticks([top + CELL / 2 for top in tops[: len(rows)]], rows, parse_math=False)
    axes.tick_params(length=0, labelsize=WORDS, top=False, labeltop=True, bottom=False, labelbottom=False)
    for label, colour in zip(axes.get_yticklabels(), colours or [BLACK] * len(rows), strict=True):
        label.set_color(colour), label.set_fontweight("bold")
    axes.spines[:].set_visible(False)


def to_pictures(x: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, S, S) in [-1, 1], what is outside cut off."""
    return [Image.fromarray(pixels) for pixels in to_pixels(x)]


def _tops(pictures: Cells, below: Sequence[Sequence[str]], groups: Sequence[int]) -> list[int]:
    """Where each row begins, in pixels."""
    tops, y = [], 0
    for row in range(len(pictures)):
        y += BREAK if row in groups and row else 0
        tops.append(y)
        y += CELL + GAP + _under(below, row)
    return tops


def _under(below: Sequence[Sequence[str]], row: int) -> int:
    return LINE * max((word.count("\n") + 1 for word in below[row] if word), default=0) if below else 0


def _extent(pictures: Cells, below: Sequence[Sequence[str]], groups: Sequence[int]) -> tuple[int, int]:
    """Width and height in pixels."""
    last = len(pictures) - 1
    width = max(map(len, pictures)) * (CELL + GAP) - GAP
    return width, _tops(pictures, below, groups)[-1] + CELL + _under(below, last)
