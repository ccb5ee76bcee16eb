import csv
import io
import json
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny
from PIL import Image

from clip_train import calibration
from clip_train.embed import embed
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.shards import write_shards
from clip_train.store import EmbeddingStore
from retrieval import changes
from retrieval.index import build_index
from retrieval.live import LiveIndex
from retrieval.query import QueryError, Term, parse_algebra
from retrieval.search import Searcher, apart


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
    with pytest.raises(UserError, match=r"\(1, 16\), but the index holds rows of width 32"):
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


def test_an_approximate_index_returns_all_rows_that_are_asked_for_and_no_empty_places(world, tmp_path):
    rows = tiny.unit_rows(400, 32)
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index", kind="ivf", recall=0.1)
    hits = Searcher.open(tmp_path / "index").vectors(rows[0], k=400)[0]
    assert sorted(hit.row for hit in hits) == list(range(400)) and [hit.rank for hit in hits] == list(range(1, 401))


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
    with pytest.raises(UserError, match="metadata/ has 6 rows, but the index has 10; make it again"):
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


def test_a_clip_that_was_taken_by_name_is_looked_for_by_name(world, tmp_path, monkeypatch):
    shutil.copytree(world / "index", tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    manifest["inputs"]["clip"]["path"] = "../emb/ViT-B-32:openai"
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    load, asked = Clip.load, []
    monkeypatch.setattr(Clip, "load", lambda spec, device: asked.append(spec) or load(world / "clip"))
    assert Searcher.open(tmp_path / "index").clip.embed_dim == 32 and asked == ["ViT-B-32:openai"]


def test_the_filters_that_were_asked_for_last_are_kept(world, monkeypatch):
    monkeypatch.setattr("retrieval.search.MASK_BYTES", 20)  # of two masks of ten rows
    searcher = Searcher.open(world / "index")
    for text in ("width == 20", "width == 21", "width == 20", "width == 22"):
        searcher.vectors(np.ones(32), 3, where=text)
    assert [where.text for where in searcher.view._masks] == ["width == 20", "width == 22"]


# Sums


def test_a_sum_of_texts_pictures_keys_and_vectors_is_the_sum_of_their_rows(searcher, world):
    clip, store = Clip.load(world / "clip"), EmbeddingStore.open(world / "emb")
    words = clip.encode_text(["something", "else"]).numpy()
    terms = [Term("text", "something"), Term("text", "else", -0.5), Term("key", "s003", 0.7)]
    terms += [Term("image", tiny.picture(5), 2.0), Term("vector", store.image([8])[0] * 9)]
    total = words[0] - 0.5 * words[1] + 0.7 * store.image([3])[0] + 2 * store.image([5])[0] + store.image([8])[0]
    expected = total / np.linalg.norm(total)
    np.testing.assert_allclose(searcher.encode(terms), expected, atol=2e-3)
    hits = searcher.query(terms, k=10)
    scores = store.image() @ expected
    np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-scores), atol=5e-3)
    assert hits[0].row == int(scores.argmax())


def test_several_sums_are_answered_as_one_after_the_other(searcher):
    sums = [parse_algebra("something - else"), [Term("key", "s003")], [Term("image", tiny.picture(4))]]
    together = searcher.queries(sums, 3)
    alone = [searcher.query(terms, 3) for terms in sums]
    assert [[hit.row for hit in hits] for hits in together] == [[hit.row for hit in hits] for hits in alone]
    assert together[1][0].key == "s003" and together[2][0].key == "s004"


def test_a_vector_in_a_file_is_a_term(searcher, world, tmp_path):
    store = EmbeddingStore.open(world / "emb")
    np.save(tmp_path / "row.npy", store.image([6])[0])
    assert searcher.query([Term("vector", str(tmp_path / "row.npy"))], 1)[0].row == 6
    np.save(tmp_path / "two.npy", store.image([6, 7]))
    with pytest.raises(UserError, match="a term is one vector, but .*two.npy holds 2"):
        searcher.query([Term("vector", str(tmp_path / "two.npy"))])


def test_a_key_that_is_not_there_is_one_line(searcher):
    with pytest.raises(UserError, match="the index has no sample with the key 'nobody'"):
        searcher.query([Term("key", "nobody")])
    assert searcher.row_of("s004") == 4 and searcher.row_of("nobody") is None


# Filters and distinct hits


