"""The way from a sample to static: as a random walk, step by step, and as the one jump that it adds up to.

A walk down a grid of schedule.py is a walk up it, backwards. Its samples x = x0 + sigma noise grow without end; what
DDPM shows is x / sqrt(1 + sigma^2), which ends at variance 1 ("variance-preserving"). A step of that process keeps
sqrt(1 - beta) of a sample and adds noise of variance beta (Ho et al. 2020, arXiv 2006.11239, eq. 2 and 4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.samplers import SampleNoise
from diffusion.schedule import DENSITIES, GRIDS, stratified
from diffusion.singlestep import Noise

PARTS = ("0", "⅛", "¼", "⅜", "½", "⅝", "¾", "⅞", "all")  # of a walk's steps: a picture is kept after each


def rising(schedule: str, steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """The schedule's grid backwards, from 0 up to sigma_max: (steps + 1,)."""
    return GRIDS[schedule](steps, sigma_min, sigma_max).flip(0)


def random_walk(x0: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """x at every level of rising sigmas, x0 itself first: each step adds fresh noise, and variances add up.

    x0 (...); noise(): unit Gaussians shaped like x0. At sigma the steps add up to x0 + sigma noise.
    """
    x = x0
    yield x
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (after**2 - now**2) ** 0.5 * noise()
        yield x


def preserved(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x as the variance-preserving process has it: x / sqrt(1 + sigma^2)."""
    return x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2).sqrt()


def betas(sigmas: Tensor) -> Tensor:
    """The share of each step's outcome that is fresh noise, for rising sigmas (N + 1,): (N,), in 0..1.

    beta = 1 - (1 + now^2) / (1 + after^2): alpha_bar is 1 / (1 + sigma^2), and 1 - beta the ratio of two of them.
    """
    squares = sigmas.double() ** 2
    return (squares[1:] - squares[:-1]) / (1 + squares[1:])


def signal_to_noise(sigma: Tensor, std: float) -> Tensor:
    """(std / sigma)^2 for data of that std."""
    return (std / sigma) ** 2


def shares(ratios: Tensor, edges: Sequence[float]) -> list[float]:
    """How many of the ratios lie above the first edge, between each two, and below the last one; the sum is 1.

    edges: falling. An edge belongs to the band above it.
    """
    bands = torch.bucketize(-ratios.double(), -torch.tensor(list(edges), dtype=torch.float64))
    return (torch.bincount(bands, minlength=len(edges) + 1) / len(ratios)).tolist()


def walk_shares(schedule: str, edges: Sequence[float], std: float, **grid: float) -> list[float]:
    """The share of a schedule's steps in each band of signal-to-noise. grid: steps, sigma_min, sigma_max."""
    return shares(signal_to_noise(rising(schedule, **grid)[1:], std), edges)


def training_shares(density: str, edges: Sequence[float], std: float, count: int = 20_000) -> list[float]:
    """The share of training's samples in each band of signal-to-noise, under one of schedule.DENSITIES."""
    u = stratified(count, torch.Generator().manual_seed(0)).double()
    return shares(signal_to_noise(DENSITIES[density](u), std), edges)


@dataclass(frozen=True)
class Way:
    """What was measured along one schedule's walk; every array has one entry per level, the clean picture first."""

    sigmas: Tensor
    noise: np.ndarray  # variance of x - x0
    preserved: np.ndarray  # variance of x / sqrt(1 + sigma^2) over the pixels
    betas: np.ndarray  # of each step, one fewer
    ratios: np.ndarray  # signal to noise after each step
    shown: list[Tensor]  # x / sqrt(1 + sigma^2) after each of PARTS

    @classmethod
    def of(cls, picture: Tensor, sigmas: Tensor, seed: int = 0) -> "Way":
        """Walk the picture (3, S, S) up rising sigmas, and measure."""
        noise, keep = SampleNoise([seed], picture.shape), parts_of(len(sigmas) - 1)
        shown, added, variance = [], [], []
        for step, x in enumerate(random_walk(picture, sigmas, lambda: noise()[0])):
            now = preserved(x, sigmas[step])
            added.append(float((x - picture).double().var(correction=0)))
            variance.append(float(now.double().var(correction=0)))
            if step in keep:
                shown.append(now)
        ratios = signal_to_noise(sigmas[1:].double(), float(picture.std(correction=0)))
        return cls(sigmas, np.array(added), np.array(variance), betas(sigmas).numpy(), ratios.numpy(), shown)


def parts_of(steps: int) -> list[int]:
    """The steps after which the PARTS are done."""
    return np.linspace(0, steps, len(PARTS)).round().astype(int).tolist()
