"""Priors beside their baselines: how near each guess of an image embedding comes to the true one, and how sure that is.

Cosine alone rewards caution: the mean of all pictures that fit a text is nearer to each of them than any one of them
is, and a sample of the true distribution, where the mean has cosine c, has about c^2. So the rank of the true picture
among all stands beside it, and the distance between the guesses' mean and the pictures' (the modality gap), which a
decoder trained on pictures' embeddings feels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train import metrics
from clip_train.folder import read_manifest
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore
from diffusion.baselines import BASELINES, fit_baseline, open_prior
from diffusion.heldout import labels_of
from diffusion.prior import Guess, PriorDenoiser, text_cond
from diffusion.trained import kind_of, refuse_other_clip

RESAMPLES = 1000  # fewer, but at least 100, where they would be more than CELLS numbers
CELLS = 20_000_000
# what each measure is called in a sentence, and whether more of it is better
MEASURES = {
    "cosine": ("cosine to the true embedding", True),
    "top1": ("true picture first", True),
    "top10": ("true picture among the first 10", True),
    "median_rank": ("median rank", False),
    "gap": ("gap to the pictures' mean", False),
}


def guesses(
    prior: PriorDenoiser,
    text: Tensor,
    seeds: Sequence[int],
    *,
    captions: Sequence[str] | None = None,
    steps: int = 16,
    guidance: float = 1.0,
) -> dict[str, Tensor]:
    """Image embeddings for text rows (N, D) by a prior and by all that is simpler; unit rows, name -> (N, D).

    The baselines' means and ridge matrix are those of the prior's own training pairs, which it carries.
    """
    return {**prior_guesses(prior, text, seeds, captions, steps, guidance), **carried_guesses(prior, text)}


def prior_guesses(
    prior: Guess, text: Tensor, seeds: Sequence[int], captions: Sequence[str] | None, steps: int, guidance: float
) -> dict[str, Tensor]:
    """What one trained prior makes of text rows: the best of two draws, one draw, and its mean; or its only guess."""
    if not isinstance(prior, PriorDenoiser):
        return {prior.name: prior.rows(text, captions, seeds)}
    how = {"guidance": guidance}
    return {
        "prior": prior.rows(text, captions, seeds, steps=steps, candidates=2, **how),
        "prior, one draw": prior.rows(text, captions, seeds, steps=steps, candidates=1, **how),
        "prior mean": prior.rows(text, captions, seeds, steps=1, candidates=1, **how),
    }


def carried_guesses(prior: Guess, text: Tensor) -> dict[str, Tensor]:
    """The linear baselines that a trained prior of either kind carries."""
    own = prior.network.linear if isinstance(prior, PriorDenoiser) else prior.linear
    return {
        "ridge": F.normalize(own(text, text_cond(text)["drop"]), dim=-1),
        "text + shift": F.normalize(text - own.input_mean + own.output_mean, dim=-1),
        "text": F.normalize(text, dim=-1),
        "mean image": F.normalize(own.output_mean, dim=-1).expand_as(text),
    }


def evaluate_prior(
    prior: PriorDenoiser,
    text: Tensor,
    image: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 16,
    guidance: float = 1.0,
    captions: Sequence[str] | None = None,
    candidates: Tensor | None = None,
    answers: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """How near each guess comes to the true image embedding. text, image: paired unit rows (N, D) kept from training.

    candidates (R, D) and answers (N,): the picture rows to rank and which one is right; the distinct `image` rows by
    default. Returns guess -> figures, see compared().
    """
    seeds = range(len(text)) if seeds is None else seeds
    made = guesses(prior, text, seeds, captions=captions, steps=steps, guidance=guidance)
    if candidates is None:
        candidates, answers = torch.unique(image, dim=0, return_inverse=True)
    return compared(made, image, candidates, np.asarray(answers), np.arange(len(candidates))).figures


@dataclass(frozen=True)
class Comparison:
    """Guesses side by side."""

    figures: dict[str, dict[str, Any]]  # guess -> measure -> number; "interval": measure -> [low, high]
    sentence: str  # which guess is best on this data, and by what


def compared(
    made: Mapping[str, Tensor],
    image: Tensor,
    candidates: Tensor,
    of_query: np.ndarray,
    of_candidate: np.ndarray,
    *,
    blocks: np.ndarray | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure guesses, name -> unit rows (N, D), against the true rows `image` (N, D) among `candidates` (R, D).

    of_query (N,), of_candidate (R,): candidates of a query's group are right answers to it. blocks (N,): what is drawn
    together when the 95 % intervals are made by drawing queries again (bootstrap); the groups by default, since the
    drawings of one concept stand or fall together.

    Figures: cosine (mean to the true row), other (mean to all candidates: what a picture of nothing in particular
    gets), top1, top10, median_rank (of the best right answer), gap (distance between the means of guesses and truth).
    "unrelated" has those of chance: another picture's embedding instead.
    """
    rows, truth = candidates.cpu().float().numpy(), image.cpu().float().numpy()
    draws = _drawn_again(of_query if blocks is None else blocks, seed)
    figures, samples = {}, {}
    for name, guess in made.items():
        own = guess.cpu().float().numpy()
        figures[name], samples[name] = _measured(own, truth, rows, of_query, of_candidate, draws)
    figures["unrelated"] = _unrelated(rows, of_query, of_candidate)
    return Comparison(figures, _best(figures, samples))


