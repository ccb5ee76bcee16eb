import io
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from clip_train import calibration
from clip_train.embed import embed
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval.index import build_index
from retrieval.search import Searcher


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten pictures in three shards, their CLIP, embeddings and index."""
    root = tmp_path_factory.mktemp("world")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    return root


@pytest.fixture(scope="module")
def searcher(world):
    return Searcher.open(world / "index")


def test_a_picture_finds_itself_first(searcher):
    pictures = [tiny.picture(7), Image.open(io.BytesIO(tiny.picture(2)))]
    for hits, i in zip(searcher.picture(pictures, k=3), (7, 2), strict=True):
        assert hits[0].key == f"s{i:03d}" and hits[0].row == i and hits[0].score == pytest.approx(1, abs=2e-3)
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert hits[0].score >= hits[1].score >= hits[2].score


def test_a_picture_file_is_searched_like_its_bytes(searcher, tmp_path):
    path = tmp_path / "query.png"
    path.write_bytes(tiny.picture(4))
    assert (
        searcher.picture([path], k=2) == searcher.picture([tiny.picture(4)], k=2) == searcher.picture([str(path)], k=2)
    )


def test_a_caption_finds_the_pictures_in_the_order_of_their_cosines(searcher, world):
    clip, store = Clip.load(world / "clip"), EmbeddingStore.open(world / "emb")
    captions = ["picture number 3", "something else"]
    truth = clip.encode_text(captions).numpy() @ store.image().T
    for hits, scores in zip(searcher.text(captions, k=10), truth, strict=True):
        assert [hit.row for hit in hits] == np.argsort(-scores).tolist()
        np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-scores), atol=1e-5)


def test_a_caption_finds_itself_among_the_captions(searcher):
    (hits,) = searcher.text(["picture number 3"], k=1, modality="text")
    assert hits[0].key == "s003" and hits[0].caption == "picture number 3"


def test_hits_carry_the_metadata_of_their_row(searcher):
    (hit,) = searcher.picture([tiny.picture(5)], k=1)[0]
    assert hit.meta["label"] == "label 2" and hit.meta["source.page"] == 5
    assert hit.meta["captions"] == ["picture number 5", "one of many"]


def test_vectors_are_searched_by_direction_whatever_their_length(searcher, world):
    store = EmbeddingStore.open(world / "emb")
    hits = searcher.vectors(store.image([1, 6]) * 37, k=1)
    assert [hit[0].row for hit in hits] == [1, 6] and hits[0][0].score == pytest.approx(1, abs=2e-3)
    assert searcher.vectors(store.image([1])[0], k=2) == searcher.vectors(store.image([1]), k=2)


def test_k_above_the_size_returns_all_and_no_queries_return_nothing(searcher):
    assert len(searcher) == 10
    assert len(searcher.text(["x"], k=1000)[0]) == 10
    assert searcher.vectors(np.empty((0, 32))) == []
    assert searcher.text(["x"], k=0) == [[]]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_vector_that_points_nowhere_is_refused(searcher, value):
    with pytest.raises(UserError, match="query 1 has length"):
        searcher.vectors(np.stack([np.ones(32), np.full(32, value)]))


def test_vectors_of_another_width_are_refused(searcher):
    with pytest.raises(UserError, match=r"\(1, 16\), but .*index/ holds rows of width 32"):
        searcher.vectors(np.ones((1, 16)))


def test_searching_vectors_needs_no_clip(world, tmp_path):
    shutil.copytree(world / "index", tmp_path / "index")
    alone = Searcher.open(tmp_path / "index")
    assert len(alone.vectors(np.ones(32), k=3)[0]) == 3
    with pytest.raises(UserError, match="is no longer at .*; say where: --clip FOLDER"):
        alone.text(["x"])
    assert alone.picture_of(0) is None
    elsewhere = Searcher.open(tmp_path / "index", clip=world / "clip")
    assert len(elsewhere.text(["x"], k=3)[0]) == 3


def test_another_clip_is_refused_even_if_its_rows_are_as_wide(world, tmp_path):
    tiny.clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="index/ was built with the CLIP sha256:.*, but .*other/ is sha256:"):
        Searcher.open(world / "index", clip=tmp_path / "other")


def test_a_clip_of_another_width_is_refused_by_its_width(world, tmp_path):
    tiny.clip(tmp_path / "narrow", dim=16)
    with pytest.raises(UserError, match="built from 32-wide embeddings, but .*narrow/ makes 16-wide ones"):
        Searcher.open(world / "index", clip=tmp_path / "narrow")


def test_a_clip_that_was_trained_on_since_is_noticed(world, tmp_path):
    for name in ("clip", "index"):
        shutil.copytree(world / name, tmp_path / name)
    Searcher.open(tmp_path / "index").text(["x"])
    shutil.rmtree(tmp_path / "clip")
    tiny.clip(tmp_path / "clip", seed=2)
    with pytest.raises(UserError, match="make both again: unclip embed, unclip index"):
        Searcher.open(tmp_path / "index").text(["x"])


def test_pictures_come_back_from_the_shards(searcher):
    for row in (0, 6, 9):
        shown = np.asarray(searcher.picture_of(row))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(io.BytesIO(tiny.picture(row))).convert("RGB")))


def test_missing_shards_give_no_picture_but_still_hits(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "shards" / "000001.tar").unlink()
    searcher = Searcher.open(tmp_path / "world" / "index")
    (hit,) = searcher.picture([tiny.picture(5)], k=1)[0]
    assert hit.key == "s005" and searcher.picture_of(hit.row) is None


def test_the_whole_world_may_be_moved(world, tmp_path):
    shutil.copytree(world, tmp_path / "moved")
    searcher = Searcher.open(tmp_path / "moved" / "index")
    assert len(searcher.text(["x"], k=2)[0]) == 2 and searcher.picture_of(3) is not None
    assert searcher.manifest.input_path("clip") == tmp_path / "moved" / "clip"


def test_an_approximate_index_never_returns_empty_places(world, tmp_path):
    rows = tiny.unit_rows(400, 32)
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index", kind="ivf", recall=0.1)
    hits = Searcher.open(tmp_path / "index").vectors(rows[0], k=400)[0]
    assert 0 < len(hits) < 400 and [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


def test_a_file_that_is_no_picture_is_one_line(searcher, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="notes.txt cannot be read: not a"):
        searcher.picture([tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="gone.png cannot be read: No such file"):
        searcher.picture([tmp_path / "gone.png"])
    with pytest.raises(UserError, match="the picture cannot be read"):
        searcher.picture([b"not a picture"])


def test_an_unknown_modality_is_one_line(searcher):
    with pytest.raises(UserError, match="modality 'sound' must be one of: image, text"):
        searcher.text(["x"], modality="sound")


def test_an_index_that_does_not_match_its_metadata_is_refused(world, tmp_path):
    shutil.copytree(world / "index", tmp_path / "index")
    next((tmp_path / "index" / "metadata").iterdir()).unlink()
    with pytest.raises(UserError, match="image.index holds 10 rows of width 32, but the folder has 6 rows"):
        Searcher.open(tmp_path / "index")


def test_a_folder_of_another_kind_is_refused(world):
    with pytest.raises(UserError, match="emb/ is of kind embeddings, but index is needed here; make it: unclip index"):
        Searcher.open(world / "emb")


def test_hits_are_json(searcher):
    from dataclasses import asdict

    assert json.loads(json.dumps([asdict(hit) for hit in searcher.text(["x"], k=2)[0]]))[1]["rank"] == 2


def test_hits_between_pictures_and_captions_carry_the_probability_of_a_calibrated_clip(world, tmp_path):
    plain = Searcher.open(world / "index")
    assert all(hit.probability is None for hit in plain.text(["picture number 3"])[0])
    shutil.copytree(world / "clip", tmp_path / "clip")
    fingerprint = Clip.load(tmp_path / "clip").fingerprint
    curve = calibration.Calibration(slope=8.0, offset=-2.0, match_rate=0.5, clip=fingerprint)
    calibration.save(tmp_path / "clip", curve)
    searcher = Searcher.open(world / "index", tmp_path / "clip")
    for hits in (searcher.text(["picture number 3"])[0], searcher.picture([tiny.picture(3)], modality="text")[0]):
        expected = [1 / (1 + np.exp(2 - 8 * hit.score)) for hit in hits]
        assert [hit.probability for hit in hits] == pytest.approx(expected)
    # two pictures, two captions, or a vector of unknown kind: the curve is not about them
    for hits in (
        searcher.text(["a"], modality="text"),
        searcher.picture([tiny.picture(3)]),
        searcher.vectors(np.ones(32)),
    ):
        assert all(hit.probability is None for hit in hits[0])


def test_a_curve_of_other_weights_is_not_used(world, tmp_path):
    shutil.copytree(world / "clip", tmp_path / "clip")
    curve = calibration.Calibration(slope=8.0, offset=-2.0, match_rate=0.5, clip="sha256:other")
    calibration.save(tmp_path / "clip", curve)
    assert Searcher.open(world / "index", tmp_path / "clip").text(["a"])[0][0].probability is None


def test_the_command_line_shows_a_column_of_probabilities_only_where_there_are_some(world, tmp_path):
    from click.testing import CliRunner

    import cli

    shutil.copytree(world / "clip", tmp_path / "clip")
    curve = calibration.Calibration(
        slope=0.0, offset=0.0, match_rate=0.5, clip=Clip.load(tmp_path / "clip").fingerprint
    )
    calibration.save(tmp_path / "clip", curve)
    options = ["--index", str(world / "index"), "--clip", str(tmp_path / "clip"), "-k", "2"]
    shown = CliRunner().invoke(cli.cli, ["search", "a fox", *options]).stdout.splitlines()
    assert shown[0].split() == ["rank", "score", "match", "key", "caption"] and shown[1].split()[2] == "0.50"
    found = json.loads(CliRunner().invoke(cli.cli, ["search", "a fox", "--json", *options]).stdout)
    assert found[0]["hits"][0]["probability"] == 0.5
    shown = CliRunner().invoke(cli.cli, ["search", "a fox", "--modality", "text", *options]).stdout
    assert shown.split()[:4] == ["rank", "score", "key", "caption"]
