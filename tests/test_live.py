import json
import shutil

import faiss
import numpy as np
import pytest
import tiny

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import changes, live, tune
from retrieval.index import build_index, load_index
from retrieval.live import LiveIndex, State

DIM = 32


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """emb/ with keys k00000 .. k00299 in 3 parts, more/ with k00300 .. k00349, and the index of the first."""
    root = tmp_path_factory.mktemp("world")
    tiny.store(root / "emb", tiny.unit_rows(300, DIM, 0), tiny.unit_rows(300, DIM, 1), parts=3)
    tiny.store(root / "more", tiny.unit_rows(50, DIM, 2), tiny.unit_rows(50, DIM, 3), parts=2, first=300)
    build_index(root / "emb", root / "index")
    return root


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def truth(world, modality, queries, allowed, k):
    stores = [EmbeddingStore.open(world / name) for name in ("emb", "more")]
    rows = np.concatenate([s.image() if modality == "image" else s.text() for s in stores])[: len(allowed)]
    return np.argsort(-np.where(allowed, queries @ rows.T, -9), axis=1, kind="stable")[:, :k]


def test_a_folder_without_changes_is_searched_exactly(world):
    live = LiveIndex.open(world / "index")
    assert len(live) == live.rows == 300 and live.dim == DIM and live.live.all()
    queries = tiny.unit_rows(7, DIM, 9)
    for modality in ("image", "text"):
        scores, rows = live.search(queries, 5, modality)
        assert scores.dtype == np.float32 and rows.dtype == np.int64
        np.testing.assert_array_equal(rows, truth(world, modality, queries, live.live, 5))
        np.testing.assert_allclose(
            scores, np.einsum("qd,qkd->qk", queries, live.vectors(rows.ravel(), modality).reshape(7, 5, DIM)), atol=1e-5
        )


def test_rows_are_those_of_base_and_segments_in_their_order(copy):
    changes.add(copy / "index", copy / "more")
    live = LiveIndex.open(copy / "index")
    assert live.rows == len(live.table) == 350
    stores = [EmbeddingStore.open(copy / name) for name in ("emb", "more")]
    assert live.table.column("image_path") == stores[0].keys + stores[1].keys
    assert live.table.row(307)["caption"] == "row 307"
    assert live.rows_of(["k00349", "k00000", "nobody"]).tolist() == [349, 0, -1]
    np.testing.assert_array_equal(live.vectors([349, 3]), np.concatenate([stores[1].image([49]), stores[0].image([3])]))
    np.testing.assert_array_equal(live.vectors([349], "text"), stores[1].text([49]))
    assert sum(len(part) for part in live.table.parts()) == 350
    assert [source.result["rows"] for source in live.sources()] == [300, 50]
    assert [source.input_path("embeddings") for source in live.sources()] == [copy / "emb", copy / "more"]


def test_a_search_over_segments_deleted_rows_and_a_filter_is_that_of_brute_force(copy):
    changes.add(copy / "index", copy / "more")
    changes.delete(copy / "index", [f"k{row:05d}" for row in range(0, 350, 3)])
    live = LiveIndex.open(copy / "index")
    queries, filter_ = tiny.unit_rows(20, DIM, 9), np.random.default_rng(0).random(350) < 0.3
    for modality in ("image", "text"):
        for allowed in (None, filter_):
            may = live.live if allowed is None else live.live & allowed
            _, rows = live.search(queries, 10, modality, allowed)
            np.testing.assert_array_equal(rows, truth(copy, modality, queries, may, 10))


def test_scores_of_short_codes_are_replaced_before_they_meet_those_of_another_part(copy, monkeypatch):
    coarse = faiss.index_factory(DIM, "PQ4x4", faiss.METRIC_INNER_PRODUCT)
    rows = EmbeddingStore.open(copy / "emb").image()
    coarse.train(rows)
    coarse.add(rows)
    base = copy / "index"
    monkeypatch.setattr(
        live, "load_index", lambda path, modality: coarse if path == base else load_index(path, modality)
    )
    queries = tiny.unit_rows(20, DIM, 9)
    scores, _ = LiveIndex.open(base).search(queries, 10)
    np.testing.assert_array_equal(scores, coarse.search(queries, 10)[0])  # alone, it has its own scale

    changes.add(base, copy / "more")
    both = LiveIndex.open(base)
    scores, found = both.search(queries, 10)
    exact = np.einsum("qd,qkd->qk", queries, both.vectors(found.ravel()).reshape(20, 10, DIM))
    np.testing.assert_allclose(scores, exact, atol=1e-5)
    candidates = np.hstack([coarse.search(queries, 10)[1], truth(copy, "image", queries, np.arange(350) >= 300, 10)])
    cosines = np.einsum("qd,qkd->qk", queries, both.vectors(candidates.ravel()).reshape(20, 20, DIM))
    best = np.take_along_axis(candidates, np.argsort(-cosines, axis=1, kind="stable")[:, :10], axis=1)
    np.testing.assert_array_equal(found, best)

    shutil.rmtree(copy / "emb")
    assert LiveIndex.open(base).search(queries, 10)[1].shape == (20, 10)


