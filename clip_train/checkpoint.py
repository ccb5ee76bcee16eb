"""What a killed run goes on from: named tensors and a few numbers in one safetensors file, written atomically."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clip_train import ranks
from clip_train.folder import write_file
from clip_train.parallel import copy_whole
from clip_train.settings import UserError

NEWEST, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"


class Damaged(UserError):
    """A file that is not what was written."""


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any] | None = None) -> None:
    """Write `tensors` and json-able `numbers` to `path`: the file is either the old one or the new one, whole.

    It holds the sha256 of both, by which load_tensors notices a bit that has changed since."""
    temporary = path.with_name(f".{path.name}.tmp")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    noted = {"json": json.dumps((numbers or {}) | {"sha256": _sha256(plain, numbers or {})})}
    try:
        # clones: safetensors refuses tensors that share memory (tied weights), and loading makes them equal again
        shared = len({t.data_ptr() for t in plain.values() if t.numel()}) < sum(t.numel() > 0 for t in plain.values())
        save_file({n: t.clone() for n, t in plain.items()} if shared else plain, temporary, noted)
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
    """What save_tensors wrote. UserError if the file is missing; Damaged if it is cut short, not a safetensors file, or
    was changed since."""
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {}).get("json", "null")) or {}
        tensors = load_file(path)
        sha256 = numbers.pop("sha256", None)  # others write safetensors files, too
        if sha256 and sha256 != _sha256(tensors, numbers):
            raise ValueError("its contents have changed since they were written")
        return {name: t.to(device) for name, t in tensors.items()}, numbers
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, SafetensorError, AttributeError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged or not a safetensors file ({error})") from error


def _sha256(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> str:
    """Of names, types, shapes and bytes of the tensors, whatever their order, and of the numbers."""
    total = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        total.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\n".encode("utf-8", "surrogatepass"))
        total.update(t.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path | str) -> None:
    """load_state_dict whose complaint is one line naming the file and the first weight that does not fit."""
    _refuse_others(module, {name: t.shape for name, t in tensors.items()}, where)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: weight {name} holds numbers that are not finite; train again, or take a copy")
    module.load_state_dict(tensors)


def _refuse_others(module: torch.nn.Module, shapes: dict[str, torch.Size], where: Path | str) -> None:
    """UserError naming the first weight of the module that is not among those of `where`, or has another shape."""
    own = module.state_dict()
    for name in own.keys() ^ shapes.keys():
        side = "lacks" if name in own else "has an unknown"
        raise UserError(f"{where} {side} weight {name}: it belongs to another model or version")
    for name, tensor in own.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"{where}: {name} is {tuple(shapes[name])}, the config needs {tuple(tensor.shape)}")


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
        _refuse_others(self.model, model, where)
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
        _save_shards(folder / name, training.tensors(), numbers)
    elif ranks.is_main():
        save_tensors(folder / name, training.tensors(), numbers)


def load_training(
    folder: Path, training: Training, on_warning: Callable[[str], None] | None = None
) -> dict[str, Any] | None:
    """Put the newest checkpoint back, on as many ranks as there are now; returns its numbers, None if there is none.

    One that is damaged is removed, and on_warning told, if the one before is not. Damaged if all are.
    """
    failures: list[tuple[Path, str]] = []
    for path in ranks.broadcast(_latest_first(folder)):
        numbers, failure = None, ""
        try:
            numbers = _load(path, training)
        except Damaged as error:
            failure = str(error)
        failure = next(filter(None, ranks.collect(failure)), "")
        if failure:
            failures.append((path, failure))
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
    return sorted(p for p in folder.glob("checkpoint*") if p.name in (NEWEST, BEFORE) or p.is_dir())


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
        numbers = _numbers(path)
        _load_shards(path, training, numbers)
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
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["json"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged or not a checkpoint ({error})") from error


def _save_shards(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(".checkpoint.tmp")
    if ranks.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    ranks.barrier()
    try:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(_rows(tensors), storage_writer=writer)
    except dcp.CheckpointException as error:  # on every rank, whichever it was that could not write
        raise UserError(f"cannot write {path}: {_cause(error)}") from error
    files = sorted(temporary.iterdir())
    mine = {file.name: _file_sha256(file) for file in files[ranks.rank() :: ranks.world_size()]}
    sums = {name: sha256 for part in ranks.collect(mine) for name, sha256 in part.items()}
    if ranks.is_main():
        sizes = {file.name: file.stat().st_size for file in files}
        write_file(temporary / "numbers.json", json.dumps(numbers | {"files": sizes, "sha256": sums}).encode())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    ranks.barrier()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_changed(path: Path, numbers: dict[str, Any]) -> None:
    """Damaged, on every rank, if a file of a checkpoint is not what was written; each rank reads its share of them."""
    why = ""
    try:
        sums = numbers.get("sha256", {})
        for n, (name, size) in enumerate(sorted(numbers["files"].items())):
            if (path / name).stat().st_size != size:
                raise OSError(f"{name} is cut short")
            mine = n % ranks.world_size() == ranks.rank()
            if mine and name in sums and _file_sha256(path / name) != sums[name]:
                raise OSError(f"{name} has changed since it was written")
    except (OSError, KeyError, TypeError, AttributeError) as error:
        why = str(error)
    why = next(filter(None, ranks.collect(why)), "")
    if why:
        raise Damaged(f"{path} is damaged or not a checkpoint ({why})")


def _load_shards(path: Path, training: Training, numbers: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    # reads safetensors headers; the default reader would unpickle a file that anybody may have written
    reader = dcp.HuggingFaceStorageReader(str(path))
    _refuse_changed(path, numbers)
    try:
        found = reader.read_metadata().state_dict_metadata
        own = {f"model.{name}": t for name, t in training.model.state_dict().items()}
        shapes = {n: own[n].shape if n in own and own[n].ndim == 0 else item.size for n, item in found.items()}
        training.prepare(shapes, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a single process may read what several have written
            dcp.load(_rows(training.tensors()), storage_reader=reader)
    except (OSError, SafetensorError, KeyError, dcp.CheckpointException) as error:
        raise Damaged(f"{path} is damaged or not a checkpoint ({_cause(error)})") from error


def _cause(error: Exception) -> str:
    """The first rank's reason, in one line."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error).splitlines()[0]


def _rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Single numbers as rows of one: safetensors cuts slices out of what it reads, and those have none."""
    return {name: t.detach().view(1) if t.ndim == 0 else t.detach() for name, t in tensors.items()}
