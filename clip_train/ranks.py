"""One process or many: what the training code needs to know about torchrun's ranks."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clip_train.folder import Workspace
from clip_train.settings import UserError


def pick_device(device: str = "auto") -> torch.device:
    """auto (CUDA if there, else MPS, else CPU), cpu, cuda, cuda:1, mps; UserError if torch does not see it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: no such device; use auto, cpu, cuda or mps") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: use auto, cpu, cuda or mps")
    if chosen.type == "cuda" and not (chosen.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: torch sees no Apple GPU; use --device cpu")
    return chosen


def start(device: str | torch.device = "auto") -> torch.device:
    """This process's device; joins the process group when torchrun started us."""
    chosen = pick_device(str(device))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        # the main rank may decode for hours while the others wait
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return chosen


def rank() -> int:
    """This process's number among world_size()."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: object) -> object:
    """The main rank's picklable value, on every rank (torch's own channel between our processes, never a file)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def open_workspace(*arguments: Any, **named: Any) -> Workspace:
    """Workspace.open on the main rank; the others see the same paths and publish nothing."""
    work = Workspace.open(*arguments, **named) if is_main() else None
    out, path, done = broadcast((work.out, work.path, work.done) if work else None)
    return work or Workspace(out, path, {}, done, None)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) of every rank, stacked in rank order to (world B, ...); gradients flow back to each row's own rank."""
    if world_size() == 1:
        return rows
    if not rows.requires_grad:
        out = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(out, rows.contiguous())
        return torch.cat(out)
    import torch.distributed.nn.functional as differentiable

    return torch.cat(differentiable.all_gather(rows.contiguous()))
