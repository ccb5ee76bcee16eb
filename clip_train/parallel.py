"""One model on several ranks: a whole copy on each (DDP), or a part of every weight on each (FSDP2)."""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_train import ranks

KINDS = ("ddp", "fsdp")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered if it is sharded: every rank must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Write a whole tensor into one that may be sharded: every rank must call, with the same source."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the ranks hold parts of it (a DTensor)."""
    return hasattr(tensor, "to_local")


class Team:
    """A model on the ranks that train it together.

    model: whose parameters the optimizer updates; with FSDP a sharded copy of the one that was given, which keeps its
    weights on the CPU until finish(). runner: what a loss calls. A single process has neither wrapper nor copy.
    """

    def __init__(self, model: nn.Module, kind: str, device: torch.device, compile: bool = False) -> None:
        """kind: "ddp" or "fsdp", if there are several ranks. compile: with torch.compile, each block if sharded."""
        self.device = device
        self.sharded = kind == "fsdp" and ranks.world_size() > 1
        self._given = model
        self.model = (copy.deepcopy(model) if self.sharded else model).to(device).train()
        if ranks.world_size() > 1 and device.type == "cuda":
            synchronise_batchnorm(self.model)
        self._statistics = _running_statistics(self.model) if ranks.world_size() > 1 else []
        self.runner = self.model
        if self.sharded:
            self._shard(compile)
        elif ranks.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.runner = nn.parallel.DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        if compile and not self.sharded:
            self.runner = torch.compile(self.runner)

    @contextlib.contextmanager
    def holding(self, hold: bool) -> Iterator[None]:
        """With `hold`, the gradients of a forward and backward pass stay on this rank, to be sent with later ones."""
        if self.sharded:
            self.model.set_requires_gradient_sync(not hold)
        with self.runner.no_sync() if hold and hasattr(self.runner, "no_sync") else contextlib.nullcontext():
            yield

    @torch.no_grad()
    def clip(self, max_norm: float, factor: float = 1.0) -> torch.Tensor:
        """Divide the gradients by `factor`, scale them down to `max_norm`; returns their norm before that.

        After the last backward pass of a step. The norm, over all weights of all ranks, is the same on every rank.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        shards = [g.to_local() for g in gradients if is_sharded(g)]
        plain = [g for g in gradients if not is_sharded(g)]
        if self.sharded:  # FSDP leaves single numbers (the temperature) alone
            for gradient in plain:
                gradient.copy_(ranks.total(gradient) / ranks.world_size())
        square = _square(plain, self.device)
        if self.sharded:
            square = square + ranks.total(_square(shards, self.device))
        norm = square.sqrt() / factor
        torch._foreach_mul_(shards + plain, (max_norm / (norm + 1e-6)).clamp(max=1.0) / factor)
        return norm

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Average BatchNorm's running statistics over the ranks; after every step, so that all ranks stay alike."""
        if not self._statistics:
            return
        mean = ranks.total(torch.cat([t.flatten() for t in self._statistics])) / ranks.world_size()
        for tensor, part in zip(self._statistics, mean.split([t.numel() for t in self._statistics]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def assembled(self) -> Iterator[None]:
        """Every rank holds all weights meanwhile and may use any part of the model by itself, without gradients."""
        if not self.sharded:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        units = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not self.model, recurse=False)

    def finish(self, averaged: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The given model gets the trained weights, whole; returns the averaged ones, whole."""
        if not self.sharded:
            return averaged
        weights = {name: whole(t).cpu() for name, t in self.model.state_dict().items()}
        self._given.load_state_dict(weights)
        self._given.to(self.device)
        return {name: whole(t) for name, t in averaged.items()} if averaged else None

    def _shard(self, compile: bool) -> None:
        """Cut every weight into as many parts as there are ranks (FSDP, Zhao et al. 2023, arXiv 2304.11277).

        Blocks are gathered one at a time, when they run. Single numbers stay whole, and become the same parameters in
        the model that was given, so that what clamps one there clamps it here.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.data, 0)
        single = {name: p for name, p in self.model.named_parameters() if p.numel() == 1}
        for name, parameter in single.items():
            parent, _, own = name.rpartition(".")
            setattr(self._given.get_submodule(parent), own, parameter)
        # Weights travel in fp32 and autocast casts what multiplies, as it does without shards. A policy that gathers
        # bf16 would halve the traffic, but LayerNorm and BatchNorm take no bf16 weights beside fp32 inputs.
        how = {
            "mesh": init_device_mesh(self.device.type, (ranks.world_size(),)),
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
            "ignored_params": set(single.values()),
        }
        for block in blocks(self.model):
            if compile:
                block.compile()
            fully_shard(block, **how)
        fully_shard(self.model, **how, reshard_after_forward=False)


def synchronise_batchnorm(model: nn.Module) -> None:
    """Let BatchNorm use the statistics of all ranks' samples, in place; CUDA only, frozen ones (in eval mode) stay."""
    from timm.layers import convert_sync_batchnorm  # knows timm's layers that carry an activation

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and child.training:
                setattr(parent, name, convert_sync_batchnorm(child))


def _running_statistics(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
    layers = [m for m in layers if not isinstance(m, nn.SyncBatchNorm)]
    return [t for m in layers for t in (m.running_mean, m.running_var)]


def _square(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all numbers."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of ModuleLists and Sequentials that have weights: what a deep model is a stack of."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(module, nn.ModuleList | nn.Sequential):
                look(child)
            elif isinstance(child, nn.ModuleList | nn.Sequential):
                look(child)
            elif any(p.numel() > 1 for p in child.parameters()):
                found.append(child)

    look(model)
    return found
