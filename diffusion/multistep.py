"""Samplers that remember earlier guesses: second and third order at one call of `denoise` a step.

Along the ODE of singlestep.py, with depth = -ln sigma (half the log signal-to-noise ratio), exactly

    x_after = (after / now) x + integral over depth, from now to after, of (after / sigma) denoised

(DPM-Solver++, Lu et al. 2022, arXiv 2211.01095, eq. 8 with alpha = 1). A multistep sampler puts a polynomial through
the guesses it has for `denoised`, and integrates that. Arguments as in singlestep.py.

No polynomial is carried over a leap, a step more than twice as deep as the one before it: the last guess alone takes
it. The step to sigma 0, infinitely deep, is always one, and puts that guess out; so is the last but one of the
equal-time grids (cosine, vp_linear, flow) at few steps, where it was what made these samplers worse than DDIM.
"""

import math

import numpy as np
import torch
from torch import Tensor

from diffusion.singlestep import Denoise, Noise, OnStep, each, pairs, tell

LEAP = 2.0  # times the last step's depth


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, eta: float = 0.0, noise: Noise | None = None, on_step: OnStep = None
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095: a straight line through the last two guesses.

    Second order. eta = 1 is SDE-DPM-Solver++(2M) (appendix D.4 there): each step forgets as much again of x and puts
    fresh noise in its place, as DDPM does (which it is, but for the second guess). Between 0 and 1 the share of that.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"DPM-Solver++ with eta = {eta} draws noise; pass noise=")
    before, depth_before = None, 0.0
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = guess = denoise(x, each(now, x))
        depth = math.log(now / after) if after > 0 else math.inf
        if depth <= LEAP * depth_before:
            guess = denoised + depth / (2 * depth_before) * (denoised - before)
        x = math.exp(-(1 + eta) * depth) * x - math.expm1(-(1 + eta) * depth) * guess
        if eta > 0 and after > 0:
            x = x + after * math.sqrt(-math.expm1(-2 * eta * depth)) * noise()
        before, depth_before = denoised, depth
        tell(on_step, step, denoised)
    return x


@torch.no_grad()
def sample_unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, on_step: OnStep = None, order: int = 2) -> Tensor:
    """UniPC-`order` with B2(h) (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2, data prediction).

    A step predicts x from the last `order` guesses; when the guess there is known, the step is taken once more with it
    as one point more (the corrector), and that guess serves the next step too: one call a step.
    """
    past: list[tuple[float, Tensor]] = []  # (sigma, guess), the latest first
    start, depth_before = x, 0.0
    for step, (now, after) in enumerate(pairs(sigmas)):
        denoised = denoise(x, each(now, x))
        if past:
            x = _through(start, past[0][0], now, [*past, (now, denoised)])
        past, start = [(now, denoised), *past][:order], x
        depth = math.log(now / after) if after > 0 else math.inf
        x = _through(x, now, after, past if depth <= LEAP * depth_before else past[:1])
        depth_before = depth
        tell(on_step, step, denoised)
    return x


def _through(x: Tensor, now: float, after: float, guesses: list[tuple[float, Tensor]]) -> Tensor:
    """x at `after`, with a polynomial in depth through the guesses (sigma, denoised); the first must be the one at now.

    Eq. 3 (and 9) of arXiv 2302.04867. Sought are weights of the differences to the first guess that integrate powers of
    the way: sum_m weight_m ratio_m^k = integral_k := depth * int_0^1 exp(depth (s - 1)) s^k ds for k = 1, 2, ...
    A single difference takes the mean slope, as in the paper, which has no h in it: integral_0 / (2 ratio).
    """
    (_, denoised), *others = guesses
    depth = math.log(now / after) if after > 0 else math.inf
    integrals = [-math.expm1(-depth)]
    x = (after / now) * x + integrals[0] * denoised
    if not others:
        return x
    ratios = [math.log(now / sigma) / depth for sigma, _ in others]
    for k in range(1, len(others) + 1):
        integrals.append(1 - k / depth * integrals[-1])  # by parts
    if len(others) == 1:
        weights = [integrals[0] / (2 * ratios[0])]
    else:
        powers = [[ratio**k for ratio in ratios] for k in range(1, len(others) + 1)]
        weights = np.linalg.solve(powers, integrals[1:]).tolist()
    for weight, (_, guess) in zip(weights, others, strict=True):
        x = x + weight * (guess - denoised)
    return x
