"""From a batch to gradients: at once, in parts whose gradients add up, or in parts that see the whole batch."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from clip_train import ranks
from clip_train.parallel import Team
from clip_train.precision import autocast

Batch = dict[str, torch.Tensor]
# loss_fn(model, batch, rng) -> (scalar loss, numbers to log)
LossFunction = Callable[[nn.Module, Batch, torch.Generator], tuple[torch.Tensor, dict[str, Any]]]


class RowsLoss(Protocol):
    """A loss that compares the samples of a batch with each other, in two steps, so that a batch can come in parts."""

    def rows(self, model: nn.Module, part: Batch, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        """What the model makes of a part of the batch: first tensors (b, D), then scalars (scale, bias)."""

    def loss(self, rows: tuple[torch.Tensor, ...], batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of all of this rank's rows, gathering from other ranks what it needs, and numbers to log."""


def make_gradients(
    team: Team,
    loss_fn: LossFunction | RowsLoss,
    batch: Batch,
    *,
    accumulate: int,
    precision: str,
    seed: int,
    step: int,
    factor: float = 1.0,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Leave the gradients of `factor` times the loss in team.model; returns the loss of this rank and numbers to log.

    The batch is cut into `accumulate` parts. A function's loss is the mean over them. A RowsLoss is taken of the rows
    of all parts together: its gradients are those of the whole batch, for a second forward pass (GradCache, Gao et al.
    2021, arXiv 2101.06983). What is random in a part follows from (seed, step, rank, part) in both passes.
    """
    batch = {name: t.to(team.device, non_blocking=True) for name, t in batch.items()}
    parts = _cut(batch, accumulate)

    def enter(i: int) -> torch.Generator:
        return seed_part(seed, step, i, team.device)

    if hasattr(loss_fn, "rows") and accumulate > 1:
        return _cached(team, loss_fn, batch, parts, enter, precision, factor)
    total = torch.zeros((), device=team.device)
    for i, part in enumerate(parts):
        rng = enter(i)
        with team.holding(i + 1 < accumulate):
            with autocast(precision, team.device):
                if hasattr(loss_fn, "rows"):
                    loss, numbers = loss_fn.loss(loss_fn.rows(team.runner, part, rng), part)
                else:
                    loss, numbers = loss_fn(team.runner, part, rng)
            (loss * (factor / accumulate)).backward()
        total += loss.detach() / accumulate
    return total, numbers


def _cached(
    team: Team,
    loss_fn: RowsLoss,
    batch: Batch,
    parts: list[Batch],
    enter: Callable[[int], torch.Generator],
    precision: str,
    factor: float,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """All rows without a graph; the loss and its gradient with respect to them; then part by part again, with one."""
    made = []
    with torch.no_grad(), unchanged_buffers(team.model):
        for i, part in enumerate(parts):
            rng = enter(i)
            with autocast(precision, team.device):
                made.append([row.detach() for row in loss_fn.rows(team.runner, part, rng)])
    leaves = [(torch.cat(r) if r[0].ndim > 1 else r[0].clone()).requires_grad_() for r in zip(*made, strict=True)]

    loss, numbers = loss_fn.loss(tuple(leaves), batch)
    (loss * factor).backward()
    gradients = [_shares(leaf, len(parts)) for leaf in leaves]

    for i, part in enumerate(parts):
        rng = enter(i)
        with team.holding(i + 1 < len(parts)):
            with autocast(precision, team.device):
                rows = loss_fn.rows(team.runner, part, rng)
            pairs = [(r, g[i]) for r, g in zip(rows, gradients, strict=True) if r.requires_grad and g[i] is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
    return loss.detach(), numbers


def _shares(leaf: torch.Tensor, count: int) -> Sequence[torch.Tensor | None]:
    """The gradient of each part's rows; that of a scalar, which every part has, goes to the last one alone."""
    if leaf.grad is None:
        return [None] * count
    return leaf.grad.chunk(count) if leaf.ndim > 1 else [None] * (count - 1) + [leaf.grad]


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """What a forward pass does to the model's buffers (BatchNorm's running statistics) is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def _cut(batch: Batch, count: int) -> list[Batch]:
    if count == 1:
        return [batch]
    cut = {name: t.chunk(count) for name, t in batch.items()}
    return [{name: parts[i] for name, parts in cut.items()} for i in range(count)]


def seed_part(seed: int, step: int, part: int, device: torch.device) -> torch.Generator:
    """Seed torch's own generators (dropout) and make one for the loss, both from (seed, step, rank, part)."""
    number = ((seed * 1_000_003 + step) * 1_000_003 + ranks.rank() ^ part * 0x9E3779B97F4A7C15) % 2**63
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond on a machine without a GPU
    if device.type == "cuda":
        torch.cuda.manual_seed_all(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)
    return torch.Generator(device).manual_seed(number ^ 0x5DEECE66D)
