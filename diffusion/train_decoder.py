"""train_decoder: shards + a CLIP + denoising_loss -> fit -> a decoder folder."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train import ranks
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.gradients import LossFunction
from clip_train.model import Clip
from clip_train.settings import Progress, UserError, config_to_json, override
from clip_train.shards import ShardSet
from clip_train.tensors import load_tensors, load_weights
from diffusion.align import Watched, clip_features, misalignment
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, noised, picture_cond
from diffusion.denoiser import Cond, denoising_loss, loss_weight
from diffusion.picture_feed import PictureFeed
from diffusion.ridge import ridge_regression
from diffusion.schedule import stratified
from diffusion.trained import Preset, density_of, publish, saved

DECODER_PRESETS = {
    "tiny": Preset(
        "CPU, minutes: 32 px",
        DecoderConfig(),
        FitConfig(minutes=4.0, batch_size=32, lr=3e-3, weight_decay=0.01, beta2=0.98, ema=0.99),
    ),
    "laptop": Preset(
        "CPU, an hour: 64 px",
        DecoderConfig(
            image_size=64,
            network="unet",
            patch=1,
            widths=(32, 64, 128, 256),
            blocks=(1, 1, 2, 2),
            attention=(8,),
            text=True,
            noise_image=0.3,
            sigma_mean=-0.4,
        ),
        FitConfig(minutes=60.0, batch_size=16, lr=2e-3, weight_decay=0.01, beta2=0.98, ema=0.999),
    ),
    "small": Preset(
        "one GPU, under an hour: 64 px",
        DecoderConfig(
            image_size=64,
            network="unet",
            patch=1,
            widths=(64, 128, 256, 512),
            blocks=(2, 2, 3, 3),
            attention=(16, 8),
            head_width=64,
            cond_width=512,
            text=True,
            noise_image=0.3,
            dropout=0.1,
            sigma_mean=-0.4,
        ),
        FitConfig(minutes=50.0, batch_size=256, lr=5e-4, weight_decay=0.01, beta2=0.99, ema=0.9995, ema_snapshots=4),
    ),
    "base": Preset(
        "a node of GPUs, days: 64 px, millions of pictures (torchrun)",
        DecoderConfig(
            image_size=64,
            network="unet",
            patch=1,
            widths=(192, 384, 576, 768),
            blocks=(3, 3, 3, 3),
            attention=(16, 8),
            head_width=64,
            cond_width=768,
            image_tokens=8,
            text=True,
            noise_image=0.5,
            dropout=0.1,
            sigma_mean=-0.4,
        ),
        FitConfig(
            steps=400_000,
            batch_size=1024,
            lr=2e-4,
            warmup=0.01,
            weight_decay=0.01,
            beta2=0.99,
            ema=0.9999,
            ema_snapshots=8,
            compile=True,
            save_every=600.0,
        ),
    ),
}


def train_decoder(
    shards: Path | str,
    clip: Path | str,
    out: Path | str,
    config: DecoderConfig = DECODER_PRESETS["tiny"].config,
    fit_config: FitConfig = DECODER_PRESETS["tiny"].fit,
    *,
    init: Path | str | None = None,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Manifest:
    """Train on the pictures of `shards`, each given its embedding by the CLIP in folder `clip`, made once beforehand.

    init: a decoder folder whose weights to begin with, its CLIP this one; config is then that folder's, with changes
    that leave the network's shape (settings_from). Writes a decoder/ folder; run again to resume, or to find it done.
    on_progress counts pictures while they are decoded and encoded (stage="encode"), then optimizer steps.
    """
    place = ranks.start(device)
    samples = ShardSet(str(shards))
    encoder = Clip.load(clip, place)
    config = replace(config, embed_dim=config.embed_dim or encoder.embed_dim)
    if config.text:
        encoder.text_states([""])  # refuses towers whose states cannot be read
        config = replace(config, text_width=config.text_width or encoder.model_cfg["text_cfg"]["width"])
    if config.align:
        features = clip_features(encoder, torch.zeros(1, 3, config.image_size, config.image_size)).shape[1]
        config = replace(config, align_width=features)
    if config.embed_dim != encoder.embed_dim:
        raise UserError(
            f"{clip}/ makes {encoder.embed_dim}-wide embeddings, but the decoder's embed_dim is {config.embed_dim}; "
            f"leave embed_dim out"
        )
    inputs = {"shards": Input(samples.fingerprint, shards), "clip": Input(encoder.fingerprint, clip)}
    if init is not None:
        inputs["init"] = Input(refuse_as_init(init, encoder, clip), init)
    settings = {"decoder": config_to_json(config), "fit": config_to_json(fit_config)}
    space = ranks.open_workspace(out, "decoder", settings, inputs)
    if space.done:
        return space.done

    mix = config.caption_mix if config.text else None
    feed = PictureFeed.prepare(samples, encoder, config.image_size, space.path, on_progress, caption_mix=mix)
    torch.manual_seed(fit_config.seed)
    if init is None:
        denoiser, notes = fitted(config, feed)
        config = denoiser.config
    else:
        denoiser, notes = DecoderDenoiser(config), {}
        take_weights(denoiser, init)
    loss, batches = diffusion_loss(config, denoiser, encoder), feed.batches(fit_config)
    told = {"on_progress": on_progress, "on_warning": on_warning}
    result = fit(denoiser, batches, loss, fit_config, space.path, device=place, **told)
    return publish(space, denoiser, config, result, {"pictures": len(feed.pictures)} | notes)


def settings_from(init: Path | str, preset: str, pairs: Sequence[str] = ()) -> list:
    """The config of the decoder in `init` and the preset's schedule, with --set pairs applied."""
    if preset not in DECODER_PRESETS:
        raise UserError(f"no preset {preset!r}; there are: {', '.join(DECODER_PRESETS)}")
    return override([saved(init, "decoder", DecoderConfig)[1], DECODER_PRESETS[preset].fit], pairs)


