"""train_upsampler: shards + a CLIP + denoising_loss on degraded crops -> fit -> an upsampler folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clip_train import ranks
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.model import Clip
from clip_train.pictures import PictureError, Pictures, decode_picture
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.shards import ShardSet
from diffusion.denoiser import Scaling, denoising_loss
from diffusion.picture_feed import PictureFeed
from diffusion.schedule import DENSITIES, stratified
from diffusion.trained import Preset, publish, ready, saved
from diffusion.upsample import (
    UpsamplerConfig,
    UpsamplerDenoiser,
    bicubic,
    degraded,
    drop_some,
    small_cond,
)

UPSAMPLER_PRESETS = {
    "tiny": Preset(
        "CPU, minutes",
        UpsamplerConfig(),
        FitConfig(minutes=10.0, batch_size=16, lr=2e-3, weight_decay=0.01, beta2=0.98, ema=0.99),
    ),
    "small": Preset(
        "one GPU, under an hour",
        UpsamplerConfig(widths=(96, 192, 256, 256), blocks=(2, 2, 2, 2), cond_width=512, dropout=0.05),
        FitConfig(minutes=40.0, batch_size=256, lr=6e-4, weight_decay=0.01, beta2=0.99, ema=0.9995),
    ),
}
LARGEST = 512  # short side of pictures at which they are kept when the config does not say


def train_upsampler(
    shards: Path | str,
    clip: Path | str,
    out: Path | str,
    config: UpsamplerConfig = UPSAMPLER_PRESETS["tiny"].config,
    fit_config: FitConfig = UPSAMPLER_PRESETS["tiny"].fit,
    *,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Manifest:
    """Train on random crops of the pictures of `shards`, each with its whole picture's embedding by the CLIP in `clip`.

    Writes an upsampler/ folder; run again to resume, or to find it done. on_progress counts pictures while they are
    decoded and encoded (stage="encode"), then optimizer steps.
    """
    place = ranks.start(device)
    samples = ShardSet(str(shards))
    encoder = Clip.load(clip, place)
    config = replace(
        config,
        embed_dim=config.embed_dim or encoder.embed_dim,
        picture_size=config.picture_size or own_size(samples, config.crop),
    )
    if config.embed_dim != encoder.embed_dim:
        raise UserError(
            f"{clip}/ makes {encoder.embed_dim}-wide embeddings, but the upsampler's embed_dim is {config.embed_dim}; "
            f"leave embed_dim out"
        )
    inputs = {"shards": Input(samples.fingerprint, shards), "clip": Input(encoder.fingerprint, clip)}
    settings = {"upsampler": config_to_json(config), "fit": config_to_json(fit_config)}
    space = ranks.open_workspace(out, "upsampler", settings, inputs)
    if space.done:
        return space.done

    feed = PictureFeed.prepare(samples, encoder, config.picture_size, space.path, on_progress)
    config = replace(config, sigma_data=residual_spread(feed.pictures, config))
    torch.manual_seed(fit_config.seed)
    denoiser = UpsamplerDenoiser(config)

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0 = random_crops(batch["pixels"], config.crop, rng)
        return crop_loss(model, x0, batch["image"], config, rng, drop=True), {}

    batches = feed.batches(fit_config)
    told = {"on_progress": on_progress, "on_warning": on_warning}
    result = fit(denoiser, batches, loss, fit_config, space.path, device=place, **told)
    notes = {"pictures": len(feed.pictures), "residual_spread": config.sigma_data}
    return publish(space, denoiser, config, result, notes)


def load_upsampler(folder: Path | str, device: torch.device | str = "cpu") -> tuple[UpsamplerDenoiser, Manifest]:
    """An upsampler folder, ready for use."""
    manifest, config = saved(folder, "upsampler", UpsamplerConfig)
    return ready(UpsamplerDenoiser(config), folder, device), manifest


def crop_loss(
    model: nn.Module, x0: Tensor, image: Tensor, config: UpsamplerConfig, rng: torch.Generator, drop: bool = False
) -> Tensor:
    """The denoising loss of crops (B, 3, S, S) in [-1, 1], degraded, with the embeddings (B, D) of their pictures.

    drop: whether some lose their embedding, as in training. Expect 0.3 to 0.6: much of what is lost is nowhere to see.
    """
    small, level = degraded(x0, config, rng)
    cond = small_cond(small, level, image, config.factor)
    if drop:
        cond = drop_some(cond, config, rng)
    sigma = noise_levels(len(x0), config, rng)
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    return denoising_loss(model, x0, cond, sigma, noise, Scaling(config.predict, config.sigma_data).weight(sigma))


def noise_levels(count: int, config: UpsamplerConfig, rng: torch.Generator) -> Tensor:
    """(count,) sigmas of the config's density."""
    u = stratified(count, rng)
    if config.density == "log_normal":
        return config.sigma_data * DENSITIES["log_normal"](u, config.sigma_mean, config.sigma_std)
    return config.sigma_data * DENSITIES[config.density](u)


def random_crops(pixels: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """A square out of each picture: uint8 (B, 3, H, W) -> (B, 3, side, side) in [-1, 1]."""
    batch, _, height, width = pixels.shape
    top, left = (
        torch.randint(whole - side + 1, (batch,), generator=rng, device=pixels.device) for whole in (height, width)
    )
    squares = pixels.unfold(2, side, 1).unfold(3, side, 1)  # (B, 3, tops, lefts, side, side), without copying
    return squares[torch.arange(batch, device=pixels.device), :, top, left].float() / 127.5 - 1


def residual_spread(pictures: Pictures, config: UpsamplerConfig) -> float:
    """Std of a pixel of what the bicubic enlargement of degraded crops leaves over, over some hundred pictures."""
    rng = torch.Generator().manual_seed(0)
    some = pictures.rows[np.linspace(0, len(pictures) - 1, min(len(pictures), 512)).astype(np.int64)]
    x0 = random_crops(pictures.load(some)[0], config.crop, rng)
    small, _ = degraded(x0, config, rng)
    return max(float((x0 - bicubic(small, config.factor)).square().mean().sqrt()), 1e-3)


def own_size(samples: ShardSet, least: int) -> int:
    """The short side, pixels, that half of the pictures have or exceed, up to LARGEST. UserError if below `least`."""
    sides = []
    for row in np.linspace(0, len(samples) - 1, min(len(samples), 64)).astype(int).tolist():
        try:
            sides.append(min(decode_picture(samples.picture(row)).size))
        except PictureError:  # named when all are decoded
            continue
    side = min(int(np.median(sides)), LARGEST) if sides else least
    if side < least:
        raise UserError(
            f"the pictures are {side} pixels wide, less than the upsampler's crop {least}: nothing to learn finer "
            f"structure from; take larger pictures, or --set crop={side // 16 * 16 or 8}"
        )
    return side
