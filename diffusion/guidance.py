"""Guidance: closures around a denoiser. Each returns denoise(x, sigma), which is all a sampler knows."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.denoiser import Cond
from diffusion.samplers import Denoise


def classifier_free(
    denoiser: Callable[..., Tensor],
    cond: Cond,
    null_cond: Cond,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, float("inf")),
) -> Denoise:
    """denoised = null + guidance * (with_cond - null).

    Ho and Salimans 2022 (arXiv 2207.12598), eq. 6 with w = guidance - 1.

    guidance: 1 follows cond as trained and 0 ignores it, each with one network call of (B, ...); any other value
    makes one call of (2 B, ...). interval: sigmas (from, to) inside which it acts; outside, guidance is 1
    (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """
    both = {name: torch.cat([cond[name], null_cond[name]]) for name in cond} if guidance not in (0, 1) else None
    everywhere = interval[0] <= 0 and interval[1] == float("inf")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        acts = everywhere or interval[0] <= float(sigma[0]) <= interval[1]
        if guidance == 1 or not acts:
            return denoiser(x, sigma, cond)
        if both is None:
            return denoiser(x, sigma, null_cond)
        with_cond, null = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + guidance * (with_cond - null)

    return denoise


def clamped(denoise: Denoise, limit: float = 1.0, quantile: float | None = None) -> Denoise:
    """Keep the guess where data can be, in [-limit, limit]; without it strong guidance burns pictures out.

    quantile: None cuts off. A number, say 0.995, first scales each sample down until that share of its values fits
    ("dynamic thresholding", Saharia et al. 2022, arXiv 2205.11487, section 2.3).
    """

    def inside(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        if quantile is not None:
            reach = denoised.abs().flatten(1).float().quantile(quantile, dim=1).to(denoised.dtype)
            denoised = denoised * (limit / reach.clamp(min=limit)).reshape(-1, *[1] * (x.ndim - 1))
        return denoised.clamp(-limit, limit)

    return inside
