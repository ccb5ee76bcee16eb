"""Damaged files in folders that the fuzzer found something with, one by one."""

import io
import json
import random

import bad_folders
import broken_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_world import copy_of, put, sets, world
from trial import bounded, commanded, run_command

from clip_train.folder import read_manifest
from clip_train.settings import UserError
from clip_train.store import EmbeddingStore, read_vectors
from clip_train.tensors import load_tensors, save_tensors
from diffusion.contrastive import ContrastiveConfig
from diffusion.decoder import DecoderConfig
from diffusion.prior import PriorConfig
from retrieval.index import load_index


@pytest.mark.parametrize("changed", [
    {"kind": 7}, {"config": []}, {"result": None}, {"inputs": {"clip": "x"}}, {"inputs": {}}, {"fingerprint": "\ud800"},
    {"result": {}}, {"result": {"rows": "x", "dim": 32}}, {"result": {"rows": 4, "dim": 32, "shards": [7]}},
    {"result": {"rows": 4, "dim": 32, "sources": [{"rows": 4}]}},
])  # fmt: skip
def test_a_manifest_with_a_field_missing_or_mistyped_is_refused_by_name(tmp_path, changed):
    folder = copy_of(["index"], tmp_path) / "index"
    data = json.loads((folder / "manifest.json").read_text())
    put(folder / "manifest.json", json.dumps(data | changed).encode())
    with pytest.raises(UserError, match=r"manifest.json cannot be read|is of kind"):
        read_manifest(folder, "index")


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 50_000], ids=["digits", "nested"])
@pytest.mark.parametrize("name", ["index/manifest.json", "index/state.json", "decoder/config.json",
                                  "prior/config.json", "clip/open_clip_config.json"])  # fmt: skip
