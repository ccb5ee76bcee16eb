"""A network becomes a denoiser: scale its input and output by what sigma alone tells (EDM, arXiv 2206.00364, eq. 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip_train.settings import UserError
from diffusion.schedule import DENSITIES

Cond = dict[str, Tensor]
KINDS = ("edm", "v", "x0", "eps")


@dataclass(frozen=True)
class Scaling:
    """denoised = skip * x + out * network(into * x, noise_level), each a function of sigma (EDM table 1).

    kind: what the network's raw output means.
        "edm"  whatever mix of x0 and noise keeps both its target and its input at unit size for every sigma
        "v"    velocity of the variance-preserving process: "edm" with the sign turned (arXiv 2202.00512)
        "x0"   the clean sample itself
        "eps"  the noise
    sigma_data: std of a coordinate of x0.
    """

    kind: str = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no parametrisation {self.kind!r}: take {', '.join(KINDS)}")

    def factors(self, sigma: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor, Tensor]:
        """skip, out, into, noise_level for sigma of any shape."""
        total = (sigma**2 + self.sigma_data**2).sqrt()  # std of x
        into, noise_level = 1 / total, sigma.log() / 4
        if self.kind == "x0":
            return 0.0, 1.0, into, noise_level
        if self.kind == "eps":
            return 1.0, -sigma, into, noise_level
        out = sigma * self.sigma_data / total
        return (self.sigma_data / total) ** 2, out if self.kind == "edm" else -out, into, noise_level

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight 1 / out^2: the error is measured on the raw output, the same size at every sigma (EDM eq. 8).

        For "edm" this is EDM's lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        """
        return 1 / (self.factors(sigma)[1] * torch.ones_like(sigma)) ** 2


def refuse_unknown(what: str, predict: str, density: str) -> None:
    """UserError if a config names a parametrisation or a density of noise levels that there is not."""
    if predict not in KINDS:
        raise UserError(f"{what}: no parametrisation {predict!r}: take {', '.join(KINDS)}")
    if density not in DENSITIES:
        raise UserError(f"{what}: no density {density!r}: take {', '.join(DENSITIES)}")


class Denoiser(nn.Module):
    """(x, sigma, cond) -> denoised.

    network: module called as network(x, noise_level, cond), with x (B, ...) of unit size and noise_level (B,).
    """

    def __init__(self, network: nn.Module, scaling: Scaling):
        super().__init__()
        self.network = network
        self.scaling = scaling

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """x: (B, ...); sigma: (B,), > 0. Returns denoised, (B, ...), in float32 or wider whatever autocast does."""
        skip, out, into, noise_level = self.scaling.factors(sigma.reshape(-1, *[1] * (x.ndim - 1)))
        raw = self.network(into * x, noise_level.flatten(), cond)
        return skip * x + out * raw.to(x.dtype)


def denoising_loss(
    denoiser: nn.Module, x0: Tensor, cond: Cond | None, sigma: Tensor, noise: Tensor, weight: Tensor
) -> Tensor:
    """Mean weighted squared error of the denoised sample (EDM eq. 2 with lambda = weight).

    x0, noise: (B, ...); sigma, weight: (B,), the weight usually Scaling.weight(sigma).
    Returns: scalar; with that weight about 1 for a network that puts out 0 (sigma_data^2 for "x0"); what it falls to is
    the share that cannot be known from x. Expect 0.1 to 0.3 for small pictures.
    """
    denoised = denoiser(x0 + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * noise, sigma, cond)
    return (weight * (denoised - x0).square().flatten(1).mean(1)).mean()
