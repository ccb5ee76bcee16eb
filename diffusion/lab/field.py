"""`unclip lab spiral`: what is trained, why on the total noise, why with the noise level, and how near the exact field.

Three networks alike in all but one thing learn the spiral: "total noise" (as the real ones do), "one step" (only the
noise of the random walk's last step), "no noise level" (total noise, but not told how much there is).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clip_train.settings import Progress, UserError
from diffusion.lab.experiment import Experiment, Finding
from diffusion.lab.field_figures import (
    BLIND,
    DATA,
    STEP,
    TOTAL,
    field_animation,
    figure_of_blind_field,
    figure_of_errors,
    figure_of_fields,
    figure_of_forward,
    figure_of_losses,
    figure_of_samples,
    figure_of_targets,
)
from diffusion.lab.plane import PlaneConfig, Trained, noise_and_step, one_step_target, scores, train_plane
from diffusion.lab.plane_figures import draw_all
from diffusion.lab.spiral import Spiral, seeded
from diffusion.lab.walks import at_level, walk
from diffusion.samplers import Denoise


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Everything that decides the numbers of `lab spiral`."""

    plane: PlaneConfig = PlaneConfig()  # of the network that learns the total noise
    points: int = 500  # training points on the spiral
    drawn: int = 4000  # points drawn by each network, and true ones they are held against
    draw_steps: int = 64  # of ddpm
    levels: int = 12  # noise levels at which errors are measured, evenly spread over ln sigma
    frames: int = 40  # of the animation; 0: none

    def __post_init__(self) -> None:
        if self.drawn < 100 or self.levels < 2 or self.draw_steps < 1 or self.frames < 0:
            raise UserError("lab spiral: needs drawn >= 100, levels >= 2, draw_steps >= 1 and frames >= 0")


def field(config: FieldConfig, folder: Path, on_progress: Progress | None = None) -> Experiment:
    """Train the three networks, measure them, draw them."""
    plane, seed = config.plane, config.plane.seed
    spiral = Spiral.of(config.points, seed=seed)
    kinds = {TOTAL: plane, STEP: replace(plane, target="step"), BLIND: replace(plane, level=False)}
    trained = {
        name: train_plane(kind, spiral, on_progress, f"training, {name}", folder) for name, kind in kinds.items()
    }
    rng = seeded(seed + 1)
    true, again = spiral.draw(config.drawn, rng)[0], spiral.draw(config.drawn, rng)[0]
    grid = plane.grid(config.draw_steps)
    drawn, quality = {DATA: again}, {DATA: scores(spiral, again, true)}
    for done, (name, network) in enumerate(trained.items()):
        drawn[name] = walk("ddpm", network, grid, config.drawn, seed).end
        quality[name] = scores(spiral, drawn[name], true)
        if on_progress:
            on_progress(done + 1, len(trained), stage="samples")
    levels = torch.logspace(*torch.tensor([plane.sigma_min, plane.sigma_max]).log10().tolist(), config.levels).tolist()
    errors: dict[str, list[float]] = {name: [] for name in trained}
    losses = []
    for done, sigma in enumerate(levels):
        losses.append(known_and_unknown(trained, spiral, sigma, seed))
        for name, network in trained.items():
            errors[name].append(relative_error(network, spiral, sigma, seed))
        if on_progress:
            on_progress(done + 1, len(levels), stage="errors")

    figures = draw_all(
        [
            partial(figure_of_forward, folder, spiral, plane, seed),
            partial(figure_of_targets, folder, spiral, plane, seed),
            partial(figure_of_losses, folder, levels, losses),
            partial(figure_of_samples, folder, drawn, quality),
            partial(figure_of_fields, folder, spiral, trained[TOTAL], max(errors[TOTAL])),
            partial(figure_of_blind_field, folder, trained[BLIND], max(errors[BLIND])),
            partial(figure_of_errors, folder, levels, errors),
        ],
        on_progress,
    )
    if config.frames:
        figures.append(field_animation(folder, trained[TOTAL], config.frames, seed, on_progress))
    return Experiment(
        title="A field of arrows that leads noise back to the data",
        figures=figures,
        findings=findings(plane, quality, errors, losses),
        tables={
            "quality": [{"network": name, **numbers} for name, numbers in quality.items()],
            "training": [{"network": name, "loss": network.loss} for name, network in trained.items()],
            "field_error": [{"sigma": sigma, **{name: errors[name][i] for name in errors}}
                            for i, sigma in enumerate(levels)],
            "loss": [{"sigma": sigma, **losses[i]} for i, sigma in enumerate(levels)],
        },
    )  # fmt: skip


