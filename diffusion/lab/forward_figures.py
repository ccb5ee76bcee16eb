"""The figures of `lab forward`. Each is made in style.drawing()."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.settings import Progress
from diffusion.lab import cube
from diffusion.lab.mosaic import CELL, draw_mosaic, mosaic, to_pictures
from diffusion.lab.noising import PARTS, Way, parts_of
from diffusion.lab.style import BLACK, COLOURS, GREY, frame, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

EDGES = (100.0, 1.0, 0.01)  # of the signal-to-noise ratio
BANDS = ("clean to the eye (above 100)", "details drown (100 to 1)", "outlines drown (1 to 0.01)",
         "static (below 0.01)")  # fmt: skip
SHADES = ("#F4F4F4", "#CFCFCF", "#9C9C9C", "#5E5E5E")  # from clean to static
SHOWN = 300  # ends of walks in the cube


def static(ways: dict[str, Way]) -> "Canvas":
    """Schedules down, shares of the steps across."""
    at = parts_of(len(next(iter(ways.values())).betas))
    below = [[f"σ {float(way.sigmas[step]):.2g}" for step in at] for way in ways.values()]
    columns = ["no step", *PARTS[1:-1], "all steps"]
    return mosaic([to_pictures(torch.stack(way.shown)) for way in ways.values()], list(ways), columns, below=below,
                  colours=[COLOURS[name] for name in ways],
                  title="Five schedules, one end: a picture after equal shares of each one's steps")  # fmt: skip


def ratios(ways: dict[str, Way], divided: dict[str, list[float]], trained: dict[str, list[float]]) -> "Canvas":
    figure, ((left, right),) = panels(1, 2, width=6.4, height=5.0)
    top, low = 1e6, 1e-6
    for shade, high, under in zip(SHADES, (top, *EDGES), (*EDGES, low), strict=True):
        left.axhspan(under, high, color=shade, alpha=0.45, linewidth=0)
    for name, way in ways.items():
        left.plot(np.arange(1, len(way.ratios) + 1) / len(way.ratios), way.ratios, color=COLOURS[name], label=name)
    left.set_yscale("log"), left.set_ylim(low, top), left.set_xlim(0, 1)
    left.set_xlabel("share of the steps taken"), left.set_ylabel("signal-to-noise ratio")
    left.set_title("One start, one end, five ways between")
    left.legend(loc="upper right")
    rows = [*trained.items(), *divided.items()][::-1]
    places = [n + 0.7 * (n >= len(divided)) for n in range(len(rows))]
    begin = np.zeros(len(rows))
    for band, shade, part in zip(BANDS, SHADES, np.array([part for _, part in rows]).T, strict=True):
        right.barh(places, part, left=begin, color=shade, edgecolor=BLACK, linewidth=0.6, label=band, height=0.8)
        for place, start, share in zip(places, begin, part, strict=True):
            if share >= 0.07:
                ink = "white" if shade == SHADES[-1] else BLACK
                right.text(start + share / 2, place, f"{100 * share:.0f} %", ha="center", va="center", color=ink,
                           fontsize=11)  # fmt: skip
        begin += part
    right.set_yticks(places, [name.partition(": ")[2] for name, _ in rows])
    for label in right.get_yticklabels():
        label.set_color(COLOURS.get(label.get_text(), BLACK)), label.set_fontweight("bold")
    right.set_xlim(-0.003, 1.003), right.set_ylim(-0.6, places[-1] + 1.1)
    right.text(0, places[len(divided) - 1] + 0.5, "share of a walk's steps", fontsize=11, style="italic")
    right.text(0, places[-1] + 0.5, "share of training's samples", fontsize=11, style="italic")
    right.set_xticks([]), right.spines[:].set_visible(False), right.tick_params(length=0)
    right.legend(loc="upper center", bbox_to_anchor=(0.4, 0.02), ncols=2, handlelength=1.0, columnspacing=1.5)
    right.set_title("Schedules spend their work in different places")
    return figure


def variances(ways: dict[str, Way], std: float) -> "Canvas":
    figure, ((left, right),) = panels(1, 2, width=6.0, height=4.6)
    for name, way in ways.items():
        steps, colour = np.arange(2, len(way.betas) + 1), COLOURS[name]
        left.plot(steps, way.betas[1:], color=colour, label=name)
        sigma = way.sigmas.double().numpy()
        right.plot(np.arange(len(sigma)), (std**2 + sigma**2) / (1 + sigma**2), color=colour)
        some = parts_of(len(way.betas))[1:]
        right.plot(some, way.preserved[some], "o", color=colour, markersize=5)
    left.set_yscale("log")
    left.set_xlabel("step"), left.set_ylabel("β: share of fresh noise in the variance")
    left.set_title("Each schedule adds its noise at another time"), left.legend(loc="lower right", ncols=2)
    right.axhline(1, color=GREY, linestyle=":", linewidth=1.5)
    right.axhline(std**2, color=GREY, linestyle=":", linewidth=1.5)
    right.text(len(sigma) * 0.02, 1.01, "unit noise", color=GREY, va="bottom")
    right.text(len(sigma), std**2 - 0.01, "the picture's own variance", color=GREY, va="top", ha="right")
    right.set_xlabel("step"), right.set_ylabel("variance of the pixels")
    right.set_ylim(std**2 - 0.15, 1.1)
    right.set_title("Variance on the way (dots: measured)")
    return figure


def colours(pixels: Tensor, walks: Tensor, red: Tensor) -> "Canvas":
    figure, axes = panels(2, 2, width=5.0, height=4.8, subplot_kw={"projection": "3d"})
    three, (many,) = axes.flat[:3], axes.flat[3:]
    reach = cube.reach_of(cube.levels(walks))
    for number, (one, name) in enumerate(zip(three, cube.names(pixels), strict=True)):
        cube.draw_cube(one, name, reach)
        cube.draw_walk(one, cube.levels(walks[:, number]), cube.PATHS[number])
    cube.draw_cube(many, "Many pure red pixels and their mean", reach, zoom=1.45)
    cube.draw_cloud(many, cube.levels(red[-1, :SHOWN]), cube.levels(red.mean(1)), cube.PATHS[0])
    many.legend(loc="lower left", bbox_to_anchor=(-0.1, -0.04), handlelength=1.2, frameon=True, edgecolor="white",
                framealpha=1)  # fmt: skip
    off = float(np.linalg.norm(cube.levels(red[-1].mean(0)) - 127.5))
    said = f"Single pixels, and the mean of {red.shape[1]} red ones: it ends {off:.1f} of 255 levels from grey"
    figure.suptitle(said, fontsize=15)
    return figure


def frames(
    shown: Tensor,
    walks: Tensor,
    places: Sequence[tuple[int, int]],
    sigmas: Tensor,
    on_progress: Progress | None = None,
) -> list[Image.Image]:
    """The picture and three pixels after each step.

    shown: (steps + 1, 3, S, S); walks: (steps + 1, 3, 3), red first; places: of the others, (column, row).
    """
    made, scale, reach = [], CELL / shown.shape[-1], cube.reach_of(cube.levels(walks))
    for step, picture in enumerate(to_pictures(shown)):
        figure, ((left, right),) = panels(1, 2, width=4.6, height=4.3)
        right.remove()
        right = figure.add_subplot(1, 2, 2, projection="3d")
        draw_mosaic(left, [[picture]])
        for place, colour in zip(places, cube.PATHS[1:], strict=True):
            at = [scale * (number + 0.5) for number in place]
            left.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor="white", markeredgewidth=4)
            left.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2)
        left.set_title(f"Step {step} of {len(sigmas) - 1}: noise level σ = {float(sigmas[step]):.2g}")
        cube.draw_cube(right, "Two of its pixels and pure red", reach)
        for number, colour in enumerate(cube.PATHS):
            cube.draw_walk(right, cube.levels(walks[: step + 1, number]), colour)
        made.append(frame(figure))
        if on_progress:
            on_progress(step + 1, len(sigmas), stage="animation")
    return made
