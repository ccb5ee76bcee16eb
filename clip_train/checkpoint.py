"""What a killed run goes on from: named tensors and a few numbers in one safetensors file, written atomically."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clip_train.settings import UserError


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any] | None = None) -> None:
    """Write `tensors` and json-able `numbers` to `path`: the file is either the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        # clones: safetensors refuses tensors that share memory (tied weights), and loading makes them equal again
        shared = len({t.data_ptr() for t in plain.values() if t.numel()}) < sum(t.numel() > 0 for t in plain.values())
        save_file(
            {n: t.clone() for n, t in plain.items()} if shared else plain, temporary, {"json": json.dumps(numbers)}
        )
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def load_tensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What save_tensors wrote. UserError if the file is missing, cut short or not a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {}).get("json", "null"))
        return load_file(path, device=str(device)), numbers or {}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path | str) -> None:
    """load_state_dict whose complaint is one line naming the file and the first weight that does not fit."""
    own = module.state_dict()
    for name in own.keys() ^ tensors.keys():
        side = "lacks" if name in own else "has an unknown"
        raise UserError(f"{where} {side} weight {name}: it belongs to another model or version")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(f"{where}: {name} is {tuple(tensors[name].shape)}, the config needs {tuple(tensor.shape)}")
    module.load_state_dict(tensors)


def save_training(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, torch.Tensor] | None,
    numbers: dict[str, Any],
) -> None:
    """All that training needs to go on as if it had never stopped (its randomness is a function of the step)."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"averaged.{name}": t for name, t in (averaged or {}).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in state.items()}
    save_tensors(path, tensors, numbers)


def load_training(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Put back what save_training wrote; returns its numbers."""
    tensors, numbers = load_tensors(path)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    load_weights(model, part("model."), path)
    for name, tensor in part("averaged.").items():
        averaged[name].copy_(tensor)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return numbers
