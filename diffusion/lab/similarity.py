"""The matrix that CLIP is trained on: every picture of a batch against every caption, own pairs on the diagonal.

CLIP, figure 1 (Radford et al. 2021, arXiv 2103.00020): training pulls the diagonal up and pushes the rest down.
"""

from pathlib import Path

import numpy as np

from diffusion.lab.pairs import Pairs, square, wrapped
from diffusion.lab.style import BLUE, GREY, drawing, panels, save

BRIGHT = "cividis"  # Nunez et al. 2018: the same to colour-blind people; bright: near
SHOWN = 7  # pairs whose pictures and captions can be read on one slide


def similarity(pairs: Pairs, rows: np.ndarray) -> np.ndarray:
    """(B, B) cosines: pictures down, captions across."""
    return pairs.image[rows] @ pairs.text[rows].T


def contrast(cosines: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Mean cosine of the pairs (i, own[i]) minus the mean of all others; 0 where pictures and captions know nothing.

    cosines (B, B). own (..., B): which caption is taken for picture i's; default: the diagonal. Returns (...).
    """
    size = len(cosines)
    own = np.arange(size) if own is None else own
    bright = cosines[np.arange(size), own].mean(axis=-1, dtype=np.float64)
    rest = (cosines.sum(dtype=np.float64) / size - bright) / (size - 1)
    return bright - rest


def matched(cosines: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Share of the rows whose largest cosine is the one with own[i] (default: the diagonal). own (..., B) -> (...)."""
    own = np.arange(len(cosines)) if own is None else own
    return (own == cosines.argmax(axis=1)).mean(axis=-1)


def draw_pairs(path: Path, pairs: Pairs, rows: np.ndarray) -> None:
    """A few pairs large enough to be read: pictures at the left, captions on top, their cosine in each cell."""
    rows = rows[:SHOWN]
    cosines = similarity(pairs, rows)
    size = len(rows)
    with drawing():
        figure, axes = panels(width=1.25 * (size + 1.3), height=1.05 * (size + 1.4))
        panel = axes[0, 0]
        low, high = min(0.0, float(cosines.min())), float(cosines.max())
        panel.imshow(cosines, cmap=BRIGHT, vmin=low, vmax=high, aspect="auto")
        for i, row in enumerate(rows.tolist()):
            picture = np.asarray(square(pairs.thumbnail(row, 128), 128))
            panel.imshow(picture, extent=(-1.45, -0.6, i + 0.46, i - 0.46), aspect="auto", interpolation="lanczos")
            for j in range(size):
                value = float(cosines[i, j])
                bright = value > low + 0.6 * (high - low)
                panel.text(j, i, signed(value), ha="center", va="center",
                           color="black" if bright else "white", fontsize=15 if i == j else 13,
                           fontweight="bold" if i == j else "normal")  # fmt: skip
        panel.set(xlim=(-1.5, size - 0.5), ylim=(size - 0.5, -0.5), yticks=[])
        panel.set_xticks(range(size), [wrapped(pairs.captions[row], 13, 5) for row in rows], fontsize=11)
        panel.xaxis.tick_top()
        panel.tick_params(length=0)
        for label in panel.get_xticklabels():
            label.set_parse_math(False)
        panel.spines[:].set_visible(False)
        found = round(float(matched(cosines)) * size)
        panel.set_title(f"Cosine of every picture with every caption: {found} of {size} find their own", fontsize=15,
                        pad=12)  # fmt: skip
        save(figure, path)


def draw_batch(path: Path, cosines: np.ndarray) -> None:
    """A whole batch as an image with its bright diagonal, and how the cosines on and off it are distributed."""
    size = len(cosines)
    off = cosines[~np.eye(size, dtype=bool)]
    own = np.diag(cosines)
    with drawing():
        figure, axes = panels(1, 2, width=5.2, height=4.6)
        left, right = axes[0]
        shown = left.imshow(cosines, cmap=BRIGHT, vmin=min(0.0, float(np.quantile(off, 0.05))),
                            vmax=float(own.max()))  # fmt: skip
        bar = figure.colorbar(shown, ax=left, shrink=0.8, pad=0.03)
        bar.set_label("cosine")
        left.set(xlabel=f"{size} captions", ylabel=f"{size} pictures", xticks=[], yticks=[])
        left.set_title("A batch: own pairs on the diagonal")
        edges = np.linspace(cosines.min(), cosines.max(), 41)
        right.hist(off, edges, density=True, color=GREY, alpha=0.6, label="other captions")
        right.hist(own, edges, density=True, color=BLUE, alpha=0.7, label="own caption")
        top = right.get_ylim()[1] * 1.28
        right.set(xlabel="cosine with a picture", ylabel="density", ylim=(0, top), yticks=[])
        for values, colour in ((off, GREY), (own, BLUE)):
            right.axvline(values.mean(), ymax=0.78, color=colour, linestyle="--", linewidth=1.5)
        right.legend(loc="upper center", ncols=2)
        right.set_title(f"Mean {signed(own.mean())} on the diagonal, {signed(off.mean())} off it")
        save(figure, path)


def signed(value: float) -> str:
    """Two digits, a true minus sign, and none before zero."""
    return f"{round(float(value), 2) + 0.0:.2f}".replace("-", "−")