def test_fewer_rows_than_asked_for_end_in_minus_one(copy):
    changes.delete(copy / "index", [f"k{row:05d}" for row in range(298)])
    live = LiveIndex.open(copy / "index")
    scores, rows = live.search(tiny.unit_rows(2, DIM), 4)
    assert [sorted(row) for row in rows.tolist()] == [[-1, -1, 298, 299]] * 2
    assert np.isneginf(scores[:, 2:]).all() and (scores[:, :2] > -1).all()
    only = np.zeros(300, dtype=bool)
    only[5] = True  # deleted
    assert (live.search(tiny.unit_rows(2, DIM), 4, allowed=only)[1] == -1).all()
    changes.delete(copy / "index", ["k00298", "k00299"])
    live = live.reopened()
    assert len(live) == 0 and (live.search(tiny.unit_rows(2, DIM), 4)[1] == -1).all()


def test_the_state_changes_with_every_change_and_only_then(copy):
    seen = [LiveIndex.state_of(copy / "index")]
    assert seen[0] == LiveIndex.state_of(copy / "index") == LiveIndex.open(copy / "index").state
    for change in (
        lambda: changes.add(copy / "index", copy / "more"),
        lambda: changes.delete(copy / "index", ["k00001"]),
        lambda: changes.compact(copy / "index"),
    ):
        change()
        seen.append(LiveIndex.state_of(copy / "index"))
    assert len(set(seen)) == 4
    changes.compact(copy / "index")
    changes.delete(copy / "index", ["k00002"])
    changes.delete(copy / "index", ["k00002"])
    assert len({*seen, LiveIndex.state_of(copy / "index")}) == 5


def test_an_open_index_goes_on_seeing_what_it_opened(copy):
    live = LiveIndex.open(copy / "index")
    queries = tiny.unit_rows(3, DIM, 9)
    before = live.search(queries, 5), live.search(queries, 5, "text")
    live = LiveIndex.open(copy / "index")  # has not been asked anything yet
    changes.add(copy / "index", copy / "more")
    changes.delete(copy / "index", [f"k{row:05d}" for row in range(0, 300, 2)])
    changes.compact(copy / "index")
    np.testing.assert_array_equal(live.search(queries, 5)[1], before[0][1])
    np.testing.assert_array_equal(live.search(queries, 5, "text")[1], before[1][1])
    assert live.table.row(299)["image_path"] == "k00299" and live.rows_of(["k00000"]).tolist() == [0]
    again = live.reopened()
    assert len(again) == again.rows == 200 and again.table.row(0)["image_path"] == "k00001"


def test_without_the_embeddings_vectors_come_out_of_the_index(copy):
    expected = LiveIndex.open(copy / "index").vectors(np.arange(300))
    shutil.rmtree(copy / "emb")
    live = LiveIndex.open(copy / "index")
    assert not live.parts[0].vectors.exact
    np.testing.assert_allclose(np.einsum("nd,nd->n", live.vectors(np.arange(300)), expected), 1, atol=1e-3)


def test_other_embeddings_in_the_old_place_are_not_taken_for_the_old_ones(copy):
    expected = LiveIndex.open(copy / "index").vectors([7])
    shutil.rmtree(copy / "emb")
    tiny.store(copy / "emb", tiny.unit_rows(300, DIM, 77))
    np.testing.assert_allclose(LiveIndex.open(copy / "index").vectors([7]), expected, atol=1e-3)


def test_a_damaged_state_is_one_line(copy):
    (copy / "index" / "state.json").write_text('{"segments": [')
    with pytest.raises(UserError, match="state.json is damaged"):
        LiveIndex.open(copy / "index")
    (copy / "index" / "state.json").write_text('{"segments": [], "deleted": {"file": "gone.npy", "rows": 1}}')
    with pytest.raises(UserError, match="gone.npy is missing or damaged"):
        LiveIndex.open(copy / "index")
    for name in ("..", ".", "", "../emb", None):
        (copy / "index" / "state.json").write_text(json.dumps({"segments": [{"name": name}]}))
        with pytest.raises(UserError, match="state.json is damaged .*have no name of a file"):
            LiveIndex.open(copy / "index")
    assert State.read(copy / "emb") == State()


def test_a_folder_of_another_kind_is_one_line(world):
    with pytest.raises(UserError, match="is of kind embeddings, but index is needed"):
        LiveIndex.open(world / "emb")
    with pytest.raises(UserError, match="does not exist; make it: unclip index"):
        LiveIndex.open(world / "nothing")
