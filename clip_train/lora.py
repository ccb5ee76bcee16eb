"""LoRA: train low-rank additions to frozen matrices, then fold them in (Hu et al. 2021, arXiv 2106.09685).

Each matrix W (out, in) becomes W + alpha / rank * up @ down through torch's parametrize, so whatever reads
module.weight, open_clip's forward or the faster one, reads the sum. Merged weights are plain open_clip weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from clip_train.settings import UserError

TOWERS = ("image", "text")


class LowRank(nn.Module):
    """W -> W + alpha / rank * up @ down, reshaped to W; up starts at zero, so nothing changes at first."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        like = {"device": weight.device, "dtype": weight.dtype}
        self.down = nn.Parameter(torch.empty(rank, columns, **like))
        self.up = nn.Parameter(torch.zeros(rows, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as the authors' code
        self.scale = alpha / rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).view(weight.shape)


def add_lora(
    clip: nn.Module, rank: int = 8, alpha: float | None = None, towers: Sequence[str] = TOWERS, conv: bool = False
) -> list[str]:
    """Freeze a Clip and put adapters on its linear and attention matrices; returns the names of the adapted weights.

    rank: of the additions. alpha: their strength; None: 2 * rank. towers: which get adapters ("image", "text"). conv:
    convolutions (a ViT's patch embedding too) as well. The temperature, and a logit_bias, go on being trained.
    """
    alpha = 2.0 * rank if alpha is None else alpha
    if rank < 1 or not alpha > 0:
        raise UserError(f"LoRA's rank {rank} must be at least 1 and its alpha {alpha:g} above 0")
    if not towers or set(towers) - set(TOWERS):
        raise UserError(f"LoRA's towers {', '.join(towers) or '(none)'} must be out of: {', '.join(TOWERS)}")
    if has_lora(clip):
        raise UserError("this CLIP has LoRA adapters already; merge them first: lora.merge_lora(clip)")
    model = clip.model
    model.requires_grad_(False)
    adapted = []
    for name, module in list(model.named_modules()):
        tower = "image" if name.split(".")[0] == "visual" else "text"
        for weight in _matrices(module, conv) if tower in towers else ():
            rank_here = min(rank, len(getattr(module, weight)), getattr(module, weight)[0].numel())
            adapter = LowRank(getattr(module, weight), rank_here, alpha * rank_here / rank)
            parametrize.register_parametrization(module, weight, adapter)
            adapted.append(f"{name}.{weight}")
    if not adapted:
        raise UserError(f"the {' and '.join(towers)} tower has no matrices that LoRA adapts; add conv")
    for name in ("logit_scale", "logit_bias"):
        if getattr(model, name) is not None:
            getattr(model, name).requires_grad_(True)
    return adapted


def merge_lora(clip: nn.Module) -> None:
    """Fold the adapters into the weights they change, in place: the state dict is open_clip's own again.

    What add_lora froze stays frozen. Of a deepcopy and its original only one can be merged.
    """
    for module in list(clip.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def has_lora(clip: nn.Module) -> bool:
    """Whether add_lora was called on this Clip and merge_lora was not since."""
    return any(isinstance(module, LowRank) for module in clip.modules())


@torch.no_grad()
def merged_state(model: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The plain open_clip state dict of an adapted open_clip model, or of `weights` (EMA) under its names."""
    state = dict(weights or model.state_dict())
    for path, adapter in model.named_modules():
        if isinstance(adapter, LowRank):
            wrapped = path.rsplit(".", 1)[0]  # MODULE.parametrizations.WEIGHT
            original = state.pop(f"{wrapped}.original")
            added = adapter.scale * (state.pop(f"{path}.up") @ state.pop(f"{path}.down"))
            state[wrapped.replace(".parametrizations.", ".")] = original + added.view(original.shape)
    return state


def _matrices(module: nn.Module, conv: bool) -> tuple[str, ...]:
    """The weights of a module that get an adapter. MultiheadAttention's out_proj is a Linear of its own."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight",) if module.in_proj_weight is not None else ()
    if isinstance(module, nn.Linear) or (conv and isinstance(module, nn.Conv2d)):
        return ("weight",)
    return ()
