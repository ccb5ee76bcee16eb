"""Blockwise exact search: the truth that recall is measured against, and the index of small sets.

Where the processor multiplies bfloat16 faster than float32, a first pass in bfloat16 leaves out the rows that cannot be
among the k best, by a bound on what rounding may have done to a score; those that are left are scored in float32. So
the answers are the exact ones. A block of rows in which the bound decides too little is multiplied in float32.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Rows = np.ndarray | Sequence[np.ndarray]  # (N, D), or the parts that make it up; memory maps and float16 are fine
QUERIES = 256  # queries multiplied at a time
BLOCK = 8192  # rows multiplied at a time
FIRST = 1024  # rows of the first block, which is multiplied in float32: it says how good an answer must be
ENOUGH = 24  # queries from which on rounding rows that are read only once is paid back
SPARSE = 32  # a block of which more than one score in 32 must be looked at is multiplied in float32 as a whole
ROUNDOFF = 2.0**-8  # a float32 rounded to bfloat16 is off by at most this share of itself


def search(rows: Rows, queries: np.ndarray, k: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of largest inner product with each query: scores (Q, k) float32 and rows (Q, k) int64, best first.

    queries (Q, D). k is cut to the number of rows. The rows are read once, `block` at a time, so the memory is about
    block * (2 D + 256) floats whatever N and Q are. Which of several rows tied for the last place is returned is
    undefined. A row with a NaN is no answer. For many searches of the same rows, Matrix saves the reading and rounding.
    """
    parts = _parts(rows)
    k = min(k, sum(len(part) for part in parts))
    if _alone(parts, queries):
        return _read_once(parts[0], queries, k)
    answers = _Answers(queries, k)
    coarse = answers.count >= ENOUGH and bfloat16_is_faster()
    for start, low, part in _pieces(parts, block):
        some = _float32(part)
        norm = float(torch.linalg.vector_norm(some, dim=1).max()) if coarse else math.inf
        rounded = some.bfloat16() if coarse else None
        answers.take(_Block(start + low, len(some), some.__getitem__, rounded, norm, ROUNDOFF * norm))
    return answers.scores, answers.rows


class Matrix:
    """Rows that are searched again and again, exactly: they are rounded once.

    Beside the rows given, which are kept as they are (a memory map stays one), it takes 2 D bytes a row in memory, or
    4 D where bfloat16 is not faster and the rows are not float32 already. Per core, on 100,000 rows of 512, it answers
    about 10 times as many queries a second as faiss's IndexFlatIP, 64 at a time.
    """

    def __init__(self, rows: Rows) -> None:
        """rows: (N, D), or its parts; float16 or float32. They must not change."""
        self._parts = _parts(rows)
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        width = self._parts[0].shape[1] if self._parts else 0
        self._blocks: list[_Block] = []
        if not bfloat16_is_faster():
            plain = len(self._parts) == 1 and self._parts[0].dtype == np.float32
            whole = self._parts[0] if plain else np.empty((len(self), width), dtype=np.float32)
            for start, low, part in [] if plain else _pieces(self._parts, BLOCK):
                whole[start + low : start + low + len(part)] = part
            self._parts, self._starts = [whole], np.array([0, len(whole)])
            for start, low, part in _pieces(self._parts, BLOCK):
                self._blocks.append(_Block(start + low, len(part), _float32(part).__getitem__))
            return
        whole = torch.empty((len(self), width), dtype=torch.bfloat16)
        for start, low, part in _pieces(self._parts, BLOCK):
            at, some = start + low, _float32(part)
            whole[at : at + len(some)] = some
        for at in _edges(len(self), BLOCK):
            rounded = whole[at.start : at.stop]
            fetch = functools.partial(self._fetch, at.start, at.stop)
            exact = fetch(slice(None))
            norm = float(torch.linalg.vector_norm(exact, dim=1).max())
            error = float(torch.linalg.vector_norm(exact - rounded.float(), dim=1).max())
            self._blocks.append(_Block(at.start, len(rounded), fetch, rounded, norm, error))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As search(). allowed (N,) bool: the rows that may be answers; with fewer than k of them, the last scores are
        -inf and the last rows -1."""
        if allowed is None and _alone(self._parts, queries):
            return _read_once(self._parts[0], queries, min(k, len(self)))
        answers = _Answers(queries, min(k, len(self)))
        for block in self._blocks:
            answers.take(block, None if allowed is None else allowed[block.start : block.start + block.count])
        return answers.scores, answers.rows

    def _fetch(self, start: int, stop: int, which: np.ndarray | slice) -> torch.Tensor:
        """Rows of start .. stop, in float32."""
        if len(self._parts) == 1:
            return _float32(self._parts[0][start:stop][which])
        rows = np.arange(start, stop)[which]
        out = np.empty((len(rows), self._parts[0].shape[1]), dtype=np.float32)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for p in np.unique(owner):
            mine = owner == p
            out[mine] = self._parts[p][rows[mine] - self._starts[p]]
        return torch.from_numpy(out)


def recall(found: np.ndarray, found_scores: np.ndarray, best: np.ndarray, tolerance: float = 1e-5) -> float:
    """Recall@k: the share of the true k best that a search found; fair to ties.

    found (Q, k) rows, -1 where nothing was found; found_scores (Q, k) their exact scores; best (Q, k) the scores of
    search(). A row counts when it scores as much as the true k-th: of several equal rows, any is right.
    """
    return float(((found >= 0) & (found_scores >= best[:, -1:] - tolerance)).mean())


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 at least 1.5 times as fast as float32, measured in a few ms."""
    rows, seconds = torch.ones(4096, 512), {}
    for kind in (torch.float32, torch.bfloat16):
        a, b = rows[:64].to(kind), rows.to(kind)
        runs = []
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(a, b.T)
            runs.append(time.perf_counter() - began)
        seconds[kind] = min(runs)
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


