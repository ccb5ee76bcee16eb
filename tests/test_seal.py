import hashlib
import json
import random
import shutil

import faiss
import numpy as np
import pytest
import tiny

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from retrieval import build, changes, seal, tune
from retrieval.index import build_index, load_index
from retrieval.live import LiveIndex

CHANGED = r"is not what was written \(damaged\?\); make it again: unclip index"


@pytest.fixture(autouse=True)
def measure_briefly(monkeypatch):
    monkeypatch.setattr(tune, "SECONDS", 0.001)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """emb/ with 300 rows, more/ with 50 others, and the index of the first."""
    root = tmp_path_factory.mktemp("world")
    tiny.store(root / "emb", tiny.unit_rows(300, 32, 0), tiny.unit_rows(300, 32, 1), parts=3)
    tiny.store(root / "more", tiny.unit_rows(50, 32, 2), tiny.unit_rows(50, 32, 3), first=300)
    build_index(root / "emb", root / "index")
    return root


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_the_manifest_notes_what_sha256sum_says_of_each_file(world):
    result = json.loads((world / "index" / "manifest.json").read_text())["result"]
    for modality in ("image", "text"):
        data = (world / "index" / f"{modality}.index").read_bytes()
        assert result[modality]["sha256"] == hashlib.sha256(data).hexdigest()
        assert result[modality]["bytes"] == len(data)


def test_a_bit_that_changed_anywhere_is_refused_before_faiss_reads_the_file(copy, monkeypatch):
    path = copy / "index" / "text.index"
    whole, rng = path.read_bytes(), random.Random(0)
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("faiss has read it"))
    for bit in (0, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(100))):
        path.write_bytes(whole)
        flip(path, bit)
        with pytest.raises(UserError, match=f"text.index {CHANGED}"):
            load_index(copy / "index", "text")
    for data in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=CHANGED):
            load_index(copy / "index", "text")


def test_a_folder_of_a_version_that_noted_nothing_opens_as_before(copy):
    path = copy / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    for modality in ("image", "text"):
        del manifest["result"][modality]["sha256"]
    path.write_text(json.dumps(manifest))
    faiss.write_index(load_index(copy / "index", "text"), str(copy / "index" / "image.index"))
    assert len(LiveIndex.open(copy / "index")) == 300


def test_of_a_file_too_large_to_read_through_the_length_and_both_ends_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "WHOLE", 1000)
    monkeypatch.setattr(seal, "END", 100)
    path = tmp_path / "image.index"
    for size in (1000, 1001, 5000):
        path.write_bytes(np.random.default_rng(size).bytes(size))
        noted, whole = seal.seal(path), path.read_bytes()
        assert ("ends" in noted) == (size > 1000)
        seal.refuse_changed(path, noted)
        for byte in (0, 99, size - 100, size - 1):
            flip(path, 8 * byte)
            with pytest.raises(UserError, match=CHANGED):
                seal.refuse_changed(path, noted)
            flip(path, 8 * byte)
        assert path.read_bytes() == whole
        path.write_bytes(whole + b"\0")
        with pytest.raises(UserError, match=CHANGED):
            seal.refuse_changed(path, noted)
    path.write_bytes(whole)
    flip(path, 8 * 100)  # between the ends, which is what the documents say
    seal.refuse_changed(path, noted)


def test_what_was_noted_under_another_limit_still_holds(tmp_path, monkeypatch):
    path = tmp_path / "image.index"
    path.write_bytes(bytes(5000))
    monkeypatch.setattr(seal, "END", 100)
    for before, now in ((1000, 9000), (9000, 1000)):
        monkeypatch.setattr(seal, "WHOLE", before)
        noted = seal.seal(path)
        monkeypatch.setattr(seal, "WHOLE", now)
        seal.refuse_changed(path, noted)
        flip(path, 8 * 4999)
        with pytest.raises(UserError, match=CHANGED):
            seal.refuse_changed(path, noted)
        flip(path, 8 * 4999)


def test_added_and_compacted_files_have_seals_of_their_own(copy):
    changes.add(copy / "index", copy / "more")
    (segment,) = (copy / "index" / "segments").iterdir()
    whole = (segment / "image.index").read_bytes()
    flip(segment / "image.index", 4 * len(whole))
    with pytest.raises(UserError, match=f"{segment}/image.index {CHANGED}"):
        LiveIndex.open(copy / "index")
    (segment / "image.index").write_bytes(whole)
    changes.delete(copy / "index", ["k00007"])
    changes.compact(copy / "index")
    assert len(LiveIndex.open(copy / "index")) == 349
    for name in ("image.index", "text.index", "rows.npy"):
        path = copy / "index" / name
        flip(path, 8 * path.stat().st_size - 64)  # the lowest byte of the last row's number
        with pytest.raises(UserError, match=f"{name} {CHANGED}"):
            LiveIndex.open(copy / "index")
        flip(path, 8 * path.stat().st_size - 64)
    (copy / "index" / "rows.npy").unlink()
    with pytest.raises(UserError, match="rows.npy is missing"):
        LiveIndex.open(copy / "index")


def test_other_rows_than_those_that_were_deleted_are_not_deleted(copy):
    changes.delete(copy / "index", ["k00007"])
    (path,) = (copy / "index" / "deleted").iterdir()
    flip(path, 8 * path.stat().st_size - 64)
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged"):
        LiveIndex.open(copy / "index")


def test_reopening_reads_no_file_through_that_it_has_already(copy, monkeypatch):
    live, read = LiveIndex.open(copy / "index"), []
    real = seal._whole
    monkeypatch.setattr(seal, "_whole", lambda path: read.append(path) or real(path))
    changes.delete(copy / "index", ["k00007"])
    read.clear()
    assert len(live.reopened()) == 299 and not read
    changes.add(copy / "index", copy / "more")
    read.clear()
    again = live.reopened()
    assert len(again) == 349 and len(read) == 2 and all("segments" in path.parts for path in read)


def test_metadata_with_a_bit_changed_is_refused_or_as_it_was(copy):
    path = min((copy / "emb" / "metadata").iterdir())
    whole, rng, keys = path.read_bytes(), random.Random(0), EmbeddingStore.open(copy / "emb").keys
    captions = EmbeddingStore.open(copy / "emb").table.column("caption")
    refused = 0
    for _ in range(150):
        path.write_bytes(whole)
        flip(path, rng.randrange(8 * len(whole)))
        try:
            store = EmbeddingStore.open(copy / "emb")
            table = store.table
            said = store.keys, table.column("caption")
        except UserError as error:
            refused += path.name in str(error) or f"{copy}/emb" in str(error)
            continue
        assert said == (keys, captions)
    assert refused > 50  # the rest lies where nobody looks: gaps, names of who wrote it


def test_a_damaged_stage_of_a_build_is_refused_by_name_with_the_way_out(tmp_path):
    (tmp_path / "scratch").mkdir()
    for read in (build.read_stage, build.load_array):
        for data in (b"", b"IxFI", b"\x93NUMPY\1\0"):
            (tmp_path / "scratch" / "x").write_bytes(data)
            with pytest.raises(UserError, match="scratch/x is damaged; remove .*scratch/ and run the command again"):
                read(tmp_path / "scratch" / "x")
