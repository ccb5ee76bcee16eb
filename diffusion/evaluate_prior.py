"""The prior beside its baselines: how near each guess comes to the true image embedding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train import metrics
from clip_train.store import EmbeddingStore
from diffusion.prior import PriorDenoiser, sample_prior, text_cond
from diffusion.trained import load_prior, refuse_other_clip


def guesses(
    prior: PriorDenoiser, text: Tensor, seeds: Sequence[int], *, steps: int = 16, guidance: float = 1.0
) -> dict[str, Tensor]:
    """Image embeddings for text rows (N, D) by the prior and by all that is simpler; unit rows, name -> (N, D).

    The baselines' means and ridge matrix are those of the prior's own training pairs, which it carries.
    """
    own = prior.network
    shifted = text - own.linear.input_mean + own.linear.output_mean
    return {
        "prior": sample_prior(prior, text, seeds, steps=steps, guidance=guidance, candidates=2),
        "prior, one draw": sample_prior(prior, text, seeds, steps=steps, guidance=guidance),
        "prior mean": sample_prior(prior, text, seeds, steps=1, guidance=guidance),
        "ridge": F.normalize(own.guess(text_cond(text)), dim=-1),
        "text + shift": F.normalize(shifted, dim=-1),
        "text": F.normalize(text, dim=-1),
        "mean image": F.normalize(own.linear.output_mean, dim=-1).expand_as(text),
    }


def evaluate_prior(
    prior: PriorDenoiser,
    text: Tensor,
    image: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 16,
    guidance: float = 1.0,
    candidates: Tensor | None = None,
    answers: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """How near each guess comes to the true image embedding. text, image: paired unit rows (N, D) kept from training.

    candidates (R, D) and answers (N,): the picture rows to rank and which one is right; the distinct `image` rows by
    default. Returns, per guess: cosine (mean to the true row), other (mean to all rows: what a picture of nothing in
    particular gets), top10 (share with the true picture among the ten nearest). "unrelated" has cosine and top10 of
    chance: another picture's embedding instead.
    """
    seeds = range(len(text)) if seeds is None else seeds
    if candidates is None:
        candidates, answers = torch.unique(image, dim=0, return_inverse=True)
    right, rows = np.asarray(answers), candidates.cpu().numpy()
    out = {}
    for name, rows_guessed in guesses(prior, text, seeds, steps=steps, guidance=guidance).items():
        ranks = metrics.ranks(rows_guessed.cpu().numpy(), rows, right, np.arange(len(rows)))
        out[name] = {
            "cosine": (rows_guessed * image).sum(-1).mean().item(),
            "other": (rows_guessed.mean(0) * candidates.mean(0)).sum().item(),
            "top10": float((ranks <= 10).mean()),
        }
    total = candidates.double().sum(0)
    pairs = max(1, len(rows) * (len(rows) - 1))
    cosine = (total.square().sum() - candidates.double().square().sum()).item() / pairs
    out["unrelated"] = {"cosine": cosine, "other": cosine, "top10": min(1.0, 10 / len(rows))}
    return out


def evaluate_prior_folder(
    embeddings: Path | str, prior: Path | str, *, device: str | torch.device = "cpu"
) -> dict[str, dict[str, float]]:
    """evaluate_prior on an embeddings folder kept from training, one caption per picture."""
    store = EmbeddingStore.open(embeddings)
    model, made = load_prior(prior, device)
    refuse_other_clip(store, embeddings, made, prior)
    text, image = (torch.from_numpy(rows).to(device) for rows in (store.text(), store.image()))
    return evaluate_prior(model, text, image)
