"""train_prior: an embeddings folder + denoising_loss -> fit -> a prior folder."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_train import ranks
from clip_train.fit import Batch, FitConfig, fit
from clip_train.folder import Input, Manifest
from clip_train.settings import Progress, UserError, config_to_json
from clip_train.store import EmbeddingStore
from diffusion.denoiser import denoising_loss
from diffusion.pairs import Pairs
from diffusion.prior import PriorConfig, PriorDenoiser, text_cond
from diffusion.ridge import ridge_regression
from diffusion.schedule import stratified
from diffusion.trained import Preset, density_of, publish

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
    return publish(space, denoiser, config, result, notes)