@dataclass
class _Block:
    """Some consecutive rows, and how far their rounded copy may lead astray."""

    start: int  # number of the first
    count: int
    fetch: Callable[[np.ndarray | slice], torch.Tensor]  # rows of the block, exact, in float32
    rounded: torch.Tensor | None = None  # (count, D) bfloat16
    norm: float = math.inf  # no row is longer
    error: float = math.inf  # nor its difference from the rounded row


class _Answers:
    """Queries, and the best rows that were found for them so far."""

    def __init__(self, queries: np.ndarray, k: int) -> None:
        asked = torch.from_numpy(np.array(queries, dtype=np.float32, ndmin=2))
        self.count, self._k = len(asked), k
        self._chunks = [_Chunk(some, k) for some in asked.split(QUERIES)] if len(asked) else []

    def take(self, block: _Block, allowed: np.ndarray | None = None) -> None:
        """Look at a block of rows; with allowed (count,) bool, only at these."""
        mask = None if allowed is None else torch.from_numpy(np.ascontiguousarray(allowed, dtype=bool))
        if not self._k or (mask is not None and not mask.any()):
            return
        for chunk in self._chunks:
            chunk.take(block, mask)

    @property
    def scores(self) -> np.ndarray:
        return self._whole([chunk.scores for chunk in self._chunks], torch.float32)

    @property
    def rows(self) -> np.ndarray:
        return self._whole([chunk.rows for chunk in self._chunks], torch.int64)

    def _whole(self, tensors: list[torch.Tensor], kind: torch.dtype) -> np.ndarray:
        return (torch.cat(tensors) if tensors else torch.empty((0, self._k), dtype=kind)).numpy()


