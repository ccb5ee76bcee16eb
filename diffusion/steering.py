"""Steering: what Sampling asks for (guidance, a negative prompt, CLIP's help), put around a generator's decoder."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.decoder import null_cond, picture_cond
from diffusion.denoiser import Cond
from diffusion.distill import few_sampling
from diffusion.guidance import (
    autoguided,
    between,
    clamped,
    classifier_free,
    clip_guided,
    conditioned,
    self_attention,
    two_conditions,
)
from diffusion.layers import Attention
from diffusion.samplers import Denoise
from diffusion.sampling import Sampling

if TYPE_CHECKING:
    from diffusion.generate import Generator

BLUR = 1 / 32  # of the picture's side: std of the blur of self-attention guidance


def steered(generator: "Generator", rows: Tensor, captions: Sequence[str] | None, how: Sampling) -> Denoise:
    """denoise(x, sigma) for unit rows (B, D), and captions if the decoder reads them: guided and clamped."""
    cond, image_only, null = conditions(generator, rows, captions, how)

    def by(network: Callable[..., Tensor]) -> Denoise:
        if how.text_guidance is None:
            return classifier_free(network, cond, null, how.guidance, rescale=how.rescale)
        return two_conditions(network, cond, image_only, null, how.guidance, how.text_guidance, how.rescale)

    guided = by(generator.network)
    if how.autoguidance != 1:  # both guided alike, so that they differ in how good they are alone
        guided = autoguided(guided, by(generator.guide), how.autoguidance)
    if how.self_attention:
        layers = [part for part in generator.decoder.modules() if isinstance(part, Attention)]
        if not layers:
            raise UserError("self_attention needs a decoder with attention; this one has none")
        plain, blur = conditioned(generator.decoder, cond), BLUR * generator.size
        unguided = how.guidance == how.autoguidance == 1 and how.text_guidance in (None, 1)
        guided = self_attention(plain if unguided else guided, plain, layers, how.self_attention, blur)
    if how.clip_guidance:
        wanted = target(generator.clip, rows, captions)
        guided = clip_guided(guided, lambda pixels: look(generator.clip, pixels), wanted, how.clip_guidance)
    guided = between(guided, conditioned(generator.network, cond), how.interval)
    return clamped(guided, quantile=how.clamp if how.clamp < 1 else None) if how.clamp else guided


def passes(how: Sampling) -> int:
    """Samples that one guided guess of one picture takes through the networks, as steered puts it together."""

    def of(*scales: float) -> int:
        return 1 if len(set(scales)) == 1 and scales[0] in (0, 1) else 2

    image, text = how.guidance, how.guidance if how.text_guidance is None else how.text_guidance
    if text in (image, 0):
        own = of(image)
    else:
        own = of(text) if image == 1 else 3
    guided = own if how.autoguidance in (0, 1) else 2 * own
    if not how.self_attention:
        return guided
    return 2 if image == text == how.autoguidance == 1 else guided + 2


def conditions(
    generator: "Generator", rows: Tensor, captions: Sequence[str] | None, how: Sampling
) -> tuple[Cond, Cond, Cond]:
    """The whole condition, the same without its text, and what guidance moves away from."""
    count, reads = len(rows), captions is not None and generator.decoder.network.config.text
    told = rows.new_full((count,), how.image_noise) if how.image_noise else None
    text, unwanted = (None, None), (None, None)
    if reads:  # in one batch, so that both are cut to one length
        states, keep = generator.clip.text_states([*captions, how.negative])
        text = states[:count], keep[:count]
        unwanted = states[count:].expand_as(text[0]), keep[count:].expand_as(text[1])
    cond = picture_cond(rows, *text, told)
    null = null_cond(cond)
    image_only = cond | {"keep_text": null["keep_text"]} if reads else cond
    if how.negative:  # one embedding for all pictures, so that none depends on its neighbours
        away = generator.image_embeddings([how.negative], [0], how).to(rows.device).expand_as(rows)
        null = picture_cond(away, *unwanted)
    return cond, image_only, null


def target(clip: Clip, rows: Tensor, captions: Sequence[str] | None) -> Tensor:
    """What CLIP is to see in pictures: the captions, or the embeddings where there are none; (B, D) unit rows."""
    return rows if captions is None else clip.encode_text(list(captions)).to(rows.device)


def look(clip: Clip, pixels: Tensor) -> Tensor:
    """What CLIP sees in pictures (B, 3, S, S) in [-1, 1]: unit rows (B, D), differentiable."""
    if pixels.shape[-1] != clip.image_size:
        pixels = F.interpolate(pixels, clip.image_size, mode="bicubic", antialias=True)
    return F.normalize(clip.model.encode_image(((pixels + 1) * 127.5 - clip.mean) / clip.std).float(), dim=-1)


def refuse_impossible(
    generator: "Generator", how: Sampling, captions: Sequence[str] | None, begin: float | None = None
) -> None:
    """UserError if `how` asks for what the generator has not got. begin: where the walk begins, if not at sigma_max."""
    config = generator.decoder.network.config
    trained, few = getattr(config, "noise_image", 0.0), getattr(config, "few_steps", 0)
    if few and not (how.sampler in ("ddim", "euler") and torch.equal(how.sigmas(begin), few_sampling(few).sigmas())):
        raise UserError(
            f"this decoder was distilled to draw in {few} steps of ddim and knows no other noise levels; leave steps, "
            f"sampler, grid and sigmas as they are, or take the decoder it was made from"
        )
    if generator.upsampler is not None and how.upsample_noise > generator.upsampler.config.noise:
        raise UserError(
            f"upsample_noise {how.upsample_noise:g} is more than this upsampler was trained with "
            f"(noise={generator.upsampler.config.noise:g})"
        )
    if how.autoguidance != 1 and generator.guide is None:
        raise UserError(f"autoguidance {how.autoguidance:g} needs a weaker decoder; pass its folder with --guide")
    if how.text_guidance is not None and not config.text:
        raise UserError("text_guidance is for decoders that read text; this one was trained without (text=false)")
    if how.text_guidance is not None and captions is None:
        raise UserError("text_guidance needs captions; there are embeddings alone")
    if how.negative and (generator.clip is None or generator.prior is None):
        raise UserError("a negative prompt needs a CLIP and a prior; pass --prior")
    if (how.candidates > 1 or how.clip_guidance) and generator.clip is None:
        raise UserError("candidates and clip_guidance need the decoder's CLIP; say where: --clip")
    if how.image_noise > trained:
        raise UserError(
            f"image_noise {how.image_noise:g} is more than this decoder was trained with (noise_image={trained:g})"
        )
