import json

import numpy as np
import pandas as pd
import pytest
import tiny

from clip_train import store as store_module
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore, EmbeddingWriter, first_not_unit

ROWS = tiny.unit_rows(10, 6)
TEXT = tiny.unit_rows(10, 6, seed=1)


@pytest.fixture
def folder(tmp_path):
    tiny.store(tmp_path / "emb", ROWS, TEXT, parts=3)
    return tmp_path / "emb"


def test_rows_come_back_as_they_were_written_to_the_precision_of_float16(folder):
    store = EmbeddingStore.open(folder)
    assert len(store) == 10 and store.dim == 6 and store.image().dtype == np.float32
    np.testing.assert_array_equal(store.image(), ROWS.astype(np.float16))
    np.testing.assert_array_equal(store.text(), TEXT.astype(np.float16))
    np.testing.assert_array_equal(store.image([9, 0, 4, 4]), ROWS[[9, 0, 4, 4]].astype(np.float16))
    assert len(store.image([])) == 0


def test_row_numbers_run_through_the_parts_and_tie_rows_to_keys(folder):
    store = EmbeddingStore.open(folder)
    assert [len(part) for part in store.image_parts] == [4, 3, 3]
    assert store.keys == [f"k{i:05d}" for i in range(10)]
    assert store.metadata["caption"].tolist() == [f"row {i}" for i in range(10)]
    assert store.table.row(7) == {"image_path": "k00007", "caption": "row 7", "captions": ["row 7", "not row 7"]}
    assert store.where(7) == "part 2, row 0"


def test_blocks_walk_through_all_rows_once(folder):
    store = EmbeddingStore.open(folder)
    blocks = list(store.blocks(3, "text"))
    assert [first for first, _ in blocks] == [0, 3, 4, 7]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), store.text())


def test_captions_know_the_row_they_belong_to(folder):
    store = EmbeddingStore.open(folder)
    emb, row = store.captions()
    assert row.tolist() == [i // 2 for i in range(20)]
    np.testing.assert_array_equal(emb[::2], store.text())
    np.testing.assert_array_equal(emb[1::2], -store.text())
    assert store.caption_texts()[6:8] == ["row 3", "not row 3"]


def test_the_layout_is_that_of_clip_retrieval(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for part in range(3):
        assert {f"img_emb/img_emb_{part}.npy", f"text_emb/text_emb_{part}.npy"} < names
        frame = pd.read_parquet(folder / f"metadata/metadata_{part}.parquet")
        assert list(frame.columns)[:2] == ["image_path", "caption"]
        image = np.load(folder / f"img_emb/img_emb_{part}.npy")
        assert image.dtype == np.float16 and len(image) == len(frame)


def test_part_numbers_are_padded_so_that_names_sort_as_numbers(tmp_path):
    tiny.store(tmp_path / "emb", ROWS, parts=10)
    names = sorted(path.name for path in (tmp_path / "emb" / "img_emb").iterdir())
    assert names == [f"img_emb_{i:02d}.npy" for i in range(10)]
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "emb").image(), ROWS.astype(np.float16))


def test_empty_parts_have_no_files_and_do_no_harm(tmp_path):
    tiny.store(tmp_path / "emb", ROWS[:2], parts=4)
    store = EmbeddingStore.open(tmp_path / "emb")
    assert len(store) == 2 and len(store.image_parts) == 2 and len(store.captions()[0]) == 4


def test_any_json_becomes_columns(tmp_path):
    writer = EmbeddingWriter(tmp_path, 1)
    odd = [
        {"nested": {"a": 1, "deep": {"b": "x"}}, "mixed": 1, "empty": {}, "list": [1, 2], "things": [{"x": 1}, {}]},
        {"mixed": "one", "count": 3, "list": [], "huge": 10**30, "surrogate": "\ud800", "none": None},
    ]
    start = [{"image_path": f"k{i}", "caption": "c", "captions": ["c"]} for i in range(2)]
    rows = [a | b for a, b in zip(start, odd, strict=True)]
    writer.write(0, ROWS[:2], TEXT[:2], np.arange(2), rows, {})
    frame = pd.read_parquet(tmp_path / "metadata" / "metadata_0.parquet")
    assert frame["nested.deep.b"][0] == "x" and frame["mixed"].tolist() == ["1", "one"]
    assert frame["count"][1] == 3 and frame["huge"][1] == str(10**30)
    assert json.loads(frame["things"][0]) == [{"x": 1}, {}]


