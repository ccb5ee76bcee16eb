"""Guidance: closures around a denoiser. Each returns denoise(x, sigma), which is all a sampler knows.

denoiser: (x, sigma, cond) -> denoised. Where several conditions meet one network they go through it in one call, with
the batch n times as long. At the scale that means "off" each of these is the plain denoiser, with its one call.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.denoiser import Cond
from diffusion.layers import Attention
from diffusion.samplers import Denoise

EVERYWHERE = (0.0, float("inf"))


def conditioned(denoiser: Callable[..., Tensor], *conds: Cond) -> Denoise:
    """denoise for one condition, or for several: denoised of each, one after the other, out of one call, (n B, ...).

    What the network can know of a condition before it sees x is computed here, once.
    """
    cond = conds[0] if len(conds) == 1 else {name: torch.cat([one[name] for one in conds]) for name in conds[0]}
    prepare = getattr(getattr(denoiser, "network", None), "prepared", None)
    if prepare is not None:
        with torch.no_grad():
            cond = prepare(cond)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if len(conds) > 1:
            x, sigma = torch.cat([x] * len(conds)), torch.cat([sigma] * len(conds))
        return denoiser(x, sigma, cond)

    return denoise


def classifier_free(
    denoiser: Callable[..., Tensor],
    cond: Cond,
    null_cond: Cond,
    guidance: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    rescale: float = 0.0,
) -> Denoise:
    """denoised = null + guidance * (with_cond - null).

    Ho and Salimans 2022 (arXiv 2207.12598), eq. 6 with w = guidance - 1. null_cond: nothing, or what is not wanted (a
    negative prompt).

    guidance: 1 follows cond as trained and 0 ignores it, each with one network call of (B, ...); any other value
    makes one call of (2 B, ...). interval: see between. rescale: see rescaled.
    """
    if guidance == 1:
        return conditioned(denoiser, cond)
    if guidance == 0:
        guided = conditioned(denoiser, null_cond)
    else:
        both = conditioned(denoiser, cond, null_cond)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            with_cond, null = both(x, sigma).chunk(2)
            return rescaled(null + guidance * (with_cond - null), with_cond, rescale)

    return guided if interval == EVERYWHERE else between(guided, conditioned(denoiser, cond), interval)


def two_conditions(
    denoiser: Callable[..., Tensor],
    full: Cond,
    image_only: Cond,
    null: Cond,
    image_scale: float,
    text_scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """denoised = null + image_scale * (image_only - null) + text_scale * (full - image_only).

    InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800, eq. 3), its picture and its text being the image embedding
    and the text tokens here. full: both; image_only: without the text; null: neither, or a negative prompt.
    One call of (3 B, ...), of (2 B, ...) where a term falls away, of (B, ...) where one alone is left. Equal scales are
    classifier-free guidance.
    """
    if image_scale == text_scale:
        return classifier_free(denoiser, full, null, image_scale, rescale=rescale)
    if text_scale == 0:
        return classifier_free(denoiser, image_only, null, image_scale, rescale=rescale)
    if image_scale == 1:
        return classifier_free(denoiser, full, image_only, text_scale, rescale=rescale)
    three = conditioned(denoiser, full, image_only, null)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        both, image, nothing = three(x, sigma).chunk(3)
        return rescaled(nothing + image_scale * (image - nothing) + text_scale * (both - image), both, rescale)

    return guided


def rescaled(guided: Tensor, with_cond: Tensor, rescale: float) -> Tensor:
    """guided, with the std of each of its samples brought back to with_cond's; rescale: 0 not at all, 1 fully.

    Guidance adds contrast; this takes it off again (Lin et al. 2023, arXiv 2305.08891, section 3.4; there on the
    network's output, here on the guess of x0).
    """
    if not rescale:
        return guided
    wanted, is_now = (part.flatten(1).std(dim=1) for part in (with_cond, guided))
    factor = 1 + rescale * (wanted / is_now.clamp(min=1e-12) - 1)
    return guided * _per_sample(factor, guided)


def between(guided: Denoise, plain: Denoise, interval: tuple[float, float]) -> Denoise:
    """guided where interval[0] <= sigma <= interval[1], plain elsewhere.

    Guidance does harm at high noise and nothing at low noise (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """
    if interval[0] <= 0 and interval[1] == float("inf"):
        return guided

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return (guided if interval[0] <= float(sigma[0]) <= interval[1] else plain)(x, sigma)

    return denoise


def autoguided(denoise: Denoise, weaker: Denoise, scale: float = 1.0) -> Denoise:
    """denoised = weaker + scale * (denoise - weaker): away from the mistakes that a weaker model makes more of.

    Karras et al. 2024 (arXiv 2406.02507): the weaker one is smaller or trained more briefly, and has the same
    condition, so what it says of the content cancels. scale: 1 is denoise alone and 0 the weaker alone, one call each.
    """
    if scale == 1:
        return denoise
    if scale == 0:
        return weaker

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        less = weaker(x, sigma)
        return less + scale * (denoise(x, sigma) - less)

    return guided


def self_attention(
    denoise: Denoise, plain: Denoise, attentions: Sequence[Attention], scale: float = 0.0, blur: float = 1.5
) -> Denoise:
    """denoised + scale * (degraded - denoised of degraded): what blurring takes away where the network looks.

    Self-attention guidance (Hong et al. 2022, arXiv 2210.00939, algorithm 1): the guess of x0 is blurred where the
    network's cells are looked at more than the average, gets its guessed noise back, and is denoised again. Their
    eps + scale * (eps - eps of degraded) is this sum, in x0. Two calls of (B, ...) of plain, besides those of denoise.

    denoise: what is to be guided. plain: the network and one condition. attentions: its attention layers, of which the
    one in the middle of the walk is watched. blur: std of the blur in pixels. scale: 0 is off, 1 is much.
    """
    if not scale:
        return denoise
    if not attentions:
        raise ValueError("self-attention guidance needs a network with attention")

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in attentions:
            layer.watch = seen
        try:
            guess = plain(x, sigma)
        finally:
            for layer in attentions:
                layer.watch = None
        mask = salient(seen[len(seen) // 2], guess.shape[-2:])
        degraded = torch.where(mask, blurred(guess, blur), guess)
        again = plain(x + degraded - guess, sigma)  # the guessed noise, (x - guess) / sigma, is added to degraded
        return (guess if denoise is plain else denoise(x, sigma)) + scale * (degraded - again)

    return guided


def salient(shares: Tensor, size: Sequence[int]) -> Tensor:
    """Where a picture of this size (H, W) is looked at more than on average: (B, 1, H, W) bool.

    shares: attention probabilities (B, cells, context tokens + cells) of a square grid of cells.
    """
    cells = shares.shape[1]
    side = math.isqrt(cells)
    looked_at = shares[:, :, -cells:].sum(1)
    mask = looked_at > looked_at.mean(1, keepdim=True)
    return F.interpolate(mask.view(-1, 1, side, side).float(), tuple(size), mode="nearest") > 0.5


def blurred(pictures: Tensor, std: float) -> Tensor:
    """Pictures (B, C, H, W) under a Gaussian of that std in pixels, their edges mirrored."""
    reach = min(math.ceil(3 * std), min(pictures.shape[-2:]) - 1)
    at = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
    weight = torch.exp(-0.5 * (at / std) ** 2)
    weight = (weight / weight.sum()).expand(pictures.shape[1], 1, -1)
    wide = F.pad(pictures, [reach] * 4, mode="reflect")
    rows = F.conv2d(wide, weight[:, :, None], groups=pictures.shape[1])
    return F.conv2d(rows, weight[..., None], groups=pictures.shape[1])


def clip_guided(denoise: Denoise, look: Callable[[Tensor], Tensor], target: Tensor, scale: float = 0.0) -> Denoise:
    """denoised, moved up the slope of its CLIP cosine to target, by scale * sigma / sqrt(1 + sigma^2) a pixel (rms).

    Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, section 4) with CLIP as the classifier, asked about
    the guess of x0, which is a picture as it knows them, where x is noise. The step is of a set size, because the
    slope's own says nothing: the same for every picture, and gone with the noise.

    look: pictures (B, 3, S, S) in [-1, 1] -> unit rows (B, D), differentiable; target (B, D) unit rows.
    scale: 0 is off, 0.05 is a small step.
    """
    if not scale:
        return denoise

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            picture = denoised.detach().float().requires_grad_()
            (slope,) = torch.autograd.grad((look(picture) * target).sum(), picture)
        size = slope.square().flatten(1).mean(1).sqrt().clamp(min=1e-12)
        step = scale * sigma / (1 + sigma**2).sqrt() / size
        return denoised + _per_sample(step, slope) * slope.to(denoised.dtype)

    return guided


def clamped(denoise: Denoise, limit: float = 1.0, quantile: float | None = None) -> Denoise:
    """Keep the guess where data can be, in [-limit, limit]; without it strong guidance burns pictures out.

    quantile: None cuts off. A number, say 0.995, first scales each sample down until that share of its values fits
    ("dynamic thresholding", Saharia et al. 2022, arXiv 2205.11487, section 2.3).
    """

    def inside(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        if quantile is not None:
            reach = denoised.abs().flatten(1).float().quantile(quantile, dim=1).to(denoised.dtype)
            denoised = denoised * _per_sample(limit / reach.clamp(min=limit), x)
        return denoised.clamp(-limit, limit)

    return inside


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
