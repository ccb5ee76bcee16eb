"""What the figures of the plane are made of: the headline, the spiral, clouds of points, arrows, paths."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clip_train.settings import Progress
from diffusion.lab.experiment import Figure
from diffusion.lab.spiral import CLASSES, curve
from diffusion.lab.style import COLOURS
from diffusion.lab.walks import at_level, lattice, shrunk
from diffusion.samplers import Denoise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


FAINT = "#CFCFCF"  # of a field that lies under something else


def draw_all(figures: Sequence[Callable[[], Figure]], on_progress: Progress | None = None) -> list[Figure]:
    """Make the figures one by one, and tell how many there are."""
    made = []
    for figure in figures:
        made.append(figure())
        if on_progress:
            on_progress(len(made), len(figures), stage="figures")
    return made


def headline(figure: "Canvas", message: str) -> None:
    """What the figure says, in one line above all its panels."""
    figure.suptitle(message, fontsize=15, parse_math=False)


def level_axis(axes: "Axes") -> None:
    """The noise level along x, on a logarithmic scale in plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("noise level σ")


def draw_curve(axes: "Axes", classes: bool = False, width: float = 5.0) -> None:
    """The spiral as a broad pale line, in the data's colour, or each third in its class's."""
    if not classes:
        axes.plot(*curve(torch.linspace(0, 1, 400)).T, color=COLOURS["data"], alpha=0.22, linewidth=width, zorder=0)
        return
    for number, name in enumerate(CLASSES):
        part = curve(torch.linspace(number / 3, (number + 1) / 3, 140))
        axes.plot(*part.T, color=COLOURS[name], alpha=0.35, linewidth=width, zorder=0, solid_capstyle="butt")


def draw_cloud(
    axes: "Axes", points: Tensor, colour: str, size: float = 5.0, alpha: float = 0.6, zorder: float = 2
) -> None:
    """Points (N, 2) as dots."""
    axes.scatter(*points.T, s=size, c=colour, alpha=alpha, linewidths=0, zorder=zorder)


def draw_arrows(axes: "Axes", start: Tensor, way: Tensor, colour: str, longest: float) -> None:
    """An arrow at each start (N, 2) along way (N, 2), none longer than `longest`; the short ones are drawn longer.

    Lengths go by the cube root, so that the small ways near the data are seen beside the long ones far from it.
    """
    size = way.norm(dim=1, keepdim=True).clamp(min=1e-9)
    scaled = way / size * longest * (size / size.max()) ** (1 / 3)
    axes.quiver(*start.T, *scaled.T, color=colour, angles="xy", scale_units="xy", scale=1, width=0.008,
                headwidth=4, headlength=4.5, headaxislength=4, minlength=0, zorder=3)  # fmt: skip


def draw_field(
    axes: "Axes", denoise: Denoise, sigma: float, colour: str, cells: int = 13, reach: float = 1.6, vp: bool = False
) -> None:
    """The vector field at one noise level: at each place the way to the denoiser's guess (sigma^2 times the score).

    vp: places are of the shrunk plane (walks.shrunk), as paths are drawn.
    """
    place = lattice(cells, reach)
    shrink = float(shrunk(torch.ones(1), sigma)) if vp else 1.0
    x = place / shrink
    draw_arrows(axes, place, shrink * (at_level(denoise, x, sigma) - x), colour, 1.8 * reach / cells)


def draw_paths(axes: "Axes", path: Tensor, colour: str, width: float = 1.3) -> None:
    """Paths (calls + 1, N, 2): lines with a ring where they start and a dot where they end."""
    for one in range(path.shape[1]):
        axes.plot(*path[:, one].T, color=colour, linewidth=width, alpha=0.9, zorder=4)
    axes.scatter(*path[0].T, s=44, facecolors="white", edgecolors=colour, linewidths=2, zorder=5)
    axes.scatter(*path[-1].T, s=70, c=colour, edgecolors="white", linewidths=1, zorder=6)
