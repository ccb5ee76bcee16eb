"""Samplers by name: walk a noisy x down a grid of sigmas with nothing but `denoise(x, sigma)`, or a clean one up it.

The functions themselves are in singlestep.py and multistep.py; what each argument is, stands there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.multistep import sample_dpmpp_2m, sample_unipc
from diffusion.singlestep import (
    Denoise,
    Noise,
    OnStep,
    each,
    pairs,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
    tell,
)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A way down the grid. Orders are measured in tests/test_samplers.py; docs/sampling.md says when to take which."""

    about: str
    walk: Callable[[Denoise, Tensor, Tensor, Noise, float, OnStep], Tensor]  # (denoise, x, sigmas, noise, eta, on_step)
    order: int  # steps doubled, the error falls 2^order times (of the distribution, for a random one)
    random: bool = False  # draws noise on its way (whatever eta is)
    eta: float | None = None  # what it takes unless told; None: there is no eta to it
    calls: Callable[[int], int] = lambda steps: steps  # steps -> calls of denoise


SAMPLERS: dict[str, Sampler] = {
    "heun": Sampler(
        about="EDM's: second order, two calls a step; the steadiest",
        order=2,
        calls=lambda steps: 2 * steps - 1,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_heun(denoise, x, sigmas, on_step),
    ),
    "ddim": Sampler(
        about="first order; eta from 0 (deterministic, invertible) to 1 (ddpm)",
        order=1,
        eta=0.0,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_ddim(denoise, x, sigmas, eta, noise, on_step),
    ),
    "ddpm": Sampler(
        about="ancestral sampling, as random as the training was; wants many steps",
        order=1,
        random=True,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_ddpm(denoise, x, sigmas, noise, on_step),
    ),
    "euler": Sampler(
        about="first order for the ODE; ddim with eta 0",
        order=1,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_euler(denoise, x, sigmas, on_step),
    ),
    "dpmpp_2m": Sampler(
        about="DPM-Solver++(2M): second order at one call a step; the fast one under guidance",
        order=2,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_dpmpp_2m(denoise, x, sigmas, on_step=on_step),
    ),
    "dpmpp_2m_sde": Sampler(
        about="its random sister: eta 1 is as random as ddpm at fewer steps, eta 0 is dpmpp_2m",
        order=2,
        eta=1.0,
        random=True,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_dpmpp_2m(denoise, x, sigmas, eta, noise, on_step),
    ),
    "unipc": Sampler(
        about="UniPC-2: third order, by a corrector, at one call a step; the most exact at 10 steps and more",
        order=3,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_unipc(denoise, x, sigmas, on_step),
    ),
    "ddpm_mean": Sampler(
        about="an ablation: ddpm without its noise; samples collapse",
        order=1,
        walk=lambda denoise, x, sigmas, noise, eta, on_step: sample_ddpm(denoise, x, sigmas, None, on_step, False),
    ),
}


def sample(
    sampler: str,
    denoise: Denoise,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float | None = None,
    start: Tensor | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """Walk from sigmas[0] * noise() down the grid with the sampler of that name. Returns x at sigmas[-1], (B, ...).

    start: x at sigmas[0], if it is not to be noise alone. eta: for those that have one (ddim, dpmpp_2m_sde), None for
    their own.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler {sampler!r}: take one of {', '.join(SAMPLERS)}")
    chosen = SAMPLERS[sampler]
    x = float(sigmas[0]) * noise() if start is None else start
    return chosen.walk(denoise, x, sigmas, noise, chosen.eta if eta is None else eta, on_step)


@torch.no_grad()
def invert(denoise: Denoise, x0: Tensor, sigmas: Tensor, on_step: OnStep = None, rounds: int = 2) -> Tensor:
    """The x at sigmas[0] from which sample_ddim (eta 0) comes to x0 on the same grid: DDIM inversion.

    Song et al. 2020 (arXiv 2010.02502, section 5.4) walk up with the guess at the lower level; that is off by the
    curvature of the way. Here each step is solved for the x that DDIM takes to the one below: from the slope of the
    last step on, `rounds` times take off what DDIM misses it by, with Anderson's extrapolation from the last two tries
    (as in arXiv 2309.04907). steps * rounds calls of denoise. x0: (B, ...); returns the same shape.
    """
    x, slope = x0, torch.zeros_like(x0)
    for step, (now, after) in enumerate(reversed(pairs(sigmas))):
        target, x = x, x + (now - after) * slope
        tried: tuple[Tensor, Tensor] | None = None
        for _ in range(rounds):
            denoised = denoise(x, each(now, x))
            missed = denoised + after / now * (x - denoised) - target
            ahead = x - missed
            back = torch.zeros_like(x)
            if tried is not None:
                turn = missed - tried[1]
                share = _dot(turn, missed) / _dot(turn, turn).clamp(min=1e-30)
                back = share * (ahead - tried[0])
            tried, x = (ahead, missed), ahead - back
        slope = (x - denoised) / now
        tell(on_step, step, denoised)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample: (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


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
