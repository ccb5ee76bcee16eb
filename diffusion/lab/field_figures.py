"""The figures of `unclip lab spiral`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.settings import Progress
from diffusion.animation import save_animation
from diffusion.lab.experiment import Figure
from diffusion.lab.noising import random_walk
from diffusion.lab.plane import PlaneConfig, Trained
from diffusion.lab.plane_figures import FAINT, draw_cloud, draw_curve, draw_field, draw_paths, headline, level_axis
from diffusion.lab.spiral import Spiral, seeded
from diffusion.lab.style import COLOURS, drawing, frame, outer_labels, panels, plane, save
from diffusion.lab.walks import at_level, walk
from diffusion.samplers import Denoise
from diffusion.schedule import karras_sigmas

TOTAL, STEP, BLIND, DATA = "total noise", "one step", "no noise level", "data"
COLOUR = {DATA: COLOURS["data"], TOTAL: COLOURS["model"], STEP: COLOURS["one step"], BLIND: COLOURS["no noise level"]}
LEVELS = (2.0, 0.5, 0.2, 0.05)  # noise levels at which the field is drawn


def figure_of_forward(folder: Path, spiral: Spiral, config: PlaneConfig, seed: int, count: int = 700) -> Figure:
    """The random walk from the data to noise, with the way of three points."""
    rng = seeded(seed + 4)
    x0, _ = spiral.draw(count, rng)
    sigmas = torch.cat([config.walk.new_zeros(1), config.walk])
    way = torch.stack(list(random_walk(x0, sigmas, lambda: torch.randn(x0.shape, generator=rng))))
    shown = (sigmas <= 1).sum()
    staying = (way[:shown].abs().amax((0, 2)) < 2.1).nonzero()[:, 0]  # within the picture all the time
    followed = [staying[_nearest_to(x0[staying], place)] for place in ((-0.05, 0.55), (0.45, -0.65), (-0.65, 0.0))]
    with drawing():
        figure, axes = panels(1, 4, width=3.5, height=4.3)
        headline(figure, "A random walk carries every point away, until nothing of the spiral is left")
        for one, sigma in zip(axes[0], (0.0, 0.1, 0.3, 1.0), strict=True):
            upto = int((sigmas <= sigma).sum()) - 1
            plane(one, "data" if not sigma else f"σ = {sigma:g}", reach=2.2)
            draw_cloud(one, way[upto], COLOURS["data" if not sigma else "noise"], alpha=0.7)
            draw_paths(one, way[: upto + 1, followed], "black", width=1.0)
        outer_labels(axes)
        save(figure, folder / "forward.png")
    return Figure(
        file="forward.png",
        caption=f"A random walk of {config.walk_steps} small steps takes every point away from the spiral, until "
        "nothing of it is left; σ is the noise level, the standard deviation of all steps so far. Three points are "
        "followed (black): rings where they start, dots where they are.",
    )


def figure_of_targets(
    folder: Path, spiral: Spiral, config: PlaneConfig, seed: int, sigma: float = 0.3, count: int = 60
) -> Figure:
    """At one noisy point: what the total noise, and what the last step, of walks that lead there say of the origin."""
    rng = seeded(seed + 5)
    x = torch.tensor([0.1, 0.62])
    spread = spiral.spread**2 + sigma**2
    likely = (-(x - spiral.points).square().sum(1) / (2 * spread)).softmax(0)
    row = torch.multinomial(likely, count, replacement=True, generator=rng)
    kept = spiral.spread**2 / spread
    x0 = spiral.points[row] + kept * (x - spiral.points[row])
    x0 = x0 + (kept * sigma**2) ** 0.5 * torch.randn(count, 2, generator=rng)
    share = config.step_share
    noise = (x - x0) / sigma
    step = share**0.5 * noise + (1 - share) ** 0.5 * torch.randn(count, 2, generator=rng)
    exact = at_level(spiral.denoise, x[None], sigma)
    with drawing():
        figure, axes = panels(1, 2, width=4.6, height=5.2)
        headline(figure, "The total noise tells where the data is, a single step hardly does")
        for one, guess, name in ((axes[0, 0], x0, TOTAL), (axes[0, 1], x - sigma * step / share**0.5, STEP)):
            plane(one, "back along the total noise" if name == TOTAL else "back along the last step")
            draw_curve(one)
            for end in guess:
                one.plot(*torch.stack([x, end]).T, color=COLOUR[name], linewidth=1.2, alpha=0.55, zorder=1)
            draw_cloud(one, guess, COLOUR[name], size=16, alpha=0.9)
            one.scatter(*x, s=90, c="white", edgecolors="black", linewidths=2, zorder=5, label="noisy point x")
            one.scatter(*exact.T, s=240, marker="*", c=COLOURS["exact"], edgecolors="white", linewidths=0.8, zorder=6,
                        label="mean of all lines")  # fmt: skip
        axes[0, 0].legend(loc="lower left", borderaxespad=0.1)
        outer_labels(axes)
        save(figure, folder / "targets.png")
    return Figure(
        file="targets.png",
        caption=f"{count} walks that all arrive at one noisy point (noise level {sigma:g}). Left: back along their "
        "total noise, each line ends on the spiral. Right: back along their last step, drawn out to the same mean: the "
        f"lines go everywhere, far beyond the picture. A step is {100 * share:.2g} % of the walk's variance.",
    )


def figure_of_losses(folder: Path, levels: list[float], losses: list[dict[str, Any]]) -> Figure:
    """Variance, floor and loss of both targets against the noise level."""
    variance = {
        STEP: [row["step_over_total"] * row["total_floor"] for row in losses],
        TOTAL: [row["total_floor"] for row in losses],
    }
    with drawing():
        figure, axes = panels(1, 2, width=5.4, height=4.7)
        left_over = (100 * sum(row[f"{key}_loss"] for row in losses) / len(losses) for key in ("step", "total"))
        headline(
            figure, "Left unexplained: {:.3g} % of one step's noise, {:.3g} % of the total noise".format(*left_over)
        )
        left, one = axes[0]
        for name, values in variance.items():
            left.plot(levels, values, color=COLOUR[name], marker="o", markersize=7)
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.set_ylim(top=1000)
        left.set_title("Variance of the target around its mean at x")
        left.text(levels[-1], 100, "noise of one step,\nscaled up to the same mean", color=COLOUR[STEP], ha="right",
                  va="bottom", fontsize=13)  # fmt: skip
        left.text(levels[0], 0.3, "total noise", color=COLOUR[TOTAL], va="top", fontsize=13)
        left.set_ylabel("in units of the noise's own variance")
        one.set_title("Loss of the network, and its floor")
        for name, key in ((STEP, "step"), (TOTAL, "total")):
            one.plot(levels, [row[f"{key}_floor"] for row in losses], color=COLOUR[name], zorder=2)
            one.scatter(levels, [row[f"{key}_loss"] for row in losses], color=COLOUR[name], s=52, zorder=3)
        one.text(levels[-1], 1.03, "noise of one step", color=COLOUR[STEP], ha="right", va="bottom", fontsize=13)
        one.text(0.9, 0.33, "total noise", color=COLOUR[TOTAL], ha="left", va="bottom", fontsize=13)
        one.plot([], [], color="#555555", label="floor")
        one.scatter([], [], color="#555555", s=52, label="loss")
        one.set_ylim(0, 1.15)
        one.set_ylabel("share of the target's variance")
        level_axis(left), level_axis(one)
        one.legend(loc="lower left")
        save(figure, folder / "loss.png")
    return Figure(
        file="loss.png",
        caption="Both targets lead to the same mean. Left: around it the noise of a single step varies many times more "
        "than the total noise. Right: so nearly all of one step is unknowable from where one is, its floor is close to "
        "1; of the total noise more and more can be known as it grows. Lines: the floor, from the exact score; "
        "dots: the losses that the two networks reached.",
    )


def figure_of_samples(folder: Path, drawn: dict[str, Tensor], quality: dict[str, dict[str, float]]) -> Figure:
    """True points beside those drawn by each network."""
    heads = {DATA: "data", TOTAL: "total noise, told its level", STEP: "one step, told its level",
             BLIND: "total noise, not told its level"}  # fmt: skip
    with drawing():
        figure, axes = panels(1, len(drawn), width=3.5, height=4.3)
        headline(figure, "The spiral, and what three networks draw that were trained in three ways")
        for one, (name, points) in zip(axes[0], drawn.items(), strict=True):
            plane(one, f"{heads[name]}\n{quality[name]['distance']:.3f} from the spiral", reach=1.3)
            draw_cloud(one, points, COLOUR[name])
        outer_labels(axes)
        save(figure, folder / "samples.png")
    return Figure(
        file="samples.png",
        caption="Points that each network draws (ddpm), alike in size, training and seed: compare them with the data. "
        "They differ in whether they learned the total noise, and in whether they are told how much there is. Numbers: "
        "mean distance to the curve.",
    )


def figure_of_fields(folder: Path, spiral: Spiral, learned: Denoise, worst: float) -> Figure:
    """The learned field above the exact one. worst: its greatest relative error."""
    with drawing():
        figure, axes = panels(2, len(LEVELS), width=3.4, height=3.85)
        headline(figure, f"Learned arrows (above) and the exact score (below): worst error {100 * worst:.0f} %")
        _draw_row(axes[0], "learned", learned, COLOURS["model"])
        _draw_row(axes[1], "exact", spiral.denoise, COLOURS["exact"])
        outer_labels(axes)
        save(figure, folder / "field.png")
    return Figure(
        file="field.png",
        caption="Where the arrows point from each noisy point: to the middle of everything while noise is high, to the "
        "nearest turn of the spiral when it is low. Above: the network's; below: the exact score of the training "
        "points. Short arrows are drawn longer than they are.",
    )


def figure_of_blind_field(folder: Path, blind: Denoise, worst: float) -> Figure:
    """The field of the network that is not told the noise level. worst: its greatest relative error."""
    with drawing():
        figure, axes = panels(1, len(LEVELS), width=3.4, height=4.3)
        headline(figure, f"Arrows of a network that is not told the noise level: worst error {100 * worst:.0f} %")
        _draw_row(axes[0], "not told", blind, COLOURS["no noise level"])
        outer_labels(axes)
        save(figure, folder / "blind.png")
    return Figure(
        file="blind.png",
        caption="Without the noise level the network has one and the same field for all levels but for the scale of x: "
        "a compromise between the middle and the turns.",
    )


def figure_of_errors(folder: Path, levels: list[float], errors: dict[str, list[float]]) -> Figure:
    """Relative error of each network's field against the noise level."""
    with drawing():
        figure, axes = panels(1, 1, width=7.2, height=4.9)
        worst = (f"{name} {100 * max(errors[name]):.0f} %" for name in (TOTAL, STEP))
        headline(figure, f"Worst error of the field: {', '.join(worst)}")
        one = axes[0, 0]
        for name, mark in ((STEP, "s"), (BLIND, "^"), (TOTAL, "o")):
            one.plot(levels, [100 * error for error in errors[name]], color=COLOUR[name], marker=mark, label=name)
        one.axhline(100, color=COLOURS["noise"], linewidth=1.2, linestyle="--", zorder=0)
        one.text(levels[-1], 103, "as wrong as no arrow at all", ha="right", va="bottom", color="#555555", fontsize=11)
        level_axis(one)
        one.set_ylim(0, max(112, 110 * max(max(error) for error in errors.values())))
        one.set_ylabel("error of the learned field, % of its length")
        one.legend(loc="center right")
        save(figure, folder / "error.png")
    return Figure(
        file="error.png",
        caption="How far each learned field is from the exact score, as a share of its length, at every noise level. "
        "At 100 % (dashed) no arrow at all would be as good.",
    )


