import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import tiny

from clip_train.folder import read_manifest
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import changes, swap, tune
from retrieval.index import build_index
from retrieval.live import LiveIndex

DIM = 32
KILLS = int(os.environ.get("UNCLIP_KILLS", "3"))  # of each change, at random moments; 20 for a thorough run
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "retrieval.changes"])


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """emb/ with keys k00000 .. k00299 and its index/, more/ with k00300 .. k00349, over/ with k00290 .. k00309."""
    root = tmp_path_factory.mktemp("world")
    tiny.store(root / "emb", tiny.unit_rows(300, DIM, 0), tiny.unit_rows(300, DIM, 1), parts=3)
    tiny.store(root / "more", tiny.unit_rows(50, DIM, 2), tiny.unit_rows(50, DIM, 3), parts=2, first=300)
    tiny.store(root / "over", tiny.unit_rows(20, DIM, 4), tiny.unit_rows(20, DIM, 5), first=290)
    build_index(root / "emb", root / "index")
    return root


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def keys(*rows):
    return [f"k{row:05d}" for row in rows]


def found(index, k=10, modality="image"):
    """The answers as keys and scores: the same for the same set, however its rows are numbered."""
    live = LiveIndex.open(index)
    scores, rows = live.search(tiny.unit_rows(30, DIM, 9), k, modality)
    return [live.table.keys_of(line) for line in rows], scores


def assert_same(a, b):
    assert a[0] == b[0]
    np.testing.assert_allclose(a[1], b[1], atol=1e-5)


def test_what_is_added_is_found_as_if_it_had_been_there_from_the_beginning(copy):
    change = changes.add(copy / "index", copy / "more")
    assert (change.added, change.deleted, change.live, change.gone, change.segments) == (50, 0, 350, 0, 1)
    emb, more = (EmbeddingStore.open(copy / name) for name in ("emb", "more"))
    tiny.store(copy / "both", np.vstack([emb.image(), more.image()]), np.vstack([emb.text(), more.text()]), parts=5)
    build_index(copy / "both", copy / "other")
    for modality in ("image", "text"):
        assert_same(found(copy / "index", 10, modality), found(copy / "other", 10, modality))


def test_adding_and_then_deleting_is_as_if_nothing_had_been_added(copy):
    before = found(copy / "index"), found(copy / "index", modality="text")
    changes.add(copy / "index", copy / "more")
    assert found(copy / "index")[0] != before[0][0]
    change = changes.delete(copy / "index", keys(*range(300, 350)))
    assert (change.deleted, change.live, change.gone) == (50, 300, 50)
    assert_same(found(copy / "index"), before[0])
    assert_same(found(copy / "index", modality="text"), before[1])


def test_adding_the_same_again_does_nothing_even_when_rows_of_it_were_deleted(copy):
    changes.add(copy / "index", copy / "more")
    state = LiveIndex.state_of(copy / "index")
    assert changes.add(copy / "index", copy / "more").added == 0
    assert changes.add(copy / "index", copy / "emb").added == 0  # the base's own
    assert LiveIndex.state_of(copy / "index") == state
    changes.delete(copy / "index", keys(301))
    assert changes.add(copy / "index", copy / "more").added == 0
    assert LiveIndex.open(copy / "index").rows_of(keys(301)) == [-1]


def test_replacing_by_the_same_brings_its_deleted_rows_back(copy):
    changes.add(copy / "index", copy / "more")
    before = found(copy / "index")
    changes.delete(copy / "index", keys(301, 349, 7))
    change = changes.add(copy / "index", copy / "more", replace=True)
    assert (change.added, change.segments) == (2, 1)
    assert LiveIndex.open(copy / "index").rows_of(keys(301, 349, 7)).tolist() == [301, 349, -1]
    changes.add(copy / "index", copy / "emb", replace=True)
    assert_same(found(copy / "index"), before)


def test_a_key_that_is_there_is_refused_or_moves(copy):
    with pytest.raises(UserError, match="10 keys of .*over/ are in .*index/ already, such as k00290; .* --replace"):
        changes.add(copy / "index", copy / "over")
    assert not (copy / "index" / "state.json").exists()
    change = changes.add(copy / "index", copy / "over", replace=True)
    assert (change.added, change.deleted, change.live) == (20, 10, 310)
    live = LiveIndex.open(copy / "index")
    assert live.rows_of(keys(289, 290, 309)).tolist() == [289, 300, 319]
    np.testing.assert_array_equal(live.vectors([300]), EmbeddingStore.open(copy / "over").image([0]))
    all_keys = live.table.keys_of(np.flatnonzero(live.live))
    assert len(set(all_keys)) == len(all_keys) == 310


def test_a_deleted_key_may_be_added_again(copy):
    changes.delete(copy / "index", keys(*range(290, 300)))
    assert changes.add(copy / "index", copy / "over").added == 20


