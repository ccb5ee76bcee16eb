"""Walks on the plane: a sampler's way from noise to points, every position on it kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.lab.plane import SIGMA_DATA
from diffusion.lab.spiral import seeded
from diffusion.samplers import Denoise, sample


@dataclass(frozen=True, eq=False)
class Walk:
    """Where N points were whenever the denoiser was asked, and where they ended."""

    sigmas: Tensor  # (calls,) at which it was asked
    x: Tensor  # (calls, N, 2)
    end: Tensor  # (N, 2)

    @property
    def calls(self) -> int:
        """How often the denoiser was asked about each point."""
        return len(self.sigmas)

    @property
    def path(self) -> Tensor:
        """(calls + 1, N, 2) the positions, each shrunk to the size of the data."""
        return torch.cat([shrunk(self.x, self.sigmas[:, None, None]), self.end[None]])


def walk(sampler: str, denoise: Denoise, sigmas: Tensor, count: int, seed: int = 0) -> Walk:
    """count points from noise down the grid with diffusion.samplers.sample. One seed starts all samplers alike."""
    rng = seeded(seed)
    levels, seen = [], []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(float(sigma[0])), seen.append(x)
        return denoise(x, sigma)

    end = sample(sampler, watched, sigmas, lambda: torch.randn(count, 2, generator=rng))
    return Walk(torch.tensor(levels), torch.stack(seen), end)


def shrunk(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x as a variance-preserving process shows it: of the data's size at every noise level."""
    return x * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5


def lattice(cells: int, reach: float = 1.6) -> Tensor:
    """(cells^2, 2) places on the plane, evenly spread within [-reach, reach]^2."""
    line = (torch.arange(cells) + 0.5) / cells * 2 * reach - reach
    return torch.cartesian_prod(line, line)


def at_level(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
    """denoised (B, 2) of points x (B, 2) that all have one noise level."""
    return denoise(x, x.new_full((len(x),), sigma))
