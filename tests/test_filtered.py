import faiss
import numpy as np
import pytest
import tiny

from retrieval import filtered
from retrieval.filtered import FilteredIndex, Mask

DIM, N = 32, 3000
KINDS = [
    "Flat",
    "SQfp16",
    "SQ8",
    "HNSW16",
    "IVF30,SQ8",
    "IVF30_HNSW16,SQ8",
    "IVF30,PQ16x4fs,Refine(SQ8)",
    "PCA32,IVF30,PQ16x4fs,Refine(SQ8)",
    "PQ16x4fs,Refine(SQ8)",  # takes no selector
]
if hasattr(faiss, "IndexIVFRaBitQFastScan"):
    KINDS.append("IVF30,RaBitQfs,Refine(SQ8)")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    rows = np.repeat(tiny.unit_rows(60, DIM), N // 60, axis=0) + 0.1 * rng.standard_normal((N, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def queries(rows):
    some = rows[::75] + 0.1 * np.random.default_rng(1).standard_normal((40, DIM)).astype(np.float32)
    return some / np.linalg.norm(some, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def made(rows):
    """Indexes as build_index tunes them: a recall of about .95 without a filter."""
    indexes = {}
    for kind in KINDS:
        index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        inner = filtered.inner_of(index)
        if isinstance(inner, faiss.IndexIVF):
            inner.nprobe = 6
        if isinstance(index, faiss.IndexRefine):
            index.k_factor = 8
        indexes[kind] = index
    return indexes


def recall(found, queries, rows, allowed, k=10):
    """Recall@k among the allowed rows, by numpy's own sort."""
    truth = np.argsort(-np.where(allowed, queries @ rows.T, -9), axis=1)[:, :k]
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(found, truth, strict=True)])


def masks():
    rng = np.random.default_rng(2)
    yield "half", rng.random(N) < 0.5
    yield "a tenth", rng.random(N) < 0.1
    yield "all but ten", np.isin(np.arange(N), rng.permutation(N)[:10], invert=True)
    yield "clusters", np.arange(N) // 50 % 7 == 0  # what a filter on a column does: far from random
    yield "one in a thousand", np.isin(np.arange(N), rng.permutation(N)[: N // 1000])


@pytest.mark.parametrize("kind", KINDS)
def test_a_filtered_search_keeps_k_results_and_its_recall_whatever_the_kind(kind, made, rows, queries, monkeypatch):
    monkeypatch.setattr(filtered, "FEW", 2)  # so that filters of a tenth and a seventh go through the index
    index = FilteredIndex(made[kind], lambda at: rows[at])
    plain = recall(index.search(queries, 10)[1], queries, rows, np.ones(N, dtype=bool))
    for name, allowed in masks():
        scores, found = index.search(queries, 10, Mask(allowed))
        there = min(10, int(allowed.sum()))
        assert ((found >= 0).sum(axis=1) == there).all(), name
        assert allowed[found[:, :there]].all(), name
        assert (np.diff(scores[:, :there], axis=1) <= 0).all() and np.isneginf(scores[:, there:]).all(), name
        assert all(len(set(row[:there])) == there for row in found.tolist()), name
        np.testing.assert_allclose(
            scores[:, :there], np.einsum("qd,qkd->qk", queries, rows[found[:, :there]]), atol=0.03
        )
        assert recall(found[:, :there], queries, rows, allowed, there) >= plain - 0.02, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_answers_with_as_many_rows_as_are_asked_for_even_all(kind, made, rows, queries):
    index = FilteredIndex(made[kind], lambda at: rows[at])
    allowed = np.arange(N) % 3 > 0
    for mask, k in ((None, 700), (Mask(allowed), 1500), (None, N + 5), (Mask(allowed), N)):
        there = min(k, N if mask is None else 2000)
        scores, found = index.search(queries[:2], k, mask)
        assert scores.shape == found.shape == (2, k)
        assert ((found >= 0).sum(axis=1) == there).all()
        assert all(len(set(row[:there])) == there for row in found.tolist())


def test_nothing_allowed_is_nothing_found(made, rows, queries):
    index = FilteredIndex(made["IVF30,SQ8"], lambda at: rows[at])
    scores, found = index.search(queries, 3, Mask(np.zeros(N, dtype=bool)))
    assert (found == -1).all() and np.isneginf(scores).all() and found.shape == (40, 3)


def test_a_search_leaves_the_knobs_of_the_index_alone(made, rows, queries):
    FilteredIndex(made["IVF30,SQ8"], lambda at: rows[at]).search(queries, 500, Mask(np.arange(N) % 2 == 0))
    assert made["IVF30,SQ8"].nprobe == 6


def test_all_kinds_that_unclip_chooses_take_a_selector(made, rows):
    without = [kind for kind in KINDS if not FilteredIndex(made[kind], lambda at: rows[at]).takes_selector]
    assert without == ["PQ16x4fs,Refine(SQ8)"]


def test_exact_kinds_are_searched_exactly_with_and_without_filter(made, rows, queries):
    for kind in ("Flat", "SQfp16"):
        index = FilteredIndex(made[kind], None)
        for _, allowed in masks():
            there = min(10, int(allowed.sum()))
            assert recall(index.search(queries, there, Mask(allowed))[1], queries, rows, allowed, there) > 0.99


def test_a_few_queries_of_an_exact_kind_take_no_memory_and_the_first_batch_does(made, rows, queries, monkeypatch):
    seen, plain = [], filtered.exact.Matrix
    monkeypatch.setattr(filtered.exact, "Matrix", lambda rows: seen.append(rows) or plain(rows))
    some = Mask(np.arange(N) % 5 > 0)  # too many to be compared one by one
    for kind in ("Flat", "SQfp16"):
        index = FilteredIndex(made[kind], None)
        few = [index.search(queries[:4], 10, mask) for mask in (None, some)]
        assert index.exact and not seen
        many = [index.search(queries[:8], 10, mask) for mask in (None, some)]
        assert len(seen) == 1 and seen.pop().shape == (N, DIM)
        for (scores, found), (more, others) in zip(few, many, strict=True):
            np.testing.assert_array_equal(found, others[:4])
            np.testing.assert_allclose(scores, more[:4], atol=1e-6)
