import json

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

from clip_train.embed import embed
from clip_train.settings import UserError
from retrieval import changes, tune
from retrieval.cluster import ClusterConfig, adjusted_rand, best_count, cluster, typical_words, words_of
from retrieval.index import build_index
from retrieval.live import LiveIndex

DIM, TRUE = 32, 8


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setattr(tune, "QUERIES", 200)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """1600 rows in 8 clusters of different sizes; row i belongs to owner[i]."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(TRUE), [400, 300, 250, 200, 150, 120, 100, 80])
    rng.shuffle(owner)
    rows = tiny.unit_rows(TRUE, DIM, 5)[owner] + 0.08 * rng.standard_normal((len(owner), DIM))
    tiny.store(root / "emb", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), parts=3)
    build_index(root / "emb", root / "index")
    np.save(root / "owner.npy", owner)
    return root


def test_clusters_that_are_there_are_found_and_numbered_by_size(world, tmp_path):
    made = cluster(world / "index", tmp_path / "out", ClusterConfig(count=TRUE, sheets=False))
    frame = pd.read_parquet(tmp_path / "out" / "clusters.parquet")
    assert list(frame.columns) == ["key", "cluster", "cosine"]
    assert frame["key"].tolist() == [f"k{row:05d}" for row in range(1600)]
    assert adjusted_rand(frame["cluster"].to_numpy(), np.load(world / "owner.npy")) == 1
    assert [entry["rows"] for entry in made.result["clusters"]] == [400, 300, 250, 200, 150, 120, 100, 80]
    assert frame["cosine"].between(0.8, 1).all()
    assert json.loads((tmp_path / "out" / "clusters.json").read_text()) == made.result["clusters"]


def test_the_cosine_is_that_to_the_centre_and_the_key_is_of_the_nearest(world, tmp_path):
    made = cluster(world / "index", tmp_path / "out", ClusterConfig(count=TRUE, sheets=False))
    frame = pd.read_parquet(tmp_path / "out" / "clusters.parquet")
    rows = LiveIndex.open(world / "index").vectors(np.arange(1600))
    for c in (0, 5):
        mine = frame["cluster"] == c
        centre = rows[mine].mean(axis=0)
        np.testing.assert_allclose(frame["cosine"][mine], rows[mine] @ centre / np.linalg.norm(centre), atol=0.01)
        assert made.result["clusters"][c]["key"] == frame["key"][frame["cosine"][mine].idxmax()]


def test_the_count_is_the_one_on_which_two_halves_agree(world, tmp_path):
    result = cluster(world / "index", tmp_path / "out", ClusterConfig(sheets=False)).result
    assert result["count"] == TRUE
    assert result["agreement"]["8"] > 0.9 > max(value for k, value in result["agreement"].items() if int(k) > 12)


def test_the_same_seed_gives_the_same_clusters_and_a_second_run_does_nothing(world, tmp_path):
    for name in ("a", "b"):
        cluster(world / "index", tmp_path / name, ClusterConfig(count=5, seed=3, sheets=False))
    a, b = (pd.read_parquet(tmp_path / name / "clusters.parquet") for name in ("a", "b"))
    pd.testing.assert_frame_equal(a, b)
    created = cluster(world / "index", tmp_path / "a", ClusterConfig(count=5, seed=3, sheets=False)).created
    assert created == cluster(world / "index", tmp_path / "a", ClusterConfig(count=5, seed=3, sheets=False)).created
    with pytest.raises(UserError, match="made with count = 5, but 6 is asked for"):
        cluster(world / "index", tmp_path / "a", ClusterConfig(count=6, seed=3, sheets=False))


def test_sheets_show_the_pictures_and_deleted_rows_are_in_no_cluster(tmp_path):
    tiny.shards(tmp_path / "shards", n=12)
    tiny.clip(tmp_path / "clip")
    embed(tmp_path / "shards", tmp_path / "clip", tmp_path / "emb")
    build_index(tmp_path / "emb", tmp_path / "index")
    changes.delete(tmp_path / "index", ["s003"])
    seen = []
    made = cluster(
        tmp_path / "index", tmp_path / "out", ClusterConfig(count=3), lambda done, total, **n: seen.append(n["step"])
    )
    frame = pd.read_parquet(tmp_path / "out" / "clusters.parquet")
    assert len(frame) == made.result["rows"] == 11 and "s003" not in frame["key"].tolist()
    names = sorted(path.name for path in (tmp_path / "out" / "sheets").iterdir())
    assert names == ["cluster_0.png", "cluster_1.png", "cluster_2.png"]
    with Image.open(tmp_path / "out" / "overview.png") as overview:
        assert len(overview.convert("RGB").getcolors(1 << 24)) > 20  # pictures, not empty cells
    assert set(seen) == {"rows", "sheets"}


def test_captions_are_clustered_when_they_are_asked_for(world, tmp_path):
    tiny.store(tmp_path / "emb", tiny.unit_rows(60, DIM, 1), np.repeat(tiny.unit_rows(3, DIM, 2), 20, axis=0))
    build_index(tmp_path / "emb", tmp_path / "index")
    cluster(tmp_path / "index", tmp_path / "out", ClusterConfig(count=3, modality="text", sheets=False))
    found = pd.read_parquet(tmp_path / "out" / "clusters.parquet")["cluster"].to_numpy()
    assert adjusted_rand(found, np.repeat(np.arange(3), 20)) == 1


def test_typical_words_are_those_of_the_cluster_and_not_those_of_all():
    captions = [(0, {"the", "fox", "red"}), (1, {"the", "car", "red"}), (2, {"the", "sea", "blue"})] * 20
    words = typical_words(iter(captions), 3)
    assert words[0][0] == "fox" and words[1][0] == "car" and set(words[2]) == {"sea", "blue"}
    assert not any("the" in some for some in words)
    assert typical_words(iter([]), 2) == [[], []]


def test_words_are_lower_case_letters_of_any_script():
    assert words_of(["A Fox's den, 3 km off", "ein Füchslein", "half-open 狐"]) == {
        "a", "fox's", "den", "km", "off", "ein", "füchslein", "half-open", "狐",
    }  # fmt: skip


def test_the_adjusted_rand_index_is_one_for_equal_and_nought_for_chance():
    """The worked example of scikit-learn's documentation, and its limits."""
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])) == 1
    assert adjusted_rand(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])) == pytest.approx(0.5714, abs=1e-4)
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    rng = np.random.default_rng(0)
    assert abs(adjusted_rand(rng.integers(0, 5, 5000), rng.integers(0, 7, 5000))) < 0.01


def test_the_largest_of_the_counts_that_are_about_as_good_is_taken():
    assert best_count({4: 0.3, 8: 0.9, 12: 0.89, 16: 0.5}) == 12
    assert best_count({}) == 1


def test_more_clusters_than_rows_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="has 1600 rows, which do not make 2000 clusters"):
        cluster(world / "index", tmp_path / "out", ClusterConfig(count=2000))
    with pytest.raises(UserError, match="--count 0 must be at least 1"):
        ClusterConfig(count=0)


def test_the_command_line_shows_clusters_with_their_words(world, tmp_path):
    from click.testing import CliRunner

    import cli

    words = ["cluster", "--index", str(world / "index"), "--out", str(tmp_path / "out"), "--no-sheets"]
    done = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert "agree best on 8 clusters" in done.stderr and "look at" in done.stderr
    assert done.stdout.splitlines()[0].split() == ["cluster", "rows", "cosine", "nearest", "words"]
    assert done.stdout.splitlines()[1].split()[:2] == ["0", "400"]