class _Chunk:
    """At most QUERIES queries."""

    def __init__(self, asked: torch.Tensor, k: int) -> None:
        self.asked, self.k = asked, k
        self.scores = torch.full((len(asked), k), -torch.inf)
        self.rows = torch.full((len(asked), k), -1)
        self.rounded = asked.bfloat16()
        self.norm = torch.linalg.vector_norm(asked, dim=1)
        self.error = torch.linalg.vector_norm(asked - self.rounded.float(), dim=1)

    def take(self, block: _Block, allowed: torch.Tensor | None) -> None:
        near = self._near(block, allowed)
        if near is None:
            self._take_all(block, allowed)
        elif len(near):
            at, query = np.divmod(near, len(self.asked))
            order = np.argsort(query, kind="stable")
            at, query = at[order], query[order]
            counts = np.bincount(query, minlength=len(self.asked))
            place = np.arange(len(near)) - (np.cumsum(counts) - counts)[query]  # 0, 1, .. among those of a query
            scores = np.full((len(self.asked), counts.max()), -np.inf, dtype=np.float32)
            scores[query, place] = np.einsum("nd,nd->n", self.asked.numpy()[query], block.fetch(at).numpy())
            rows = np.full(scores.shape, -1)
            rows[query, place] = at + block.start
            self._merge(torch.from_numpy(scores), torch.from_numpy(rows))

    def _near(self, block: _Block, allowed: torch.Tensor | None) -> np.ndarray | None:
        """The scores that may change the answer, as row * queries + query, ascending; None if there are many.

        Let q' and x' be q and x rounded. Then q.x - q'.x' = (q - q').x + q'.(x - x'), which Cauchy and Schwarz bound by
        |q - q'| |x| + |q'| |x - x'|; summing D products in float32 is off by at most D 2^-23 |q'| |x'|. A row that
        beats the k-th best so far, b, has q'.x' >= b - bound, and rounding both to bfloat16 keeps that order. All this
        for normal numbers: products below 1e-38 may be lost.
        """
        if block.rounded is None or not math.isfinite(block.norm + block.error):
            return None
        sums = self.asked.shape[1] * 2.0**-23 * (block.norm + block.error)
        bound = self.error * block.norm + (self.norm + self.error) * (block.error + sums)
        worst = self.scores[:, -1]
        limit = worst - 1.001 * bound - 1e-6 * worst.abs()
        if not torch.isfinite(limit).all():  # fewer than k rows so far
            return None
        near = torch.mm(block.rounded, self.rounded.T) >= limit.bfloat16()  # (rows, queries)
        if allowed is not None:
            near &= allowed[:, None]
        where = np.flatnonzero(near.numpy())
        return None if len(where) * SPARSE > near.numel() else where

    def _take_all(self, block: _Block, allowed: torch.Tensor | None) -> None:
        scores = self.asked @ block.fetch(slice(None)).T
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        best, at = scores.topk(min(self.k, block.count), dim=1)
        if best.isnan().any():  # topk puts them first; they are no answers
            best, at = scores.masked_fill_(scores.isnan(), -torch.inf).topk(min(self.k, block.count), dim=1)
        self._merge(best, torch.where(best > -torch.inf, at + block.start, -1))

    def _merge(self, scores: torch.Tensor, rows: torch.Tensor) -> None:
        self.scores, keep = torch.cat([self.scores, scores], dim=1).topk(self.k, dim=1)
        self.rows = torch.cat([self.rows, rows], dim=1).gather(1, keep)


def _parts(rows: Rows) -> list[np.ndarray]:
    return [rows] if isinstance(rows, np.ndarray) else list(rows)


def _alone(parts: Sequence[np.ndarray], queries: np.ndarray) -> bool:
    """Whether there is one query, and plain float32 rows to ask."""
    plain = len(parts) == 1 and len(parts[0]) and parts[0].dtype == np.float32 and isinstance(parts[0], np.ndarray)
    return bool(plain and parts[0].flags.c_contiguous and np.size(queries) == parts[0].shape[1])


def _read_once(rows: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One query: the time is that of reading the rows, which faiss does fastest."""
    import faiss

    asked = np.array(query, dtype=np.float32, ndmin=2)
    return faiss.knn(asked, rows, k, metric=faiss.METRIC_INNER_PRODUCT) if k else (asked[:, :0], np.empty((1, 0), int))


def _pieces(parts: Sequence[np.ndarray], block: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first row of the part, first row in the part, at most `block` rows); the very first pieces are smaller."""
    start = 0
    for p, part in enumerate(parts):
        for at in _edges(len(part), block, small=p == 0):
            yield start, at.start, part[at.start : at.stop]
        start += len(part)


def _edges(count: int, block: int, small: bool = True) -> Iterator[range]:
    """0 .. count in steps of `block`; with small, the first steps are FIRST, twice that, and so on."""
    low, step = 0, min(block, FIRST) if small else block
    while low < count:
        yield range(low, min(low + step, count))
        low, step = low + step, min(2 * step, block)


def _float32(rows: np.ndarray) -> torch.Tensor:
    rows = np.asarray(rows, dtype=np.float32)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())  # torch wants no read-only memory