def field_animation(folder: Path, denoise: Trained, frames: int, seed: int, on_progress: Progress | None) -> Figure:
    """Noise turning into the spiral over the field that carries it, on the plane shrunk to the data's size."""
    way = walk("ddim", denoise, karras_sigmas(max(frames - 1, 1), denoise.config.sigma_min, LEVELS[0]), 500, seed)
    path, pictures = way.path, []
    with drawing():
        for step, points in enumerate(path):
            last = step == len(path) - 1
            sigma = float(way.sigmas[min(step, way.calls - 1)])
            figure, axes = panels(1, 1, width=4.8, height=5.2)
            headline(figure, "Noise on its way along the arrows")
            plane(axes[0, 0], f"σ = {0 if last else sigma:.2g}", reach=1.5)
            draw_field(axes[0, 0], denoise, sigma, FAINT, cells=13, reach=1.4, vp=True)
            draw_cloud(axes[0, 0], points, COLOURS["model"], size=11, alpha=0.9, zorder=5)
            pictures.append(frame(figure))
            if on_progress:
                on_progress(step + 1, len(path), stage="animation")
        save_animation([*pictures, *[pictures[-1]] * 10], folder / "field.gif", seconds=0.15)
    return Figure(
        file="field.gif",
        caption="The field changes as the noise level σ falls (grey), and points that began as noise follow it (red). "
        "The plane is shrunk to the size of the data at every level.",
    )


def _draw_row(axes, name: str, denoise: Denoise, colour: str) -> None:
    for one, sigma in zip(axes, LEVELS, strict=True):
        plane(one, f"{name}, σ = {sigma:g}", reach=1.4)
        draw_curve(one)
        draw_field(one, denoise, sigma, colour, cells=13, reach=1.4)


def _nearest_to(points: Tensor, place: tuple[float, float]) -> int:
    return int((points - torch.tensor(place)).norm(dim=1).argmin())
