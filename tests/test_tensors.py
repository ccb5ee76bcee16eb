import errno
import os
from unittest import mock

import pytest
import torch

from clip_train import tensors as module
from clip_train.settings import UserError
from clip_train.tensors import Damaged, load_tensors, load_weights, save_tensors


def test_tensors_and_numbers_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "seconds": 0.1})
    back, numbers = load_tensors(tmp_path / "x.safetensors")
    assert numbers == {"step": 3, "seconds": 0.1}
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in tensors.items())


def test_numbers_come_back_as_json_has_them_and_are_not_called_damaged(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"m": {10: 1, 9: (2, 3)}})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"m": {"10": 1, "9": [2, 3]}}


def test_a_bit_that_changed_in_any_piece_of_any_tensor_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 16)
    path, tensors = tmp_path / "x.safetensors", {"a": torch.randn(11), "b": torch.ones(3), "none": torch.ones(0, 2)}
    save_tensors(path, tensors)
    whole = path.read_bytes()
    for byte in range(len(whole) - 4 * 14, len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 4]) + whole[byte + 1 :])
        with pytest.raises(Damaged, match="changed since"):
            load_tensors(path)
    path.write_bytes(whole)
    assert torch.equal(load_tensors(path)[0]["a"], tensors["a"])


def test_a_file_that_cannot_be_read_is_not_called_damaged_or_missing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.symlink_to(path)
    with pytest.raises(UserError, match="cannot read .*x.safetensors: Too many levels") as caught:
        load_tensors(path)
    assert not isinstance(caught.value, Damaged)
    path.unlink()
    save_tensors(path, {"a": torch.ones(2)})
    monkeypatch.setattr(module, "load_file", mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(UserError, match="cannot read .*x.safetensors: Input/output error") as caught:
        load_tensors(path)
    assert not isinstance(caught.value, Damaged)


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

    monkeypatch.setattr(module, "save_file", full)
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
    with pytest.raises(UserError, match="x: weight bias is torch.bool, the config needs torch.float32"):
        load_weights(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3, dtype=torch.bool)}, "x")
    load_weights(model, {"weight": torch.ones(3, 2, dtype=torch.float64), "bias": torch.ones(3).half()}, "x")
