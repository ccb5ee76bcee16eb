"""Samplers: pure functions that walk a noisy x down a grid of sigmas with nothing but `denoise(x, sigma)`.

denoise: (x (B, ...), sigma (B,)) -> denoised (B, ...).     sigmas: 1-D, falling, ending in 0 (schedule.py).
x: the start, sigmas[0] * noise.     noise: for the stochastic ones, a function without arguments that returns a fresh
unit Gaussian shaped like x (SampleNoise).     on_step(step, denoised): called after each step, for progress and strips.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], None] | None


@torch.no_grad()
def sample_ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Callable[[], Tensor], on_step: OnStep = None):
    """Draw each x from q(x_next | x, x0 = denoised) (DDPM algorithm 2, Ho et al. 2020, arXiv 2006.11239, eq. 6-7).

    In units of x0 that posterior is a Gaussian with mean denoised + (next / now)^2 (x - denoised) and variance
    next^2 (now^2 - next^2) / now^2.
    """
    for step, (now, after) in enumerate(_pairs(sigmas)):
        denoised = denoise(x, _each(now, x))
        kept = (after / now) ** 2
        x = denoised + kept * (x - denoised)
        if after > 0:
            x = x + (after**2 * (1 - kept)) ** 0.5 * noise()
        _tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """Denoise, then add noise back up to the next level (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16).

    eta: share of the fresh noise that DDPM would add; 0 is deterministic (and is Euler's method), 1 is DDPM.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"DDIM with eta = {eta} draws noise; pass noise=")
    for step, (now, after) in enumerate(_pairs(sigmas)):
        denoised = denoise(x, _each(now, x))
        direction = (x - denoised) / now  # the guess of the noise in x
        fresh = eta * after / now * (now**2 - after**2) ** 0.5
        x = denoised + (after**2 - fresh**2) ** 0.5 * direction
        if fresh > 0:
            x = x + fresh * noise()
        _tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep = None) -> Tensor:
    """First order for dx/dsigma = (x - denoise(x, sigma)) / sigma: the error halves when the steps double."""
    for step, (now, after) in enumerate(_pairs(sigmas)):
        denoised = denoise(x, _each(now, x))
        x = x + (after - now) * (x - denoised) / now
        _tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep = None) -> Tensor:
    """Solve dx/dsigma = (x - denoise(x, sigma)) / sigma from sigmas[0] to sigmas[-1] (EDM algorithm 1, 2206.00364).

    Second order: the error falls fourfold when the steps double. 2 * steps - 1 calls of denoise.
    """
    for step, (now, after) in enumerate(_pairs(sigmas)):
        denoised = denoise(x, _each(now, x))
        slope = (x - denoised) / now
        ahead = x + (after - now) * slope
        if after > 0:  # the slope at sigma = 0 does not exist
            slope = (slope + (ahead - denoise(ahead, _each(after, x))) / after) / 2
            ahead = x + (after - now) * slope
        x = ahead
        _tell(on_step, step, denoised)
    return x


SAMPLERS = ("heun", "ddim", "ddpm", "euler")


def sample(
    sampler: str,
    denoise: Denoise,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    *,
    eta: float = 0.0,
    on_step: OnStep = None,
) -> Tensor:
    """Start from sigmas[0] * noise() and walk down with the sampler of that name. eta: for "ddim" only."""
    x = float(sigmas[0]) * noise()
    if sampler == "heun":
        return sample_heun(denoise, x, sigmas, on_step)
    if sampler == "euler":
        return sample_euler(denoise, x, sigmas, on_step)
    if sampler == "ddim":
        return sample_ddim(denoise, x, sigmas, eta, noise, on_step)
    if sampler == "ddpm":
        return sample_ddpm(denoise, x, sigmas, noise, on_step)
    raise ValueError(f"no sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")


class SampleNoise:
    """Unit Gaussians of which row i depends on seeds[i] alone: not on the batch, its size, its order or the device.

    seeds: one non-negative integer per sample; shape: of one sample; stream: which of several independent noises of
    the same seed (the prior's and the decoder's). Draws happen on the CPU, where the generator is the same everywhere.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu", stream: int = 0):
        if any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds are non-negative integers, not {min(seeds)}")
        self.shape, self.device = tuple(shape), device
        mixed = [np.random.SeedSequence([int(seed), stream]).generate_state(1, np.uint64)[0] for seed in seeds]
        self.generators = [torch.Generator().manual_seed(int(number >> np.uint64(1))) for number in mixed]

    def __call__(self) -> Tensor:
        """(B, *shape), float32; each call goes on where the last one stopped."""
        return torch.stack([torch.randn(self.shape, generator=rng) for rng in self.generators]).to(self.device)


def _pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    levels = sigmas.tolist()
    return list(zip(levels[:-1], levels[1:], strict=True))


def _each(sigma: float, x: Tensor) -> Tensor:
    return x.new_full((len(x),), sigma)


def _tell(on_step: OnStep, step: int, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(step, denoised)