def refuse_as_init(init: Path | str, encoder: Clip, clip: Path | str) -> str:
    """The fingerprint of the decoder in `init`; UserError where it cannot be trained on with this CLIP."""
    made, config = saved(init, "decoder", DecoderConfig)
    if made.inputs["clip"]["fingerprint"] != encoder.fingerprint:
        raise UserError(f"{init}/ was trained with another CLIP than {clip}/; pass that one with --clip")
    if config.few_steps:
        raise UserError(f"{init}/ is distilled to {config.few_steps} steps; pass the decoder it was made from")
    return made.fingerprint


def take_weights(denoiser: DecoderDenoiser, init: Path | str) -> None:
    """The weights of the decoder in `init`; what align.py reads is kept as it is where only this one has it."""
    path = Path(init) / "model.safetensors"
    weights = load_tensors(path)[0]
    if denoiser.config.align_width != saved(init, "decoder", DecoderConfig)[1].align_width:
        own = denoiser.state_dict()
        weights = {name: weight for name, weight in weights.items() if not name.startswith("features.")}
        weights |= {name: own[name] for name in own if name.startswith("features.")}
    load_weights(denoiser, weights, path)


def fitted(config: DecoderConfig, feed: PictureFeed) -> tuple[DecoderDenoiser, dict]:
    """A new decoder with all that is computed from the data beforehand: linear guess, its spread, Wiener's filter."""
    linear = ridge_regression(guess_pairs(feed, config))
    moved = config.sigma_mean + math.log(linear.spread / config.sigma_data)
    denoiser = DecoderDenoiser(replace(config, sigma_data=linear.spread, sigma_mean=moved))
    denoiser.network.linear.take(linear)
    if config.noise_image:
        found = feed.pictures.rows
        blocks = np.array_split(found, -(-len(found) // 4096))
        denoiser.network.wiener.take((feed.rows(some) for some in blocks), linear.penalty)
    return denoiser, {"linear_penalty": linear.penalty, "linear_spread": linear.spread}


def diffusion_loss(config: DecoderConfig, decoder: DecoderDenoiser, encoder: Clip | None) -> LossFunction:
    """The denoising loss of a batch of pictures, with `align` that of the hidden states as well.

    encoder: the CLIP whose text states or features are looked at; None where the config asks for neither.
    """
    density, scaling = density_of(config), decoder.scaling

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0, cond = batch["pixels"].float() / 127.5 - 1, shown(batch, config, encoder, rng)
        sigma = density(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        weight = loss_weight(scaling, sigma, config.weighting)
        if not config.align:
            return denoising_loss(model, x0, cond, sigma, noise, weight), {}
        watched = Watched(model)
        value = denoising_loss(watched, x0, cond, sigma, noise, weight)
        away = misalignment(watched.features, clip_features(encoder, batch["pixels"]))
        return value + config.align * away, {"denoising": float(value.detach()), "misalignment": float(away.detach())}

    return loss


def shown(batch: Batch, config: DecoderConfig, encoder: Clip | None, rng: torch.Generator) -> Cond:
    """A batch's condition as training sees it: embeddings noised, embeddings and texts taken away from some."""
    rows, level = batch["image"], None
    if config.noise_image:
        level = config.noise_image * stratified(len(rows), rng) ** 2  # half of them below a quarter of the most
        rows = noised(rows, level, torch.randn(rows.shape, generator=rng, device=rows.device))
    text = encoder.text_states(batch["tokens"]) if "tokens" in batch else ()
    return drop_some(picture_cond(rows, *text, image_noise=level), config, rng)


def guess_pairs(feed: PictureFeed, config: DecoderConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """(embedding (n, D), picture (n, 3 g g) in [-1, 1]) of every picture once, g pixels wide as the linear guess."""
    for start in range(0, len(feed.pictures.rows), 1024):
        pixels, rows = feed.pictures.load(feed.pictures.rows[start : start + 1024])
        small = F.interpolate(pixels.float() / 127.5 - 1, config.guess_size, mode="area")
        yield feed.rows(rows), small.flatten(1)
