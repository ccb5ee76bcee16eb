"""The figures of `unclip lab sampling`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from clip_train.settings import Progress
from diffusion.animation import save_animation
from diffusion.lab.experiment import Figure
from diffusion.lab.plane import Trained
from diffusion.lab.plane_figures import FAINT, draw_cloud, draw_curve, draw_field, draw_paths, headline
from diffusion.lab.style import COLOURS, MARKS, drawing, frame, outer_labels, panels, plane, save
from diffusion.lab.walks import walk

SHOWN = {"ddpm": "ddpm", "ddpm without noise": "ddpm_mean", "ddim": "ddim"}  # name in the figures -> sampler
NAMES = {"ddpm": "DDPM", "ddpm without noise": "DDPM without its noise", "ddim": "DDIM", "heun": "Heun",
         "dpmpp_2m": "DPM-Solver++"}  # fmt: skip


def figure_of_paths(folder: Path, network: Trained, steps: int, seed: int, count: int = 8) -> Figure:
    """The ways of a few points, from the same noise, over the field half way down."""
    half = 0.25
    with drawing():
        figure, axes = panels(1, len(SHOWN), width=4.2, height=5.1)
        headline(figure, "From the same noise three ways down")
        for one, (shown, sampler) in zip(axes[0], SHOWN.items(), strict=True):
            plane(one, NAMES[shown], reach=1.5)
            draw_curve(one)
            draw_field(one, network, half, FAINT, cells=13, reach=1.5, vp=True)
            path = walk(sampler, network, network.config.grid(steps), count, seed).path
            if shown == "ddpm":  # more than two such paths hide one another
                draw_paths(one, path[:, :2], COLOURS[shown])
            else:
                draw_paths(one, path, COLOURS[shown], width=2.2)
        outer_labels(axes)
        save(figure, folder / "paths.png")
    return Figure(
        file="paths.png",
        caption=f"{count} points (for DDPM the first two) on their way from noise (rings) to where they end (dots), "
        f"the plane shrunk to the data's size at every level; grey: the field at noise level {half:g}. Look at how "
        "smooth the ways are, and whether they end apart or together.",
    )


def figure_of_ends(folder: Path, ends: dict[str, Tensor], walks: dict[str, dict[str, float]]) -> Figure:
    """Where many points end, with the share of the variance that is left."""
    with drawing():
        figure, axes = panels(1, len(ends), width=4.2, height=5.2)
        headline(
            figure,
            f"Variance that DDPM keeps: {_percent(walks['ddpm']['variance'])}, without the noise it adds "
            f"on its way {_percent(walks['ddpm without noise']['variance'])}",
        )
        for one, (shown, points) in zip(axes[0], ends.items(), strict=True):
            kept, full = _percent(walks[shown]["variance"]), 100 * walks[shown]["coverage"]
            plane(one, f"{NAMES[shown]}\n{kept} of the variance\n{full:.0f} % of the curve", reach=1.4)
            draw_curve(one)
            draw_cloud(one, points, COLOURS[shown], size=9)
        outer_labels(axes)
        save(figure, folder / "ends.png")
    return Figure(
        file="ends.png",
        caption=f"Where {len(points)} points end that start from the same noise: with DDPM, with DDPM but for the "
        "noise that it adds on its way, and with DDIM, which adds none. Look at how much of the spiral is reached.",
    )


def _percent(share: float) -> str:
    """Small ones with one digit that is not 0."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def figure_of_evaluations(folder: Path, rows: list[dict[str, Any]], floor: tuple[float, float], few: int) -> Figure:
    """Distance from the spiral against calls of the network, a line for each sampler.

    floor: the least and the greatest distance between as many true points and others. few: steps that are named.
    """
    top = 0.6
    found = {row["sampler"]: row["energy"] for row in rows if row["steps"] == few}
    named = (f"{NAMES[name]} {found[name]:.2g}" for name in ("ddpm", "ddim", "dpmpp_2m"))
    with drawing():
        figure, axes = panels(1, 1, width=7.6, height=5.2)
        headline(figure, f"At {few} steps: {', '.join(named)}")
        one = axes[0, 0]
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            mine = [row for row in rows if row["sampler"] == sampler]
            one.plot(
                [row["evaluations"] for row in mine],
                [row["energy"] for row in mine],
                color=COLOURS[sampler],
                marker=MARKS[sampler],
                markersize=7,
                label=NAMES[sampler],
            )
            for row in mine:
                if row["energy"] > top:
                    one.annotate(f"{NAMES[sampler]}: {row['energy']:.2g}", (row["evaluations"], 0.9 * top),
                                 (row["evaluations"], 0.5 * top), color=COLOURS[sampler], ha="center", va="top",
                                 arrowprops={"arrowstyle": "->", "color": COLOURS[sampler]})  # fmt: skip
        one.axhspan(*floor, color=COLOURS["data"], alpha=0.22, linewidth=0, zorder=0)
        one.text(2, 0.85 * floor[0], "data against other data", color=COLOURS["data"], va="top")
        one.set_ylim(min(2e-4, 0.5 * floor[0]), top)
        one.set_xscale("log", base=2), one.set_yscale("log")
        ticks = [2, 4, 8, 16, 32, 64, 128]
        one.set_xticks(ticks, [str(tick) for tick in ticks])
        one.yaxis.set_major_formatter("{x:g}")
        one.set_xlabel("evaluations of the network"), one.set_ylabel("energy distance from the spiral")
        one.legend(loc="upper right")
        save(figure, folder / "evaluations.png")
    return Figure(
        file="evaluations.png",
        caption="How far the drawn points, as a whole, are from the spiral's (energy distance: 0 only if they are "
        "spread over it as the data is) against how often the network was asked (Heun asks twice a step). Blue band: "
        "true points against other true points. The lower and the farther left a line, the better.",
    )


def walk_animation(folder: Path, network: Trained, frames: int, seed: int, on_progress: Progress | None) -> Figure:
    """DDPM with and without its noise, side by side, from the same start."""
    pair = {shown: SHOWN[shown] for shown in ("ddpm", "ddpm without noise")}
    ways = {shown: walk(sampler, network, network.config.grid(frames - 1 or 1), 500, seed)
            for shown, sampler in pair.items()}  # fmt: skip
    sigmas, pictures = [*ways["ddpm"].sigmas.tolist(), 0.0], []
    with drawing():
        for step, sigma in enumerate(sigmas):
            figure, axes = panels(1, 2, width=4.2, height=4.9)
            headline(figure, "DDPM with the noise that it adds on its way, and without")
            for one, (shown, way) in zip(axes[0], ways.items(), strict=True):
                plane(one, f"{NAMES[shown]}, σ = {sigma:.2g}", reach=1.5)
                draw_curve(one)
                draw_cloud(one, way.path[step], COLOURS[shown], size=11, alpha=0.8)
            outer_labels(axes)
            pictures.append(frame(figure))
            if on_progress:
                on_progress(step + 1, len(sigmas), stage="animation")
        save_animation([*pictures, *[pictures[-1]] * 10], folder / "walk.gif", seconds=0.15)
    return Figure(
        file="walk.gif",
        caption="500 points walk from noise to the data, with DDPM's noise (left) and without (right): the same "
        "network, the same start.",
    )