def test_what_is_added_is_of_the_kind_that_the_base_was_asked_for(copy):
    build_index(copy / "emb", copy / "flat", kind="flat")
    changes.add(copy / "flat", copy / "more")
    (segment,) = (copy / "flat" / "segments").iterdir()
    assert read_manifest(segment).config["kind"] == "flat"


def test_what_cannot_be_read_is_named_and_not_the_index(copy, monkeypatch):
    def unreadable(folder):
        raise PermissionError(13, "Permission denied", "more/metadata")

    monkeypatch.setattr(EmbeddingStore, "open", unreadable)
    with pytest.raises(UserError, match="^more/metadata: Permission denied$"):
        changes.add(copy / "index", copy / "more")


def test_embeddings_of_another_clip_are_refused(copy):
    path = copy / "more" / "manifest.json"
    path.write_text(path.read_text().replace("sha256:clip", "sha256:other"))
    with pytest.raises(UserError, match="of the CLIP sha256:clip, but .* of sha256:other; embed with the same CLIP"):
        changes.add(copy / "index", copy / "more")
    tiny.store(copy / "wide", tiny.unit_rows(5, 16), first=900)
    with pytest.raises(UserError, match="holds 32-wide rows .* 16-wide ones"):
        changes.add(copy / "index", copy / "wide")


def test_embeddings_with_a_key_twice_are_refused(copy):
    shutil.copyfile(
        copy / "more" / "metadata" / "metadata_0.parquet", copy / "more" / "metadata" / "metadata_1.parquet"
    )
    with pytest.raises(UserError, match="has a key twice"):
        changes.add(copy / "index", copy / "more")


def test_deleting_says_what_was_not_there_and_refuses_when_nothing_was(copy):
    change = changes.delete(copy / "index", [*keys(3, 4, 3), "nobody"])
    assert (change.deleted, change.missing, change.live) == (2, ("nobody",), 298)
    again = changes.delete(copy / "index", keys(3, 4))
    assert (again.deleted, again.missing, again.live) == (0, ("k00003", "k00004"), 298)
    with pytest.raises(UserError, match="has no row with the key nobody"):
        changes.delete(copy / "index", ["nobody"])


def test_rows_are_deleted_by_what_the_metadata_say(copy):
    assert changes.delete(copy / "index", where="caption == 'row 17' or caption == 'row 18'").deleted == 2
    assert LiveIndex.open(copy / "index").rows_of(keys(16, 17, 18)).tolist() == [16, -1, -1]
    assert changes.delete(copy / "index", where="caption == 'row 17'").deleted == 0


def test_compact_makes_one_plain_folder_with_the_same_answers(copy):
    changes.add(copy / "index", copy / "more")
    changes.add(copy / "index", copy / "over", replace=True)
    changes.delete(copy / "index", keys(*range(0, 300, 7)))
    before = found(copy / "index"), found(copy / "index", modality="text")
    rows = len(LiveIndex.open(copy / "index"))
    made = changes.compact(copy / "index")
    assert made.result["rows"] == rows and made.result["image"]["recall"] == 1.0
    assert sorted(p.name for p in copy.iterdir()) == ["emb", "index", "more", "over"]
    names = {path.name for path in (copy / "index").iterdir()}
    assert names - {".lock"} == {"image.index", "text.index", "manifest.json", "metadata", "rows.npy"}
    assert faiss.read_index(str(copy / "index" / "image.index")).ntotal == rows
    assert_same(found(copy / "index"), before[0])
    assert_same(found(copy / "index", modality="text"), before[1])
    live = LiveIndex.open(copy / "index")
    assert live.rows == len(live) == len(live.table) == rows
    assert [source.input_path("embeddings") for source in live.sources()] == [
        copy / name for name in ("emb", "more", "over")
    ]
    assert all(live.parts[0].vectors.stores)
    text = faiss.read_index(str(copy / "index" / "text.index"))
    np.testing.assert_allclose(live.vectors(np.arange(rows), "text"), text.reconstruct_n(0, rows), atol=1e-6)


def test_an_approximate_index_is_compacted_to_an_approximate_one_whose_recall_is_measured(tmp_path):
    rng = np.random.default_rng(0)
    image, text = (np.repeat(tiny.unit_rows(60, DIM, s), 40, axis=0) for s in (0, 1))
    image, text = (rows + 0.1 * rng.standard_normal(rows.shape) for rows in (image, text))
    image, text = ((r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in (image, text))
    tiny.store(tmp_path / "emb", image, text, parts=4)
    build_index(tmp_path / "emb", tmp_path / "index", kind="ivf", recall=0.9)
    changes.delete(tmp_path / "index", keys(*range(0, 2400, 2)))
    made = changes.compact(tmp_path / "index").result
    live = LiveIndex.open(tmp_path / "index")
    for modality, rows in (("image", image[1::2]), ("text", text[1::2])):
        assert made[modality]["kind"].startswith("IVF") and made[modality]["recall"] >= 0.9
        queries = rows[::10] + 0.02 * rng.standard_normal((120, DIM))
        best = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
        _, found = live.search(queries, 10, modality)
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)]) > 0.85