def test_a_filter_keeps_k_hits_in_the_order_of_their_cosines(searcher, world):
    store = EmbeddingStore.open(world / "emb")
    passing = [1, 2, 4, 7]
    where = "source.page in [1, 2, 4, 7] and width == 20"
    query = store.image([0])[0]
    expected = sorted(passing, key=lambda row: -float(store.image([row])[0] @ query))
    for k in (2, 4, 10):
        (hits,) = searcher.vectors(query, k, where=where)
        assert [hit.row for hit in hits] == expected[:k] and [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert searcher.vectors(query, 3, where="label == 'nothing'") == [[]]
    assert searcher.text(["x"], 3, where="label == 'label 2'")[0][0].meta["label"] == "label 2"
    assert len(searcher.picture([tiny.picture(1)], 3, where="not (source.page < 8)")[0]) == 2


def test_a_filter_keeps_k_hits_of_an_approximate_index(tmp_path):
    rows = tiny.unit_rows(3000, 16)
    tiny.store(tmp_path / "emb", rows)
    build_index(tmp_path / "emb", tmp_path / "index", kind="ivf", recall=0.5)
    searcher = Searcher.open(tmp_path / "index")
    (hits,) = searcher.vectors(rows[5], 20, where="image_path.endswith('7')")
    assert len(hits) == 20 and all(hit.key.endswith("7") for hit in hits)


def test_a_filter_on_a_column_that_is_not_there_names_those_that_are(searcher):
    with pytest.raises(UserError, match=r"no column 'lable' \(label\?\); the columns are: .*source.page \(number\)"):
        searcher.text(["x"], where="lable == 'x'")
    assert searcher.columns["label"] == "text" and searcher.columns["width"] == "number"


def test_distinct_hits_leave_near_copies_out_and_still_are_k(tmp_path):
    """Twenty rows, nine near copies behind each; by hand, the answer is the twenty in their order."""
    dim = 32
    centres = np.linalg.qr(tiny.unit_rows(dim, dim))[0][:20].astype(np.float32)  # at right angles
    copies = np.repeat(centres, 10, axis=0) + 0.01 * tiny.unit_rows(200, dim, seed=1)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    tiny.store(tmp_path / "emb", copies)
    build_index(tmp_path / "emb", tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index")
    query = (np.arange(20, 0, -1) @ centres).astype(np.float32)
    assert [hit.row // 10 for hit in searcher.vectors(query, 20)[0]] == [0] * 10 + [1] * 10
    (hits,) = searcher.vectors(query, 20, distinct=0.9)
    assert [hit.row // 10 for hit in hits] == list(range(20)) and [hit.rank for hit in hits] == list(range(1, 21))
    assert hits[0].row == searcher.vectors(query, 1)[0][0].row  # the best of its copies is the one that stays
    (some,) = searcher.vectors(query, 3, distinct=0.9, where="image_path >= 'k00150'")
    assert [hit.row // 10 for hit in some] == [15, 16, 17]
    assert len(searcher.vectors(query, 40, distinct=0.9)[0]) == 20  # there are no more
    assert len(searcher.vectors(query, 40, distinct=1.0)[0]) >= 39


@pytest.mark.parametrize("distinct", [0.0, 1.5, -1.0, float("nan")])
def test_a_cosine_that_would_leave_nothing_out_or_all_is_refused(searcher, distinct):
    with pytest.raises(UserError, match="is a cosine above 0 and at most 1"):
        searcher.text(["x"], distinct=distinct)


# A server's needs


def test_pictures_come_as_the_files_that_lie_in_the_tars(searcher):
    assert searcher.picture_bytes(7) == (tiny.picture(7), "image/png") and searcher.tar_of(7) == "000001.tar"


def test_many_threads_get_the_answers_that_one_gets(world):
    queries = [f"query {n}" for n in range(24)]
    alone = Searcher.open(world / "index")
    truth = [alone.query([Term("text", q), Term("key", "s003", 0.5)], 4, where="width == 20") for q in queries]
    shared = Searcher.open(world / "index")  # nothing is loaded yet
    start = threading.Barrier(8)

    def ask(n):
        if n < 8:
            start.wait()
        found = shared.query([Term("text", queries[n]), Term("key", "s003", 0.5)], 4, where="width == 20")
        return found, shared.picture_bytes(found[0].row), shared.row_of("s001")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    for (found, (file, _), row), expected in zip(answers, truth, strict=True):
        assert [hit.row for hit in found] == [hit.row for hit in expected] and row == 1
        assert file == tiny.picture(expected[0].row)


def test_rows_that_are_added_and_deleted_are_seen_after_a_refresh_with_pictures_of_their_own_tars(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    root = tmp_path / "w"
    searcher = Searcher.open(root / "index")
    old = searcher.index
    # four of the keys come again with other pictures, in tars of their own
    other = [replace(sample, image=tiny.picture(100 + n)) for n, sample in enumerate(tiny.samples(4))]
    write_shards([*other, *tiny.samples(3, "new")], root / "more", samples_per_shard=100)
    embed(root / "more", root / "clip", root / "emb2")
    changes.add(root / "index", root / "emb2", replace=True)
    changes.delete(root / "index", ["s007"])
    assert searcher.index is old and searcher.row_of("new001") is None
    assert searcher.refresh() and not searcher.refresh()
    assert len(searcher) == 12 and searcher.row_of("s007") is None
    expected = {"s001": 101, "s003": 103, "s005": 5, "new002": 2}
    for key, seed in expected.items():
        assert searcher.picture_bytes(searcher.row_of(key)) == (tiny.picture(seed), "image/png")
        hits = searcher.picture([tiny.picture(seed)], 2)[0]
        assert key in [hit.key for hit in hits] and hits[0].score == pytest.approx(1, abs=2e-3)
    assert all(hit.key != "s007" for hit in searcher.text(["x"], 50)[0])
    assert len(searcher.text(["x"], 50, where="image_path.startswith('s')")[0]) == 9
    changes.add(root / "index", root / "emb", replace=True)  # the first pictures come back
    searcher.refresh()
    assert searcher.picture_bytes(searcher.row_of("s001")) == (tiny.picture(1), "image/png")
    changes.compact(root / "index")
    assert searcher.refresh() and len(searcher) == 13
    for key, seed in {"s001": 1, "s007": 7, "new002": 2}.items():
        assert searcher.picture_bytes(searcher.row_of(key)) == (tiny.picture(seed), "image/png")


def test_a_searcher_looks_again_only_when_the_folder_has_changed(searcher):
    index = searcher.index
    assert searcher.refresh() is False and searcher.index is index


def test_a_folder_that_is_of_another_clip_by_now_is_not_taken_for_the_old_one(world, tmp_path):
    tiny.clip(tmp_path / "other", seed=1)
    tiny.clip(tmp_path / "wide", dim=48)
    shutil.copytree(world / "index", tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", clip=world / "clip")
    before = searcher.picture([tiny.picture(7)], 3)
    for name in ("other", "wide"):
        embed(world / "shards", tmp_path / name, tmp_path / f"{name}-emb")
        shutil.rmtree(tmp_path / "index")
        build_index(tmp_path / f"{name}-emb", tmp_path / "index")
        for _ in range(2):  # it stays so
            with pytest.raises(UserError, match="index/ is now of another CLIP"):
                searcher.refresh()
        assert searcher.picture([tiny.picture(7)], 3) == before


def test_questions_are_answered_while_the_folder_is_opened_again(world, tmp_path, monkeypatch):
    shutil.copytree(world / "index", tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", clip=world / "clip")
    opening, go_on = threading.Event(), threading.Event()
    reopened = LiveIndex.reopened
    changes.delete(tmp_path / "index", ["s003"])
    monkeypatch.setattr(LiveIndex, "reopened", lambda index: opening.set() or go_on.wait(10) and reopened(index))
    with ThreadPoolExecutor(2) as pool:
        refreshed = pool.submit(searcher.refresh)
        try:
            assert opening.wait(10)
            assert len(pool.submit(searcher.text, ["x"], 20).result(timeout=5)[0]) == 10
        finally:
            go_on.set()
        assert refreshed.result() and len(searcher) == 9


def test_who_holds_a_view_sees_one_state_whatever_becomes_of_the_folder(world, tmp_path):
    for name in ("shards", "emb", "index"):
        shutil.copytree(world / name, tmp_path / name)
    searcher = Searcher.open(tmp_path / "index")
    view = searcher.view
    changes.delete(tmp_path / "index", ["s000"])
    changes.compact(tmp_path / "index")
    assert searcher.refresh()
    for held, first in ((view, 0), (searcher.view, 1)):
        (hit,) = held.hits([1.0], [0])
        assert hit.key == f"s00{first}" and held.picture_bytes(0) == (tiny.picture(first), "image/png")


@pytest.mark.parametrize(("cosine", "most"), [(0.3, 2000), (0.9, 2000), (0.9, 7), (1.0, 2000)])
def test_distinct_rows_are_those_that_one_finds_going_from_row_to_row(cosine, most):
    rows = tiny.unit_rows(700, 4)
    kept = []
    for n in range(len(rows)):
        if len(kept) < most and not (rows[kept] @ rows[n] > cosine).any():
            kept.append(n)
    assert apart(rows, cosine, most) == kept


def test_distinct_rows_of_many_are_found_in_little_memory():
    rows = tiny.unit_rows(4000, 8)
    apart(rows, 0.94, len(rows))
    tracemalloc.start()
    try:
        apart(rows, 0.94, len(rows))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000  # all cosines at once are 64 MB
    finally:
        tracemalloc.stop()


def test_what_the_asker_did_wrong_is_told_apart_from_what_is_wrong_here_and_names_no_folder(world, searcher, tmp_path):
    wrong = [
        lambda: searcher.query([Term("key", "nobody")]),
        lambda: searcher.vectors(np.ones((1, 16))),
        lambda: searcher.vectors(np.zeros((1, 32))),
        lambda: searcher.picture([b"not a picture"]),
        lambda: searcher.text(["x"], modality="sound"),
        lambda: searcher.text(["x"], distinct=2.0),
        lambda: searcher.text(["x"], where="colour == 'red'"),
    ]
    for ask in wrong:
        with pytest.raises(QueryError) as caught:
            ask()
        assert str(world) not in str(caught.value)
    shutil.copytree(world / "index", tmp_path / "index")
    with pytest.raises(UserError) as caught:
        Searcher.open(tmp_path / "index").text(["x"])  # its CLIP is not here
    assert not isinstance(caught.value, QueryError)


# The command line


def run(*arguments):
    from click.testing import CliRunner

    import cli

    return CliRunner().invoke(cli.cli, ["search", *map(str, arguments)])


def test_the_command_line_searches_with_sums_filters_and_files(world, tmp_path):
    index = ["--index", world / "index", "-k", "3", "--device", "cpu"]
    (tmp_path / "queries.txt").write_text("something - else\nkey:s003\n")
    found = json.loads(run("--file", tmp_path / "queries.txt", "--json", *index).stdout)
    assert [one["query"] for one in found] == ['"something" - "else"', "key:s003"]
    assert found[0]["terms"][1] == {"kind": "text", "value": "else", "weight": -1.0}
    assert found[1]["hits"][0]["key"] == "s003" and "terms" not in found[1]

    shown = run("t-shirt - red", *index)
    assert 'is read as "t-shirt" - "red"; --literal takes it as it stands' in shown.stderr
    assert "is read as" not in run("t-shirt - red", "--literal", *index).stderr

    where = ["--where", "width == 20", "--where", "source.page > 3 or label == 'x'", "--distinct", "0.999"]
    (one,) = json.loads(run("--key", "s005", "--plus", "red", "--minus", "0.5*blue", "--json", *where, *index).stdout)
    assert one["query"] == 'key:s005 + "red" - 0.5*"blue"' and {hit["row"] > 3 for hit in one["hits"]} == {True}
    assert "no row of" in run("x", "--where", "width > 20", *index).stderr


def test_the_command_line_writes_csv_json_and_sheets(world, tmp_path, monkeypatch):
    index = ["--index", world / "index", "-k", "2", "--device", "cpu"]
    lines = list(csv.DictReader(io.StringIO(run("a, b", "--csv", *index).stdout)))
    assert [line["rank"] for line in lines] == ["1", "2"] and lines[0]["query"] == "a, b"
    assert json.loads(lines[0]["captions"])[1] == "one of many" and lines[0]["source.page"].isdigit()
    run("x", "--out", tmp_path / "hits.csv", *index)
    run("x", "--out", tmp_path / "hits.json", *index)
    assert len((tmp_path / "hits.csv").read_text().splitlines()) == 3
    assert len(json.loads((tmp_path / "hits.json").read_text())[0]["hits"]) == 2

    opened = []
    monkeypatch.setattr("click.launch", lambda path: opened.append(path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "q.png").write_bytes(tiny.picture(3))
    run("--image", tmp_path / "q.png", "--key", "s004", "x", "--open", *index)
    with Image.open(opened[0]) as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 300
    run("x", "--sheet", tmp_path / "sheet.png", *index)
    assert (tmp_path / "sheet.png").exists() and len(opened) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to search for"),
        (["x", "--json", "--csv"], "--json and --csv contradict"),
        (["x", "--out", "hits.txt"], "must end in .json or .csv"),
        (["x", "--where", "width ="], "write == to compare"),
        (["--key", "nobody"], "no sample with the key 'nobody'"),
    ],
)
def test_the_command_line_refuses_in_one_line(world, arguments, said):
    result = run(*arguments, "--index", world / "index", "--device", "cpu")
    assert isinstance(result.exception, UserError) and said in str(result.exception)
