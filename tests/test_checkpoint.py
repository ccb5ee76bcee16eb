import json
import os

import crew
import pytest
import torch
from safetensors.torch import load_file

from clip_train import checkpoint
from clip_train.checkpoint import load_tensors, load_weights, save_tensors
from clip_train.settings import UserError


def test_tensors_and_numbers_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "seconds": 0.1})
    back, numbers = load_tensors(tmp_path / "x.safetensors")
    assert numbers == {"step": 3, "seconds": 0.1}
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in tensors.items())


def test_tied_weights_are_saved_as_two_and_loaded_as_one(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    save_tensors(tmp_path / "x.safetensors", model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    load_weights(model, load_tensors(tmp_path / "x.safetensors")[0], "x")
    assert model[0].weight.any() and model[0].weight is model[1].weight


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})

    def full(tensors, path, *_):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"] and load_tensors(tmp_path / "x.safetensors")[0]["a"].all()


def test_files_that_are_missing_cut_or_something_else_are_one_clear_line(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:-1], b"", b"\x80\x04pickle"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            load_tensors(path)


def test_weights_of_another_model_are_refused_by_the_first_that_does_not_fit():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="x lacks weight bias"):
        load_weights(model, {"weight": torch.ones(3, 2)}, "x")
    with pytest.raises(UserError, match="x: weight is \\(2, 2\\), the config needs \\(3, 2\\)"):
        load_weights(model, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "x")


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
