"""A fixed share of the fuzzer's cases: nothing bad ends in a traceback, a hang, silence or a wrong artefact."""

import io
import json
import random
import tarfile

import bad_captions
import bad_folders
import bad_numbers
import bad_options
import bad_pictures
import bad_shards
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from outcome import Tally
from tiny_world import CLIP, copy_of, put, world
from trial import bounded, commanded, run_command

from clip_train.check import check_shards
from clip_train.checkpoint import load_tensors, save_tensors
from clip_train.folder import read_manifest, write_file
from clip_train.ingest import shard_source
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingStore, read_vectors
from clip_train.stream import BrokenShard, read_shard
from diffusion.decoder import DecoderConfig
from diffusion.prior import PriorConfig
from retrieval.index import load_index

SHARE = {  # of the cases that benchmarks/faults.py tries: seconds
    bad_shards: range(0, 48),
    bad_pictures: range(0, 60, 2),
    bad_captions: range(0, 99, 4),
    bad_numbers: range(0, 60, 2),
    bad_folders: range(0, 70),
    bad_options: range(0, 40),
}


@pytest.mark.filterwarnings("default")  # as on a person's command line; a warning there is counted as a loss
@pytest.mark.parametrize("module", SHARE, ids=lambda module: module.__name__)
def test_bad_input_ends_as_done_or_counted_or_in_one_line(module, tmp_path):
    tally = module.run(SHARE[module], 0, tmp_path, lambda *_, **__: None)
    assert isinstance(tally, Tally) and tally.losses == []


def test_the_same_number_is_the_same_case():
    for module in SHARE:
        assert module.case(3, 14).what == module.case(3, 14).what
    rngs = [random.Random("x"), random.Random("x")]
    assert bad_shards.flipped(rngs[0]) == bad_shards.flipped(rngs[1])


# What the fuzzer found, one by one


def tar_of(folder, **pax):
    members = bad_shards.good()
    members[3][0].pax_headers = pax
    folder.mkdir()
    (folder / "0.tar").write_bytes(bad_shards.packed(members))
    return folder / "0.tar"


@pytest.mark.parametrize("record", [{"size": "x"}, {"GNU.sparse.map": "1,x"}, {"GNU.sparse.major": "1"}])
def test_a_pax_record_that_cannot_be_parsed_is_damage_for_every_reader(tmp_path, record):
    more = {"GNU.sparse.minor": "0"} if "GNU.sparse.major" in record else {}
    tar = tar_of(tmp_path / "in", **record, **more)
    with pytest.raises(UserError, match="cut short or damaged"):
        ShardSet(tar)
    with pytest.raises(BrokenShard, match="damaged"):
        list(read_shard(str(tar)))
    assert [one.what for one in check_shards(str(tar)).errors] == ["damaged tars"]
    assert "damaged tar" in shard_source(tar, tmp_path / "out").result["reasons"]


def test_a_name_that_is_not_utf8_is_packed_and_printed(tmp_path):
    members = [(info, data) for info, data in bad_shards.good(1)]
    for info, _ in members:
        info.name = "\udcff/" + info.name
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(bad_shards.packed(members, tarfile.GNU_FORMAT))
    shard_source(tmp_path / "in", tmp_path / "out")
    assert "\ufffd" in ShardSet(tmp_path / "out").read(0).meta["source"]
    ended = run_command(["data", "check", str(tmp_path / "in")])
    assert ended.code == 0


@pytest.mark.parametrize(
    "name, value", [("suffixes", 3), ("blind", 0.5), ("keys", ["x"] * 4), ("sha256", "x"), ("mute", [[]])]
)
def test_an_index_of_a_tar_that_was_changed_is_made_anew(tmp_path, name, value):
    tar = tiny.shards(tmp_path / "shards", 4) / "000000.tar"
    whole = ShardSet(tar)
    path = tar.with_name(tar.name + ".index.json")
    index = json.loads(path.read_bytes())
    path.write_text(json.dumps(index | {name: value}))
    again = ShardSet(tar)
    assert (again.keys, again.fingerprint) == (whole.keys, whole.fingerprint)
    assert json.loads(path.read_bytes()) == index


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


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 50_000])
def test_json_that_python_gives_up_on_is_refused_by_name(tmp_path, text):
    for name in ("index/manifest.json", "decoder/config.json", "clip/open_clip_config.json", "index/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    copy_of(["decoder"], tmp_path / "index")
    put(tmp_path / "index" / "decoder" / "config.json", text.encode())
    outcome = commanded(["generate", "--embedding", str(world() / "rows.npy"), "--decoder",
                         str(tmp_path / "index" / "decoder"), "--out", str(tmp_path / "x")])  # fmt: skip
    assert outcome.how == "refused" and "config.json cannot be read" in outcome.line


@pytest.mark.parametrize("config, field", [
    (DecoderConfig, {"blocks": (2**31, 1, 1)}), (PriorConfig, {"depth": 2**31}), (PriorConfig, {"sigma_data": 0.0}),
    (DecoderConfig, {"sigma_mean": float("nan")}), (DecoderConfig, {"align_width": -1}),
])  # fmt: skip
def test_a_config_of_absurd_numbers_is_refused_before_a_network_is_built(config, field):
    with pytest.raises(UserError, match=next(iter(field))):
        config(**field)


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


def test_a_row_of_parquet_that_is_not_utf8_is_rejected_alone(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(tiny.picture(0))
    texts = pa.array([b"a fox", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": ["in/a.png"] * 2, "caption": texts}), tmp_path / "in.parquet")
    made = shard_source(tmp_path / "in.parquet", tmp_path / "out").result
    assert (made["samples"], made["reasons"]) == (1, {"its text is not UTF-8": 1})


@pytest.mark.parametrize("path", ["", ".", "a/.."])
def test_a_file_to_write_that_is_a_folder_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_file(tmp_path.__class__(path), b"")


def test_a_record_that_names_no_fingerprint_is_damaged(tmp_path):
    rng = random.Random(0)
    data, _ = bad_folders.bad_record(rng, (world() / "made.png").read_bytes(), 0)
    assert data[:4] == b"\x89PNG" and CLIP
    from diffusion.generate import Generator

    generator = Generator.open(world() / "decoder")
    outcome = bounded(lambda: generator.regenerate({"caption": "x", "fingerprints": {"decoder": 7}, "seed": 0}))
    assert outcome.how == "refused" and "was made with decoder 7" in outcome.line


@pytest.mark.parametrize("words, said", [
    (["data", "bench", "--shards", "shards", "--batch-size", str(2**63)], "more than 100000000"),
    (["generate", "a", "--decoder", "decoder", "--prior", "prior", "--set", f"steps={10**18}"], "steps"),
    (["train", "prior", "--embeddings", "emb", "--set", f"batch_size={2**63}"], "batch_size"),
])  # fmt: skip
def test_a_number_beyond_all_that_there_is_is_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(copy_of(["shards", "emb", "prior", "decoder", "clip"], tmp_path))
    outcome = commanded(words)
    assert outcome.how == "refused" and said in outcome.line


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 6.94 EiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")
])  # fmt: skip
def test_too_little_memory_is_one_line(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("retrieval.index.build_index", full)
    outcome = commanded(["index", "--embeddings", "emb"])
    assert outcome.how == "refused" and "not enough memory" in outcome.line
