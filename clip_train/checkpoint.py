"""What a killed run goes on from: Training as a checkpoint in its folder, and the one before it in case of damage."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clip_train import ranks
from clip_train.folder import CHECKPOINT
from clip_train.parallel import copy_whole
from clip_train.sharded_checkpoint import load_sharded, save_sharded
from clip_train.tensors import Damaged, load_tensors, refusal, refuse_others, refuse_unreadable, save_tensors

NEWEST, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"  # both as folder.CHECKPOINT has them


@dataclass(frozen=True)
class Training:
    """What a run goes on from: all of it, as its randomness is a function of the step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    averaged: dict[str, torch.Tensor] | None  # EMA of the weights
    power: dict[str, torch.Tensor] | None = None  # averages for post-hoc EMA (ema.PowerAverages)

    def tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor, in place: model.NAME, averaged.NAME and optimizer.NAME.STATE for every parameter's NAME."""
        found = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        found |= {f"averaged.{name}": t for name, t in (self.averaged or {}).items()}
        found |= {f"power.{name}": t for name, t in (self.power or {}).items()}
        for name, parameter in self.model.named_parameters():
            for key, t in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = t
        return found

    def prepare(self, shapes: dict[str, torch.Size], where: Path) -> None:
        """Make room for the tensors of checkpoint `where`, given their names and shapes: the optimizer gets an empty
        state for each parameter that has one there. UserError if it is another model's."""
        model = {name.removeprefix("model."): size for name, size in shapes.items() if name.startswith("model.")}
        refuse_others(self.model, model, where)
        stateful = {name.partition(".")[2].rpartition(".")[0] for name in shapes if name.startswith("optimizer.")}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0  # this step moves no weight
        for name, parameter in self.model.named_parameters():
            parameter.grad = torch.zeros_like(parameter) if name in stateful else None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def save_training(folder: Path, training: Training, numbers: dict[str, Any], sharded: bool) -> None:
    """Write a checkpoint; the one before stays, in case that this one is damaged. `numbers` holds "step", and is json.

    By the main rank alone into checkpoint.safetensors; or, `sharded`, by every rank its own part into a folder
    checkpoint-STEP/ of safetensors files (torch.distributed.checkpoint; all ranks must call).
    """
    name = f"checkpoint-{numbers['step']:09d}" if sharded else NEWEST
    if ranks.is_main():
        for path in _latest_first(folder)[1:]:  # at no time are there more than two
            _remove(path)
        if (folder / NEWEST).exists():
            os.replace(folder / NEWEST, folder / BEFORE)
    if sharded:
        save_sharded(folder / name, training.tensors(), numbers)
    elif ranks.is_main():
        save_tensors(folder / name, training.tensors(), numbers)


def load_training(
    folder: Path, training: Training, on_warning: Callable[[str], None] | None = None
) -> dict[str, Any] | None:
    """Put the newest checkpoint back, on as many ranks as there are now; returns its numbers, None if there is none.

    One that is damaged is removed, and on_warning told, if the one before is not. Damaged if all are; UserError if one
    cannot be read, for it may be whole.
    """
    failures: list[tuple[Path, str]] = []
    for path in ranks.from_main(lambda: _latest_first(folder)):
        try:
            numbers = ranks.agreed(lambda path=path: _load(path, training))
        except Damaged as error:
            failures.append((path, str(error)))
            continue
        if ranks.is_main():
            for bad, why in failures:
                _remove(bad)
                if on_warning:
                    on_warning(f"{why}; went on from the checkpoint before it, of step {numbers['step']}")
        return numbers
    if failures:
        raise Damaged(f"{failures[0][1]}; remove it to start again")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder."""
    return sorted(path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name))


def _latest_first(folder: Path) -> list[Path]:
    """The checkpoints, those first of which nobody can say how old they are."""

    def age(path: Path) -> tuple[float, bool]:
        try:
            return -_numbers(path)["step"], path.name == BEFORE
        except (Damaged, KeyError, TypeError):
            return -float("inf"), path.name == BEFORE

    return sorted(checkpoints(folder), key=age)


def _load(path: Path, training: Training) -> dict[str, Any]:
    """Put a checkpoint back; returns its numbers."""
    if path.is_dir():
        numbers = ranks.agreed(lambda: _numbers(path))
        load_sharded(path, training, numbers)
        return numbers
    tensors, numbers = load_tensors(path)
    if type(numbers.get("step")) is not int:
        raise Damaged(f"{path} is damaged or not a checkpoint (it names no step)")
    training.prepare({name: t.shape for name, t in tensors.items()}, path)
    with torch.no_grad():
        for name, target in training.tensors().items():
            copy_whole(tensors[name], target)
    return numbers


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _numbers(path: Path) -> dict[str, Any]:
    """The numbers that a checkpoint was saved with."""
    try:
        if path.is_dir():
            return json.loads((path / "numbers.json").read_text())
        refuse_unreadable(path)
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["json"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal(path, error) from error
