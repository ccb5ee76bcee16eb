"""`unclip lab forward`: a picture's way to static, and how each schedule of schedule.py divides it into steps."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_train.settings import Progress, UserError
from diffusion.animation import save_animation
from diffusion.lab import cube, noising
from diffusion.lab import forward_figures as figures
from diffusion.lab.experiment import Experiment, Figure, Finding
from diffusion.lab.forward_figures import BANDS, EDGES
from diffusion.lab.noising import PARTS, Way, parts_of
from diffusion.lab.style import drawing, save
from diffusion.samplers import SampleNoise
from diffusion.schedule import DENSITIES, GRIDS
from diffusion.source import Source


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Everything that decides what `lab forward` shows."""

    size: int = 96  # pixels a side
    steps: int = 200  # of each schedule
    sigma_min: float = 0.002  # EDM's ends (arXiv 2206.00364, table 1), data in [-1, 1]
    sigma_max: float = 80.0
    schedule: str = "vp_linear"  # of the walks in the cube
    arrows: int = 20  # steps of these
    walks: int = 16_384  # of the red pixel
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in GRIDS:
            raise UserError(f"no schedule {self.schedule!r}: take {', '.join(GRIDS)}")
        if self.size < 8 or self.steps < len(PARTS) - 1 or self.arrows < 2 or self.walks < 2:
            raise UserError(f"size {self.size} must be at least 8, steps {self.steps} at least {len(PARTS) - 1}, "
                            f"arrows {self.arrows} and walks {self.walks} at least 2")  # fmt: skip
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"sigma_min {self.sigma_min} must be above 0 and below sigma_max {self.sigma_max}")

    @property
    def ends(self) -> dict[str, float]:
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}


def forward(config: ForwardConfig, folder: Path, on_progress: Progress | None = None, *, source: Source) -> Experiment:
    """Five schedules' walks of one picture, three pixels' walks in the RGB cube; see the findings."""
    picture = source.pixels(config.size)
    std = float(picture.std(correction=0))
    if float(picture.flatten(1).std(dim=1).max()) < 0.01:
        raise UserError(f"{source.name} is of one colour: there is no signal to drown; take another picture")
    ways = {}
    for number, name in enumerate(GRIDS):
        ways[name] = Way.of(picture, noising.rising(name, config.steps, **config.ends), config.seed)
        if on_progress:
            on_progress(number + 1, len(GRIDS), stage="walks")
    pixels, places = cube.three_pixels(picture)
    sigmas = noising.rising(config.schedule, config.arrows, **config.ends)
    shown = preserving_walk(picture, sigmas, config.seed)
    red = preserving_walk(pixels[:1].expand(config.walks, -1), sigmas, config.seed)
    walks = torch.stack([red[:, 0], *(shown[:, :, row, column] for column, row in places)], dim=1)
    divided = {f"a walk's steps: {name}": noising.walk_shares(name, EDGES, std, steps=config.steps, **config.ends)
               for name in GRIDS}  # fmt: skip
    trained = {f"training: {name}": noising.training_shares(name, EDGES, std) for name in DENSITIES}

    with drawing():
        save(figures.static(ways), folder / "static.png")
        save(figures.ratios(ways, divided, trained), folder / "schedules.png")
        save(figures.variances(ways, std), folder / "variance.png")
        save(figures.colours(pixels, walks, red), folder / "colours.png")
        frames = figures.frames(shown, walks, places, sigmas, on_progress)
    save_animation([*frames, *frames[-1:] * 6], folder / "walk.gif", seconds=0.35)
    return Experiment(
        title="The way to static",
        figures=[
            Figure(file="static.png", caption="One picture after equal shares of each schedule's steps, at the size "
                   "that the variance-preserving process has. All begin and end alike; the way between is theirs."),
            Figure(file="schedules.png", caption="Left: the signal-to-noise ratio falls from the same start to the "
                   "same end. Right: the share of the steps, and of training, that each schedule spends in each "
                   "band of it."),
            Figure(file="variance.png", caption="Left: the noise that each step adds. Right: the variance of the "
                   "pixels, from the picture's own towards 1; dots are measured, lines the closed form."),
            Figure(file="colours.png", caption="Three pixels on their way, an arrow a step: each takes another. Below "
                   "at the right, where many walks from pure red end, and the way of their mean."),
            Figure(file="walk.gif", caption="The same three pixels beside the picture that goes with them; "
                   "circles show where two of them are."),
        ],
        findings=_findings(config, ways, red, divided, std),
        tables={
            "schedules": [_row(name, part) for name, part in (divided | trained).items()],
            "levels": [
                {"schedule": name, "step": step, "sigma": float(way.sigmas[step]), "noise": float(way.noise[step]),
                 "variance": float(way.preserved[step])}
                for name, way in ways.items() for step in parts_of(config.steps)
            ],
            "end": [{"schedule": name, "correlation": _correlation(way),
                     "signal_share": _signal(std, config.sigma_max) ** 2}
                    for name, way in ways.items()],
            "red pixel": [{"step": step, **dict(zip(("red", "green", "blue"), row, strict=True))}
                          for step, row in enumerate(cube.levels(red.mean(1)).tolist())],
        },
    )  # fmt: skip


