"""The trained models that draw together, opened from their folders and refused where they do not belong together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.denoiser import Denoiser
from diffusion.provenance import short
from diffusion.trained import load_decoder

if TYPE_CHECKING:
    from diffusion.copies import CopyCheck
    from diffusion.prior import Guess
    from diffusion.upsample import UpsamplerDenoiser


@dataclass(frozen=True)
class Models:
    """decoder draws; clip and prior are for captions; guide, a weaker decoder, for autoguidance; upsampler enlarges;
    copies finds the nearest training picture.

    fingerprints: of each by its name here, as the manifests have them.
    """

    clip: Clip | None
    prior: "Guess | None"
    decoder: Denoiser
    guide: Denoiser | None = None
    upsampler: "UpsamplerDenoiser | None" = None
    copies: "CopyCheck | None" = None
    fingerprints: dict[str, str] = field(default_factory=dict)


def open_models(
    decoder: Path | str,
    prior: Path | str | None = None,
    clip: Path | str | None = None,
    *,
    guide: Path | str | None = None,
    upsampler: Path | str | None = None,
    embeddings: Path | str | None = None,
    copies: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> Models:
    """See Generator.open. UserError if the folders do not belong together."""
    decoder_model, made = load_decoder(decoder, device)
    decoder_model = decoder_model.to(memory_format=torch.channels_last)  # 3 to 8 % faster convolutions
    fingerprints = {"decoder": made.fingerprint, "clip": made.inputs["clip"]["fingerprint"]}

    def known(name: str, folder: Path | str, fingerprint: str, its_clip: str | None) -> None:
        if its_clip not in (None, fingerprints["clip"]):
            raise UserError(
                f"{folder}/ and {decoder}/ were trained with different CLIPs ({short(its_clip)} and "
                f"{short(fingerprints['clip'])}); train one of them again with the other's"
            )
        fingerprints[name] = fingerprint

    prior_model = guide_model = upsampler_model = None
    if prior is not None:
        from diffusion.baselines import open_prior

        prior_model, own, prior_made = open_prior(prior, device, embeddings)
        known("prior", prior if prior_made else embeddings, own["prior"], own.get("clip"))
    if guide is not None:
        guide_model, guide_made = load_decoder(guide, device)
        guide_model = guide_model.to(memory_format=torch.channels_last)
        known("guide", guide, guide_made.fingerprint, guide_made.inputs["clip"]["fingerprint"])
        sizes = [model.config.image_size for model in (guide_model, decoder_model)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{guide}/ draws {sizes[0]} px and {decoder}/ {sizes[1]} px: it cannot guide it")
    if upsampler is not None:
        from diffusion.train_upsampler import load_upsampler

        upsampler_model, upsampler_made = load_upsampler(upsampler, device)
        known("upsampler", upsampler, upsampler_made.fingerprint, upsampler_made.inputs["clip"]["fingerprint"])
    check = None
    if copies is not None:
        from diffusion.copies import CopyCheck

        check = CopyCheck.open(copies)
        check.refuse_other_clip(fingerprints["clip"])
    wanted = any(one is not None for one in (prior, clip, copies)) or decoder_model.config.text
    folder = (clip or made.input_path("clip")) if wanted else None
    if folder is None and wanted:
        raise UserError(f"the CLIP that {decoder}/ was trained with is not where it was; say where: --clip")
    clip_model = Clip.load(folder, device) if folder else None
    if clip_model and clip_model.fingerprint != fingerprints["clip"]:
        raise UserError(
            f"{decoder}/ was trained with CLIP {short(fingerprints['clip'])}, but {folder}/ is "
            f"{short(clip_model.fingerprint)}; pass the former with --clip, or train again: unclip train decoder"
        )
    return Models(clip_model, prior_model, decoder_model, guide_model, upsampler_model, check, fingerprints)
