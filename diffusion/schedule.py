"""Noise levels: the density they are drawn from in training, the grid they are walked down in sampling.

A training density is given as its quantile function: it takes u, uniform in (0, 1), and returns sigma. So the caller
owns the randomness, and can stratify u over a batch. A grid is a 1-D tensor of steps + 1 falling sigmas, the last 0.
"""

import math

import torch
from torch import Tensor


def log_normal_sigma(u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Sigma whose logarithm is Gaussian (EDM table 1, arXiv 2206.00364). mean, std: of ln sigma."""
    return torch.exp(mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1))


def cosine_sigma(u: Tensor) -> Tensor:
    """Sigma of the cosine schedule at a uniform time: alpha_bar = cos^2(pi u / 2), so sigma = tan(pi u / 2).

    Nichol and Dhariwal 2021 (arXiv 2102.09672, eq. 17 without its offset). The median is 1, the tails heavy
    (half-Cauchy): noise levels far above the data are seen often, as a prior's one-step guess needs.
    """
    return torch.tan(math.pi / 2 * u)


def vp_linear_sigma(u: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """Sigma at a uniform time of DDPM's linear betas, 1000 steps from beta_min / 1000 to beta_max / 1000.

    Their limit for many steps, sigma^2 = exp(beta_min u + (beta_max - beta_min) u^2 / 2) - 1 (Song et al. 2021,
    arXiv 2011.13456, eq. 33; EDM table 1, column VP). From 0 to 152 (157 for the 1000 steps themselves).
    """
    return torch.expm1(beta_min * u + (beta_max - beta_min) * u**2 / 2).sqrt()


def flow_sigma(u: Tensor) -> Tensor:
    """Sigma at a uniform time of the rectified flow x_flow = (1 - time) x0 + time noise: sigma = time / (1 - time).

    Liu et al. 2022 (arXiv 2209.03003, eq. 1). Stable Diffusion 3 draws a logit-normal time instead (Esser et al. 2024,
    arXiv 2403.03206, eq. 19): its sigma is log_normal, with the same mean and std; and its shift multiplies sigma.
    """
    return u / (1 - u)


DENSITIES = {"log_normal": log_normal_sigma, "cosine": cosine_sigma, "vp_linear": vp_linear_sigma, "flow": flow_sigma}


def stratified(count: int, rng: torch.Generator) -> Tensor:
    """count uniform numbers in (0, 1), one in each of count equal strips, shuffled: they vary less than free ones.

    rng: generator on the device the numbers are to be on. Each single number is exactly uniform.
    """
    device = rng.device
    strips = torch.randperm(count, generator=rng, device=device)
    within = torch.rand(count, generator=rng, device=device)
    return ((strips + within) / count).clamp(1e-6, 1 - 1e-6)


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The EDM grid (eq. 5): equal steps in sigma^(1/rho), so most steps go where sigma is small. (steps + 1,)."""
    _check(steps, sigma_min, sigma_max)
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _ending_in_zero((high + share * (low - high)) ** rho)


def cosine_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """The cosine schedule's grid: equal steps of its time, sigma = tan(pi u / 2), from sigma_max down. (steps + 1,)."""
    _check(steps, sigma_min, sigma_max)
    low, high = math.atan(sigma_min), math.atan(sigma_max)
    return _ending_in_zero(torch.tan(torch.linspace(high, low, steps, dtype=torch.float64)))


def vp_linear_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """DDPM's and DDIM's usual grid: equal steps of the time of vp_linear_sigma, from sigma_max down. (steps + 1,)."""
    _check(steps, sigma_min, sigma_max)
    low, high = (_vp_linear_time(sigma) for sigma in (sigma_min, sigma_max))
    return _ending_in_zero(vp_linear_sigma(torch.linspace(high, low, steps, dtype=torch.float64)))


def _vp_linear_time(sigma: float, beta_min: float = 0.1, beta_max: float = 20.0) -> float:
    """The time at which vp_linear_sigma is sigma (EDM table 1)."""
    gain = beta_max - beta_min
    return (math.sqrt(beta_min**2 + 2 * gain * math.log1p(sigma**2)) - beta_min) / gain


def flow_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Equal steps of the rectified flow's time, sigma / (1 + sigma), from sigma_max down. (steps + 1,)."""
    _check(steps, sigma_min, sigma_max)
    low, high = (sigma / (1 + sigma) for sigma in (sigma_min, sigma_max))
    return _ending_in_zero(flow_sigma(torch.linspace(high, low, steps, dtype=torch.float64)))


def log_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Equal steps of ln sigma, which is minus half the log signal-to-noise ratio, from sigma_max down. (steps + 1,).

    The grid the DPM-Solvers' and UniPC's error bounds are stated for (Lu et al. 2022, arXiv 2206.00927, section 4).
    """
    _check(steps, sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _ending_in_zero(torch.linspace(high, low, steps, dtype=torch.float64).exp())


GRIDS = {
    "karras": karras_sigmas,
    "cosine": cosine_sigmas,
    "vp_linear": vp_linear_sigmas,
    "flow": flow_sigmas,
    "log": log_sigmas,
}


def _check(steps: int, sigma_min: float, sigma_max: float) -> None:
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, not {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"a grid needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")


def _ending_in_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
