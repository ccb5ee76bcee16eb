import faiss
import numpy as np
import pytest
import tiny
import torch

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


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def first_pass(request, monkeypatch):
    """Both ways of searching, whatever this processor is good at."""
    monkeypatch.setattr(exact, "bfloat16_is_faster", lambda: request.param)
    monkeypatch.setattr(exact, "FIRST", 64)
    monkeypatch.setattr(exact, "BLOCK", 512)
    return request.param


def true_best(rows, queries, k):
    """By float64, all of them: scores and rows."""
    scores = queries.astype(np.float64) @ np.asarray(rows, dtype=np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def alike(n, dim, spread, seed=0):
    """Unit rows around one direction, so close that their scores differ by less than bfloat16 can say."""
    rng = np.random.default_rng(seed)
    rows = tiny.unit_rows(1, dim, seed) + spread * rng.standard_normal((n, dim)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("spread", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("order", ["as they come", "best last", "best first"])
def test_what_rounding_mixes_up_is_still_found_in_its_true_order(first_pass, spread, order):
    rows = alike(3000, 64, spread)
    queries = alike(40, 64, spread, seed=0)[::-1].copy()
    if order != "as they come":
        rank = np.argsort(rows @ queries.mean(0))
        rows = rows[rank if order == "best last" else rank[::-1]]
    rounded = (torch.from_numpy(queries).bfloat16() @ torch.from_numpy(rows).bfloat16().T).float()
    naive = rounded.topk(10).indices.numpy()
    best, found = true_best(rows, queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(naive, found, strict=True)]) < 0.99  # it is not easy
    for answer in (exact.search(rows, queries, 10), exact.Matrix(rows).search(queries, 10)):
        np.testing.assert_allclose(answer[0], best, atol=3e-7 * 10)
        assert exact.recall(answer[1], np.einsum("qd,qkd->qk", queries, rows[answer[1]]), best, 1e-6) == 1.0


def test_a_best_row_that_rounding_makes_the_least_of_the_good_ones_is_found(first_pass):
    """Every number of queries and good rows is rounded down by almost all that bfloat16 can be off."""
    half = 2.0**-8  # of the distance between 1 and the next bfloat16
    queries = np.full((30, 64), 1 + 0.98 * half, dtype=np.float32)
    rows = 0.1 * tiny.unit_rows(4000, 64)
    rows[:10] = 1 + 0.75 * half  # in the first block
    rows[3000:3010] = 1 + 0.98 * half  # better, but after rounding all of them are ones
    assert float((torch.from_numpy(rows[3000]).bfloat16() - 1).abs().max()) == 0
    for answer in (exact.search(rows, queries, 10), exact.Matrix(rows).search(queries, 10)):
        assert all(sorted(found) == list(range(3000, 3010)) for found in answer[1].tolist())


def test_one_query_gets_the_same_answer_as_among_many(first_pass, rows):
    many = exact.search(rows, QUERIES, 6)
    for n, query in enumerate(QUERIES[:4]):
        for scores, found in (exact.search(rows, query, 6), exact.Matrix(rows).search(query[None], 6)):
            np.testing.assert_array_equal(found, many[1][n : n + 1])
            np.testing.assert_allclose(scores, many[0][n : n + 1], atol=1e-6)
    assert exact.search(rows, QUERIES[0], 0)[1].shape == (1, 0)


def test_the_first_pass_looks_again_at_few_rows_only(monkeypatch):
    monkeypatch.setattr(exact, "bfloat16_is_faster", lambda: True)
    rows, seen = tiny.unit_rows(20_000, 64), []
    matrix = exact.Matrix(rows)
    plain = exact._Chunk._near
    monkeypatch.setattr(exact._Chunk, "_near", lambda *given: seen.append(plain(*given)) or seen[-1])
    found = matrix.search(tiny.unit_rows(50, 64, seed=1), 10)[1]
    assert seen[0] is None and all(near is not None for near in seen[1:])  # only the first block as a whole
    assert sum(len(near) for near in seen[1:]) < 0.02 * 50 * 20_000
    np.testing.assert_array_equal(found, true_best(rows, tiny.unit_rows(50, 64, seed=1), 10)[1])


def test_rows_all_alike_long_or_short_are_searched_exactly(first_pass):
    queries = tiny.unit_rows(30, 16, seed=2)
    for rows in (np.ones((3000, 16), np.float32), 1e4 * tiny.unit_rows(3000, 16), 1e-4 * tiny.unit_rows(3000, 16)):
        best, _ = true_best(rows, queries, 5)
        scores, found = exact.Matrix(rows).search(queries, 5)
        np.testing.assert_allclose(scores, best, rtol=1e-5)
        assert all(len(set(row)) == 5 for row in found.tolist())


def test_a_matrix_of_mapped_float16_parts_answers_as_search_does(first_pass, rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    matrix = exact.Matrix([mapped[:1], mapped[1:1], mapped[1:700], mapped[700:]])
    assert len(matrix) == 1000
    best, found = true_best(mapped, QUERIES, 5)
    scores, mine = matrix.search(QUERIES, 5)
    np.testing.assert_array_equal(mine, found)
    np.testing.assert_allclose(scores, best, atol=1e-6)


def test_only_allowed_rows_are_answers_and_too_few_leave_places_empty(first_pass, rows):
    matrix = exact.Matrix(rows)
    allowed = np.arange(1000) % 3 == 1
    _, found = matrix.search(QUERIES, 7, allowed)
    np.testing.assert_array_equal(found, np.flatnonzero(allowed)[true_best(rows[allowed], QUERIES, 7)[1]])
    few = np.zeros(1000, dtype=bool)
    few[[5, 990]] = True
    scores, found = matrix.search(QUERIES, 4, few)
    assert set(map(tuple, np.sort(found[:, :2]).tolist())) == {(5, 990)}
    assert (found[:, 2:] == -1).all() and np.isneginf(scores[:, 2:]).all() and np.isfinite(scores[:, :2]).all()
    assert (matrix.search(QUERIES, 3, np.zeros(1000, dtype=bool))[1] == -1).all()


def test_an_empty_matrix_and_no_queries_give_no_answers(first_pass, rows):
    assert exact.Matrix(rows).search(QUERIES[:0], 3)[1].shape == (0, 3)
    assert exact.Matrix(rows[:0]).search(QUERIES, 3)[1].shape == (30, 0)


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


def test_nothing_is_found_where_no_answer_is_asked_for(first_pass, rows):
    for answer in (exact.search(rows, QUERIES, 0), exact.Matrix(rows).search(QUERIES, 0)):
        assert answer[0].shape == answer[1].shape == (30, 0)


def test_a_row_that_is_no_number_is_no_answer(first_pass, rows):
    broken = rows.copy()
    broken[[7, 600], 3] = np.nan
    whole = np.delete(np.arange(1000), [7, 600])
    found = whole[true_best(rows[whole], QUERIES, 4)[1]]
    for answer in (exact.search(broken, QUERIES, 4), exact.Matrix(broken).search(QUERIES, 4)):
        np.testing.assert_array_equal(answer[1], found)
