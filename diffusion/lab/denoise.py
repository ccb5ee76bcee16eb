"""`unclip lab denoise`: what a decoder believes at every noise level, and why it takes a walk to make a picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_train.settings import Progress, UserError
from diffusion.animation import save_animation
from diffusion.generate import Generator, Sampling
from diffusion.grid import draw_grid, read_axis
from diffusion.lab import denoise_figures as figures
from diffusion.lab.belief import Real, Track, among_seeds, detail, error, ratio, saturation
from diffusion.lab.experiment import Experiment, Figure, Finding
from diffusion.lab.style import drawing, save

ENDS = 6  # pictures that are drawn at the corners of the grid too, so that no finding rests on one


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """Everything that decides what `lab denoise` shows."""

    count: int = 12  # pictures measured
    levels: tuple[float, ...] = (0.1, 0.3, 0.7, 1.5, 4.0, 20.0)  # sigma, in units of pixels in [-1, 1]
    steps: int = 16  # of a walk from sigma_max; from a lower level as many fewer as there is less way (in ln sigma)
    sampler: str = "dpmpp_2m_sde"  # of the walks: as random as the truth is
    random_steps: int = 24  # of ddpm, with its noise and without
    seeds: int = 5  # walks of one picture there
    untold: int = 16  # walks that are told nothing: more, as they end farther apart
    grid_steps: tuple[int, ...] = (1, 3, 5, 8, 16)
    grid_guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    belief_steps: int = 17  # of the walk that is shown step by step
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 5 or min(self.seeds, self.steps, self.random_steps) < 2 or self.belief_steps < 8:
            raise UserError(f"count {self.count} must be at least 5, seeds {self.seeds}, steps {self.steps} and "
                            f"random_steps {self.random_steps} at least 2, belief_steps {self.belief_steps} at "
                            f"least 8")  # fmt: skip
        if self.untold < self.seeds:
            raise UserError(f"untold {self.untold} must be at least seeds, {self.seeds}: as many are shown")
        if len(self.levels) < 2 or list(self.levels) != sorted(set(self.levels)) or self.levels[0] <= 0.01:
            raise UserError("levels: two or more rising sigmas above 0.01")
        if 1.0 not in self.grid_guidance or len(self.grid_steps) < 2:
            raise UserError("grid_guidance needs 1 among its values, grid_steps two values")


def denoise(config: DenoiseConfig, folder: Path, on_progress: Progress | None = None, *, real: Real) -> Experiment:
    """What the generator of `real` believes of these pictures; see the findings. real: at least 5 pictures."""
    parts: list[tuple[str, Callable]] = [("levels", by_level), ("no noise", without_noise), ("grid", by_settings),
                                         ("belief", believing), ("zero steps", from_nothing)]  # fmt: skip
    made = {}
    for number, (stage, part) in enumerate(parts):
        if on_progress:
            on_progress(number, len(parts), stage=stage)
        made[stage] = part(config, real, folder)
    if on_progress:
        on_progress(len(parts), len(parts), stage="done")
    return Experiment(
        title="What a decoder believes",
        figures=[figure for part in made.values() for figure in part.figures],
        findings=[finding for part in made.values() for finding in part.findings],
        tables={name: rows for part in made.values() for name, rows in part.tables.items()},
    )


def by_level(config: DenoiseConfig, real: Real, folder: Path) -> Experiment:
    """One step against the full walk, from real pictures noised to each level."""
    how = _how(config, real.generator)
    own, table, shown = detail(real.x0), [], []
    for sigma in config.levels:
        x = real.noisy(sigma, config.seed)
        once, walked = real.believed(x, sigma, how), real.walked(config.seed, _shorter(how, sigma), x, sigma)
        errors = {"one_step_error": error(once, real.x0), "walk_error": error(walked, real.x0)}
        details = {"one_step_detail": ratio(detail(once), own), "walk_detail": ratio(detail(walked), own)}
        table.append({"sigma": sigma, **errors, **details})
        shown.append((sigma, x, once, walked))
    with drawing():
        save(figures.by_level(real, shown, table[-1]), folder / "levels.png")
        save(figures.detail_and_error(table), folder / "blur.png")
    first, last = table[0], table[-1]
    ratios = [ratio(row["walk_error"], row["one_step_error"]) for row in table]
    return Experiment(
        title="one step and the walk",
        figures=[
            Figure(file="levels.png", caption="Real pictures under more and more noise (top rows), what the decoder "
                   "believes of them in one step (middle), and where the full walk from the same noise ends (bottom). "
                   "One step aims at the mean of all pictures it could have been, the walk at one of them."),
            Figure(file="blur.png", caption="Left: fine detail, the real pictures' being 1. Right: squared distance to "
                   "the real picture. For an exact model the walk's is twice that of the one step."),
        ],
        findings=[
            Finding(name="one_step_is_blurred", says="one step from almost pure noise keeps of real pictures' detail",
                    value=last["one_step_detail"], high=0.6, unit="x"),
            Finding(name="walk_is_sharp", says="the full walk from the same noise has of real pictures' detail",
                    value=last["walk_detail"], low=0.6, high=1.6, unit="x"),
            Finding(name="mean_is_nearer", says="yet the walk's picture is farther from the true one than the blurred "
                    "guess, mean over the levels (2 for an exact model)", value=float(np.exp(np.mean(np.log(ratios)))),
                    low=1.3, high=2.7, unit="x the squared error"),
            Finding(name="little_noise_is_no_riddle", says="error of one step from the lowest level, over that from "
                    "the highest", value=ratio(first["one_step_error"], last["one_step_error"]), high=0.25, unit="x"),
        ],
        tables={"levels": table},
    )  # fmt: skip


def without_noise(config: DenoiseConfig, real: Real, folder: Path) -> Experiment:
    """DDPM with its noise and without: one picture told, and nothing told."""
    one, made = real.some([0]), {}
    how = replace(_how(config, real.generator), steps=config.random_steps, eta=None)
    told, blind, top = one.repeated(config.seeds), one.repeated(config.untold), how.sigma_max
    for sampler in ("ddpm", "ddpm_mean"):
        made["told what to draw", sampler] = told.walked(config.seed, replace(how, sampler=sampler))
    for sampler in ("ddpm", "ddpm_mean"):
        free = replace(how, sampler=sampler, guidance=0.0)
        made["told nothing", sampler] = blind.walked(config.seed, free, blind.untold(top, config.seed), top)
    own = detail(one.x0)
    table = [{"told": told, "sampler": sampler, "variance_among_seeds": among_seeds(pictures, len(pictures)),
              "detail": ratio(detail(pictures), own)} for (told, sampler), pictures in made.items()]  # fmt: skip
    kept, untold = (ratio(table[row + 1]["variance_among_seeds"], table[row]["variance_among_seeds"]) for row in (0, 2))
    with drawing():
        shown = {name: pictures[: config.seeds] for name, pictures in made.items()}
        save(figures.without_noise(real, shown, kept, untold), folder / "no-noise.png")
    return Experiment(
        title="the walk without its noise",
        figures=[Figure(file="no-noise.png", caption="The same walks from the same starts, with the noise that DDPM "
                        "adds after each step and without it. Look at how far the pictures of different starts are "
                        "apart, and how sharp they are.")],
        findings=[
            Finding(name="no_noise_collapses", says="without the added noise, told what to draw: variance among starts "
                    "kept", value=100 * kept, high=50.0, unit="%"),
            Finding(name="no_noise_collapses_untold", says="without the added noise, told nothing: variance among "
                    "starts kept", value=100 * untold, high=50.0, unit="%"),
            Finding(name="no_noise_blurs", says="without the added noise, told nothing: detail, over that with noise",
                    value=ratio(table[3]["detail"], table[2]["detail"]), high=0.7, unit="x"),
        ],
        tables={"no noise": table},
    )  # fmt: skip


def by_settings(config: DenoiseConfig, real: Real, folder: Path) -> Experiment:
    """Steps down, guidance across."""
    generator, one = real.generator, real.some([1])
    axes = [read_axis(f"guidance={','.join(f'{value:g}' for value in config.grid_guidance)}"),
            read_axis(f"steps={','.join(map(str, config.grid_steps))}")]  # fmt: skip

    def draw(how: Sampling, seed: int) -> Any:
        return generator.from_embeddings(one.rows, [seed], how, captions=one.told)[0]

    how = replace(_how(config, generator), sampler="dpmpp_2m", eta=None)
    made = [picture for _, picture in draw_grid(draw, axes, how, config.seed)]
    across = len(config.grid_guidance)
    rows = [[one.picture for one in made[low : low + across]] for low in range(0, len(made), across)]
    table = [{"steps": steps, "guidance": guidance, "detail": ratio(detail(_tensor(picture)), detail(one.x0)),
              "saturation": saturation(_tensor(picture))}
             for steps, row in zip(config.grid_steps, rows, strict=True)
             for guidance, picture in zip(config.grid_guidance, row, strict=True)]  # fmt: skip
    some, steps, strong = real.some(slice(0, ENDS)), config.grid_steps, config.grid_guidance[-1]
    corners = (steps[0], 1.0), (steps[-1], 1.0), (steps[-1], strong)
    few, most, insisting = (some.walked(config.seed, replace(how, steps=count, guidance=guidance)).clamp(-1, 1)
                            for count, guidance in corners)  # fmt: skip
    sharper, brighter = ratio(detail(most), detail(few)), ratio(saturation(insisting), saturation(most))
    with drawing():
        save(figures.by_settings(one, rows, steps, config.grid_guidance, sharper, brighter), folder / "grid.png")
    findings = [
        Finding(name="steps_sharpen", says=f"{len(some)} pictures' detail after {steps[-1]} steps over that after "
                f"{steps[0]}, at guidance 1", value=sharper, low=1.2, unit="x"),
        Finding(name="guidance_saturates", says=f"{len(some)} pictures' colour spread at guidance {strong:g} over that "
                "at 1", value=brighter, low=1.03, unit="x"),
    ]  # fmt: skip
    return Experiment(
        title="steps and guidance",
        figures=[Figure(file="grid.png", caption="One embedding, one seed. Look down for how sharp the picture is, and "
                        "across for how clear and how colourful.")],
        findings=findings,
        tables={"grid": table},
    )  # fmt: skip


def believing(config: DenoiseConfig, real: Real, folder: Path) -> Experiment:
    """Where the walk is beside what it believes."""
    few, track = real.some(slice(0, 3)), Track()
    how = replace(real.generator.how, sampler="ddim", eta=None, steps=config.belief_steps)
    end = few.walked(config.seed, how, around=track.around)
    away = track.unsettled(end)
    settled = next((sigma for sigma, left in zip(track.sigmas, away, strict=True) if left <= 0.5), float("nan"))
    with drawing():
        save(figures.beliefs(track, 0), folder / "belief.png")
        frames = figures.belief_frames(track)
    save_animation([*frames, *frames[-1:] * 8], folder / "belief.gif", seconds=0.3)
    table = [{"sigma": sigma, "unsettled": left} for sigma, left in zip(track.sigmas, away, strict=True)]
    return Experiment(
        title="what the model believes",
        figures=[
            Figure(file="belief.png", caption="A walk from noise to a picture. Above: where it is. Below: what the "
                   "decoder believes it will be, from the first step on. Look at when it settles."),
            Figure(file="belief.gif", caption="The same for three pictures, step by step."),
        ],
        findings=[
            Finding(name="belief_starts_at_once", says="the first belief, in nothing but noise, against a grey "
                    "picture: squared distance from the end",
                    value=ratio(error(track.believed[0], end), error(torch.zeros_like(end), end)), high=0.8, unit="x"),
            Finding(name="half_settled", says="half of what the first belief left open is settled by the noise level",
                    value=settled, low=0.3, high=12.0, unit="sigma"),
        ],
        tables={"belief": table},
    )  # fmt: skip


def from_nothing(config: DenoiseConfig, real: Real, folder: Path) -> Experiment:
    """Zero steps of sampling, the linear guess, one step, and all of them."""
    few, track = real.some(slice(0, 5)), Track()
    how = replace(real.generator.how, sampler="dpmpp_2m", eta=None, steps=config.steps)
    end = few.walked(config.seed, how, around=track.around)
    guess = real.generator.guess(real.rows, how).cpu()
    with drawing():
        save(figures.from_nothing(few, track, guess[: len(few)], end), folder / "zero-steps.png")
    mean = real.x0.mean(0, keepdim=True).expand_as(real.x0)
    return Experiment(
        title="zero steps",
        figures=[Figure(file="zero-steps.png", caption="Without a step there is noise. Below it the decoder's "
                        "linear guess, which knows the embedding and no noise, its answer after one step, and where "
                        "the walk ends.")],
        findings=[
            Finding(name="guess_knows_something", says="squared error of the linear guess over that of the pictures' "
                    "own mean", value=ratio(error(guess, real.x0), error(mean, real.x0)), high=0.9, unit="x"),
            Finding(name="guess_is_a_ghost", says="detail of the linear guess, of real pictures'",
                    value=ratio(detail(guess), detail(real.x0)), high=0.3, unit="x"),
        ],
        tables={"zero steps": [{"start_error": error(track.x[0], few.x0), "linear_guess_error": error(guess, real.x0),
                                "mean_error": error(mean, real.x0), "one_step_error": error(track.believed[0], few.x0),
                                "walk_error": error(end, few.x0)}]},
    )  # fmt: skip


def _how(config: DenoiseConfig, generator: Generator) -> Sampling:
    return replace(generator.how, steps=config.steps, sampler=config.sampler, guidance=1.0, sigma_max=config.levels[-1])


def _shorter(how: Sampling, sigma: float) -> Sampling:
    """As fine a walk for the way that is left from sigma."""
    share = np.log(sigma / how.sigma_min) / np.log(how.sigma_max / how.sigma_min)
    return replace(how, steps=max(2, round(float(how.steps * share))))


def _tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
