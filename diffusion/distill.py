"""Distillation: a student that goes in one DDIM step where its teacher goes in several.

A student of k steps knows k levels of sigma. From each it is to land where the teacher's walk comes by at the next one:
there is exactly one `denoised` that takes DDIM there, and that is regressed (progressive distillation, Salimans and Ho
2022, arXiv 2202.00512, section 3). The teacher's guidance and clamping are part of its walk, so they are baked in
(Meng et al. 2022, arXiv 2210.03142): afterwards a picture takes k network calls of (B, ...), not 35 of (2 B, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_train.settings import UserError
from diffusion.denoiser import Cond
from diffusion.samplers import Denoise
from diffusion.sampling import Sampling
from diffusion.schedule import karras_sigmas

LEVELS = 16  # of the finest grid, which is that of a walk in 16 steps; the coarser ones skip levels


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student is to do. Its network is the teacher's."""

    few_steps: int = 4  # network calls that a picture takes afterwards: 1, 2, 4 or 8
    stages: tuple[int, ...] = ()  # steps of the students on the way, each the next one's teacher; (): 4, 2, 1
    teacher_steps: int = 8  # of Heun's method (two calls each), by which the first teacher walks
    guidance: float = 2.0  # of the first teacher: baked in
    clamp: float = 1.0  # likewise, see Sampling.clamp
    caption_mix: tuple[float, ...] = ()  # as in DecoderConfig, for decoders that look at text

    def __post_init__(self) -> None:
        if self.few_steps not in (1, 2, 4, 8):
            raise UserError(f"a student takes 1, 2, 4 or 8 steps, not {self.few_steps}")
        chain = (self.teacher_steps, *self.chain)
        finer = all(a % b == 0 for a, b in zip(chain[:-1], chain[1:], strict=True))
        if LEVELS % self.teacher_steps or not finer or self.chain[-1] != self.few_steps:
            raise UserError(
                f"distillation goes from {self.teacher_steps} steps by stages of {', '.join(map(str, self.chain))}; "
                f"each must divide the one before, {LEVELS} comes before all, and the last is {self.few_steps}"
            )
        if self.guidance < 0 or not 0 <= self.clamp <= 1:
            raise UserError(f"guidance {self.guidance} must be at least 0 and clamp {self.clamp} in [0, 1]")

    @property
    def chain(self) -> tuple[int, ...]:
        """Steps of the students, one after the other; the last is the one that is kept."""
        return self.stages or tuple(steps for steps in (4, 2, 1) if steps > self.few_steps) + (self.few_steps,)


def few_sigmas(steps: int) -> Tensor:
    """The grid of a student of that many steps, (steps + 1,): every (16 / steps)-th level of 16 Karras steps.

    About [20, 0] for 1 step, [20, 0.9, 0] for 2, [20, 5, 0.9, 0.1, 0] for 4.
    """
    sigmas = karras_sigmas(LEVELS, Sampling.sigma_min, Sampling.sigma_max)
    return torch.cat([sigmas[: -1 : LEVELS // steps], sigmas[-1:]])


def few_sampling(steps: int) -> Sampling:
    """How a student of that many steps draws: DDIM down its own grid, no guidance besides the one that is baked in."""
    last = float(few_sigmas(steps)[-2]) if steps > 1 else Sampling.sigma_min
    return Sampling(steps=steps, sampler="ddim", guidance=1.0, clamp=1.0, sigma_min=last)


@torch.no_grad()
def walk_on(denoise: Denoise, x: Tensor, grid: Tensor, place: Tensor, steps: int, second_order: bool) -> Tensor:
    """From x (B, ...) at grid[place] to grid[place + steps], each sample along its own part of one grid.

    place: (B,) int64. second_order: Heun's method (EDM algorithm 1, arXiv 2206.00364), else Euler's, which is DDIM.
    """
    for step in range(steps):
        now, after = grid[place + step], grid[place + step + 1]
        slope = (x - denoise(x, now)) / _each(now, x)
        ahead = x + _each(after - now, x) * slope
        if second_order and (after > 0).any():
            above = after.clamp(min=float(grid[-2]))  # at 0 there is no slope: those samples keep the first one
            second = (ahead - denoise(ahead, above)) / _each(above, x)
            ahead = torch.where(_each(after, x) > 0, x + _each(after - now, x) * (slope + second) / 2, ahead)
        x = ahead
    return x


def denoised_to_land(x: Tensor, landed: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """The `denoised` with which a DDIM step takes x at sigma `now` to `landed` at sigma `after`; now, after: (B,).

    Solves landed = denoised + (after / now) (x - denoised); arXiv 2202.00512, algorithm 2, in units of x0.
    """
    ratio = _each(after / now, x)
    return (landed - ratio * x) / (1 - ratio)


def distillation_loss(
    student: Callable[..., Tensor],
    teacher: Denoise,
    x0: Tensor,
    cond: Cond,
    noise: Tensor,
    uniform: Tensor,
    weight: Callable[[Tensor], Tensor],
    *,
    steps: int,
    teacher_steps: int,
    second_order: bool,
    guess: Tensor | float = 0.0,
) -> Tensor:
    """Mean weighted squared distance of the student's denoised from the one that lands where the teacher's walk does.

    student: (x, sigma, cond) -> denoised. teacher: denoise(x, sigma) with cond closed in, which walks `teacher_steps` /
    `steps` steps while the student does one. x0, noise: (B, ...); uniform: (B,) in (0, 1), says from which of the
    student's levels; weight: of sigma, usually Scaling.weight. At the first level there is
    noise alone, around guess (B, ...), the decoder's linear one, as when a picture is drawn. Returns a scalar; it has
    no floor, as the target is a function of x: expect 0.01 to 0.1.
    """
    grid = few_sigmas(teacher_steps).to(x0)
    jump = teacher_steps // steps
    place = (uniform * steps).long().clamp(max=steps - 1) * jump
    now, after = grid[place], grid[place + jump]
    x = torch.where(_each(place, x0) > 0, x0, guess) + _each(now, x0) * noise
    landed = walk_on(teacher, x, grid, place, jump, second_order)
    target = denoised_to_land(x, landed, now, after)
    return (weight(now) * (student(x, now, cond) - target).square().flatten(1).mean(1)).mean()


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
