"""A checkpoint that every rank writes its own part of: a folder of safetensors files (torch.distributed.checkpoint)."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from clip_train import ranks
from clip_train.folder import write_file
from clip_train.settings import UserError
from clip_train.tensors import first_line, refusal

if TYPE_CHECKING:
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

    from clip_train.checkpoint import Training


def save_sharded(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Write the folder, whole or not at all; all ranks must call. numbers.json holds the numbers, sizes and hashes."""
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
        raise UserError(f"cannot write {path}: {first_line(_cause(error))}") from error
    files = sorted(temporary.iterdir())
    mine = {file.name: _file_sha256(file) for file in files[ranks.rank() :: ranks.world_size()]}
    sums = {name: sha256 for part in ranks.collect(mine) for name, sha256 in part.items()}
    if ranks.is_main():
        sizes = {file.name: file.stat().st_size for file in files}
        write_file(temporary / "numbers.json", json.dumps(numbers | {"files": sizes, "sha256": sums}).encode())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    ranks.barrier()


def load_sharded(path: Path, training: "Training", numbers: dict[str, Any]) -> None:
    """Put it back, on as many ranks as there are now; all must call. Damaged if it is not what was written, UserError
    if it cannot be read."""
    import torch.distributed.checkpoint as dcp

    # reads safetensors headers; the default reader would unpickle a file that anybody may have written
    reader = dcp.HuggingFaceStorageReader(str(path))
    ranks.agreed(lambda: _refuse_changed(path, numbers))
    found = ranks.agreed(lambda: _metadata(path, reader))
    own = {f"model.{name}": t for name, t in training.model.state_dict().items()}
    shapes = {n: own[n].shape if n in own and own[n].ndim == 0 else item.size for n, item in found.items()}
    training.prepare(shapes, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a single process may read what several have written
            dcp.load(_rows(training.tensors()), storage_reader=reader)
    except dcp.CheckpointException as error:  # on every rank, whichever it was that could not read
        raise refusal(path, _cause(error)) from error


def _refuse_changed(path: Path, numbers: dict[str, Any]) -> None:
    """Damaged if a file of a checkpoint is not what was written; each rank reads its share of them."""
    try:
        sums = numbers.get("sha256", {})
        for n, (name, size) in enumerate(sorted(numbers["files"].items())):
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} is cut short")
            mine = n % ranks.world_size() == ranks.rank()
            if mine and name in sums and _file_sha256(path / name) != sums[name]:
                raise ValueError(f"{name} has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(path, error) from error


def _metadata(path: Path, reader: "HuggingFaceStorageReader") -> dict[str, Any]:
    """name -> what its headers say of each tensor."""
    try:
        return reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise refusal(path, error) from error


def _cause(error: "CheckpointException") -> BaseException:
    """The first rank's reason."""
    return next(iter(error.failures.values()))[0]


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Single numbers as rows of one: safetensors cuts slices out of what it reads, and those have none."""
    return {name: t.detach().view(1) if t.ndim == 0 else t.detach() for name, t in tensors.items()}