def test_a_compacted_index_can_be_changed_and_compacted_again(copy):
    changes.add(copy / "index", copy / "more")
    changes.delete(copy / "index", keys(5, 305))
    changes.compact(copy / "index")
    before = found(copy / "index")
    assert changes.add(copy / "index", copy / "more").added == 0  # known still, though a row of it is gone
    changes.add(copy / "index", copy / "over", replace=True)
    changes.delete(copy / "index", keys(*range(290, 310)))
    changes.compact(copy / "index")
    live = LiveIndex.open(copy / "index")
    assert len(live) == 350 - 2 - 19 and [s.result["rows"] for s in live.sources()] == [300, 50]
    assert before[0] != found(copy / "index")[0]
    assert changes.add(copy / "index", copy / "more", replace=True).added == 50
    assert len(LiveIndex.open(copy / "index")) == 290 - 1 + 50


def test_compacting_what_lost_no_row_and_has_one_source_is_a_folder_like_any_other(copy):
    changes.add(copy / "index", copy / "more")
    changes.delete(copy / "index", keys(*range(300, 350)))
    changes.compact(copy / "index")
    assert read_manifest(copy / "index").inputs == read_manifest(copy / "index").inputs
    assert not (copy / "index" / "rows.npy").exists()
    assert set(read_manifest(copy / "index").inputs) == {"embeddings", "clip", "shards"}
    build_index(copy / "emb", copy / "index")  # nothing to do


def test_compacting_nothing_does_nothing(copy):
    created = read_manifest(copy / "index").created
    before = (copy / "index" / "image.index").stat().st_ino
    assert changes.compact(copy / "index").created == created
    assert (copy / "index" / "image.index").stat().st_ino == before


def test_compacting_without_the_embeddings_says_which_are_missing_and_takes_them_from_elsewhere(copy):
    changes.add(copy / "index", copy / "more")
    (copy / "more").rename(copy / "moved")
    with pytest.raises(UserError, match=r"no longer at .*/more; say where: --embeddings FOLDER"):
        changes.compact(copy / "index")
    changes.compact(copy / "index", embeddings=[copy / "over", copy / "moved"])
    live = LiveIndex.open(copy / "index")
    assert len(live) == 350 and live.sources()[1].input_path("embeddings") == copy / "moved"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"kind": "foo"}, "kind 'foo' must be one of"), ({"recall": 0}, "recall 0 must be"), ({"memory": "x"}, "memory")],
)
def test_compacting_for_what_build_index_refuses_is_refused(copy, wrong, told):
    with pytest.raises(UserError, match=told):
        changes.compact(copy / "index", **wrong)


def test_a_compact_that_fails_leaves_nothing_beside_the_folder(copy, monkeypatch):
    def fail(*_, **__):
        raise UserError("only a recall of 0.5 can be had")

    changes.delete(copy / "index", keys(1))
    monkeypatch.setattr(changes, "choose_and_build", fail)
    with pytest.raises(UserError, match="only a recall"):
        changes.compact(copy / "index")
    assert sorted(p.name for p in copy.iterdir()) == ["emb", "index", "more", "over"]
    assert len(LiveIndex.open(copy / "index")) == 299


def test_an_empty_index_is_not_compacted(copy):
    changes.delete(copy / "index", keys(*range(300)))
    with pytest.raises(UserError, match="has no row left"):
        changes.compact(copy / "index")


def test_two_changers_do_not_meet(copy):
    with swap.locked(copy / "index"), pytest.raises(UserError, match="another process is changing .*index/; wait"):
        changes.delete(copy / "index", keys(1))
    assert changes.delete(copy / "index", keys(1)).deleted == 1


def test_an_index_is_changed_through_a_link_to_it(copy):
    (copy / "link").symlink_to(copy / "index")
    changes.delete(copy / "link", keys(1))
    changes.compact(copy / "link")
    assert (copy / "link").is_symlink() and len(LiveIndex.open(copy / "index")) == 299


def test_where_two_names_cannot_be_exchanged_two_steps_do_it(copy, monkeypatch):
    monkeypatch.setattr(swap, "exchange", lambda *_: False)
    changes.delete(copy / "index", keys(1))
    changes.compact(copy / "index")
    assert len(LiveIndex.open(copy / "index")) == LiveIndex.open(copy / "index").rows == 299
    assert sorted(p.name for p in copy.iterdir()) == ["emb", "index", "more", "over"]


