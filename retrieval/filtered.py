"""A faiss index that is asked for the best of some of its rows, and answers with as many as were asked for."""

import math
import threading
from collections.abc import Callable
from functools import cached_property

import faiss
import numpy as np

from retrieval import exact

FEW = 500  # rows that one query is compared with, one by one, rather than looking for them in the index
SHARING = 32  # queries at most that share the fetching of rows, and so make that many times as many rows few
BLOCK = 16_384  # rows compared at a time
AROUND = 32  # nearest rows that are looked at, to see how many around a query are allowed
MOST = 0.9  # share of allowed rows above which it does not matter where they are
BATCH = 8  # queries from which on an exact kind gets an exact.Matrix, which takes memory; half as many use it then
FETCHED = 2048  # answers that are fetched at most, to find k among them that are allowed

Answer = tuple[np.ndarray, np.ndarray]  # scores (Q, k) float32, rows (Q, k) int64; best first, -inf and -1 at the end


class Mask:
    """Which rows may be answers."""

    def __init__(self, allowed: np.ndarray) -> None:
        self.allowed = np.array(allowed, dtype=bool)
        self.count = int(np.count_nonzero(self.allowed))

    @cached_property
    def selector(self) -> faiss.IDSelector:
        """The same for faiss."""
        return faiss.IDSelectorBitmap(np.packbits(self.allowed, bitorder="little"))