def relative_error(denoise: Denoise, spiral: Spiral, sigma: float, seed: int, count: int = 1000) -> float:
    """Root mean square error of the learned score over that of the exact one, at noisy points of that level.

    (denoised - exact) / (exact - x): sigma^2, by which both scores are divided, cancels.
    """
    rng = seeded(seed + 2)
    x = spiral.draw(count, rng)[0] + sigma * torch.randn(count, 2, generator=rng)
    exact = at_level(spiral.denoise, x, sigma)
    wrong = at_level(denoise, x, sigma) - exact
    return (wrong.square().sum() / (exact - x).square().sum()).sqrt().item()


def known_and_unknown(
    trained: dict[str, Trained], spiral: Spiral, sigma: float, seed: int, count: int = 4000
) -> dict[str, Any]:
    """Squared errors per pixel of both targets, each a unit Gaussian, at one level: loss of its network, and the floor.

    The floor is the variance of the target given x: no network can be below it. That of the total noise is the exact
    denoiser's error; that of the step follows, 1 - step_share (1 - floor of the total).
    """
    rng = seeded(seed + 3)
    x0 = spiral.draw(count, rng)[0]
    share = trained[STEP].config.step_share
    noise, step = noise_and_step(x0, share, rng)
    x = x0 + sigma * noise
    target, _ = one_step_target(x0, x0.new_full((count,), sigma), noise, step, share)

    def error(denoise: Denoise, wanted: torch.Tensor) -> float:
        return (at_level(denoise, x, sigma) - wanted).square().mean().item() / sigma**2

    floor = error(spiral.denoise, x0)
    return {
        "total_floor": floor,
        "total_loss": error(trained[TOTAL], x0),
        "step_floor": 1 - share * (1 - floor),
        "step_loss": share * error(trained[STEP], target),
        "step_over_total": (1 / share - 1 + floor) / floor,  # variances of what each says of the total noise
    }


def findings(
    plane: PlaneConfig, quality: dict[str, dict], errors: dict[str, list[float]], losses: list[dict[str, Any]]
) -> list[Finding]:
    """The claims of the experiment."""

    def mean(name: str) -> float:
        return sum(row[name] for row in losses) / len(losses)

    def times(name: str, measure: str) -> float:
        return quality[name][measure] / quality[TOTAL][measure]

    return [
        Finding(name="total_floor", unit="%", value=100 * mean("total_floor"), high=70,
                says="of the total noise's variance that much cannot be known from x (mean over the levels)"),
        Finding(name="step_loss_over_total", unit="x", value=mean("step_loss") / mean("total_loss"), low=1.5,
                says="the network that learns one step is left with that many times the loss of the one that learns "
                     "the total noise (both in shares of what they were asked for)"),
        Finding(name="total_loss_over_floor", unit="x", value=mean("total_loss") / mean("total_floor"), low=0.9,
                high=1.25, says="the network's loss on the total noise is near its floor"),
        Finding(name="one_step_distance", unit="x", value=times(STEP, "distance"), low=2,
                says="points drawn by the network that learned one step lie farther from the spiral than those by "
                     "the one that learned the total noise"),
        Finding(name="one_step_energy", unit="x", value=times(STEP, "energy"), low=2,
                says="and their distribution is farther from the spiral's (energy distance)"),
        Finding(name="blind_distance", unit="x", value=times(BLIND, "distance"), low=2,
                says="points drawn by the network that is not told the noise level lie farther from the spiral than "
                     "those by the one that is"),
        Finding(name="blind_energy", unit="x", value=times(BLIND, "energy"), low=2,
                says="and their distribution is farther from the spiral's (energy distance)"),
        Finding(name="field_error", unit="%", value=100 * max(errors[TOTAL]), high=35,
                says="the learned field is that near the exact score at every noise level (relative error, worst of "
                     f"{len(losses)} levels from {plane.sigma_min:g} to {plane.sigma_max:g})"),
        Finding(name="one_step_field_error", unit="%", value=100 * max(errors[STEP]), low=60,
                says="the field learned from one step is not (worst level)"),
    ]  # fmt: skip