def evaluate_prior_folder(
    embeddings: Path | str,
    priors: Path | str | Sequence[Path | str],
    *,
    train: Path | str | None = None,
    steps: int = 16,
    guidance: float = 1.0,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> Comparison:
    """Trained priors and baselines on an embeddings folder kept from training, the first caption of each picture.

    priors: folders of either kind. train: the embeddings that the baselines are fitted to; by default those that the
    first prior was trained on, where they were then; if they are gone, only what the prior carries is compared.
    Pictures of one label are each other's right answers, where the metadata have labels.
    """
    folders = [priors] if isinstance(priors, str | Path) else list(priors)
    if not folders:
        raise UserError("no prior to evaluate; pass --prior prior (made by unclip train prior)")
    store = EmbeddingStore.open(embeddings)
    text, image = (torch.from_numpy(rows).to(device) for rows in (store.text(), store.image()))
    captions, groups, seeds = store.first_captions(), labels_of(store), range(len(store))
    made: dict[str, Tensor] = {}
    for number, folder in enumerate(folders):
        if str(folder) in BASELINES:
            raise UserError(f"--prior {folder} is a baseline, which is in the table anyway; name a folder")
        guess, _, manifest = open_prior(folder, device)
        refuse_other_clip(store, embeddings, manifest, folder)
        some = prior_guesses(guess, text, seeds, captions, steps, guidance)
        several = sum(kind_of(other) == kind_of(folder) for other in folders) > 1
        made |= {f"{name} ({folder})" if several else name: rows for name, rows in some.items()}
        if not number:
            carried, train = carried_guesses(guess, text), train or manifest.input_path("embeddings")
        if on_progress:
            on_progress(number + 1, len(folders) + 1)
    fitted = EmbeddingStore.open(train) if train else None
    if fitted is not None:
        refuse_other_clip(fitted, train, read_manifest(folders[0]), folders[0])
        names = {"shift": "text + shift", "mean": "mean image"}
        carried = {names.get(b, b): fit_baseline(b, fitted, device).rows(text) for b in reversed(BASELINES)}
    if on_progress:
        on_progress(len(folders) + 1, len(folders) + 1)
    found = compared(made | carried, image, image, groups, groups)
    known = [str(folder) for folder in folders if was_trained_on(folder, store)]
    if known:
        return replace(found, sentence=f"{', '.join(known)}: trained on these very embeddings; {found.sentence}")
    return found


def was_trained_on(folder: Path | str, store: EmbeddingStore) -> bool:
    """Whether these are the embeddings that the prior in `folder` learned from, and so say nothing of new ones."""
    return store.fingerprint == read_manifest(folder).inputs["embeddings"]["fingerprint"]


def table_of(comparison: Comparison) -> tuple[str, tuple[str, ...], list[tuple]]:
    """Title, head and rows of a comparison, with its 95 % intervals, for a terminal."""
    head = ("guess", "cosine", "other", "top 1", "top 10", "median rank", "gap")
    rows = []
    for name, own in comparison.figures.items():
        cells = [name]
        for measure in ("cosine", "other", "top1", "top10", "median_rank", "gap"):
            if measure not in own:
                cells.append("")
                continue
            form = "{:.0f}" if measure == "median_rank" else "{:.3f}"
            low, high = own.get("interval", {}).get(measure, (None, None))
            span = f" [{form.format(low)}, {form.format(high)}]" if low is not None else ""
            cells.append(form.format(own[measure]) + span)
        rows.append(tuple(cells))
    return "", head, rows


def _drawn_again(blocks: np.ndarray, seed: int) -> np.ndarray:
    """(R, N) how often each query is in each bootstrap sample; whole blocks are drawn, with replacement."""
    rng, own = np.random.default_rng(seed), np.unique(blocks, return_inverse=True)[1]
    count, size = own.max() + 1, max(100, min(RESAMPLES, CELLS // len(blocks)))
    times = rng.multinomial(count, np.full(count, 1 / count), size=size)
    return times[:, own].astype(np.float32)


def _measured(
    own: np.ndarray,
    truth: np.ndarray,
    rows: np.ndarray,
    of_query: np.ndarray,
    of_candidate: np.ndarray,
    draws: np.ndarray,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One guess's figures with intervals, and its measures over all bootstrap samples, (R,) each."""
    rank = metrics.ranks(own, rows, of_query, of_candidate)
    each = {"cosine": (own * truth).sum(1), "top1": rank == 1, "top10": rank <= 10}
    size = draws.sum(1)
    samples = {name: draws @ values.astype(np.float32) / size for name, values in each.items()}
    order = np.argsort(rank, kind="stable")
    middle = (draws[:, order].cumsum(1) >= size[:, None] / 2).argmax(1)
    samples["median_rank"] = rank[order][middle].astype(np.float64)
    samples["gap"] = np.linalg.norm(draws @ (own - truth) / size[:, None], axis=1)
    figures = {
        "cosine": float(each["cosine"].mean()),
        "other": float(own.mean(0) @ rows.mean(0)),
        "top1": float(each["top1"].mean()),
        "top10": float(each["top10"].mean()),
        "median_rank": float(np.median(rank)),
        "gap": metrics.modality_gap(truth, own),
    }
    figures["interval"] = {name: np.quantile(own, [0.025, 0.975]).tolist() for name, own in samples.items()}
    return figures, samples


def _unrelated(rows: np.ndarray, of_query: np.ndarray, of_candidate: np.ndarray) -> dict[str, float]:
    """What another picture's embedding would get instead of a guess."""
    count, total = len(rows), rows.sum(0, dtype=np.float64)
    cosine = float((total @ total - np.square(rows, dtype=np.float64).sum()) / max(1, count * (count - 1)))
    groups, sizes = np.unique(of_candidate, return_counts=True)
    right = sizes[np.searchsorted(groups, of_query)].tolist()
    return {
        "cosine": cosine,
        "other": cosine,
        "top1": float(np.mean([metrics.chance_recall(m, count, 1) for m in right])),
        "top10": round(float(np.mean([metrics.chance_recall(m, count, 10) for m in right])), 12),
        "median_rank": float(np.median([metrics.chance_rank(m, count) for m in right])),
    }


def _best(figures: dict[str, dict[str, Any]], samples: dict[str, dict[str, np.ndarray]]) -> str:
    """One line: the best guess by each measure, and which others are not told from it (95 % of paired resamples)."""
    parts = []
    for measure, (words, more) in MEASURES.items():
        sign = 1 if more else -1
        order = sorted(samples, key=lambda name: -sign * figures[name][measure])
        first = order[0]
        alike = []
        for name in order[1:]:
            ahead = sign * (samples[first][measure] - samples[name][measure])
            if np.quantile(ahead, 0.025) <= 0:
                alike.append(name)
        value = figures[first][measure]
        shown = f"{value:.0f}" if measure == "median_rank" else f"{value:.3f}"
        parts.append(f"{first} by {words} ({shown}{'; not told from it: ' + ', '.join(alike) if alike else ''})")
    return "best on this data: " + "; ".join(parts)
