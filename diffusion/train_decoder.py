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
from clip_train.captions import pick_caption, uniform_of
from clip_train.feed import decoded
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.shards import ShardSet
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, picture_cond
from diffusion.denoiser import denoising_loss
from diffusion.ridge import ridge_regression
from diffusion.schedule import stratified
from diffusion.trained import Preset, density_of, publish

CACHE_GB = 2.0  # pictures are decoded once and kept as bytes, if they fit

DECODER_PRESETS = {
    "tiny": Preset(
        "CPU, minutes: 32 px",
        DecoderConfig(),
        FitConfig(minutes=4.0, batch_size=32, lr=3e-3, weight_decay=0.01, beta2=0.98, ema=0.99),
    ),
    "small": Preset(
        "one GPU, under an hour: 64 px",
        DecoderConfig(
            image_size=64,
            widths=(128, 256, 384, 512),
            blocks=(1, 2, 3, 2),
            attention=(16, 8, 4),
            head_width=64,
            cond_width=512,
            dropout=0.1,
        ),
        FitConfig(minutes=50.0, batch_size=256, lr=5e-4, weight_decay=0.01, beta2=0.99, ema=0.9995),
    ),
}


def train_decoder(
    shards: Path | str,
    clip: Path | str,
    out: Path | str,
    config: DecoderConfig = DECODER_PRESETS["tiny"].config,
    fit_config: FitConfig = DECODER_PRESETS["tiny"].fit,
    *,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
) -> Manifest:
    """Train on the pictures of `shards`, each given its embedding by the CLIP in folder `clip`, made once beforehand.

    Writes a decoder/ folder; run again to resume, or to find it done. on_progress counts pictures while they are
    decoded and encoded (stage="encode"), then optimizer steps.
    """
    place = ranks.start(device)
    samples = ShardSet(str(shards))
    encoder = Clip.load(clip, place)
    config = replace(config, embed_dim=config.embed_dim or encoder.embed_dim)
    if config.text:
        config = replace(config, text_width=config.text_width or encoder.model_cfg["text_cfg"]["width"])
    if config.embed_dim != encoder.embed_dim:
        raise UserError(
            f"{clip}/ makes {encoder.embed_dim}-wide embeddings, but the decoder's embed_dim is {config.embed_dim}; "
            f"leave embed_dim out"
        )
    inputs = {"shards": Input(samples.fingerprint, shards), "clip": Input(encoder.fingerprint, clip)}
    settings = {"decoder": config_to_json(config), "fit": config_to_json(fit_config)}
    space = ranks.open_workspace(out, "decoder", settings, inputs)
    if space.done:
        return space.done

    if len(samples) < 2:
        raise UserError(f"{shards} holds {len(samples)} picture; a decoder needs at least 2")
    tell = (lambda done, total, **numbers: on_progress(done, total, stage="encode")) if on_progress else None
    image = picture_embeddings(samples, encoder, space.path, tell)
    pictures = decoded(samples, config.image_size, space.path, CACHE_GB, tell)
    captions = samples.captions if config.text else None
    linear = ridge_regression(guess_pairs(image, pictures, config))
    moved = config.sigma_mean + math.log(linear.spread / config.sigma_data)
    config = replace(config, sigma_data=linear.spread, sigma_mean=moved)
    torch.manual_seed(fit_config.seed)
    denoiser = DecoderDenoiser(config)
    denoiser.network.linear.take(linear)
    density, scaling = density_of(config), denoiser.scaling

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0 = batch["pixels"].float() / 127.5 - 1
        cond = picture_cond(batch["image"], batch.get("text"), batch.get("keep_text"))
        cond = drop_some(cond, config, rng)
        sigma = density(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        return denoising_loss(model, x0, cond, sigma, noise, scaling.weight(sigma)), {}

    world = ranks.world_size()
    order = Batches(pictures, fit_config.batch_size // world, fit_config.seed, ranks.rank(), world)

    def batches(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(order(step), start=step):
            batch = batch | {"image": torch.from_numpy(image[batch["row"].numpy()].astype(np.float32))}
            if captions:
                uniform = uniform_of(fit_config.seed, order.places(number))
                batch |= text_batch(encoder, captions, batch["row"].tolist(), config.caption_mix, uniform)
            yield batch

    result = fit(denoiser, batches, loss, fit_config, space.path, device=place, on_progress=on_progress)
    notes = {"pictures": len(pictures), "linear_penalty": linear.penalty, "linear_spread": linear.spread}
    return publish(space, denoiser, config, result, notes)


def picture_embeddings(samples: ShardSet, clip: Clip, work: Path, on_progress: Progress | None) -> np.ndarray:
    """(rows of the shards, D) float16: embeddings of the pictures, zeros where one is bad; made once, then mapped."""
    path, block = work / "scratch" / "image_emb.npy", 256
    if not path.exists():
        pictures = decoded(samples, clip.image_size, work, CACHE_GB, on_progress)
        if ranks.is_main():
            unfinished = path.with_name("image_emb_part.npy")
            rows = np.lib.format.open_memmap(unfinished, "w+", np.float16, (len(samples), clip.embed_dim))
            for start in range(0, len(samples), block):
                pixels, found = pictures.load(np.arange(start, min(start + block, len(samples))))
                if len(found):
                    rows[found] = clip.encode_image(pixels).numpy()
                if on_progress:
                    on_progress(min(start + block, len(samples)), len(samples))
            rows.flush()
            unfinished.replace(path)
        ranks.barrier()
    return np.load(path, mmap_mode="r")


def guess_pairs(image: np.ndarray, pictures: Pictures, config: DecoderConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """(embedding (n, D), picture (n, 3 g g) in [-1, 1]) of every picture once, g pixels wide as the linear guess."""
    for start in range(0, len(pictures.rows), 1024):
        pixels, rows = pictures.load(pictures.rows[start : start + 1024])
        small = F.interpolate(pixels.float() / 127.5 - 1, config.guess_size, mode="area")
        yield torch.from_numpy(image[rows].astype(np.float32)), small.flatten(1)


def text_batch(
    clip: Clip, captions: Callable[[int], list[str]], rows: list[int], mix: Sequence[float], uniform: np.ndarray
) -> Batch:
    """The text tower's states of one caption per picture: the one that `uniform` (B,) in [0, 1) chooses, see mix."""
    said = [captions(row) for row in rows]
    which = pick_caption(np.array([len(own) for own in said]), mix, uniform)
    states, keep = clip.text_states([own[i] for own, i in zip(said, which.tolist(), strict=True)])
    return {"text": states.cpu(), "keep_text": keep.cpu()}
