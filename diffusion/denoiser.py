"""A network becomes a denoiser: scale its input and output by what sigma alone tells (EDM, arXiv 2206.00364, eq. 7)."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.settings import UserError
from diffusion.schedule import DENSITIES

Cond = dict[str, Tensor]
KINDS = ("edm", "v", "x0", "eps", "flow")
WEIGHTINGS = ("even", "min_snr", "soft_min_snr")
MOST = {"depth": 1000, "blocks": 1000, "vocabulary": 10_000_000}  # of a config's numbers; of all others 100,000


@dataclass(frozen=True)
class Scaling:
    """denoised = skip * x + out * network(into * x, noise_level), each a function of sigma (EDM table 1).

    kind: what the network's raw output means.
        "edm"  whatever mix of x0 and noise keeps both its target and its input at unit size for every sigma
        "v"    velocity of the variance-preserving process: "edm" with the sign turned (arXiv 2202.00512)
        "x0"   the clean sample itself
        "eps"  the noise
        "flow" velocity of the rectified flow x_flow = (1 - time) x0 + time noise, time = sigma / (1 + sigma):
               noise - x0, whatever sigma_data is (arXiv 2209.03003)
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
        if self.kind == "flow":
            return 1 / (1 + sigma), -sigma / (1 + sigma), into, noise_level
        out = sigma * self.sigma_data / total
        return (self.sigma_data / total) ** 2, out if self.kind == "edm" else -out, into, noise_level

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight 1 / out^2: the error is measured on the raw output, the same size at every sigma (EDM eq. 8).

        For "edm" this is EDM's lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
        """
        return 1 / (self.factors(sigma)[1] * torch.ones_like(sigma)) ** 2


def loss_weight(scaling: Scaling, sigma: Tensor, kind: str = "even", gamma: float = 5.0) -> Tensor:
    """Weight of the squared error of the denoised sample at sigma, (B,) for sigma (B,): what denoising_loss takes.

    "even"          Scaling.weight: the error of the raw output, the same size at every sigma
    "min_snr"       the signal-to-noise ratio, but at most gamma: min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556,
                    section 3.4). As the error is measured on the denoised sample, it is the same for every
                    parametrisation: their min(SNR, gamma) / SNR for "eps" and / (SNR + 1) for "v" are this
    "soft_min_snr"  SNR gamma / (SNR + gamma), without the corner (Crowson et al. 2024, arXiv 2401.11605, eq. 9, for
                    gamma = 1); the sigmoid weight of arXiv 2410.19324 with gamma = exp(bias)
    SNR = (sigma_data / sigma)^2; errors in units of sigma_data, so that the weight is that of unit-size data.
    """
    if kind == "even":
        return scaling.weight(sigma)
    snr = (scaling.sigma_data / sigma) ** 2
    if kind == "min_snr":
        return snr.clamp(max=gamma) / scaling.sigma_data**2
    if kind == "soft_min_snr":
        return gamma * snr / (snr + gamma) / scaling.sigma_data**2
    raise ValueError(f"no loss weighting {kind!r}: take {', '.join(WEIGHTINGS)}")


def raw_of(kind: str, x0: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """What a perfect network of that parametrisation puts out for x = x0 + sigma * noise: the target, in closed form.

    x0, noise: (B, ...); sigma: of any shape that broadcasts with them. "v" with sigma_data 1 is
    (noise - sigma x0) / sqrt(1 + sigma^2), the velocity of arXiv 2202.00512 (appendix D).
    """
    if kind in ("edm", "v"):
        velocity = (sigma_data * noise - sigma / sigma_data * x0) / (sigma**2 + sigma_data**2).sqrt()
        return velocity if kind == "v" else -velocity
    targets = {"x0": lambda: x0, "eps": lambda: noise, "flow": lambda: noise - x0}
    if kind not in targets:
        raise ValueError(f"no parametrisation {kind!r}: take {', '.join(KINDS)}")
    return targets[kind]()


def clean_and_noise(kind: str, raw: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The x0 and the noise that a raw output stands for at x: raw_of undone. Shapes as there.

    Each by its own closed form: (x - x0) / sigma would lose digits where sigma is small. That is left for "x0", which
    says nothing else about the noise (and for "eps" the same of x0 at a large sigma).
    """
    skip, out, _, _ = Scaling(kind, sigma_data).factors(sigma)
    x0 = skip * x + out * raw
    if kind == "x0":
        return x0, (x - raw) / sigma
    if kind == "eps":
        return x0, raw
    if kind == "flow":
        return x0, (x + raw) / (1 + sigma)
    total = sigma**2 + sigma_data**2
    share = sigma_data / total.sqrt()
    return x0, sigma / total * x + (share if kind == "v" else -share) * raw


def refuse_unknown(what: str, predict: str, density: str, weighting: str = "even") -> None:
    """UserError if a config names a parametrisation, a density of noise levels or a loss weighting there is not."""
    if predict not in KINDS:
        raise UserError(f"{what}: no parametrisation {predict!r}: take {', '.join(KINDS)}")
    if density not in DENSITIES:
        raise UserError(f"{what}: no density {density!r}: take {', '.join(DENSITIES)}")
    if weighting not in WEIGHTINGS:
        raise UserError(f"{what}: no loss weighting {weighting!r}: take {', '.join(WEIGHTINGS)}")


def refuse_absurd(what: str, config: Any) -> None:
    """UserError if a number of a config is none that a network can be built from: building it would take for ever."""
    for field in fields(config):
        value = getattr(config, field.name)
        for n in value if isinstance(value, tuple) else (value,):
            if isinstance(n, float) and not math.isfinite(n):
                raise UserError(f"{what}: {field.name} {n} must be a finite number")
            most = MOST.get(field.name, 100_000)
            if isinstance(n, int) and not 0 <= n <= most:
                raise UserError(f"{what}: {field.name} {n} must be at least 0 and at most {most}")
    if not getattr(config, "sigma_data", 1) > 0:
        raise UserError(f"{what}: sigma_data {config.sigma_data} must be above 0")


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

    x0, noise: (B, ...); sigma, weight: (B,), the weight as loss_weight gives it.
    Returns: scalar; with the even weight about 1 for a network that puts out 0 (sigma_data^2 for "x0", 1 + sigma_data^2
    for "flow"); what it falls to is the share that cannot be known from x. Expect 0.1 to 0.3 for small pictures.
    """
    denoised = denoiser(x0 + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * noise, sigma, cond)
    return (weight * (denoised - x0).square().flatten(1).mean(1)).mean()
