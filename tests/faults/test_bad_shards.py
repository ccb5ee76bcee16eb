"""Tars that the fuzzer found something with, one by one."""

import contextlib
import json
import tarfile

import broken_tars
import pytest
import tiny
from trial import run_command

from clip_train import shards
from clip_train.check import check_shards
from clip_train.ingest import shard_source
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.stream import BrokenShard, read_shard


def tar_of(folder, **pax):
    members = broken_tars.good()
    members[3][0].pax_headers = pax
    folder.mkdir()
    (folder / "0.tar").write_bytes(broken_tars.packed(members))
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
    members = [(info, data) for info, data in broken_tars.good(1)]
    for info, _ in members:
        info.name = "\udcff/" + info.name
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(broken_tars.packed(members, tarfile.GNU_FORMAT))
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


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "name, value",
    [("suffixes", 3), ("suffixes", {"txt": "4"}), ("keys", []), ("keys", "abcd"), ("keys", [[1]] * 4), ("blind", 7),
     ("numbers", "AAAA"), ("numbers", 5), ("mute", [[9, "x"]]), ("mute", [7]), ("sha256", None)],
)  # fmt: skip
def test_an_index_of_a_tar_that_another_wrote_is_not_believed_for_its_crc(tmp_path, name, value, version):
    tar = tiny.shards(tmp_path / "shards", 4) / "000000.tar"
    whole = ShardSet(tar)
    path = tar.with_name(tar.name + ".index.json")
    index = json.loads(path.read_bytes()) | {name: value, "version": version}
    del index["crc32"]
    with contextlib.suppress(TypeError, AttributeError):
        index |= {"crc32": shards._crc32(index)} if version == 3 else {}
    path.write_text(json.dumps(index))
    again = ShardSet(tar)
    assert (again.keys, again.fingerprint) == (whole.keys, whole.fingerprint)
    assert json.loads(path.read_bytes())["version"] == 3


def test_an_index_of_the_version_before_is_read_as_before(tmp_path, monkeypatch):
    tar = tiny.shards(tmp_path / "shards", 4) / "000000.tar"
    whole = ShardSet(tar)
    path = tar.with_name(tar.name + ".index.json")
    index = json.loads(path.read_bytes()) | {"version": 2}
    path.write_text(json.dumps(index))  # with the crc32 of another version: changed since
    assert ShardSet(tar).keys == whole.keys and json.loads(path.read_bytes())["version"] == 3
    del index["crc32"]
    path.write_text(json.dumps(index))
    monkeypatch.setattr(shards, "_build_index", None)  # a tar of terabytes is not read again
    assert (ShardSet(tar).keys, ShardSet(tar).fingerprint) == (whole.keys, whole.fingerprint)
