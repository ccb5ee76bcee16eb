"""A fixed share of the fuzzer's cases: nothing bad ends in a traceback, a hang, silence or a wrong artefact."""

import random
import shlex

import bad_captions
import bad_folders
import bad_numbers
import bad_options
import bad_pictures
import bad_shards
import broken_tars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from command_lines import BASE
from outcome import Tally
from tiny_world import copy_of
from trial import commanded

from clip_train.folder import write_file
from clip_train.ingest import shard_source
from clip_train.settings import UserError

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


LONG = (*bad_options.SLOW, "lab spiral", "lab forward", "lab denoise", "export onnx")  # the rest takes 1 s each


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in BASE if not name.startswith(LONG)])
def test_the_line_of_each_command_that_is_varied_works_as_it_stands(name, tmp_path):
    outcome = bad_options.attempt(tmp_path, [*name.split(), *shlex.split(BASE[name])], slow=False)
    assert outcome.how == "done", outcome.line


def test_the_same_number_is_the_same_case():
    for module in SHARE:
        assert module.case(3, 14).what == module.case(3, 14).what
    rngs = [random.Random("x"), random.Random("x")]
    assert broken_tars.flipped(rngs[0]) == broken_tars.flipped(rngs[1])


# What the fuzzer found outside of shards and folders, one by one


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
