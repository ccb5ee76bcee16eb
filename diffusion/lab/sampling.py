"""`unclip lab sampling`: what the noise of ddpm is for, and what fewer steps cost each sampler."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clip_train.settings import Progress, UserError
from diffusion.lab.experiment import Experiment, Finding
from diffusion.lab.plane import PlaneConfig, Trained, energy_distance, scores, train_plane
from diffusion.lab.plane_figures import draw_all
from diffusion.lab.sampling_figures import (
    SHOWN,
    figure_of_ends,
    figure_of_evaluations,
    figure_of_paths,
    walk_animation,
)
from diffusion.lab.spiral import Spiral, seeded
from diffusion.lab.walks import walk

COMPARED = ("ddpm", "ddim", "heun", "dpmpp_2m")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Everything that decides the numbers of `lab sampling`."""

    plane: PlaneConfig = PlaneConfig()
    points: int = 500  # training points on the spiral
    drawn: int = 4000  # points drawn by each sampler, and true ones they are held against
    many: int = 64  # steps of the walks that are drawn
    few: int = 16  # steps at which ddim and ddpm are compared
    steps: tuple[int, ...] = (2, 4, 8, 16, 32, 64)  # number of steps against which quality is drawn
    frames: int = 40  # of the animation; 0: none

    def __post_init__(self) -> None:
        if self.drawn < 100 or min(self.many, self.few, *self.steps) < 2 or self.frames < 0:
            raise UserError("lab sampling: needs drawn >= 100, at least 2 steps everywhere, and frames >= 0")


def sampling(config: SamplingConfig, folder: Path, on_progress: Progress | None = None) -> Experiment:
    """Train one network on the spiral; walk down with every sampler; measure and draw."""
    seed = config.plane.seed
    spiral = Spiral.of(config.points, seed=seed)
    network = train_plane(config.plane, spiral, on_progress, folder=folder)
    rng = seeded(seed + 1)
    true, again = spiral.draw(config.drawn, rng)[0], spiral.draw(config.drawn, rng)[0]

    ends: dict[str, torch.Tensor] = {}
    walks = {"data": scores(spiral, again, true)}
    for shown, sampler in SHOWN.items():
        ends[shown] = walk(sampler, network, config.plane.grid(config.many), config.drawn, seed).end
        walks[shown] = scores(spiral, ends[shown], true)
        if on_progress:
            on_progress(len(ends), len(SHOWN), stage="walks")
    rows = compared(config, network, spiral, true, on_progress)
    floor = [energy_distance(spiral.draw(config.drawn, rng)[0], true) for _ in range(5)]
    figures = draw_all(
        [
            partial(figure_of_paths, folder, network, config.many, seed),
            partial(figure_of_ends, folder, ends, walks),
            partial(figure_of_evaluations, folder, rows, (min(floor), max(floor)), config.few),
        ],
        on_progress,
    )
    if config.frames:
        figures.append(walk_animation(folder, network, config.frames, seed, on_progress))
    return Experiment(
        title="The noise that is added on the way back, and how few steps will do",
        figures=figures,
        findings=findings(config, walks, rows),
        tables={"walks": [{"sampler": name, **numbers} for name, numbers in walks.items()], "evaluations": rows},
    )


def compared(
    config: SamplingConfig, network: Trained, spiral: Spiral, true: torch.Tensor, on_progress: Progress | None
) -> list[dict[str, Any]]:
    """Scores of what each sampler draws from the same noise at each number of steps, and its calls of the network."""
    rows: list[dict[str, Any]] = []
    counts = sorted({*config.steps, config.few})
    for sampler in COMPARED:
        for steps in counts:
            made = walk(sampler, network, config.plane.grid(steps), config.drawn, config.plane.seed)
            rows.append({"sampler": sampler, "steps": steps, "evaluations": made.calls,
                         **scores(spiral, made.end, true)})  # fmt: skip
            if on_progress:
                on_progress(len(rows), len(COMPARED) * len(counts), stage="samplers")
    return rows


def findings(config: SamplingConfig, walks: dict[str, dict], rows: list[dict[str, Any]]) -> list[Finding]:
    """The claims of the experiment."""
    found = {(row["sampler"], row["steps"]): row for row in rows}
    few, fewest = config.few, min(config.steps)
    bare = walks["ddpm without noise"]
    near = min((row for row in rows if row["sampler"] == "dpmpp_2m"), key=lambda row: abs(row["steps"] - few))
    return [
        Finding(name="ddpm_variance", unit="%", value=100 * walks["ddpm"]["variance"], low=90, high=110,
                says="ddpm keeps the spiral's variance"),
        Finding(name="ddpm_coverage", unit="%", value=100 * walks["ddpm"]["coverage"], low=95,
                says="and reaches all parts of the spiral"),
        Finding(name="no_noise_variance", unit="%", value=100 * bare["variance"], high=50,
                says="without the noise added on the way, ddpm loses most of the variance"),
        Finding(name="no_noise_coverage", unit="%", value=100 * bare["coverage"], high=50,
                says="and reaches only some parts of the spiral"),
        Finding(name="no_noise_distance", value=bare["distance"], high=0.1,
                says="though its points do lie near the spiral: each one good, all of them alike"),
        Finding(name="ddim_over_ddpm", unit="x", value=found["ddim", few]["energy"] / found["ddpm", few]["energy"],
                high=0.9, says=f"at {few} steps ddim's points are nearer the spiral's distribution than ddpm's "
                "(energy distance, ddim over ddpm)"),
        Finding(name="ddim_over_ddpm_distance", unit="x",
                value=found["ddim", few]["distance"] / found["ddpm", few]["distance"], low=1,
                says="by the mean way to the curve alone ddpm is the nearer one: that does not see the variance which "
                     "it has lost (ddim over ddpm)"),
        Finding(name="ddim_variance_at_few", unit="%", value=100 * found["ddim", few]["variance"], low=75,
                says=f"ddim at {few} steps has most of the variance"),
        Finding(name="dpmpp_over_ddim", unit="x", value=near["energy"] / found["ddim", few]["energy"], high=1.0,
                says="a second-order sampler (DPM-Solver++) is nearer still at the same number of calls"),
        Finding(name="fewest_over_many", unit="x", low=10,
                value=found["ddim", fewest]["energy"] / found["ddim", max(config.steps)]["energy"],
                says=f"ddim at {fewest} steps is that much farther from the spiral than at {max(config.steps)}"),
    ]  # fmt: skip
