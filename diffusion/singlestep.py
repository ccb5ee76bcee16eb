"""Samplers that go from one sigma to the next without a memory: pure functions of `denoise(x, sigma)`.

denoise: (x (B, ...), sigma (B,)) -> denoised (B, ...).     sigmas: 1-D, falling, ending in 0 (schedule.py).
x: the start, sigmas[0] * noise.     noise: for the stochastic ones, a function without arguments that returns a fresh
unit Gaussian shaped like x (SampleNoise).     on_step(step, denoised): called after each step, for progress and strips.
The last step, to sigma 0, puts out what the denoiser believes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
OnStep = Callable[[int, Tensor], None] | None


@torch.no_grad()
def sample_ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None, on_step: OnStep = None, add_noise: bool = True
) -> Tensor:
    """Draw each x from q(x_next | x, x0 = denoised) (DDPM algorithm 2, Ho et al. 2020, arXiv 2006.11239, eq. 6-7).

    In units of x0 that posterior is a Gaussian with mean denoised + (next / now)^2 (x - denoised) and variance
    next^2 (now^2 - next^2) / now^2.

    add_noise: False walks along the means alone, to show what the noise is for: samples fall together. Those of a
    Gaussian of std s end with std s^2 sigmas[0] / (s^2 + sigmas[0]^2) instead of s.
    """
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = denoise(x, each(now, x))
        kept = (after / now) ** 2
        x = denoised + kept * (x - denoised)
        if add_noise and after > 0:
            x = x + (after**2 * (1 - kept)) ** 0.5 * noise()
        tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_ddim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, eta: float = 0.0, noise: Noise | None = None, on_step: OnStep = None
) -> Tensor:
    """Denoise, then add noise back up to the next level (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16).

    eta: share of the fresh noise that DDPM would add; 0 is deterministic (and is Euler's method), 1 is DDPM.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"DDIM with eta = {eta} draws noise; pass noise=")
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = denoise(x, each(now, x))
        direction = (x - denoised) / now  # the guess of the noise in x
        fresh = eta * after / now * (now**2 - after**2) ** 0.5
        x = denoised + (after**2 - fresh**2) ** 0.5 * direction
        if fresh > 0:
            x = x + fresh * noise()
        tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep = None) -> Tensor:
    """First order for dx/dsigma = (x - denoise(x, sigma)) / sigma: the error halves when the steps double."""
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = denoise(x, each(now, x))
        x = x + (after - now) * (x - denoised) / now
        tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep = None) -> Tensor:
    """Solve dx/dsigma = (x - denoise(x, sigma)) / sigma from sigmas[0] to sigmas[-1] (EDM algorithm 1, 2206.00364).

    Second order: the error falls fourfold when the steps double. 2 * steps - 1 calls of denoise.
    """
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = denoise(x, each(now, x))
        slope = (x - denoised) / now
        ahead = x + (after - now) * slope
        if after > 0:  # the slope at sigma = 0 does not exist
            slope = (slope + (ahead - denoise(ahead, each(after, x))) / after) / 2
            ahead = x + (after - now) * slope
        x = ahead
        tell(on_step, step, denoised)
    return x


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(now, after) of every step down the grid."""
    levels = sigmas.tolist()
    return list(zip(levels[:-1], levels[1:], strict=True))


def each(sigma: float, x: Tensor) -> Tensor:
    """One sigma for every sample of x: (B,)."""
    return x.new_full((len(x),), sigma)


def tell(on_step: OnStep, step: int, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(step, denoised)
