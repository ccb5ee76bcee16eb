"""Turning an index's knobs to a recall, on one half of the held-out queries, and confirming it on the other.

The queries are of the kind that will be asked: captions against pictures. They lie apart from the pictures (the
modality gap), so pictures as queries would flatter the index. The truth is exact search of all rows.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from retrieval import exact
from retrieval.build import Rows, rows_of
from retrieval.kinds import Kind

MODALITIES = ("image", "text")
K = 10  # recall is measured at 10
QUERIES = 1500  # the knobs are turned on so many, then the recall is confirmed on as many others
PATIENCE = 4  # steps of the knob, each of sqrt(2), that tell where the recall is heading
STEADY = 32  # the first steps, of whole numbers, are not of sqrt(2) yet
CEILING = 300  # queries that tell what codes can reach at best
SECONDS = 0.15  # of one core, spent on each measurement of speed


@dataclass(frozen=True)
class Setting:
    """What the knobs of a kind are set to, and what that gives on the queries that it was chosen on."""

    kind: Kind
    value: int  # of kind.knob
    k_factor: int  # of the refinement
    recall: float
    speed: float  # queries a second and core, one at a time

    def apply(self, index: faiss.Index) -> None:
        """Set the knobs; faiss writes them into the index file."""
        turn(index, self.kind, self.value, self.k_factor)

    def table_row(self) -> dict[str, Any]:
        row = {"kind": self.kind.name, "knob": self.kind.knob, "value": self.value}
        row |= {"k_factor": self.k_factor} if self.kind.refine else {}
        return row | {"recall": round(self.recall, 4), "queries_per_second": self.speed}


class Questions:
    """Queries whose true answers are known."""

    def __init__(self, store: Rows, modality: str, queries: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """queries (Q, D); scores and rows (Q, >= K): their true answers, best first."""
        self.queries, self.best, self._near = queries, scores[:, :K], rows
        self._fetch = lambda rows: rows_of(store, modality, rows)

    def recall(self, index: faiss.Index) -> float:
        """Recall@10, by the exact scores of what the index finds."""
        k = self.best.shape[1]
        _, found = index.search(self.queries, k)
        rows = self._fetch(np.maximum(found, 0).ravel()).reshape(*found.shape, -1)
        return exact.recall(found, np.einsum("qd,qkd->qk", self.queries, rows), self.best)

    def ceiling(self, codes: str) -> float:
        """The recall that rows kept by these codes (SQ8, ...) can reach: the 10 best by codes, of the truly 40 best."""
        near, best = self._near[:CEILING], self.best[:CEILING]
        rows = self._fetch(near.ravel())
        index = faiss.index_factory(rows.shape[1], codes, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        kept = index.sa_decode(index.sa_encode(rows))
        truly, seen = (
            np.einsum("qd,qkd->qk", self.queries[:CEILING], some.reshape(*near.shape, -1)) for some in (rows, kept)
        )
        found = np.argsort(-seen, axis=1)[:, : best.shape[1]]
        return exact.recall(found, np.take_along_axis(truly, found, axis=1), best)

    def speed(self, index: faiss.Index, batch: int = 1) -> float:
        """Queries a second of one core, `batch` at a time: CPU time, which other work on the machine hardly changes."""
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            done, began = 0, time.process_time()
            while True:
                low = done % len(self.queries)
                done += len(index.search(self.queries[low : low + batch], self.best.shape[1])[1])
                seconds = time.process_time() - began
                if seconds > SECONDS:
                    return round(done / seconds, 1)
        finally:
            faiss.omp_set_num_threads(threads)


def questions(store: Rows, modality: str) -> tuple[Questions, Questions]:
    """Queries to turn the knobs on, and others to confirm on: the other modality's embeddings, and their truth."""
    other = MODALITIES[1 - MODALITIES.index(modality)]
    rows = np.random.default_rng(1).permutation(len(store))[: 2 * QUERIES]
    queries = rows_of(store, other, rows)
    truth = exact.search([_Slices(store, modality)], queries, 4 * K)
    half = (len(rows) + 1) // 2
    halves = [slice(0, half), slice(half, None) if len(rows) > 1 else slice(0, half)]
    return tuple(Questions(store, modality, queries[some], *(part[some] for part in truth)) for some in halves)


