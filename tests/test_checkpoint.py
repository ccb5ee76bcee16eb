import errno
import json
import os
from unittest import mock

import crew
import pytest
import torch
from safetensors.torch import load_file

from clip_train import tensors
from clip_train.settings import UserError


def test_a_checkpoint_names_everything_by_its_parameter(tmp_path):
    crew.train(tmp_path)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    weights, averaged, _ = crew.train(tmp_path)
    assert {name.partition(".")[0] for name in saved} == {"model", "averaged", "optimizer"}
    assert all(torch.equal(saved[f"model.{name}"], t) for name, t in weights.items())
    assert all(torch.equal(saved[f"averaged.{name}"], t) for name, t in averaged.items())
    assert saved["optimizer.table.weight.exp_avg"].shape == weights["table.weight"].shape
    assert saved["optimizer.logit_scale.step"] == 6


def test_of_two_checkpoints_the_later_counts_and_what_was_being_written_does_not(tmp_path):
    crew.train(tmp_path, steps=3)
    early = (tmp_path / "checkpoint.safetensors").read_bytes()
    whole = crew.train(tmp_path / "whole")
    os.replace(tmp_path / "whole" / "checkpoint.safetensors", tmp_path / "checkpoint.safetensors")
    shards = tmp_path / "checkpoint-000000003"
    shards.mkdir()  # what a run on several ranks left behind: complete, but older
    (shards / "shard-00001-model-00001-of-00001.safetensors").write_bytes(early)
    (shards / "numbers.json").write_text(json.dumps({"step": 3, "seconds": 1.0, "scale": {}, "files": {}}))
    (tmp_path / ".checkpoint.tmp").mkdir()  # killed while it wrote
    (tmp_path / ".checkpoint.safetensors.tmp").write_bytes(b"half")
    again = crew.train(tmp_path)
    assert crew.difference((*whole[:2], 0), (*again[:2], 0)) == 0


def test_a_folder_without_its_numbers_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-000000003").mkdir()
    with pytest.raises(UserError, match="remove it to start again"):
        crew.train(tmp_path)


def test_a_checkpoint_that_cannot_be_read_stops_the_run_and_stays(tmp_path, monkeypatch):
    assert crew.train(tmp_path, stop=4, save_every=0) is None
    there = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(tensors, "load_file", mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(UserError, match="cannot read .*checkpoint.safetensors: Input/output error$"):
            crew.train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    newest = tmp_path / "checkpoint-000000009" / "numbers.json"
    newest.parent.mkdir()
    newest.symlink_to(newest)  # nobody can read it: too many levels of symbolic links
    with pytest.raises(UserError, match="cannot read .*checkpoint-000000009: Too many levels"):
        crew.train(tmp_path)
    assert newest.is_symlink()


def test_what_only_begins_as_a_checkpoint_does_is_left_alone(tmp_path):
    whole = crew.train(tmp_path / "whole")
    assert crew.train(tmp_path / "run", stop=4, save_every=0) is None
    mine = tmp_path / "run" / "checkpoint-mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert crew.difference(whole, crew.train(tmp_path / "run", save_every=0)) == 0
    assert mine.read_text() == "mine"
