"""How well two sets of embeddings find each other: pure functions on matrices, without torch.

Scores are inner products, so cosines when the rows are unit rows. Groups say what is right: an answer is right when its
group equals the query's (several drawings of one concept share a label, and all of them are right answers).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BLOCK = 1024  # queries scored at a time


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Retrieval in one direction. Shares are of the queries."""

    queries: int
    rows: int  # answers to choose from
    recall: dict[int, float]  # k -> share whose best right answer ranks k or better
    chance: dict[int, float]  # k -> what a random order reaches
    median_rank: float  # of the best right answer; 1 is perfect
    right_answers: float  # mean number of right answers per query

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, **{name: {f"R@{k}": v for k, v in data[name].items()} for name in ("recall", "chance")}}


def retrieval_recall(
    queries: np.ndarray,
    rows: np.ndarray,
    groups_q: Sequence | np.ndarray | None = None,
    groups_r: Sequence | np.ndarray | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall@k with many right answers: is one of them among the k best? See ranks() for groups and ties.

    queries (Q, D), rows (N, D). Text -> picture: queries are captions, rows pictures; picture -> text: the other way.
    """
    rank = ranks(queries, rows, groups_q, groups_r)
    _, right = _groups(len(queries), len(rows), groups_q, groups_r)
    counts, times = np.unique(right, return_counts=True)  # equal counts have equal chances
    return Recall(
        queries=len(queries),
        rows=len(rows),
        recall={k: float((rank <= k).mean()) for k in ks},
        chance={k: float(np.average([chance_recall(int(m), len(rows), k) for m in counts], weights=times)) for k in ks},
        median_rank=float(np.median(rank)),
        right_answers=float(right.mean()),
    )


def ranks(
    queries: np.ndarray,
    rows: np.ndarray,
    groups_q: Sequence | np.ndarray | None = None,
    groups_r: Sequence | np.ndarray | None = None,
) -> np.ndarray:
    """(Q,) rank of every query's best right answer among rows: 1 + the wrong answers that score as much or more.

    A tie with a wrong answer counts against the query, so that a model which gives all rows one score gains nothing.
    groups_q (Q,), groups_r (N,): labels of one kind, numbers or strings; without them row i answers query i.
    ValueError: a query whose group no row has.
    """
    groups, _ = _groups(len(queries), len(rows), groups_q, groups_r)
    of_query, of_row = groups
    queries, rows = np.asarray(queries, dtype=np.float32), np.asarray(rows, dtype=np.float32)
    out = np.empty(len(queries), dtype=np.int64)
    for low in range(0, len(queries), BLOCK):
        scores = queries[low : low + BLOCK] @ rows.T
        right = of_query[low : low + BLOCK, None] == of_row[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        wrong = ~(scores < best) & ~right  # "not below", so that a score that is not a number counts against too
        out[low : low + BLOCK] = 1 + wrong.sum(axis=1)
    return out


def mean_average_precision(
    queries: np.ndarray,
    rows: np.ndarray,
    groups_q: Sequence | np.ndarray | None = None,
    groups_r: Sequence | np.ndarray | None = None,
) -> float:
    """Mean over the queries of their average precision: the mean, over a query's right answers, of the share of right
    answers among all that rank as high. 1 when every right answer stands before every wrong one; ties as in ranks().
    """
    groups, _ = _groups(len(queries), len(rows), groups_q, groups_r)
    of_query, of_row = groups
    queries, rows = np.asarray(queries, dtype=np.float32), np.asarray(rows, dtype=np.float32)
    total = 0.0
    for low in range(0, len(queries), BLOCK):
        block = np.nan_to_num(queries[low : low + BLOCK] @ rows.T, nan=-np.inf)
        for scores, group in zip(block, of_query[low : low + BLOCK], strict=True):
            right = of_row == group
            best = np.sort(scores[right])[::-1]
            wrong = np.sort(scores[~right])
            place = np.arange(1, len(best) + 1)  # among the right answers
            total += float(np.mean(place / (place + len(wrong) - np.searchsorted(wrong, best, side="left"))))
    return total / len(queries)


def nearest(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q,) int64: the row with the highest score for each query, the first of equal ones."""
    queries, rows = np.asarray(queries, dtype=np.float32), np.asarray(rows, dtype=np.float32)
    blocks = [(queries[low : low + BLOCK] @ rows.T).argmax(axis=1) for low in range(0, len(queries), BLOCK)]
    return np.concatenate([np.empty(0, dtype=np.int64), *blocks])


def class_recalls(correct: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """(C,) share of each class's samples that are correct; nan for a class without samples.

    correct (N,) bool, target (N,) class numbers. The mean over classes that have samples is the balanced accuracy.
    """
    count = np.bincount(target, minlength=classes).astype(np.float64)
    right = np.bincount(target, weights=correct, minlength=classes)
    return np.divide(right, count, out=np.full(classes, np.nan), where=count > 0)


def chance_recall(right: int, total: int, k: int) -> float:
    """The chance that k different answers drawn from `total` hold at least one of the `right` ones (hypergeometric).

    1 - C(total - right, k) / C(total, k); with one right answer this is k / total.
    """
    if k > total - right:
        return 1.0 if right else 0.0
    miss = sum(math.log1p(-right / (total - i)) for i in range(k))
    return -math.expm1(miss)


def chance_rank(right: int, total: int) -> float:
    """The mean rank of the best of `right` answers in a random order of `total`: (total + 1) / (right + 1)."""
    return (total + 1) / (right + 1)


def brier_score(probability: np.ndarray, happened: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean squared distance of the probabilities (N,) from what happened (N,) bool; 0 is perfect.

    weight (N,): how much each case counts, e.g. to make rare ones as common as they are in use.
    """
    return float(np.average((np.asarray(probability) - np.asarray(happened)) ** 2, weights=weight))


def log_loss(probability: np.ndarray, happened: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean -log of the probability given to what happened, in nats; the base rate p alone reaches its entropy."""
    given = np.where(happened, probability, 1 - np.asarray(probability))
    return float(np.average(-np.log(np.clip(given, 1e-15, 1)), weights=weight))


def reliability(
    probability: np.ndarray, happened: np.ndarray, weight: np.ndarray | None = None, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cases in `bins` equal steps of probability: mean probability, share that happened, share of the cases. (bins,)

    The first two are nan where a bin is empty.
    """
    weight = np.ones(len(probability)) if weight is None else np.asarray(weight, dtype=np.float64)
    place = np.minimum((np.asarray(probability) * bins).astype(np.int64), bins - 1)
    mass = np.bincount(place, weights=weight, minlength=bins)
    said = np.bincount(place, weights=weight * probability, minlength=bins)
    was = np.bincount(place, weights=weight * happened, minlength=bins)
    empty = np.full(bins, np.nan)
    there = mass > 0
    said, was = (np.divide(one, mass, out=empty.copy(), where=there) for one in (said, was))
    return said, was, mass / mass.sum()


def calibration_error(
    probability: np.ndarray, happened: np.ndarray, weight: np.ndarray | None = None, bins: int = 15
) -> float:
    """Expected calibration error: mean over the cases of |mean probability - share that happened| of their bin.

    Guo et al. 2017, arXiv 1706.04599, equation 3. 0 is perfect; it says nothing about how sharp the probabilities are.
    """
    said, was, share = reliability(probability, happened, weight, bins)
    return float(np.nansum(share * np.abs(said - was)))


def paired_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) cosine of row i of a with row i of b; the rows (N, D) need not be unit rows. A zero row has cosine 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.where(length > 0, length, 1)


def modality_gap(image: np.ndarray, text: np.ndarray) -> float:
    """Distance between the mean picture row and the mean text row (Liang et al. 2022, arXiv 2203.02053, section 3).

    0: the two clouds have one centre. OpenAI's CLIP: about 0.8; the largest distance of unit rows is 2.
    """
    return float(np.linalg.norm(np.mean(image, axis=0, dtype=np.float64) - np.mean(text, axis=0, dtype=np.float64)))


def _groups(
    n_queries: int, n_rows: int, groups_q: Sequence | np.ndarray | None, groups_r: Sequence | np.ndarray | None
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Both groups as integers, and the number of right answers of every query."""
    groups_q = np.arange(n_queries) if groups_q is None else np.asarray(groups_q)
    groups_r = np.arange(n_rows) if groups_r is None else np.asarray(groups_r)
    if len(groups_q) != n_queries or len(groups_r) != n_rows:
        raise ValueError(f"{len(groups_q)} and {len(groups_r)} groups for {n_queries} queries and {n_rows} rows")
    _, code = np.unique(np.concatenate([groups_q, groups_r]), return_inverse=True)
    of_query, of_row = code[:n_queries], code[n_queries:]
    right = np.bincount(of_row, minlength=code.max(initial=0) + 1)[of_query]
    if (right == 0).any():
        raise ValueError(f"query {int(np.argmin(right))} has no right answer among the rows")
    return (of_query, of_row), right
