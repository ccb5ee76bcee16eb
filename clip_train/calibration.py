"""Cosine -> probability that a picture and a caption belong together.

A CLIP's cosines mean nothing by themselves: 0.25 is a strong match for one model and a weak one for another. A logistic
curve (Platt 1999) is fitted to pairs that match and to random pairs that do not. What comes out depends on how often
pairs match where it is used; that share is stated, and can be changed afterwards.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_train import metrics
from clip_train.folder import write_file
from clip_train.settings import UserError

FILE = "calibration.json"
PLOT = "calibration.png"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The curve of one CLIP: probability = 1 / (1 + exp(-(slope cosine + offset))). Stored as calibration.json."""

    slope: float
    offset: float
    match_rate: float  # share of matching pairs that the curve takes for granted
    clip: str  # fingerprint of the CLIP it belongs to
    measured: dict[str, Any] = field(default_factory=dict)  # how well it does on pairs it was not fitted to

    def probability(self, cosines: np.ndarray, match_rate: float | None = None) -> np.ndarray:
        """(N,) cosines of pictures with captions -> (N,) probabilities that they match.

        match_rate: the share of matching pairs where this is used, if it is another than the curve's: by Bayes' rule,
        the odds change by the ratio of the two shares' odds.
        """
        shift = 0.0 if match_rate is None else log_odds(match_rate) - log_odds(self.match_rate)
        return logistic(self.slope * np.asarray(cosines, dtype=np.float64) + self.offset + shift)


@dataclass(frozen=True)
class Pairs:
    """Pictures with captions, some of which match. cosine float64, match bool, fold int: (P,) each."""

    cosine: np.ndarray
    match: np.ndarray
    fold: np.ndarray

    def weight(self, match_rate: float) -> np.ndarray:
        """(P,) how much each pair counts, so that matches make up `match_rate` of the whole."""
        share = self.match.mean()
        return np.where(self.match, match_rate / share, (1 - match_rate) / (1 - share))


def draw_pairs(
    image: np.ndarray,
    text: np.ndarray,
    owner: np.ndarray,
    groups: np.ndarray,
    *,
    negatives: int = 20,
    folds: int = 5,
    seed: int = 0,
) -> Pairs:
    """Every caption with its own picture, and `negatives` random pictures of other groups for each caption.

    image (N, D), text (M, D): unit rows; owner (M,): each caption's picture; groups (N,): equal for pictures that are
    right answers for each other. A group lies in one fold as a whole, and a caption meets pictures of its own fold
    only, so what is measured on one fold owes nothing to the others. UserError: too few groups for that,
    or rows that are not numbers.
    """
    rng = np.random.default_rng(seed)
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2 * folds:
        raise UserError(
            f"calibration needs captions of at least {2 * folds} different things, these shards have {len(names)}; "
            "use more of them"
        )
    fold_of = rng.permutation(np.arange(len(names)) % folds)[group]  # (N,)
    cosine, match, fold = (
        [metrics.paired_cosines(image[owner], text)],
        [np.ones(len(text), dtype=bool)],
        [fold_of[owner]],
    )
    for f in range(folds):
        pictures, captions = np.flatnonzero(fold_of == f), np.flatnonzero(fold_of[owner] == f)
        asked = np.repeat(captions, negatives)
        drawn = rng.choice(pictures, len(asked))
        wrong = group[drawn] != group[owner[asked]]
        asked, drawn = asked[wrong], drawn[wrong]
        cosine.append(metrics.paired_cosines(image[drawn], text[asked]))
        match.append(np.zeros(len(asked), dtype=bool))
        fold.append(np.full(len(asked), f))
    pairs = Pairs(np.concatenate(cosine), np.concatenate(match), np.concatenate(fold))
    if not np.isfinite(pairs.cosine).all():
        raise UserError("this CLIP makes embeddings that are not numbers; train it again")
    return pairs


