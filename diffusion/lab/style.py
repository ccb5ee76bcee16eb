"""How the lab's pictures look: one colour for one thing everywhere, all of them told apart by colour-blind people.

The eight colours are Okabe and Ito's (2008). Text is large enough to be read at half size; no axis is without a label.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from clip_train.folder import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
GREY = "#8A8A8A"
COLOURS = {
    "data": BLUE,  # true points, real pictures
    "noise": GREY,
    "model": RED,  # what a network made or believes
    "exact": GREEN,  # the closed form
    "conditional": BLUE,
    "unconditional": GREY,
    "guided": RED,
    "text": ORANGE,
    "image": BLUE,
    "person": ORANGE,  # the three classes of the spiral
    "dog": SKY,
    "cat": PINK,
    "one step": ORANGE,  # a network that learned the noise of one step alone
    "no noise level": PINK,  # a network that is not told the noise level
    # samplers
    "ddpm": ORANGE,
    "ddpm without noise": BLACK,
    "ddim": SKY,
    "heun": BLUE,
    "dpmpp_2m": RED,
    # schedules
    "vp_linear": ORANGE,
    "cosine": SKY,
    "karras": BLUE,
    "flow": GREEN,
    "log": PINK,
}
MARKS = {"ddpm": "o", "ddpm without noise": "x", "ddim": "s", "heun": "^", "dpmpp_2m": "D"}
DPI = 120
FONTS = (  # where DejaVu Sans lacks a letter
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Emoji", "Hiragino Sans",
    "Arial Unicode MS", "Microsoft YaHei", "Segoe UI Symbol",
)  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """The context in which figures are made and saved: the lab's text sizes and lines, letters of many scripts.

    What no installed font has is drawn as a box, without a warning for each letter.
    """
    from matplotlib import font_manager, rc_context

    there = set(font_manager.fontManager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in there)]
    with rc_context(STYLE | {"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


def panels(rows: int = 1, columns: int = 1, width: float = 4.4, height: float = 4.2, **options) -> tuple:
    """(figure, array (rows, columns) of axes), each panel of that many inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plane(axes: "Axes", title: str = "", reach: float = 1.6) -> None:
    """The square plane of the spiral: equal units, both pixels' values from -reach to reach."""
    axes.set_xlim(-reach, reach), axes.set_ylim(-reach, reach)
    axes.set_xticks([-1, 0, 1]), axes.set_yticks([-1, 0, 1])
    axes.set_aspect("equal")
    axes.set_xlabel("first pixel"), axes.set_ylabel("second pixel")
    axes.set_title(title)


def outer_labels(axes) -> None:
    """In a grid (rows, columns) of equal panels only the left and the lowest ones name their axes."""
    for one in axes[:, 1:].flat:
        one.set_ylabel("")
    for one in axes[:-1].flat:
        one.set_xlabel("")


def save(figure: "Canvas", path: Path) -> None:
    """Write the figure as a PNG, atomically."""
    write_file(path, _png(figure))


def frame(figure: "Canvas") -> Image.Image:
    """The figure as a picture, for animations (diffusion.animation.save_animation)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _png(figure: "Canvas") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
}
