"""Named tensors and a few numbers in one safetensors file, written atomically, with the hash by which it is checked."""

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clip_train.settings import UserError

PIECE = 1 << 24  # bytes that one thread hashes at a time


class Damaged(UserError):
    """A file that is not what was written."""


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any] | None = None) -> None:
    """Write `tensors` and json-able `numbers` to `path`: the file is either the old one or the new one, whole.

    It holds a digest of both, by which load_tensors notices a bit that has changed since."""
    temporary = path.with_name(f".{path.name}.tmp")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    numbers = json.loads(json.dumps(numbers or {}))  # as they will be read: names are texts
    noted = {"json": json.dumps(numbers | {"digest": _digest(plain, numbers)})}
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
    """What save_tensors wrote. UserError if the file is missing or cannot be read; Damaged if it is cut short, not a
    safetensors file, or was changed since."""
    refuse_unreadable(path)
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {}).get("json", "null")) or {}
        tensors = load_file(path)
        digest = numbers.pop("digest", None)  # others write safetensors files, too
        if digest and digest != _digest(tensors, numbers):
            raise ValueError("its contents have changed since they were written")
        return {name: t.to(device) for name, t in tensors.items()}, numbers
    except (OSError, SafetensorError, AttributeError, ValueError, RecursionError) as error:
        raise refusal(path, error, "safetensors file") from error


def refuse_unreadable(path: Path) -> None:
    """UserError if a file cannot be opened: safetensors calls all that "no such file"."""
    try:
        open(path, "rb").close()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: BaseException, what: str = "checkpoint") -> UserError:
    """Damaged, unless it is the system that could not read the file: then nobody knows, and it must stay."""
    if isinstance(error, OSError) and error.errno != errno.ENOENT:
        return UserError(f"cannot read {path}: {error.strerror or error}")
    return Damaged(f"{path} is damaged or not a {what} ({first_line(error)})")


def first_line(error: BaseException) -> str:
    """What an error says, as far as it goes into a line."""
    return str(error).partition("\n")[0]


def _digest(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> str:
    """sha256 of the numbers, and of names, types, shapes and bytes of the tensors, whatever their order.

    Of the bytes, the sha256 of each piece counts, so that threads share the work (hashlib lets them run at once).
    """
    named = sorted(tensors.items())
    about = [numbers, *((name, str(t.dtype), tuple(t.shape)) for name, t in named)]
    pieces = [piece.numpy() for _, t in named for piece in t.reshape(-1).view(torch.uint8).split(PIECE)]
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces):
            total.update(digest)
    return total.hexdigest()


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path | str) -> None:
    """load_state_dict whose complaint is one line naming the file and the first weight that does not fit."""
    refuse_others(module, {name: t.shape for name, t in tensors.items()}, where)
    own = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{where}: weight {name} is {tensor.dtype}, the config needs {own[name].dtype}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: weight {name} holds numbers that are not finite; train again, or take a copy")
    module.load_state_dict(tensors)


def refuse_others(module: torch.nn.Module, shapes: dict[str, torch.Size], where: Path | str) -> None:
    """UserError naming the first weight of the module that is not among those of `where`, or has another shape."""
    own = module.state_dict()
    for name in own.keys() ^ shapes.keys():
        side = "lacks" if name in own else "has an unknown"
        raise UserError(f"{where} {side} weight {name}: it belongs to another model or version")
    for name, tensor in own.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"{where}: {name} is {tuple(shapes[name])}, the config needs {tuple(tensor.shape)}")