def fit_curve(cosine: np.ndarray, match: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """slope and offset of the logistic curve with the least weighted log loss, by Newton's method.

    Platt's targets, (n + 1) / (n + 2) for the n matches and 1 / (m + 2) for the m others, keep the curve finite when
    one cosine parts them all.
    """
    n, m = int(match.sum()), int((~match).sum())
    target = np.where(match, (n + 1) / (n + 2), 1 / (m + 2))
    mean, std = float(np.average(cosine, weights=weight)), float(np.std(cosine)) or 1.0
    x = np.stack([(cosine - mean) / std, np.ones_like(cosine)])  # (2, P)
    beta = np.zeros(2)
    for _ in range(100):
        p = logistic(beta @ x)
        gradient = x @ (weight * (p - target))
        hessian = (x * (weight * np.maximum(p * (1 - p), 1e-12))) @ x.T
        step = np.linalg.solve(hessian + 1e-9 * np.eye(2), gradient)
        beta -= step * min(1.0, 5 / max(np.abs(step).max(), 1e-12))  # far away, a full step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    slope = beta[0] / std
    return float(slope), float(beta[1] - slope * mean)


def calibrate(pairs: Pairs, clip: str, match_rate: float = 0.5) -> tuple[Calibration, np.ndarray]:
    """The curve fitted to all pairs, and (P,) probabilities each pair got from a curve fitted to the other folds.

    clip: the CLIP's fingerprint. Calibration.measured holds, of the latter and at `match_rate`: "ece" (15 bins),
    "brier" and "log_loss" beside what the base rate alone reaches, and how many pairs there were of both kinds.
    """
    if not 0 < match_rate < 1:
        raise UserError(f"--match-rate {match_rate} must lie between 0 and 1; 0.5 if nothing is known")
    weight = pairs.weight(match_rate)
    held_out = np.empty(len(pairs.cosine))
    for fold in np.unique(pairs.fold):
        rest = pairs.fold != fold
        slope, offset = fit_curve(pairs.cosine[rest], pairs.match[rest], weight[rest])
        held_out[~rest] = logistic(slope * pairs.cosine[~rest] + offset)
    slope, offset = fit_curve(pairs.cosine, pairs.match, weight)
    base = np.full_like(held_out, match_rate)
    measured = {
        "matching_pairs": int(pairs.match.sum()),
        "other_pairs": int((~pairs.match).sum()),
        "folds": len(np.unique(pairs.fold)),
        "ece": metrics.calibration_error(held_out, pairs.match, weight),
        "brier": metrics.brier_score(held_out, pairs.match, weight),
        "brier_base_rate": metrics.brier_score(base, pairs.match, weight),
        "log_loss": metrics.log_loss(held_out, pairs.match, weight),
        "log_loss_base_rate": metrics.log_loss(base, pairs.match, weight),
        "cosine_of_even_odds": -offset / slope if slope else None,
    }
    return Calibration(slope=slope, offset=offset, match_rate=match_rate, clip=clip, measured=measured), held_out


def save(folder: Path | str, calibration: Calibration) -> Path:
    """Write calibration.json into a clip/ folder. Its fingerprint stays: that is of the weights and config alone."""
    path = Path(folder) / FILE
    write_file(path, json.dumps(asdict(calibration), indent=1).encode())
    return path


def load(folder: Path | str) -> Calibration | None:
    """The curve of a clip/ folder, None if it has none. UserError if the file is damaged.

    Whether it belongs to the folder's weights is for the caller to compare: `clip` is the CLIP's fingerprint.
    """
    path = Path(folder) / FILE
    try:
        data = json.loads(path.read_bytes())
        made = Calibration(**data)
        numbers = np.array([made.slope, made.offset, made.match_rate], dtype=np.float64)
        if not np.isfinite(numbers).all() or not 0 < made.match_rate < 1:
            raise ValueError("a number is out of range")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        again = f"make it again: unclip evaluate clip --shards SHARDS --clip {folder} --calibrate"
        raise UserError(f"{path} cannot be read ({error}); {again}") from error
    return made


def plot(path: Path | str, pairs: Pairs, held_out: np.ndarray, calibration: Calibration) -> None:
    """Two panels as a PNG: the cosines of both kinds with the curve, and the reliability diagram."""
    import io

    from matplotlib.figure import Figure

    blue, orange, grey = "#0072b2", "#d55e00", "#9aa5b1"  # Okabe and Ito's palette
    weight, said = pairs.weight(calibration.match_rate), calibration.measured
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(pairs.cosine.min(), pairs.cosine.max(), 61)
    left.hist(pairs.cosine[~pairs.match], edges, density=True, color=grey, alpha=0.7, label="random pairs")
    left.hist(pairs.cosine[pairs.match], edges, density=True, color=blue, alpha=0.6, label="matching pairs")
    left.set(xlabel="cosine of picture and caption", ylabel="density", xlim=(edges[0], edges[-1]))
    curve = left.twinx()
    curve.plot(edges, calibration.probability(edges), color=orange, label="probability of a match")
    curve.set(ylim=(0, 1), ylabel="probability of a match")
    handles = [*left.get_legend_handles_labels()[0], *curve.get_legend_handles_labels()[0]]
    left.legend(handles, [h.get_label() for h in handles], loc="upper left", fontsize=8)
    left.set_title(f"Cosines; {calibration.match_rate:g} of the pairs are taken to match", fontsize=10)

    told, was, share = metrics.reliability(held_out, pairs.match, weight)
    there = ~np.isnan(told)
    right.plot([0, 1], [0, 1], color=grey, linewidth=1, label="perfect")
    right.bar(np.arange(len(share)) / len(share), share, 1 / len(share), align="edge", color=grey, alpha=0.35)
    right.plot(told[there], was[there], "o-", color=blue, markersize=4, label="held-out pairs")
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability said", ylabel="share that matched (bars: share of pairs)")
    right.legend(loc="upper left", fontsize=8)
    right.set_title(
        f"ECE {said['ece']:.3f}, log loss {said['log_loss']:.3f} (base rate {said['log_loss_base_rate']:.3f})",
        fontsize=10,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_file(Path(path), file.getvalue())


def logistic(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def log_odds(share: float) -> float:
    """log(p / (1 - p))."""
    return float(np.log(share) - np.log1p(-share))
