import shutil
import sys

import faiss
import numpy as np
import pandas as pd
import pytest
import tiny
from click.testing import CliRunner

import cli
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import build, tune
from retrieval import index as module
from retrieval.index import build_index, choose_and_build, load_index, parse_bytes
from retrieval.kinds import HEAD, NAMES, Kind

DIM = 32


def clustered(n, seed=0):
    """Pictures in 60 clusters, and texts near their pictures but moved off all in one direction: a modality gap."""
    rng = np.random.default_rng(seed)
    image = np.repeat(tiny.unit_rows(60, DIM, seed), -(-n // 60), axis=0)[:n] + 0.1 * rng.standard_normal((n, DIM))
    text = image + 0.1 * rng.standard_normal((n, DIM)) + 0.7 * tiny.unit_rows(1, DIM, seed + 1)
    return [(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (image, text)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "emb"
    tiny.store(folder, *clustered(6000), parts=12)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "emb"
    tiny.store(folder, *clustered(300), parts=3)
    return folder


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setattr(tune, "QUERIES", 150)


def recall_of(index, embeddings, queries):
    """Recall@10 by numpy's own sort, on the given queries."""
    truth = np.argsort(-(queries @ embeddings.T), axis=1)[:, :10]
    found = index.search(queries, 10)[1]
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])


def test_a_small_index_is_exact_and_its_ids_are_the_rows(small, tmp_path):
    manifest = build_index(small, tmp_path / "index")
    store = EmbeddingStore.open(small)
    assert manifest.result["image"]["kind"] == "Flat" and manifest.result["image"]["recall"] == 1.0
    index = load_index(tmp_path / "index")
    scores, rows, vectors = index.search_and_reconstruct(store.image([7, 250]), 1)
    assert rows[:, 0].tolist() == [7, 250]
    np.testing.assert_array_equal(vectors[:, 0], store.image([7, 250]))
    np.testing.assert_allclose(scores, 1, atol=1e-3)
    text = load_index(tmp_path / "index", "text")
    assert text.search(store.text([7, 250]), 1)[1][:, 0].tolist() == [7, 250]


def test_the_folder_is_what_clip_retrieval_serves(small, tmp_path):
    build_index(small, tmp_path / "index")
    for name in ("image", "text"):
        index = faiss.read_index(str(tmp_path / "index" / f"{name}.index"))
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT and index.ntotal == 300
    paths = sorted((tmp_path / "index" / "metadata").glob("*.parquet"))
    frame = pd.concat([pd.read_parquet(path) for path in paths])
    assert frame["image_path"].tolist() == EmbeddingStore.open(small).keys


@pytest.mark.parametrize("asked", [0.8, 0.97])
def test_an_approximate_index_reaches_the_recall_asked_for_on_other_queries(large, tmp_path, asked):
    manifest = build_index(large, tmp_path / "index", recall=asked, kind="ivf")
    entry = manifest.result["image"]
    assert entry["kind"].startswith("IVF") and entry["recall"] >= asked
    index = load_index(tmp_path / "index")
    _, queries = clustered(6000, seed=0)
    noise = 0.05 * np.random.default_rng(5).standard_normal((600, DIM)).astype(np.float32)
    assert recall_of(index, EmbeddingStore.open(large).image(), queries[::10] + noise) > asked - 0.03
    assert faiss.extract_index_ivf(index).nprobe == entry["value"]  # the file itself carries the knob
    assert index.search_and_reconstruct(queries[:2], 3)[2].shape == (2, 3, DIM)


def test_more_recall_takes_a_higher_setting_and_the_table_shows_the_way(large, tmp_path):
    low = build_index(large, tmp_path / "low", recall=0.5, kind="ivf").result["image"]
    high = build_index(large, tmp_path / "high", recall=0.97, kind="ivf").result["image"]
    assert low["value"] < high["value"]
    tried = [entry["recall"] for entry in high["tried"]]
    assert tried == sorted(tried) and tried[0] < 0.97 <= tried[-1]
    assert all(entry["queries_per_second"] > 0 for entry in high["tried"])


def test_hnsw_keeps_its_knob_in_the_file(large, tmp_path):
    entry = build_index(large, tmp_path / "index", recall=0.97, kind="hnsw").result["image"]
    assert entry["kind"] == "HNSW32,SQ8" and entry["recall"] >= 0.97
    assert load_index(tmp_path / "index").hnsw.efSearch == entry["value"]


def test_a_kind_that_cannot_reach_the_recall_is_replaced_by_an_exact_one(large, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLACK", 1.0)  # try codes even where they cannot reach it
    lossy = [[Kind("SQ8", lists=150)], [Kind("Flat")]]
    monkeypatch.setattr(module, "tiers", lambda *_, **__: lossy)
    entry = build_index(large, tmp_path / "index", recall=0.9999, kind="ivf").result["image"]
    assert entry["kind"] == "Flat"
    others = [row for row in entry["tried"] if row["kind"] != "Flat"]
    assert max(row["recall"] for row in others) < 0.9999
    assert max(row["value"] for row in others) < 100  # of 150 lists: turning it further was seen to be useless


def test_codes_that_cannot_reach_the_recall_are_not_even_built(large, tmp_path):
    entry = build_index(large, tmp_path / "index", recall=0.9999, kind="ivf").result["image"]
    assert entry["ceilings"]["SQ8"] < 0.9999 and not any(row["kind"].endswith("SQ8") for row in entry["tried"])
    assert entry["recall"] >= 0.9999


def test_the_ceiling_of_codes_is_the_recall_of_searching_all_rows_by_them(large):
    store = EmbeddingStore.open(large)
    asked, _ = tune.questions(store, "image")
    for codes in ("SQ8", "SQ4"):
        index = faiss.index_factory(DIM, codes, faiss.METRIC_INNER_PRODUCT)
        index.train(store.image())
        index.add(store.image())
        assert asked.ceiling(codes) == pytest.approx(asked.recall(index), abs=0.02)


def test_of_kinds_that_reach_the_recall_the_fastest_is_taken(large, tmp_path, monkeypatch):
    speeds = iter([100.0, 300.0, 200.0])
    monkeypatch.setattr(module, "tiers", lambda *_, **__: [[Kind("SQ8", 50), Kind("SQfp16", 50), Kind("Flat", 50)]])
    monkeypatch.setattr(tune, "confirm", lambda index, setting, *_: (setting, setting.recall))
    monkeypatch.setattr(tune.Questions, "speed", lambda *_: 1.0)
    plain = module.Built
    monkeypatch.setattr(module, "Built", lambda *values: plain(*values[:2], next(speeds), values[3]))
    result = choose_and_build(EmbeddingStore.open(large), "image", tmp_path / "i.index", recall=0.9)
    assert result["kind"] == "IVF50,SQfp16" and result["queries_per_second"] == 300.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.index"]  # nothing is left of the others


def test_half_the_memory_of_flat_is_enough_to_stay_exact_and_less_makes_it_approximate(large, tmp_path):
    flat = (6000 * DIM * 4 + HEAD) * 2  # both indexes
    assert build_index(large, tmp_path / "a", memory=flat).result["image"]["kind"] == "Flat"
    half = build_index(large, tmp_path / "b", memory=flat - 1).result["image"]
    assert half["kind"] == "SQfp16" and half["recall"] > 0.999
    quarter = build_index(large, tmp_path / "c", memory=int(0.48 * flat), recall=0.9)
    assert "SQ8" in quarter.result["image"]["kind"]
    assert (tmp_path / "c" / "image.index").stat().st_size < 0.24 * flat


def test_too_little_memory_for_the_recall_is_refused_with_what_would_do(large, tmp_path):
    with pytest.raises(UserError, match="no index of this kind fits.* an exact index needs 768200 bytes"):
        build_index(large, tmp_path / "index", memory="10K")
    with pytest.raises(UserError, match=r"only a recall of 0\.9\d* can be had, but 0.9999 is asked for"):
        build_index(large, tmp_path / "index2", memory=int(0.48 * 6000 * DIM * 8), recall=0.9999)


def test_the_memory_said_is_that_of_the_file(large, tmp_path):
    for kind in ("flat", "ivf", "hnsw"):
        entry = build_index(large, tmp_path / kind, kind=kind).result["image"]
        size = (tmp_path / kind / "image.index").stat().st_size / 6000
        assert entry["bytes_per_vector"] == pytest.approx(size, rel=0.1)


def test_the_measured_recall_is_that_of_a_damaged_index(small, monkeypatch):
    """The measurement itself: an index that lost half its rows finds about half of the true answers."""
    store = EmbeddingStore.open(small)
    _, test = tune.questions(store, "image")
    index = faiss.IndexFlatIP(DIM)
    rows = store.image()
    rows[::2] = 0
    index.add(rows)
    assert test.recall(index) == pytest.approx(0.5, abs=0.1)


def test_queries_are_of_the_other_modality_and_the_two_halves_do_not_overlap(small):
    store = EmbeddingStore.open(small)
    halves = tune.questions(store, "image")
    everything = {row.tobytes() for row in store.text()}
    first, second = ({row.tobytes() for row in half.queries} for half in halves)
    assert first | second == everything and not first & second


def test_nan_and_zero_rows_are_refused_by_part_and_row(small, tmp_path):
    for value, length in ((np.nan, "nan"), (0, "0")):
        shutil.copytree(small, tmp_path / "emb", dirs_exist_ok=True)
        path = tmp_path / "emb" / "text_emb" / "text_emb_1.npy"
        rows = np.load(path)
        rows[42] = value
        np.save(path, rows)
        with pytest.raises(UserError, match=f"part 1, row 42 has length {length}, not 1"):
            build_index(tmp_path / "emb", tmp_path / "index")


def test_a_broken_row_that_opening_does_not_look_at_is_still_found(small, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.store.SAMPLED_ROWS", 3)
    shutil.copytree(small, tmp_path / "emb")
    path = tmp_path / "emb" / "img_emb" / "img_emb_2.npy"
    rows = np.load(path)
    rows[33] = np.nan
    np.save(path, rows)
    EmbeddingStore.open(tmp_path / "emb")
    with pytest.raises(UserError, match="the image embedding of part 2, row 33 has length nan"):
        build_index(tmp_path / "emb", tmp_path / "index")


def test_a_broken_caption_is_found_before_the_picture_index_is_built(small, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_train.store.SAMPLED_ROWS", 3)
    shutil.copytree(small, tmp_path / "emb")
    path = tmp_path / "emb" / "text_emb" / "text_emb_2.npy"
    rows = np.load(path)
    rows[33] = np.nan
    np.save(path, rows)
    monkeypatch.setattr(module, "choose_and_build", None)
    with pytest.raises(UserError, match="the text embedding of part 2, row 33 has length nan"):
        build_index(tmp_path / "emb", tmp_path / "index")


def test_ray_that_is_missing_is_noticed_before_anything_is_done(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs Ray"):
        build_index(small, tmp_path / "index", engine="ray")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", NAMES)
def test_one_row_or_fewer_than_codes_make_an_index_of_every_kind(kind, tmp_path):
    for n in (1, 15):
        tiny.store(tmp_path / f"emb{n}", tiny.unit_rows(n, DIM))
        made = build_index(tmp_path / f"emb{n}", tmp_path / f"index{n}", kind=kind).result["image"]
        assert made["recall"] >= 0.95


def test_an_index_that_turns_out_larger_than_the_memory_is_not_taken(large, tmp_path, monkeypatch):
    store, lied = EmbeddingStore.open(large), Kind.bytes_per_row
    monkeypatch.setattr(module, "tiers", lambda *_, **__: [[Kind("SQ8", 50)], [Kind("SQfp16")]])
    monkeypatch.setattr(Kind, "bytes_per_row", lambda kind, *_: 1)
    room = lied(Kind("SQ8", 50), 6000, DIM) * 6000 * 0.9
    with pytest.raises(UserError, match="no index of this kind fits"):
        choose_and_build(store, "image", tmp_path / "i.index", memory=int(room))
    assert not list(tmp_path.iterdir())


def test_stages_of_other_vectors_are_never_taken_for_these(small, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    store = EmbeddingStore.open(small)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tune, "tune", stop)
        choose_and_build(store, "image", tmp_path / "i.index")
    assert choose_and_build(store, "text", tmp_path / "i.index")["kind"] == "Flat"
    rows = faiss.read_index(str(tmp_path / "i.index")).reconstruct_n(0, 300)
    np.testing.assert_array_equal(rows, store.text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.index"]


def test_a_recall_that_cannot_be_had_is_said_without_a_memory_nobody_gave(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "tiers", lambda *_, **__: [[Kind("SQ4")]])
    monkeypatch.setattr(module, "SLACK", 1.0)
    with pytest.raises(UserError, match=r"^only a recall of 0\.\d+ can be had, but 1.0 is asked for: lower --recall$"):
        choose_and_build(EmbeddingStore.open(small), "image", tmp_path / "i.index", recall=1.0)


def test_the_manifest_leads_to_embeddings_clip_and_shards(small, tmp_path):
    manifest = build_index(small, tmp_path / "index")
    assert set(manifest.inputs) == {"embeddings", "clip", "shards"}
    assert manifest.input_path("embeddings") == small
    assert manifest.inputs["clip"]["fingerprint"] == "sha256:clip"
    assert (manifest.folder / manifest.inputs["clip"]["path"]).resolve() == small.parent / "clip"


def test_running_it_again_does_nothing_and_other_settings_are_refused(small, tmp_path):
    first = build_index(small, tmp_path / "index")
    assert build_index(small, tmp_path / "index").created == first.created
    with pytest.raises(UserError, match="was made with recall = 0.95, but 0.9 is asked for now"):
        build_index(small, tmp_path / "index", recall=0.9)


def test_a_stopped_build_leaves_no_index_and_goes_on_from_its_stages(large, tmp_path, monkeypatch):
    whole = build_index(large, tmp_path / "whole", kind="pq")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tune, "tune", stop)
        build_index(large, tmp_path / "index", kind="pq")
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(build, "k_means", stop)  # the centres are there
    monkeypatch.setattr(build, "nearest", stop)  # and so is each row's centre
    again = tmp_path / "index.partial" / "scratch" / "image"
    assert list(again.glob("centres*.npy")) and list(again.glob("owners*.npy"))
    with pytest.raises(KeyboardInterrupt):  # those of the captions are not
        build_index(large, tmp_path / "index", kind="pq")
    monkeypatch.undo()
    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setattr(tune, "QUERIES", 150)
    made = build_index(large, tmp_path / "index", kind="pq")
    for modality in ("image", "text"):
        assert made.result[modality]["kind"] == whole.result[modality]["kind"] == "IVF150,PQ8x4fsr,Refine(SQ8)"
        assert made.result[modality]["recall"] >= 0.95
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "image.index", "manifest.json", "metadata", "text.index"
    ]  # fmt: skip


def test_bad_settings_are_one_line(small, tmp_path):
    for wrong, message in (
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"engine": "spark"}, "engine 'spark' must be one of: local, ray"),
        ({"kind": "magic"}, "kind 'magic' must be one of: auto, flat"),
        ({"recall": 1.5}, "recall 1.5 must be above 0"),
        ({"memory": "a lot"}, "memory 'a lot' is not a number of bytes"),
    ):
        with pytest.raises(UserError, match=message):
            build_index(small, tmp_path / "index", **wrong)


def test_a_damaged_index_file_is_one_line(small, tmp_path):
    build_index(small, tmp_path / "index")
    path = tmp_path / "index" / "image.index"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="image.index is not what was written .* make it again: unclip index"):
        load_index(tmp_path / "index")
    (tmp_path / "index" / "manifest.json").unlink()  # faiss itself notices that one, and not much else
    with pytest.raises(UserError, match="image.index is damaged"):
        load_index(tmp_path / "index")


def test_an_index_of_distances_is_said_to_be_one(tmp_path):
    faiss.write_index(faiss.IndexFlatL2(8), str(tmp_path / "image.index"))
    with pytest.raises(UserError, match="image.index ranks by L2 distance"):
        load_index(tmp_path)


def test_bytes_are_read_as_people_write_them():
    assert [parse_bytes(text) for text in (1000, "1000", "4G", "1.5 MB", "2kb")] == [
        1000,
        1000,
        4 * 10**9,
        1500000,
        2000,
    ]


def test_the_command_prints_what_was_tried_and_needs_embeddings(small, tmp_path):
    run = CliRunner().invoke(cli.cli, ["index", "--embeddings", str(small), "--out", str(tmp_path / "i"), "--report"])
    assert run.exit_code == 0, run.output
    head, *lines = run.stdout.splitlines()
    assert head.split() == ["index", "kind", "knob", "value", "k_factor", "recall", "queries_per_second"]
    assert [line.split()[:2] for line in lines] == [["image", "Flat"], ["text", "Flat"]]
    assert "image.index: Flat, recall@10 1.000" in run.stderr
    assert "Missing option '--embeddings'" in CliRunner().invoke(cli.cli, ["index"]).output