class FilteredIndex:
    """One faiss index and the vectors in it. Safe over threads: the index itself is never turned.

    Exact kinds (Flat, SQfp16) take no memory of their own until the first batch of BATCH queries comes; from then on
    that of exact.Matrix.
    """

    def __init__(self, index: faiss.Index, fetch: Callable[[np.ndarray], np.ndarray]) -> None:
        """fetch: rows (N,) -> vectors (N, D) float32, for the comparisons one by one."""
        self.index = index
        self._rows = plain_rows(index)
        self._fetch = fetch if self._rows is None else self._rows.__getitem__
        self._matrix: exact.Matrix | None = None
        self._making = threading.Lock()

    def __len__(self) -> int:
        return self.index.ntotal

    @property
    def exact(self) -> bool:
        """Whether it finds the true best: the vectors are in it as they were given."""
        return self._rows is not None

    @cached_property
    def takes_selector(self) -> bool:
        """Whether this kind can be told which rows it may answer with. Of those that unclip chooses, all can; the
        fast-scan kinds without lists cannot."""
        nothing = faiss.IDSelectorRange(0, 0)
        try:
            _, rows = self.index.search(np.ones((1, self.index.d), dtype=np.float32), 1, params=self._turned(nothing))
        except (RuntimeError, TypeError, AttributeError):
            return False
        return bool((rows < 0).all())

    def search(self, queries: np.ndarray, k: int, mask: Mask | None = None) -> Answer:
        """The k best allowed rows for each of (Q, D), or all that are allowed where these are fewer."""
        count = len(self) if mask is None else mask.count
        if mask is not None and count == len(self):
            mask = None
        if not count or not len(queries) or k < 1:
            return nothing_found(len(queries), k)
        if mask is not None and count <= self._few(len(queries)):
            return self._one_by_one(queries, k, mask)
        scores, rows = nothing_found(len(queries), k)
        left = np.arange(len(queries))
        if mask is not None and count > MOST * len(self):  # a few are deleted: leaving them out afterwards costs least
            scores, rows = self._fetched(queries, k, mask, k + math.ceil(1.5 * k * (len(self) / count - 1)) + 4)
            left = np.flatnonzero((rows < 0).any(axis=1))
        if self.exact:
            scores[left], rows[left] = padded(self._exactly(queries[left], min(k, count), mask), k)
            return scores, rows
        if count <= k:
            return self._one_by_one(queries, k, mask)
        if mask is not None and not self.takes_selector:
            return self._over_fetched(queries, k, mask)
        widen, most = self._widening(queries, mask), self._widest()
        while len(left):
            for value in np.unique(widen[left]).tolist():
                now = left[widen[left] == value]
                scores[now], rows[now] = self._searched(queries[now], k, mask, value)
            left = left[(rows[left] < 0).any(axis=1) & (widen[left] < most)]
            widen[left] = np.minimum(4 * widen[left], most)
        if len(short := np.flatnonzero((rows < 0).any(axis=1))):
            scores[short], rows[short] = self._one_by_one(queries[short], k, mask)
        return scores, rows

    def _widening(self, queries: np.ndarray, mask: Mask | None) -> np.ndarray:
        """(Q,) how many times the effort that the index was tuned to each query takes, a power of two.

        The fewer rows are allowed, the farther the search has to go; and the fewer of those around the query, the
        farther still (a caption of a car, among the animals). Both shares count alike. In a graph, the effort is the
        number of rows it keeps in sight, so it grows in proportion; of lists the nearest hold most of what is wanted:
        the exponent is the least that kept the index's recall for all filters of benchmarks/filters.py.
        """
        if mask is None:
            return np.ones(len(queries))
        share = mask.count / len(self)
        if share > MOST:
            return np.full(len(queries), 2.0)
        _, near = self.index.search(queries, AROUND)
        around = ((mask.allowed[near] & (near >= 0)).sum(axis=1) + 1) / (AROUND + 1 / share)  # as if 1 / share more
        widen = 1 / np.sqrt(share * around)
        return 2.0 ** np.ceil(np.log2(widen if self._graph is not None else widen**0.7))

    def _exactly(self, queries: np.ndarray, k: int, mask: Mask | None = None) -> Answer:
        """Of an exact kind; faiss is as fast for a few queries, without the memory and the time to make a Matrix."""
        if len(queries) < (BATCH if self._matrix is None else BATCH // 2):
            return self._searched(queries, k, mask, 1)
        with self._making:
            if self._matrix is None:
                self._matrix = exact.Matrix(self._rows)
        return self._matrix.search(queries, k, None if mask is None else mask.allowed)

    def _searched(self, queries: np.ndarray, k: int, mask: Mask | None, widen: float) -> Answer:
        if mask is None and widen == 1:
            return self.index.search(queries, k)
        return self.index.search(queries, k, params=self._turned(None if mask is None else mask.selector, widen))

    def _over_fetched(self, queries: np.ndarray, k: int, mask: Mask) -> Answer:
        """Ask for ever more rows until k of them are allowed."""
        wanted = math.ceil(1.5 * k * len(self) / mask.count)
        scores, rows = nothing_found(len(queries), k)
        short = np.arange(len(queries))
        while len(short) and wanted <= min(FETCHED, len(self)):
            scores[short], rows[short] = self._fetched(queries[short], k, mask, wanted)
            short, wanted = short[(rows[short] < 0).any(axis=1)], 4 * wanted
        if len(short):
            scores[short], rows[short] = self._one_by_one(queries[short], k, mask)
        return scores, rows

    def _fetched(self, queries: np.ndarray, k: int, mask: Mask, wanted: int) -> Answer:
        """The allowed ones of the `wanted` best, at most k."""
        wanted = min(wanted, len(self))
        scores, rows = (self._exactly if self.exact else self.index.search)(queries, wanted)
        scores[(rows < 0) | ~mask.allowed[rows]] = -np.inf
        return best_of(scores, rows, k)

    def _one_by_one(self, queries: np.ndarray, k: int, mask: Mask | None) -> Answer:
        """Compare each query with every allowed row."""
        allowed = np.arange(len(self)) if mask is None else np.flatnonzero(mask.allowed)
        scores, rows = nothing_found(len(queries), k)
        for low in range(0, len(allowed), BLOCK):
            some = allowed[low : low + BLOCK]
            more, found = exact.search(self._fetch(some), queries, k)
            scores, rows = best_of(np.hstack([scores, more]), np.hstack([rows, some[found]]), k)
        return scores, rows

    def _few(self, queries: int) -> int:
        """Up to so many rows, comparing them costs less than finding them.

        Fetching a row costs about as much as comparing it with 100 queries. Exact kinds compare all that is there, in
        half the precision first. A graph is walked past n / count times as many nodes, each about four rows' fetching.
        """
        few = FEW * min(queries, SHARING)
        if self.exact:
            return max(few, len(self) // 16)
        graph = self._graph
        return few if graph is None else max(few, int(math.sqrt(4 * graph.hnsw.efSearch * len(self))))

    def _widest(self) -> float:
        """The widening at which the whole index is looked at."""
        lists = faiss.try_extract_index_ivf(inner_of(self.index))
        if lists is not None:
            return lists.nlist / lists.nprobe
        return 1 if self._graph is None else len(self) / self._graph.hnsw.efSearch

    @cached_property
    def _graph(self) -> faiss.IndexHNSW | None:
        inner = inner_of(self.index)
        return inner if isinstance(inner, faiss.IndexHNSW) else None

    def _turned(self, selector: faiss.IDSelector | None, widen: float = 1) -> faiss.SearchParameters:
        """Settings for one search: only the selected rows, and `widen` times the effort the index was tuned to."""
        return _turned(faiss.downcast_index(self.index), selector, widen)


def plain_rows(index: faiss.Index) -> np.ndarray | None:
    """(N, D) float32 or float16: the memory of an index that keeps its vectors as they are; None of other kinds."""
    index = faiss.downcast_index(index)
    shape = (index.ntotal, index.d)
    if isinstance(index, faiss.IndexFlat):
        return faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(shape)
    if isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        return faiss.rev_swig_ptr(index.codes.data(), 2 * index.ntotal * index.d).view(np.float16).reshape(shape)
    return None


def best_of(scores: np.ndarray, rows: np.ndarray, k: int) -> Answer:
    """The k best of each line of (Q, M), the earlier first where they are equal; -1 where the score is -inf."""
    scores = scores.astype(np.float32, copy=False)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return padded((scores, np.where(np.isneginf(scores), -1, rows)), k)


def padded(answer: Answer, k: int) -> Answer:
    """The answer with k columns."""
    scores, rows = answer
    if (missing := k - scores.shape[1]) > 0:
        edge = ((0, 0), (0, missing))
        scores, rows = np.pad(scores, edge, constant_values=-np.inf), np.pad(rows, edge, constant_values=-1)
    return scores, rows


def nothing_found(queries: int, k: int) -> Answer:
    """The answer without a row."""
    return np.full((queries, max(k, 0)), -np.inf, dtype=np.float32), np.full((queries, max(k, 0)), -1, dtype=np.int64)


def inner_of(index: faiss.Index) -> faiss.Index:
    """What finds the candidates: without the refinement and the rotation around it."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return inner_of(index.base_index)
    return inner_of(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _turned(index: faiss.Index, selector: faiss.IDSelector | None, widen: float) -> faiss.SearchParameters:
    given = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexRefine):
        inner = _turned(faiss.downcast_index(index.base_index), selector, widen)
        factor = index.k_factor * (1 if selector is None else 4)  # far rows lie closer together than the codes can tell
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _turned(faiss.downcast_index(index.index), selector, widen)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(index.nlist, math.ceil(index.nprobe * widen)), **given)
    if isinstance(index, faiss.IndexHNSW):
        effort = min(index.ntotal, math.ceil(index.hnsw.efSearch * widen))
        return faiss.SearchParametersHNSW(efSearch=effort, **given)
    return faiss.SearchParameters(**given)