def test_killed_between_the_two_steps_the_folder_comes_back_when_it_is_next_opened(copy, monkeypatch):
    monkeypatch.setattr(swap, "exchange", lambda *_: False)
    rename = os.rename

    def die(old, new):
        if Path(new).name == "index":
            raise KeyboardInterrupt
        rename(old, new)

    changes.delete(copy / "index", keys(1))
    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        changes.compact(copy / "index")
    monkeypatch.setattr(os, "rename", rename)
    assert not (copy / "index").exists()
    assert len(LiveIndex.open(copy / "index")) == 299
    assert changes.delete(copy / "index", keys(2)).live == 298
    assert sorted(p.name for p in copy.iterdir()) == ["emb", "index", "more", "over"]


def test_a_reader_sees_the_folder_before_or_after_each_change_and_never_between(copy):
    seen, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                seen.append(tuple(sum(found(copy / "index", 3)[0], [])))
            except Exception as error:  # noqa: BLE001
                seen.append(error)

    expected = [tuple(sum(found(copy / "index", 3)[0], []))]
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for change in (
            lambda: changes.add(copy / "index", copy / "over", replace=True),
            lambda: changes.delete(copy / "index", keys(*range(0, 300, 2))),
            lambda: changes.compact(copy / "index"),
            lambda: changes.add(copy / "index", copy / "more", replace=True),
            lambda: changes.delete(copy / "index", keys(*range(1, 300, 4))),
            lambda: changes.compact(copy / "index"),
        ):
            change()
            expected.append(tuple(sum(found(copy / "index", 3)[0], [])))
    finally:
        stop.set()
        reader.join()
    assert len(seen) > 10 and [error for error in seen if isinstance(error, Exception)] == []
    places = [expected.index(answer) for answer in seen]
    assert places == sorted(places)


CHANGES = {
    "add": lambda root: changes.add(root / "index", root / "over", replace=True),
    "delete": lambda root: changes.delete(root / "index", keys(*range(0, 300, 3))),
    "compact": lambda root: changes.compact(root / "index"),
}


def _change(what, root, ready):
    tune.SECONDS = 0.001
    ready.set()
    CHANGES[what](root)


def begin(what, root):
    """A process that makes a change, at its first moment: everything is imported."""
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_change, args=(what, root, ready))
    process.start()
    assert ready.wait(120)
    return process


@pytest.mark.parametrize("what", ["add", "delete", "compact"])
def test_a_change_killed_at_any_moment_has_happened_or_not_and_can_be_made_again(what, copy):
    if what == "compact":
        changes.add(copy / "index", copy / "over", replace=True)
        changes.delete(copy / "index", keys(*range(0, 300, 3)))
    shutil.copytree(copy / "index", copy / "whole")
    before = found(copy / "index")
    process = begin(what, copy)
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0
    after = found(copy / "index")
    for moment in np.random.default_rng(0).random(KILLS):
        shutil.rmtree(copy / "index")
        shutil.copytree(copy / "whole", copy / "index")
        process = begin(what, copy)
        time.sleep(moment * seconds)
        process.kill()
        process.join()
        now = found(copy / "index")
        assert now[0] in (before[0], after[0])
        CHANGES[what](copy)
        assert_same(found(copy / "index"), after)
        assert sorted(p.name for p in copy.iterdir()) == ["emb", "index", "more", "over", "whole"]
        assert not [p for p in (copy / "index").rglob("*") if ".partial" in p.name or ".tmp" in p.name]


def test_the_command_line_adds_deletes_and_compacts(copy, monkeypatch):
    from click.testing import CliRunner

    import cli

    def unclip(*words):
        done = CliRunner().invoke(cli.cli, list(words), catch_exceptions=False)
        return done.stderr

    monkeypatch.chdir(copy)
    assert "50 rows added" in unclip("index", "add", "--embeddings", "more")
    assert "index/ has more/ already" in unclip("index", "add", "--embeddings", "more")
    assert "20 rows added, 20 rows replaced" in unclip("index", "add", "--embeddings", "over", "--replace")
    (copy / "drop.txt").write_text("k00001\nk00002\n\nk00003\n")
    assert "5 rows to delete" in unclip("index", "delete", "k00004", "k00005", "--keys", "drop.txt", "--dry-run")
    told = unclip("index", "delete", "k00004", "nobody", "--keys", "drop.txt", "--where", "caption == 'row 7'")
    assert "5 rows deleted" in told and "1 keys are not there (any more): nobody" in told
    assert "345 rows, 25 deleted, 2 segments" in told
    assert "345 rows, Flat, recall@10 1.000" in unclip("index", "compact")
    with pytest.raises(UserError, match="nothing to delete; give keys"):
        unclip("index", "delete")
