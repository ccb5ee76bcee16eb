import faiss
import numpy as np
import pytest
import tiny

from retrieval import exact


@pytest.fixture(scope="module")
def rows():
    return tiny.unit_rows(1000, 24)


QUERIES = tiny.unit_rows(30, 24, seed=1)


@pytest.mark.parametrize("block", [7, 256, 5000])
def test_exact_search_finds_what_faiss_flat_finds(rows, block):
    index = faiss.IndexFlatIP(24)
    index.add(rows)
    scores, found = index.search(QUERIES, 10)
    mine, mine_found = exact.search(rows, QUERIES, 10, block)
    np.testing.assert_array_equal(mine_found, found)
    np.testing.assert_allclose(mine, scores, atol=1e-6)


def test_float16_memory_maps_in_parts_are_one_set_of_rows(rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    scores, found = exact.search(mapped, QUERIES, 5)
    in_parts = exact.search([mapped[:1], mapped[1:1], mapped[1:700], mapped[700:]], QUERIES, 5, block=64)
    np.testing.assert_array_equal(in_parts[1], found)
    truth = QUERIES @ mapped.astype(np.float32).T
    np.testing.assert_array_equal(found, np.argsort(-truth, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :5], atol=1e-6)


def test_many_queries_are_multiplied_in_blocks_too(rows, monkeypatch):
    whole = exact.search(rows, QUERIES, 3)
    monkeypatch.setattr(exact, "QUERIES", 4)
    np.testing.assert_array_equal(exact.search(rows, QUERIES, 3)[1], whole[1])


def test_k_is_cut_to_the_number_of_rows(rows):
    scores, found = exact.search(rows[:4], QUERIES, 10)
    assert scores.shape == (30, 4) and sorted(found[0]) == [0, 1, 2, 3]
    assert exact.search(rows, QUERIES[:0], 10)[1].shape == (0, 10)
    assert exact.search(rows, QUERIES[0], 2)[1].shape == (1, 2)


def test_recall_counts_what_was_found_of_the_true_best():
    best = np.array([[0.9, 0.8], [0.7, 0.6]], dtype=np.float32)
    found = np.array([[5, 3], [2, -1]])
    scores = np.array([[0.9, 0.5], [0.7, 0.6]], dtype=np.float32)  # row 3 is none of the best; -1 is nothing
    assert exact.recall(found, scores, best) == 0.5


def test_any_of_several_equal_rows_is_right():
    rows = np.repeat(tiny.unit_rows(5, 8), 4, axis=0)
    best, found = exact.search(rows, rows[:1], 2)
    others = np.array([[r for r in range(4) if r not in found[0]]])
    scores = (rows[others[0]] @ rows[0])[None]
    assert exact.recall(others, scores, best) == 1.0
