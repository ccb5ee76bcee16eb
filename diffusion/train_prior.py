"""train_prior: an embeddings folder + a loss -> fit -> a prior folder, of the diffusion or the contrastive kind."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clip_train import ranks
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.gradients import LossFunction
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.store import EmbeddingStore
from diffusion.contrastive import ContrastiveConfig, ContrastivePrior, contrastive_prior_loss
from diffusion.denoiser import denoising_loss, loss_weight
from diffusion.pairs import Pairs, blurred
from diffusion.prior import UNKNOWN, PriorConfig, PriorDenoiser, text_cond
from diffusion.ridge import ridge_regression
from diffusion.schedule import stratified
from diffusion.trained import Preset, density_of, publish
from diffusion.words import NO_WORD

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
CONTRASTIVE_PRESETS = {
    "tiny": Preset(
        "CPU, half a minute: thousands of pairs",
        ContrastiveConfig(),
        FitConfig(minutes=0.5, batch_size=512, lr=1e-3, weight_decay=0.1, ema=0.99),
    ),
    "small": Preset(
        "one GPU, minutes: from a hundred thousand pairs on",
        ContrastiveConfig(width=1024, depth=6),
        FitConfig(minutes=5.0, batch_size=4096, lr=5e-4, weight_decay=0.1, ema=0.999),
    ),
}
KINDS = {"diffusion": PRIOR_PRESETS, "contrastive": CONTRASTIVE_PRESETS}


def train_prior(
    embeddings: Path | str,
    out: Path | str,
    config: PriorConfig | ContrastiveConfig = PRIOR_PRESETS["tiny"].config,
    fit_config: FitConfig = PRIOR_PRESETS["tiny"].fit,
    *,
    device: str | torch.device = "auto",
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
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

    pairs = Pairs.of(store, config.caption_mix, config.words)
    known = np.unique(pairs.words[pairs.words != NO_WORD]) if config.words else np.zeros(0, dtype=np.int64)
    config = replace(config, vocabulary=len(known))
    linear = ridge_regression(moved_blocks(pairs, config.text_noise, fit_config.seed), independent=len(store))
    if isinstance(config, PriorConfig):
        config = replace(config, sigma_data=linear.spread * config.embed_dim**0.5)
    torch.manual_seed(fit_config.seed)
    model = PriorDenoiser(config) if isinstance(config, PriorConfig) else ContrastivePrior(config)
    network = model.network if isinstance(model, PriorDenoiser) else model
    network.linear.take(linear)
    if config.words:
        network.words.known.copy_(torch.from_numpy(known))

    loss = diffusion_loss(config, model) if isinstance(model, PriorDenoiser) else contrastive_loss(config)
    batches = pairs.batches(fit_config)
    told = {"on_progress": on_progress, "on_warning": on_warning}
    result = fit(model, batches, loss, fit_config, space.path, device=place, **told)
    notes = {"pairs": len(pairs.row), "linear_penalty": linear.penalty, "linear_spread": linear.spread}
    return publish(space, model, config, result, notes)


def diffusion_loss(config: PriorConfig, prior: PriorDenoiser) -> LossFunction:
    """The denoising loss of a batch of pairs, each at `draws` noise levels."""
    density, scaling = density_of(config), prior.scaling

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        cond = shown(batch, config, rng)
        cond["drop"] = torch.rand(len(batch["text"]), generator=rng, device=rng.device) < config.drop_text
        x0 = (batch["image"] * config.embed_dim**0.5).repeat_interleave(config.draws, 0)
        sigma = density(stratified(len(x0), rng))
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        weight = loss_weight(scaling, sigma, config.weighting)
        return denoising_loss(model, x0, cond, sigma, noise, weight), {}

    return loss


def contrastive_loss(config: ContrastiveConfig) -> LossFunction:
    """contrastive_prior_loss of a batch of pairs."""

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict]:
        guess = model(shown(batch, config, rng))
        return contrastive_prior_loss(guess, batch["image"], config.contrast, config.temperature), {}

    return loss


def shown(batch: Batch, config: PriorConfig | ContrastiveConfig, rng: torch.Generator) -> Batch:
    """A batch's condition as training sees it: texts moved off their place, words hidden or taken away."""
    text = blurred(batch["text"], config.text_noise, rng) if config.text_noise else batch["text"]
    cond = text_cond(text)
    if "words" in batch:
        words, chance = batch["words"], torch.rand(batch["words"].shape, generator=rng, device=rng.device)
        words = words.masked_fill((chance < config.drop_word) & (words != NO_WORD), UNKNOWN)
        gone = torch.rand(len(words), 1, generator=rng, device=rng.device) < config.drop_words
        cond["words"] = words.masked_fill(gone, NO_WORD)
    return cond


def moved_blocks(pairs: Pairs, text_noise: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs as ridge regression is to see them: their texts moved as they are in training."""
    rng = torch.Generator().manual_seed(seed)
    for text, image in pairs.blocks(1024 if text_noise else 8192):
        yield blurred(text, text_noise, rng) if text_noise else text, image
