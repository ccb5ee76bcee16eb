"""A fixed share of the runs that are killed, stopped, out of room, doubled or damaged; benchmarks/faults.py has all."""

import errno
import json
import os
from unittest import mock

import disks
import kills
import locks
import pytest
import rot
import signals
from broken_runs import COMMANDS, Bench

SHARE = {  # of the cases that benchmarks/faults.py tries: one core, 40 seconds for all
    kills: (1, 2, 4, 5, 7, 24),
    signals: (1, 2, 10, 13, 15, 23),
    disks: (1, 2, 3, 4, 7, 10, 29, 36),
    locks: (3, 5, 7, 11, 15, 16),
    rot: (0, 1, 2, 3, 4, 5, 6, 8, 9, 14, 32),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("bench") / "b")
    yield made
    made.close()


@pytest.mark.parametrize("module", SHARE, ids=lambda module: module.__name__)
def test_a_broken_run_loses_nothing_and_ends_as_an_unbroken_one(module, bench, tmp_path):
    if module is disks and not disks.can_mount():
        pytest.skip("this user may not mount a small disk")
    assert module.run(SHARE[module], 0, tmp_path, lambda *_, **__: None, bench).losses == []


def test_the_bench_notices_one_changed_byte(bench, tmp_path):
    command = COMMANDS[0]
    folder = bench.fresh(command, tmp_path / "case")
    assert bench.finish(command, folder).how == "done"
    tar = folder / "out" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert bench.compare(command, folder).how == "wrong"


@pytest.mark.parametrize("plan", [b"\xff", b"[]", b"3", b"{}", b'{"inputs": 1}', b"[" * 100_000, b""])
def test_a_damaged_plan_is_one_line(plan, tmp_path):
    from clip_train.folder import Workspace
    from clip_train.settings import UserError

    Workspace.open(tmp_path / "out", "prior", {"a": 1}, {})
    (tmp_path / "out.partial" / "weights").write_text("begun")
    (tmp_path / "out.partial" / "plan.json").write_bytes(plan)
    with pytest.raises(UserError, match="plan.json is damaged; remove"):
        Workspace.open(tmp_path / "out", "prior", {"a": 1}, {})


def test_a_run_killed_right_after_it_published_leaves_nothing_behind_when_it_is_run_again(tmp_path, monkeypatch):
    from clip_train import folder

    space = folder.Workspace.open(tmp_path / "out", "shards", {"a": 1}, {})
    for name in ("weights", "checkpoint.safetensors", "scratch/large"):
        (space.path / name).parent.mkdir(exist_ok=True)
        (space.path / name).write_text(name)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder, "_sweep", mock.Mock(side_effect=KeyboardInterrupt))
        space.publish()
    space.release()
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()
    assert folder.Workspace.open(tmp_path / "out", "shards", {"a": 1}, {}).done
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "weights"]


def test_a_plan_that_is_whole_is_gone_on_with(tmp_path):
    from clip_train.folder import Input, Workspace

    inputs = {"clip": Input("sha256:a", "ViT-B-32:openai"), "shards": Input("sha256:b", tmp_path)}
    space = Workspace.open(tmp_path / "out", "prior", {"a": 1}, inputs)
    (space.path / "weights").write_text("begun")
    space.release()
    assert (Workspace.open(tmp_path / "out", "prior", {"a": 1}, inputs).path / "weights").exists()
    assert json.loads((tmp_path / "out.partial" / "plan.json").read_text())["config"] == {"a": 1}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-5] + bytes([b[-5] ^ 4]) + b[-4:]])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_gone_on_from(damage, tmp_path):
    import crew

    from clip_train.checkpoint import BEFORE, NEWEST, checkpoints
    from clip_train.settings import UserError
    from clip_train.tensors import load_tensors

    whole, folder = crew.train(tmp_path / "whole"), tmp_path / "broken"
    assert crew.train(folder, stop=4, save_every=0) is None
    assert [load_tensors(folder / name)[1]["step"] for name in (NEWEST, BEFORE)] == [4, 3]
    (folder / NEWEST).write_bytes(damage((folder / NEWEST).read_bytes()))
    assert crew.difference(whole, crew.train(folder, save_every=0)) == 0
    assert len(checkpoints(folder)) == 2
    for path in checkpoints(folder):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint.safetensors is damaged .* remove it to start again"):
        crew.train(folder)


def test_an_index_that_finds_no_room_for_its_last_bytes_is_not_taken_for_whole(tmp_path, monkeypatch):
    """faiss's own writer keeps 4 kB back and does not look whether the disk took them."""
    import io

    import faiss

    from clip_train.settings import UserError
    from retrieval import build

    class Full(io.BytesIO):
        def close(self):
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "open", lambda *_: Full(), raising=False)
    with pytest.raises(UserError, match="cannot write .*image.index: No space left"):
        build.write_index(faiss.IndexFlatIP(8), tmp_path / "image.index")
    assert not list(tmp_path.iterdir())


def test_an_array_is_refused_before_it_is_begun_if_the_disk_has_no_room_for_it(tmp_path, monkeypatch):
    import numpy as np

    from clip_train.arrays import new_array

    new_array(tmp_path / "small.npy", np.uint8, (3, 4))[1] = 7
    assert np.load(tmp_path / "small.npy").sum() == 28
    with pytest.raises(OSError) as caught:
        new_array(tmp_path / "large.npy", np.uint8, (1 << 50,))
    assert caught.value.filename == str(tmp_path / "large.npy") and caught.value.strerror
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left.*full.npy"):
        new_array(tmp_path / "full.npy", np.uint8, (3, 4))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_keep_room_free_gets_the_array_all_the_same(tmp_path, monkeypatch, number):
    import numpy as np

    from clip_train.arrays import new_array

    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    new_array(tmp_path / "small.npy", np.uint8, (3, 4))[1] = 7
    assert np.load(tmp_path / "small.npy").sum() == 28
