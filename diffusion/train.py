"""train_prior and train_decoder: a folder of data + denoising_loss -> fit -> a folder with config.json and weights."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train import ranks
from clip_train.captions import pick_caption, uniform_of
from clip_train.checkpoint import load_tensors, load_weights, save_tensors
from clip_train.feed import decoded
from clip_train.fit import Batch, FitConfig, FitResult, fit
from clip_train.folder import Input, Manifest, Workspace, read_manifest, write_file
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import Progress, UserError, config_from_json, config_to_json, override
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingStore
from diffusion.decoder import DecoderConfig, DecoderDenoiser, drop_some, picture_cond
from diffusion.denoiser import Denoiser, denoising_loss
from diffusion.prior import PriorConfig, PriorDenoiser, text_cond
from diffusion.ridge import ridge_regression
from diffusion.schedule import DENSITIES, stratified

CACHE_GB = 2.0  # pictures are decoded once and kept as bytes, if they fit


@dataclass(frozen=True)
class Preset:
    """A model and a schedule that belong together, and what they are for."""

    about: str
    config: PriorConfig | DecoderConfig
    fit: FitConfig


PRIOR_PRESETS = {
    "tiny": Preset(
        "CPU, a minute: thousands of pairs",
        PriorConfig(),
        FitConfig(minutes=1.0, batch_size=256, lr=1e-3, weight_decay=0.1, ema=0.99),
    ),
    "small": Preset(
        "one GPU, minutes: from a hundred thousand pairs on",
        PriorConfig(width=512, depth=8, heads=8),
        FitConfig(minutes=20.0, batch_size=1024, lr=5e-4, weight_decay=0.1, ema=0.999),
    ),
}

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


def train_prior(
    embeddings: Path | str,
    out: Path | str,
    config: PriorConfig = PRIOR_PRESETS["tiny"].config,
    fit_config: FitConfig = PRIOR_PRESETS["tiny"].fit,
    *,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
) -> Manifest:
    """Train on every (caption, picture) pair of an embeddings folder; needs neither pictures nor CLIP.

    Writes a prior/ folder; run again to resume, or to find it done. on_progress counts optimizer steps.
    """
    place = ranks.start(device)
    store = EmbeddingStore.open(embeddings)
    config = replace(config, embed_dim=config.embed_dim or store.dim)
    if config.embed_dim != store.dim:
        raise UserError(
            f"{embeddings}/ holds {store.dim}-wide embeddings, but the prior's embed_dim is {config.embed_dim}; "
            f"leave embed_dim out"
        )
    if len(store) < 2:
        raise UserError(f"{embeddings}/ has {len(store)} picture; a prior needs at least 2")
    clip = store.manifest.inputs["clip"]
    inputs = {
        "embeddings": Input(store.fingerprint, embeddings),
        "clip": Input(clip["fingerprint"], os.path.normpath(store.folder / clip["path"])),
    }
    settings = {"prior": config_to_json(config), "fit": config_to_json(fit_config)}
    space = ranks.open_workspace(out, "prior", settings, inputs)
    if space.done:
        return space.done

    pairs = Pairs.of(store, config.caption_mix)
    linear = ridge_regression(pairs.blocks(), independent=len(store))
    config = replace(config, sigma_data=linear.spread * config.embed_dim**0.5)
    torch.manual_seed(fit_config.seed)
    denoiser = PriorDenoiser(config)
    denoiser.network.linear.take(linear)
    density, scaling = density_of(config), denoiser.scaling

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        x0 = batch["image"] * config.embed_dim**0.5
        cond = text_cond(batch["text"])
        cond["drop"] = torch.rand(len(x0), generator=rng, device=x0.device) < config.drop_text
        sigma = density(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        return denoising_loss(model, x0, cond, sigma, noise, scaling.weight(sigma)), {}

    batches = pairs.batches(fit_config)
    result = fit(denoiser, batches, loss, fit_config, space.path, device=place, on_progress=on_progress)
    notes = {"pairs": len(pairs.row), "linear_penalty": linear.penalty, "linear_spread": linear.spread}
    return _publish(space, denoiser, config, result, notes)


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
    return _publish(space, denoiser, config, result, notes)


def settings(presets: dict[str, Preset], name: str = "tiny", pairs: Sequence[str] = ()) -> list:
    """The two configs of a preset out of PRIOR_PRESETS or DECODER_PRESETS, with --set pairs applied."""
    if name not in presets:
        raise UserError(f"no preset {name!r}; there are: {', '.join(presets)}")
    return override([presets[name].config, presets[name].fit], pairs)


@dataclass(frozen=True)
class Pairs:
    """Caption rows and the picture row that each belongs to, on the CPU."""

    text: np.ndarray  # (M, D)
    image: np.ndarray  # (N, D)
    row: np.ndarray  # (M,): the picture of each caption, in rising order
    mix: Sequence[
        float
    ] = ()  # weights of a picture's 1st, 2nd, ... caption; (): every caption comes round equally often

    @classmethod
    def of(cls, store: EmbeddingStore, mix: Sequence[float] = ()) -> "Pairs":
        text, row = store.captions()
        return cls(text, store.image(), row, mix)

    def blocks(self, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """(text (n, D), image (n, D)), each pair once."""
        for start in range(0, len(self.row), size):
            yield self._take(np.arange(start, min(start + size, len(self.row))))

    def batches(self, config: FitConfig) -> Callable[[int], Iterator[Batch]]:
        """This rank's share of every step's batch: permutations of all pairs, one after the other.

        With a mix: permutations of the pictures that have captions, each with one of them.
        """
        pictures, first, count = np.unique(self.row, return_index=True, return_counts=True)
        mine = config.batch_size // ranks.world_size()

        def from_step(step: int) -> Iterator[Batch]:
            while True:
                start = step * config.batch_size + ranks.rank() * mine
                if len(self.mix):
                    some = shuffled(start, mine, len(pictures), config.seed)
                    uniform = uniform_of(config.seed, np.arange(start, start + mine))
                    some = first[some] + pick_caption(count[some], self.mix, uniform)
                else:
                    some = shuffled(start, mine, len(self.row), config.seed)
                text, image = self._take(some)
                yield {"text": text, "image": image}
                step += 1

        return from_step

    def _take(self, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.text[pairs]), torch.from_numpy(self.image[self.row[pairs]])


def shuffled(start: int, count: int, total: int, seed: int) -> np.ndarray:
    """Items start .. start + count of the endless row of permutations of range(total), each from (seed, its number)."""
    taken = []
    while count:
        epoch, at = divmod(start, total)
        part = _permutation(total, seed, epoch)[at : at + count]
        taken.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(taken)


@lru_cache(maxsize=2)
def _permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def density_of(config: PriorConfig | DecoderConfig) -> Callable[[Tensor], Tensor]:
    """The config's noise-level density: u in (0, 1) -> sigma."""
    if config.density == "log_normal":
        return lambda u: DENSITIES["log_normal"](u, config.sigma_mean, config.sigma_std)
    return DENSITIES[config.density]


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