def test_text_that_is_no_utf8_is_kept_apart_from_other_such_text(tmp_path):
    keys, names = ["\udcffk", "\udcfek", "?k"], ["\ud800", "\ud801"]
    rows = [{"image_path": k, "caption": "c", "captions": ["c"], "\udfff": {n: n for n in names}} for k in keys]
    EmbeddingWriter(tmp_path, 1).write(0, ROWS[:3], TEXT[:3], np.arange(3), rows, {})
    table = store_module.MetadataTable(tmp_path / "metadata")
    assert table.column("image_path") == [r"\udcffk", r"\udcfek", "?k"]
    assert table.row(0)[r"\udfff.\ud800"] == r"\ud800" and table.row(0)[r"\udfff.\ud801"] == r"\ud801"


@pytest.mark.parametrize("depth", [8, 9, 40, 900])
def test_lists_nested_deeper_than_parquet_reads_become_json(tmp_path, depth):
    nested = json.loads("[" * depth + "1" + "]" * depth)
    rows = [{"image_path": "k", "caption": "c", "captions": ["c"], "nested": nested}]
    EmbeddingWriter(tmp_path, 1).write(0, ROWS[:1], TEXT[:1], np.arange(1), rows, {})
    back = store_module.MetadataTable(tmp_path / "metadata").row(0)["nested"]
    assert back == nested if depth <= 8 else back.startswith("[[[") and json.loads(back) == nested


def test_a_part_is_finished_only_when_all_of_it_is_there(tmp_path, monkeypatch):
    import clip_train.store as module

    written = []

    def stop_at_metadata(path, data):
        if "metadata" in path.name:
            raise KeyboardInterrupt
        written.append(path.name)

    writer = EmbeddingWriter(tmp_path, 1)
    part = (0, ROWS[:1], TEXT[:1], np.zeros(1, int), [{"image_path": "k", "caption": "c", "captions": ["c"]}])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_file", stop_at_metadata)
        writer.write(*part, {"rows": 1})
    assert len(written) == 4 and writer.finished(0) is None
    writer.write(*part, {"rows": 1})
    assert writer.finished(0) == {"rows": 1}


def replace_part(folder, name, array):
    np.save(folder / name / f"{name}_1.npy", array)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_rows_that_are_not_unit_rows_are_refused_by_part_and_row(folder, value):
    broken = ROWS[4:7].astype(np.float16)
    broken[1] *= value
    replace_part(folder, "img_emb", broken)
    with pytest.raises(UserError, match="img_emb/ part 1, row 1 has length .*, not 1; make it again: unclip embed"):
        EmbeddingStore.open(folder)


def test_captions_whose_rows_go_down_are_refused_whatever_their_type(folder):
    path = folder / "captions_emb" / "captions_row_0.npy"
    np.save(path, np.load(path)[::-1].astype(np.uint64))
    with pytest.raises(UserError, match="part 0 is .* for 0 captions of 4 rows"):
        EmbeddingStore.open(folder).captions()


def test_parts_that_disagree_in_rows_or_width_are_refused(folder):
    replace_part(folder, "text_emb", TEXT[:2].astype(np.float16))
    with pytest.raises(UserError, match="part 1 has 3 picture rows, 2 text rows and 3 metadata rows"):
        EmbeddingStore.open(folder)
    replace_part(folder, "text_emb", tiny.unit_rows(3, 5).astype(np.float16))
    with pytest.raises(UserError, match=r"part 1 is \(3, 5\), but part 0 is 4 rows of width 6"):
        EmbeddingStore.open(folder)


def test_missing_and_damaged_files_are_named(folder):
    path = folder / "text_emb" / "text_emb_2.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="text_emb_2.npy is damaged"):
        EmbeddingStore.open(folder)
    path.unlink()
    with pytest.raises(UserError, match="text_emb_2.npy is missing"):
        EmbeddingStore.open(folder)
    path.write_bytes(whole)
    (folder / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="metadata/ cannot be read"):
        EmbeddingStore.open(folder)


def test_a_pickle_in_place_of_an_array_is_not_opened(folder):
    np.save(folder / "img_emb" / "img_emb_0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="img_emb_0.npy is damaged"):
        EmbeddingStore.open(folder)


def test_the_check_of_unit_rows_allows_float16_and_nothing_else():
    assert first_not_unit(tiny.unit_rows(500, 512).astype(np.float16)) is None
    assert first_not_unit(np.array([[1.0, 0.0], [0.0, 1.01]])) == 1


def test_rows_are_the_same_whether_their_parts_are_kept_in_memory_or_read_each_time(tmp_path, monkeypatch):
    tiny.store(tmp_path / "emb", tiny.unit_rows(12, 8), parts=4)
    table = EmbeddingStore.open(tmp_path / "emb").table
    reads, read = [], table._read
    for kept, most in ((1, 0), (4, 10**9)):
        table._part = store_module._LastRead(lambda part: reads.append(part) or read(part), most)
        assert [table.row(row)["image_path"] for row in (0, 11, 5, 0)] == ["k00000", "k00011", "k00005", "k00000"]
        assert reads == ([0, 3, 1, 0] if kept == 1 else [0, 3, 1])  # one is always kept
        reads.clear()