def test_json_that_python_gives_up_on_is_refused_by_name(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(copy_of(bad_folders.EVERYTHING, tmp_path))
    put(tmp_path / name, text.encode())
    outcome = commanded(bad_folders.COMMANDS[name.split("/")[0]][0])
    assert outcome.how == "refused" and name in outcome.line


@pytest.mark.parametrize("config, field", [
    (DecoderConfig, {"blocks": (2**31, 1, 1)}), (PriorConfig, {"depth": 2**31}), (PriorConfig, {"sigma_data": 0.0}),
    (DecoderConfig, {"sigma_mean": float("nan")}), (DecoderConfig, {"align_width": -1}),
])  # fmt: skip
def test_a_config_of_absurd_numbers_is_refused_before_a_network_is_built(config, field):
    with pytest.raises(UserError, match=next(iter(field))):
        config(**field)


def test_a_prior_may_read_as_many_words_as_tokenizers_know():
    assert PriorConfig(words=8, vocabulary=250_002).vocabulary == ContrastiveConfig(vocabulary=250_002).vocabulary
    with pytest.raises(UserError, match="vocabulary 10000001 must be"):
        PriorConfig(vocabulary=10_000_001)


@pytest.mark.parametrize("room, name, value", [
    ("model_cfg", "vision_cfg", 3), ("model_cfg", "embed_dim", 2**70), ("preprocess_cfg", "std", [1, 1, 0]),
    ("preprocess_cfg", "mean", [0, 0]), ("preprocess_cfg", "size", [[]]), ("preprocess_cfg", "resize_mode", "x"),
])  # fmt: skip
def test_a_clip_config_that_is_none_is_refused_by_name(tmp_path, room, name, value):
    from clip_train.model import Clip

    folder = copy_of(["clip"], tmp_path) / "clip"
    config = json.loads((folder / "open_clip_config.json").read_text())
    config[room][name] = value
    put(folder / "open_clip_config.json", json.dumps(config).encode())
    with pytest.raises(UserError, match="open_clip_config.json"):
        Clip.load(folder)


def test_weights_that_are_not_finite_draw_nothing(tmp_path):
    folder = copy_of(["prior", "decoder", "clip"], tmp_path)
    path = folder / "prior" / "model.safetensors"
    tensors = load_tensors(path)[0]
    path.unlink()
    save_tensors(path, tensors | {"network.say.bias": torch.full_like(tensors["network.say.bias"], float("nan"))})
    words = ["generate", "a fox", "--prior", f"{folder}/prior", "--decoder", f"{folder}/decoder", "--device", "cpu"]
    outcome = commanded([*words, "--out", f"{folder}/x.png"])
    assert outcome.how == "refused" and "model.safetensors: weight network.say.bias" in outcome.line
    save_tensors(path, {name: torch.full_like(t, 1e38) for name, t in tensors.items()})
    outcome = commanded([*words, "--out", f"{folder}/x.png"])
    assert outcome.how == "refused" and "not finite" in outcome.line and not (folder / "x.png").exists()


@pytest.mark.parametrize("spoil", [
    lambda table: table.append_column("image_path", table.column("image_path")),
    lambda table: table.set_column(0, "image_path", pa.array([[1]] * len(table))),
    lambda table: table.remove_column(0),
    lambda table: table.set_column(1, "caption", pa.array([b"\xff"] * len(table))),
    lambda table: table.set_column(2, "captions", pa.array([7] * len(table))),
], ids=["twice", "lists", "gone", "bytes", "numbers"])  # fmt: skip
def test_metadata_of_other_columns_is_refused_by_name(tmp_path, spoil):
    folder = copy_of(["emb"], tmp_path) / "emb"
    path = min((folder / "metadata").iterdir())
    file = io.BytesIO()
    pq.write_table(spoil(pq.read_table(path)), file)
    put(path, file.getvalue())
    with pytest.raises(UserError, match=path.name):
        EmbeddingStore.open(folder)


def _categories(table):
    for n, field in enumerate(table.schema):
        if field.type == pa.string():
            table = table.set_column(n, field.name, table.column(n).dictionary_encode())
    return table


def _captionless(table):
    for name in ("caption", "captions"):
        table = table.set_column(table.column_names.index(name), name, pa.nulls(len(table)))
    return table


@pytest.mark.parametrize("write", [_categories, _captionless])
def test_categories_and_missing_captions_of_other_writers_work_in_every_command(tmp_path, write):
    root = copy_of(["emb", "clip", "shards", "prior", "decoder"], tmp_path)
    keys = EmbeddingStore.open(root / "emb").keys
    for path in (root / "emb" / "metadata").iterdir():
        file = io.BytesIO()
        pq.write_table(write(pq.read_table(path)), file)
        put(path, file.getvalue())
    assert EmbeddingStore.open(root / "emb").keys == keys
    index, emb = ["--index", f"{root}/index"], ["--embeddings", f"{root}/emb"]
    train = ["train", "prior", "--steps", "2", "--batch-size", "4", "--device", "cpu", "--out"]
    read = sets(["words=4", "width=32", "depth=1", "heads=2"])
    for one in (
        ["index", *emb, "--out", f"{root}/index"],
        ["search", "a fox", *index, "--where", "caption is null or 'one' in caption", "--sheet", f"{root}/s.png"],
        ["classify", "one", "two", *index, "--out", f"{root}/l.parquet", "--sheet", f"{root}/sheets"],
        ["cluster", *index, "--out", f"{root}/clusters"],
        ["dedup", *index, "--threshold", "0.5", "--sheet", f"{root}/near.png"],
        [*train, f"{root}/silent", *emb, *sets(["width=32", "depth=1", "heads=2"])],
        [*train, f"{root}/words", "--embeddings", f"{world()}/emb", *read],
        ["evaluate", "prior", *emb, "--prior", f"{root}/words"],
        ["evaluate", "loop", *emb, "--prior", f"{root}/prior", "--decoder", f"{root}/decoder", "--count", "2"],
        ["index", "delete", keys[0], *index],
    ):
        ended = run_command(one)
        assert ended.code == 0, (one, ended.err)
    ended = run_command([*train, f"{root}/reads", *emb, *read])
    assert ended.code == (0 if write is _categories else 2)
    assert write is _categories or "metadata/ has 0 captions for the" in ended.err


@pytest.mark.parametrize("column", ["image_path", "caption", "captions", "label"])
def test_no_index_is_made_of_texts_that_no_search_could_show(tmp_path, column):
    folder = copy_of(["emb"], tmp_path) / "emb"
    path = min((folder / "metadata").iterdir())
    table = pq.read_table(path)
    at, file = table.column_names.index(column), io.BytesIO()
    texts = pa.array([b"caf\xe9"] * len(table), pa.binary()).view(pa.string())
    if column == "captions":
        texts = pa.ListArray.from_arrays(pa.array(range(len(table) + 1), pa.int32()), texts)
    pq.write_table(table.set_column(at, column, texts), file)
    put(path, file.getvalue())
    outcome = commanded(["index", "--embeddings", str(folder), "--out", str(tmp_path / "index")])
    assert outcome.how == "refused" and f"{path} cannot be read" in outcome.line and "UTF8" in outcome.line
    assert "unclip embed" in outcome.line and not (tmp_path / "index").exists()


def header_that_lies(shape: str) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + bytes(96)


@pytest.mark.parametrize("data", [header_that_lies("(10**12, 32)"), header_that_lies("(1000000000000, 32)"),
                                  header_that_lies("(9223372036854775808, 32)"), b"PK\3\4" + bytes(50)],
                         ids=range(4))  # fmt: skip
def test_a_file_of_vectors_that_lies_about_itself_is_refused_by_name(tmp_path, data):
    (tmp_path / "rows.npy").write_bytes(data)
    with pytest.raises(UserError, match="rows.npy"):
        read_vectors(tmp_path / "rows.npy")
    folder = copy_of(["emb"], tmp_path) / "emb"
    path = min((folder / "img_emb").iterdir())
    put(path, data)
    with pytest.raises(UserError, match=path.name):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize("array", [np.float64(3), np.ones((15, 32), complex), np.full((15, 32), 3e38, np.float32)])
def test_embeddings_that_are_no_rows_of_numbers_are_refused_by_name(tmp_path, array):
    folder = copy_of(["emb"], tmp_path) / "emb"
    file = io.BytesIO()
    np.save(file, array)
    put(folder / "img_emb" / "img_emb_0.npy", file.getvalue())
    with pytest.raises(UserError, match="img_emb"):
        EmbeddingStore.open(folder)


def test_captions_whose_embeddings_are_not_of_length_1_are_refused(tmp_path):
    folder = copy_of(["emb"], tmp_path) / "emb"
    path = min((folder / "captions_emb").glob("captions_emb_*"))
    file = io.BytesIO()
    np.save(file, np.load(path) * 7)
    put(path, file.getvalue())
    with pytest.raises(UserError, match="not of length 1"):
        EmbeddingStore.open(folder).captions()


@pytest.mark.parametrize("data", [b"", b"7", b"IxFI" + b"\xff" * 40])
def test_an_index_that_faiss_cannot_read_is_refused_by_name(tmp_path, data):
    (tmp_path / "image.index").write_bytes(data)
    with pytest.raises(UserError, match="image.index is damaged"):
        load_index(tmp_path)


def test_a_record_that_names_no_fingerprint_is_damaged(tmp_path):
    rng = random.Random(0)
    data, _ = broken_files.bad_record(rng, (world() / "made.png").read_bytes(), 0)
    assert data[:4] == b"\x89PNG"
    from diffusion.generate import Generator

    generator = Generator.open(world() / "decoder")
    outcome = bounded(lambda: generator.regenerate({"caption": "x", "fingerprints": {"decoder": 7}, "seed": 0}))
    assert outcome.how == "refused" and "was made with decoder 7" in outcome.line
