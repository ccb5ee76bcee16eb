"""Linear probe: what a plain linear classifier can read out of frozen embeddings.

CLIP, appendix A.3 (Radford et al. 2021, arXiv 2103.00020): logistic regression by L-BFGS, at most 1,000 iterations, its
L2 strength found on a held-out part of the training features, 8 steps to a decade from 1e-6 to 1e6. CLIP's ViTs were
probed before their projection, here it is the unit rows that search and the prior work with, as in CLIP_benchmark.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from clip_train import metrics
from clip_train.settings import Progress

COARSE = tuple(10.0**e for e in range(-6, 7, 2))  # CLIP's starting points
STEPS_PER_DECADE = 8
MAX_ITERATIONS = 1000


def fit_probe(
    features: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    strength: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """(D + 1, C) weights, the last row the biases, that minimise sum of cross-entropies + strength / 2 |weights|^2.

    features (N, D) float32, target (N,) int64. strength: lambda, the inverse of scikit-learn's C; the biases are free.
    start: weights to begin at (any, the problem is convex).
    """
    weights = torch.zeros(features.shape[1] + 1, classes, device=features.device) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weights[:-1] + weights[-1], target)
        loss = loss + strength / (2 * len(features)) * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def find_peak(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The strength with the highest score, by CLIP's search: the coarse points, then halving around the best one.

    Stops at 8 steps to a decade. Of equal scores the stronger regularisation wins. Returns it and every score taken.
    """
    taken = {strength: score(strength) for strength in reversed(COARSE)}
    step = 2.0  # decades between neighbours
    while step > 1 / STEPS_PER_DECADE:
        step /= 2
        best = max(taken, key=lambda s: (taken[s], s))
        for strength in (10 ** (math.log10(best) + step), 10 ** (math.log10(best) - step)):
            if COARSE[0] <= strength <= COARSE[-1]:
                taken[strength] = score(strength)
    return max(taken, key=lambda s: (taken[s], s)), taken


def linear_probe(
    train: np.ndarray,
    train_target: np.ndarray,
    test: np.ndarray,
    test_target: np.ndarray,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> dict[str, float | int]:
    """Train on `train` rows (N, D), score on `test` rows; targets are class numbers from 0, all of them in train's.

    A random `held_out` share of the training rows chooses the strength; then all of them train the probe that is
    scored. Returns "acc1", "acc5", "mean_per_class_recall", "train_acc1", "held_out_acc1", the "strength", "classes",
    and the "majority" share that always saying the commonest training class would reach.
    """
    classes = int(train_target.max()) + 1
    rows, target = torch.from_numpy(train).float().to(device), torch.from_numpy(train_target).to(device)
    order = np.random.default_rng(seed).permutation(len(train))
    kept = max(1, round(held_out * len(train)))
    val, fit = torch.from_numpy(order[:kept]).to(device), torch.from_numpy(order[kept:]).to(device)
    last: dict[float, torch.Tensor] = {}

    def score(strength: float) -> float:
        near = min(last, key=lambda s: abs(math.log(s / strength)), default=None)
        last[strength] = fit_probe(rows[fit], target[fit], classes, strength, None if near is None else last[near])
        if on_progress:
            on_progress(len(last), len(COARSE) + 8, stage="linear probe")
        return _accuracy(rows[val], target[val], last[strength])

    strength, taken = find_peak(score)
    weights = fit_probe(rows, target, classes, strength, last[strength])
    if on_progress:
        on_progress(len(COARSE) + 8, len(COARSE) + 8, stage="linear probe")
    test_rows = np.concatenate([test, np.ones((len(test), 1), dtype=test.dtype)], axis=1)
    rank = metrics.ranks(test_rows, weights.T.cpu().numpy(), test_target, np.arange(classes))
    common = int(np.bincount(train_target).argmax())
    return {
        "train_samples": len(train),
        "samples": len(test),
        "classes": classes,
        "acc1": float((rank <= 1).mean()),
        "acc5": float((rank <= 5).mean()),
        "mean_per_class_recall": float(np.nanmean(metrics.class_recalls(rank == 1, test_target, classes))),
        "majority": float((test_target == common).mean()),
        "train_acc1": _accuracy(rows, target, weights),
        "held_out_acc1": taken[strength],
        "strength": strength,
    }


def _accuracy(rows: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> float:
    return float(((rows @ weights[:-1] + weights[-1]).argmax(1) == target).float().mean())