def load_prior(folder: Path | str, device: torch.device | str = "cpu") -> tuple[PriorDenoiser, Manifest]:
    """A prior folder, ready for use."""
    manifest, config = _saved(folder, "prior", PriorConfig)
    return _ready(PriorDenoiser(config), folder, device), manifest


def load_decoder(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Denoiser, Manifest]:
    """A decoder folder, ready for use."""
    manifest, config = _saved(folder, "decoder", DecoderConfig)
    return _ready(DecoderDenoiser(config), folder, device), manifest


def _saved(folder: Path | str, kind: str, cls: type) -> tuple[Manifest, PriorConfig | DecoderConfig]:
    manifest, path = read_manifest(folder, kind), Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); train again: unclip train {kind}") from error
    return manifest, config_from_json(cls, data, str(path))


def _ready(denoiser: Denoiser, folder: Path | str, device: torch.device | str) -> Denoiser:
    path = Path(folder) / "model.safetensors"
    load_weights(denoiser, load_tensors(path)[0], path)
    return denoiser.to(device).eval().requires_grad_(False)


def _publish(
    space: Workspace, denoiser: Denoiser, config: PriorConfig | DecoderConfig, result: FitResult, notes: dict
) -> Manifest:
    """Save the averaged weights (the last ones where there is no average) and finish the folder."""
    manifest = None
    if ranks.is_main():
        save_tensors(space.path / "model.safetensors", result.averaged or denoiser.state_dict())
        write_file(space.path / "config.json", json.dumps(config_to_json(config), indent=1).encode())
        manifest = space.publish({"steps": result.steps, "seconds": result.seconds, "loss": result.loss} | notes)
    return ranks.broadcast(manifest)