def turn(index: faiss.Index, kind: Kind, value: int, k_factor: int = 1) -> None:
    """Set the knobs of an index of this kind."""
    if kind.refine:
        index = faiss.downcast_index(index)
        index.k_factor = k_factor
        index = faiss.downcast_index(index.base_index)
    if kind.knob == "nprobe":
        faiss.extract_index_ivf(index).nprobe = value
    elif kind.knob == "efSearch":
        faiss.downcast_index(index).hnsw.efSearch = value


def tune(index: faiss.Index, kind: Kind, asked: Questions, recall: float) -> tuple[Setting | None, list[Setting]]:
    """The fastest setting that reaches the recall, None if none does; and all that were tried."""
    tried: dict[tuple[int, int], Setting] = {}
    values = list(kind.values(index.ntotal))

    def reached(k_factor: int, value: int) -> bool:
        if (value, k_factor) not in tried:
            turn(index, kind, value, k_factor)
            tried[value, k_factor] = Setting(kind, value, k_factor, asked.recall(index), asked.speed(index))
        return tried[value, k_factor].recall >= recall

    best: Setting | None = None
    start = 0
    for k_factor in kind.k_factors:
        enough = _least(values[start:], functools.partial(reached, k_factor), tried, k_factor, recall)
        if enough is None:  # a longer second look may help; fewer lists will not
            looked = max(value for value, factor in tried if factor == k_factor)
            start = max(0, min(values.index(looked), len(values) - 1) - PATIENCE)
            continue
        found = tried[enough, k_factor]
        if best is not None and found.speed <= best.speed:
            break
        best = found
        start = max(0, sum(value <= enough for value in values) - 3)
    return best, sorted(tried.values(), key=lambda one: (one.k_factor, one.value))


def _least(
    values: list[int],
    reached: Callable[[int], bool],
    tried: dict[tuple[int, int], Setting],
    k_factor: int,
    recall: float,
) -> int | None:
    """The least value that reaches the recall, to a sixteenth; None at the ceiling of what the codes can tell apart."""
    curve: list[float] = []
    low = 0
    for value in values:
        if reached(value):
            high = value
            while high - low > max(1, high // 16):
                middle = (low + high) // 2
                low, high = (low, middle) if reached(middle) else (middle, high)
            return high
        low = value
        curve.append(tried[value, k_factor].recall)
        if len(curve) > PATIENCE and value >= STEADY and _limit(curve[-5:]) < recall - 0.01:
            break
    return None


def _limit(curve: list[float]) -> float:
    """Where five recalls, each a step of the knob apart, are heading: their gains taken for a geometric series.

    Nowhere where they have ended, endless where they do not shrink.
    """
    before, now = curve[2] - curve[0], curve[4] - curve[2]
    if now < 0.001:
        return -math.inf
    return curve[4] + now * now / (before - now) if now < 0.95 * before else math.inf


def confirm(index: faiss.Index, setting: Setting, asked: Questions, recall: float) -> tuple[Setting, float] | None:
    """The setting, raised a little where other queries ask for it, and their recall; None if they cannot be satisfied.

    The index is left at that setting.
    """
    kind, value = setting.kind, setting.value
    most = max(kind.values(index.ntotal))
    for _ in range(12):
        turn(index, kind, value, setting.k_factor)
        seen = asked.recall(index)
        if seen >= recall:
            return Setting(kind, value, setting.k_factor, setting.recall, setting.speed), seen
        if value >= most:
            return None
        value = min(most, value + max(1, value // 16))
    return None


class _Slices:
    """The rows of a store as an array of which only slices are ever in memory."""

    def __init__(self, store: Rows, modality: str) -> None:
        self._store, self._modality = store, modality
        self.shape, self.dtype = (len(store), store.dim), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, some: slice) -> np.ndarray:
        return rows_of(self._store, self._modality, range(*some.indices(len(self))))
