"""The RGB cube: pixels as points of it, their walks as arrows from step to step."""

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.lab.style import BLACK, BLUE, GREEN, GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATHS = (RED, BLUE, GREEN)  # of the three pixels
REACH = 238.0  # levels from grey that are drawn at least; the faces of the cube are 127.5 from it
HEAD = 26.0  # length of an arrow's head, in levels
PURE_RED = (255, 0, 0)
NAMED = {  # edges: what grows along each, and where its name stands
    "red": (127.5, -85.0, -50.0),
    "green": (-85.0, 127.5, -45.0),
    "blue": (-15.0, 325.0, 127.5),
}


def levels(values: Tensor) -> np.ndarray:
    """Values in [-1, 1] as levels 0 to 255, unrounded and not cut off: noise leaves the cube."""
    return (127.5 * (values.double() + 1)).numpy()


def three_pixels(picture: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pure red, and the two most colourful pixels of the picture that are farthest from it. (3, 3) in [-1, 1].

    picture: (3, S, S) in [-1, 1]. Of its 24 most usual colours (median cut), so that no stray pixel is taken, each time
    the one that is farthest from those chosen, and from black, grey and white.
    Returns the colours, and where the two stand (column, row); red need not be there.
    """
    flat = ((picture.permute(1, 2, 0) + 1) * 127.5).round()
    image = Image.fromarray(flat.byte().numpy())
    usual = np.asarray(image.quantize(24, Image.Quantize.MEDIANCUT).convert("RGB")).reshape(-1, 3)
    chosen, places = [torch.tensor(PURE_RED, dtype=torch.float32)], []
    palette = torch.from_numpy(np.unique(usual, axis=0)).float()
    greys = torch.tensor([0.0, 127.5, 255.0])[:, None].expand(-1, 3)
    for _ in range(2):
        far = torch.cdist(palette, torch.cat([torch.stack(chosen), greys])).min(dim=1).values.argmax()
        place = int((flat.reshape(-1, 3) - palette[far]).square().sum(dim=1).argmin())
        chosen.append(flat.reshape(-1, 3)[place])
        places.append((place % flat.shape[1], place // flat.shape[1]))
    return torch.stack(chosen) / 127.5 - 1, places


def reach_of(walks: np.ndarray) -> float:
    """How far from grey a drawing of these levels (..., 3) has to go."""
    return max(REACH, float(np.abs(walks - 127.5).max()))


def draw_cube(axes: "Axes", title: str = "", reach: float = REACH, turn: float = -118.0, zoom: float = 1.95) -> None:
    """The cube's edges on 3-D axes, its corners in their own colours, grey marked in its middle.

    reach: see reach_of. turn: azimuth in degrees.
    """
    corners = np.array(list(product((0, 255), repeat=3)))
    for a, b in product(corners.tolist(), repeat=2):
        if sum(x != y for x, y in zip(a, b, strict=True)) == 1 and a < b:
            axes.plot(*zip(a, b, strict=True), color=GREY, linewidth=1.0, zorder=1)
    axes.scatter(*corners.T, c=corners / 255, s=40, edgecolors=GREY, linewidths=1.0, depthshade=False)
    axes.scatter(127.5, 127.5, 127.5, color=GREY, marker="X", s=130, edgecolors=BLACK, zorder=5)
    for name in "xyz":
        getattr(axes, f"set_{name}lim")(127.5 - reach, 127.5 + reach)
    for name, place in NAMED.items():
        axes.text(*place, f"{name}\n0 to 255", fontsize=10, ha="center", va="center")
    axes.set_axis_off()
    axes.view_init(elev=18, azim=turn)
    axes.set_box_aspect((1, 1, 1), zoom=zoom)
    axes.set_title(title)


def draw_walk(axes: "Axes", walk: np.ndarray, colour: str) -> None:
    """One pixel's walk (steps + 1, 3) in levels: an arrow a step; each point in its own colour, the ends large."""
    for place, way in zip(walk[:-1], np.diff(walk, axis=0), strict=True):
        ratio = min(0.5, HEAD / max(float(np.linalg.norm(way)), 1e-9))
        axes.quiver(*place, *way, color=colour, linewidth=1.7, arrow_length_ratio=ratio)
    own = (walk / 255).clip(0, 1)
    axes.scatter(*walk.T, c=own, s=26, edgecolors=colour, linewidths=0.8, depthshade=False)
    for place, mark, size in ((0, "o", 190), (-1, "s", 90)):
        axes.scatter(*walk[[place]].T, c=own[[place]], s=size, marker=mark, edgecolors=colour, linewidths=2.2,
                     depthshade=False)  # fmt: skip


def draw_cloud(axes: "Axes", ends: np.ndarray, mean: np.ndarray, colour: str) -> None:
    """Where many walks of one pixel end, ends (N, 3), and the way of their mean (steps + 1, 3)."""
    axes.scatter(
        *ends.T,
        c=(ends / 255).clip(0, 1),
        s=14,
        alpha=0.8,
        linewidths=0,
        depthshade=False,
        label=f"ends of {len(ends)} walks",
    )
    axes.plot(*mean.T, color=colour, linewidth=2.6, marker="o", markersize=4, label="mean of all walks")
    axes.scatter(*mean[:1].T, c=[(mean[0] / 255).clip(0, 1)], s=190, edgecolors=BLACK, linewidths=1.5)


def names(pixels: Tensor) -> list[str]:
    """What is said of pure red and of two pixels (3, 3) of the picture."""
    whose = ("Pure red", "A pixel of the picture", "Another one")
    return [f"{name} ({', '.join(f'{level:.0f}' for level in row)})"
            for name, row in zip(whose, levels(pixels), strict=True)]  # fmt: skip
