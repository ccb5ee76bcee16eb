"""One process or many: what the training code needs to know about torchrun's ranks."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

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
        _join("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def _join(backend: str) -> None:
    timeout = timedelta(hours=12)  # the main rank may decode for hours while the others wait
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store through all restarts, and a rank that is early would find the address of one that
        # died (pytorch issue 135712). Several machines do not count restarts alike: docs/training.md says what to set.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)


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


class ToldByMain(UserError):
    """What went wrong on the main rank, which says so itself."""


def from_main(work: Callable[[], Any]) -> Any:
    """What work() returns on the main rank, which alone calls it, told to every rank; so is a UserError it raises.

    Otherwise the others would wait for a main rank that has ended.
    """
    answer, failure = None, None
    if is_main():
        try:
            answer = work()
        except UserError as error:
            failure = error
    answer, reason = broadcast((answer, None if failure is None else str(failure)))
    if reason is not None:
        raise failure or ToldByMain(reason)
    return answer


def agreed(work: Callable[[], Any]) -> Any:
    """What work() returns on this rank, once it has on all; a UserError of any rank is raised on every one.

    Otherwise the others would wait for a rank that has ended.
    """
    answer, failure = None, None
    try:
        answer = work()
    except UserError as error:
        failure = error
    failure = next(filter(None, collect(failure)), None)
    if failure is not None:
        raise failure
    return answer


def collect(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def open_workspace(*arguments: Any, **named: Any) -> Workspace:
    """Workspace.open on the main rank; the others see the same paths and publish nothing."""
    opened: list[Workspace] = []

    def work() -> tuple[Any, ...]:
        opened.append(Workspace.open(*arguments, **named))
        return opened[0].out, opened[0].path, opened[0].done

    out, path, done = from_main(work)
    return opened[0] if opened else Workspace(out, path, {}, done, None)


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's `numbers`, on every rank; no gradient flows."""
    if world_size() > 1:
        numbers = numbers.clone()
        dist.all_reduce(numbers)
    return numbers


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) of every rank, stacked in rank order to (world B, ...); gradients flow back to each row's own rank."""
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def pass_on(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors of the next rank in the ring, while ours go to the one before; gradients travel back the same way."""
    return _PassOn.apply(*tensors) if world_size() > 1 else tensors


def leave(code: int = 0) -> NoReturn:
    """End this process: the last thing that a program started by torchrun does, however it went.

    Python's finalisers are left out, because threads of gloo and autograd may still want the interpreter while it goes
    away (SIGABRT after the work was done). Files must be closed by now. A rank that did well waits for the others,
    so that nobody loses the process that holds the rendezvous; a rank that failed waits for nobody.
    """
    if not dist.is_initialized():
        sys.exit(code)
    if code == 0:
        with contextlib.suppress(RuntimeError):  # another rank failed meanwhile, and says so itself
            dist.barrier()
            dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        out = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(out, rows.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient.contiguous()).chunk(world_size())[rank()]


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(True)
        out = _exchange(tensors, to=rank() - 1, source=rank() + 1)
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        ctx.differentiable = [t.is_floating_point() for t in out]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = iter(
            _exchange([g for g, yes in zip(gradients, ctx.differentiable, strict=True) if yes], rank() + 1, rank() - 1)
        )
        return tuple(next(back) if yes else None for yes in ctx.differentiable)


def _exchange(tensors: Sequence[torch.Tensor], to: int, source: int) -> tuple[torch.Tensor, ...]:
    """Send tensors to one rank and receive as many of the same shapes from another, all at once."""
    out = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    sends = [dist.P2POp(dist.isend, t.contiguous(), to % world_size()) for t in tensors]
    receives = [dist.P2POp(dist.irecv, t, source % world_size()) for t in out]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    return out
