"""Choose the length of the average after the training: reconstruct several from its snapshots, keep the best.

Post-hoc EMA (Karras et al. 2023, arXiv 2312.02696, section 3; clip_train/ema.py). All are measured by the loss they
were trained on (decoders and upsamplers with their whole condition, as they draw), on samples they were not trained on,
with the same noise for each: so differences far smaller than the loss's own spread can be told.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_train.ema import read_snapshots, reconstruct
from clip_train.fit import Batch, FitConfig, FitResult
from clip_train.folder import Input, Manifest, Workspace, read_manifest
from clip_train.model import Clip
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingStore
from clip_train.tensors import load_weights
from diffusion.decoder import picture_cond
from diffusion.denoiser import denoising_loss, loss_weight
from diffusion.pairs import Pairs
from diffusion.picture_feed import PictureFeed
from diffusion.schedule import stratified
from diffusion.train_prior import diffusion_loss
from diffusion.train_upsampler import crop_loss, load_upsampler, random_crops
from diffusion.trained import density_of, load_decoder, load_prior, publish, refuse_other_clip

AS_TRAINED = "as trained"
Losses = Callable[[nn.Module], np.ndarray]  # model -> its loss on each batch held out, the same noise each time


def choose_average(
    folder: Path | str,
    sigma_rels: Sequence[float],
    out: Path | str,
    *,
    shards: Path | str | None = None,
    embeddings: Path | str | None = None,
    clip: Path | str | None = None,
    count: int = 1024,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> Manifest:
    """Measure averages of the widths sigma_rels, and the weights as they are; write the best as a folder like `folder`.

    folder: of a decoder or upsampler, measured on `shards`, or of a prior, measured on `embeddings`, none of which it
    was trained on; trained with --set ema_snapshots=N. clip: where the CLIP is, if it is not where it was. count: how
    many samples to measure on. The manifest's result has "sigma_rel" (None: as trained is best) and "table": rows of
    average, sigma_rel, loss, behind (its distance to the best one), error (that distance's standard error over
    batches; None of one batch), profile (how far the average is from a true one, see ema.reconstruct).
    """
    made = read_manifest(folder)
    if made.kind not in ("prior", "decoder", "upsampler"):
        raise UserError(f"{folder}/ is of kind {made.kind}; give a prior, decoder or upsampler folder")
    snapshots = read_snapshots(folder)
    if not sigma_rels:
        raise UserError("no widths to choose from; give some, e.g. 0.03,0.08,0.15")
    source = embeddings if made.kind == "prior" else shards
    if source is None:
        raise UserError(f"a {made.kind} is measured on pictures it does not know: pass --{_SOURCE[made.kind]}")
    encoder = None
    if made.kind == "prior":
        held = EmbeddingStore.open(embeddings)
        refuse_other_clip(held, embeddings, made, folder)
    else:
        held, encoder = ShardSet(str(shards)), _clip_of(made, folder, clip, device)
    if held.fingerprint in {one["fingerprint"] for one in made.inputs.values()}:
        raise UserError(
            f"{source} is what {folder}/ was trained on, where the longest average always wins; pass others"
        )
    inputs = {name: _again(made, name) for name in made.inputs}
    inputs |= {made.kind: Input(made.fingerprint, folder), "held_out": Input(held.fingerprint, source)}
    config = {"sigma_rel": sorted(float(one) for one in sigma_rels), "count": count, "seed": seed}
    space = Workspace.open(out, made.kind, config, inputs, "unclip ema")
    if space.done:
        return space.done

    model = {"prior": load_prior, "decoder": load_decoder, "upsampler": load_upsampler}[made.kind](folder, device)[0]
    if made.kind == "prior":
        losses = prior_losses(model.config, held, count, seed)
    elif made.kind == "decoder":
        losses = decoder_losses(model.config, held, encoder, space.path, count, seed)
    else:
        losses = upsampler_losses(model.config, held, encoder, space.path, count, seed)
    weights: dict[float | None, dict[str, Tensor]] = {None: {k: t.cpu().clone() for k, t in model.state_dict().items()}}
    rows, measured, best = [], {}, None
    for number, width in enumerate([None, *config["sigma_rel"]]):
        tensors, distance = (weights[None], 0.0) if width is None else reconstruct(snapshots, width)
        load_weights(model, tensors, folder)
        measured[width] = losses(model)
        rows.append({"average": AS_TRAINED if width is None else f"{width:g}", "sigma_rel": width, "profile": distance})
        if best is None or measured[width].mean() < measured[best].mean():
            best, weights[width] = width, tensors
        if on_progress:
            on_progress(number + 1, len(config["sigma_rel"]) + 1)
    for row in rows:
        behind = measured[row["sigma_rel"]] - measured[best]
        error = float(behind.std(ddof=1)) / len(behind) ** 0.5 if len(behind) > 1 else None
        row |= {"loss": float(measured[row["sigma_rel"]].mean()), "behind": float(behind.mean()), "error": error}
    load_weights(model, weights[best], folder)
    training = made.result.get("steps", snapshots[-1].step), made.result.get("seconds", 0.0)
    result = FitResult(*training, float(measured[best].mean()), None)
    return publish(space, model, model.config, result, {"sigma_rel": best, "table": rows, "count": count})


def decoder_losses(config: Any, samples: ShardSet, encoder: Clip, work: Path, count: int, seed: int) -> Losses:
    """The denoising loss on pictures of the shards, with their embeddings (and first captions, if it reads text)."""
    feed = PictureFeed.prepare(samples, encoder, config.image_size, work)
    density = density_of(config)

    def batches(device: torch.device) -> Iterator[tuple[Tensor, ...]]:
        for number, some in enumerate(_blocks(feed.pictures.rows, count, seed)):
            pixels, found = feed.pictures.load(some)
            text = encoder.text_states([samples.captions(row)[0] for row in found.tolist()]) if config.text else ()
            rng = torch.Generator(device).manual_seed(seed * 100_003 + number)
            cond = picture_cond(feed.rows(found).to(device), *(t.to(device) for t in text))
            sigma = density(stratified(len(found), rng))
            x0 = pixels.to(device).float() / 127.5 - 1
            yield x0, cond, sigma, torch.randn(x0.shape, generator=rng, device=device)

    @torch.no_grad()
    def losses(model: nn.Module) -> np.ndarray:
        device = next(model.parameters()).device
        return np.array(
            [
                float(denoising_loss(model, *batch, loss_weight(model.scaling, batch[2], config.weighting)))
                for batch in batches(device)
            ]
        )

    return losses


def upsampler_losses(config: Any, samples: ShardSet, encoder: Clip, work: Path, count: int, seed: int) -> Losses:
    """The denoising loss on one degraded crop of each picture of the shards, with its embedding."""
    feed = PictureFeed.prepare(samples, encoder, config.picture_size, work)

    @torch.no_grad()
    def losses(model: nn.Module) -> np.ndarray:
        device, measured = next(model.parameters()).device, []
        for number, some in enumerate(_blocks(feed.pictures.rows, count, seed)):
            pixels, found = feed.pictures.load(some)
            rng = torch.Generator(device).manual_seed(seed * 100_003 + number)
            x0 = random_crops(pixels.to(device), config.crop, rng)
            measured.append(float(crop_loss(model, x0, feed.rows(found).to(device), config, rng)))
        return np.array(measured)

    return losses


def prior_losses(config: Any, store: EmbeddingStore, count: int, seed: int) -> Losses:
    """The loss that the prior was trained on, on pairs of an embeddings folder."""
    pairs = Pairs.of(store, config.caption_mix, config.words)
    size = min(BATCH, len(pairs.row))
    order = pairs.batches(FitConfig(steps=1, batch_size=size, seed=seed))

    @torch.no_grad()
    def losses(model: nn.Module) -> np.ndarray:
        device, measured = next(model.parameters()).device, []
        loss = diffusion_loss(config, model)
        for number, batch in zip(range(max(1, -(-count // size))), order(0), strict=False):
            rng = torch.Generator(device).manual_seed(seed * 100_003 + number)
            measured.append(float(loss(model, _to(batch, device), rng)[0]))
        return np.array(measured)

    return losses


BATCH = 64
_SOURCE = {"prior": "embeddings", "decoder": "shards", "upsampler": "shards"}


def _blocks(rows: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    chosen = np.random.default_rng(seed).permutation(rows)[:count]
    return (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: t.to(device) for name, t in batch.items()}


def _again(made: Manifest, name: str) -> Input:
    """An input of a folder, as an input of another."""
    recorded = made.inputs[name]
    path = recorded["path"]
    if "://" not in path and ":" not in path.replace("::", ""):
        path = os.path.normpath(made.folder / path)
    return Input(recorded["fingerprint"], path)


def _clip_of(made: Manifest, folder: Path | str, clip: Path | str | None, device: str | torch.device) -> Clip:
    where = clip or made.input_path("clip")
    if where is None:
        raise UserError(f"the CLIP that {folder}/ was trained with is not where it was; say where: --clip")
    encoder = Clip.load(where, device)
    if encoder.fingerprint != made.inputs["clip"]["fingerprint"]:
        raise UserError(f"{where}/ is not the CLIP that {folder}/ was trained with; pass that with --clip")
    return encoder