def preserving_walk(x0: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """A walk up rising sigmas, as the variance-preserving process has it: (steps + 1, *x0.shape)."""
    noise = SampleNoise([seed], x0.shape)
    steps = noising.random_walk(x0, sigmas, lambda: noise()[0])
    return torch.stack([noising.preserved(x, sigma) for x, sigma in zip(steps, sigmas, strict=True)])


def _findings(
    config: ForwardConfig, ways: dict[str, Way], red: Tensor, divided: dict[str, list[float]], std: float
) -> list[Finding]:
    """Bands are five sampling errors wide: of a variance of n values (2 / n)^0.5, of a correlation n^-0.5."""
    count = 3 * config.size**2
    of_variance, of_correlation = 5 * (2 / count) ** 0.5, 5 * count**-0.5
    off = max(float(np.abs(way.noise[1:] / way.sigmas[1:].double().numpy() ** 2 - 1).max()) for way in ways.values())
    ends = cube.levels(red[-1])
    middle = {name: part[1] + part[2] for name, part in divided.items()}
    least, most = (float(ways["log"].sigmas[step]) for step in (1, -1))
    between = min(most, std / EDGES[-1] ** 0.5), max(least, std / EDGES[0] ** 0.5)
    log = math.log(between[0] / between[1]) / math.log(most / least)
    margin = 2 / (config.steps * log) if log > 0 else math.nan  # a step more or less in each of the two bands
    return [
        Finding(name="steps_add_up", says="the steps' noise adds up to that of one jump to sigma, at worst off by",
                value=100 * off, high=100 * of_variance, unit="% of the variance"),
        Finding(name="red_ends_grey", says="the mean of many walks of a pure red pixel ends at grey, away from it by",
                value=float(np.linalg.norm(ends.mean(0) - 127.5)), high=10.0, unit="of 255 levels"),
        Finding(name="red_forgets", says="a red pixel's last red value tells no more of it than of any other: spread "
                "over distance from grey", value=float(ends[:, 0].std() / abs(ends[:, 0].mean() - 127.5)), low=15.0,
                unit="x"),
        Finding(name="variance_at_end", says="the variance-preserving process ends at variance 1",
                value=float(np.mean([way.preserved[-1] for way in ways.values()])), low=1 - of_variance,
                high=1 + of_variance),
        Finding(name="picture_forgotten", says="the static's pixels tell nothing of the picture's: correlation, the "
                "farthest from 0 of all schedules", value=max(abs(_correlation(way)) for way in ways.values()),
                high=_signal(std, most) + of_correlation),
        Finding(name="log_steps_divide_evenly", says="equal steps of log SNR: share of them between 100 and 0.01, "
                "over what the closed form says", value=middle["a walk's steps: log"] / (log or math.nan),
                low=1 - margin, high=1 + margin, unit="x"),
        *([] if min(middle.values()) == 0 else [  # so few steps that a schedule takes none there
            Finding(name="schedules_differ", says="the schedule that works most between SNR 100 and 0.01 does so more "
                    "often than the one that works least", value=max(middle.values()) / min(middle.values()), low=1.5,
                    unit="x")]),
    ]  # fmt: skip


def _correlation(way: Way) -> float:
    """Of the pixels at the end of the walk with the picture's."""
    return float(torch.corrcoef(torch.stack([way.shown[0].flatten(), way.shown[-1].flatten()]).double())[0, 1])


def _signal(std: float, sigma: float) -> float:
    """The correlation of x0 + sigma noise with x0, whose std is given: its square is the picture's share of the
    variance."""
    return std / (std**2 + sigma**2) ** 0.5


def _row(name: str, part: list[float]) -> dict[str, Any]:
    return {"schedule": name, **{band: round(share, 4) for band, share in zip(BANDS, part, strict=True)}}
