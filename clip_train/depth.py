"""How deep in its tower each weight stands: what layer-wise learning rates and locked towers go by.

Depth 0 is the embeddings (stem), 1 .. L the blocks (stages of a convolutional tower), L + 1 the projection. The norm
after the last block counts with that block, as in open_clip's lock.
"""

import re

from torch import nn

from clip_train.settings import UserError


def depths(model: nn.Module) -> dict[str, dict[str, int]]:
    """{"image": {weight: depth}, "text": {weight: depth}} of an open_clip model's weights, by their full names.

    Weights that LoRA added stand where the ones they change do. UserError for a tower of unknown layout.
    """
    text_prefix = "text." if hasattr(model, "text") else ""
    found: dict[str, dict[str, int]] = {"image": {}, "text": {}}
    stages = _timm_stages(model.visual) if hasattr(model.visual, "trunk") else None
    for name, _ in model.named_parameters():
        if name in ("logit_scale", "logit_bias"):
            continue
        tower = "image" if name.startswith("visual.") else "text"
        own = name.removeprefix("visual." if tower == "image" else text_prefix)
        found[tower][name] = stages[own] if stages and tower == "image" else _depth(own, model, tower)
    for places in found.values():  # projection: one above the deepest block
        top = max((d for d in places.values() if d < _HEAD), default=-1)
        places.update({name: top + 1 for name, d in places.items() if d == _HEAD})
    return found


def lr_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """{weight: decay ** (its tower's deepest depth - its own)}: 1 at the projection, less towards the embeddings.

    Layer-wise decay as in BEiT (arXiv 2106.08254); each tower counts for itself. Temperature and bias: 1.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer-wise decay {decay:g} must be above 0 and at most 1")
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for places in depths(model).values():
        top = max(places.values())
        scales |= {name: decay ** (top - depth) for name, depth in places.items()}
    return scales


def lock(model: nn.Module, tower: str, unlocked_groups: int = 0) -> None:
    """Turn off the gradients of a tower ("image" or "text") but for its last `unlocked_groups` depths.

    LiT (Zhai et al. 2022, arXiv 2111.07991) locks the image tower: unlocked_groups 0, or 1 to train its projection.
    """
    if tower not in ("image", "text"):
        raise UserError(f"no tower {tower!r} to lock; there are: image, text")
    if unlocked_groups < 0:
        raise UserError(f"unlocked_groups {unlocked_groups} must be at least 0")
    places = depths(model)[tower]
    first_trained = max(places.values()) + 1 - unlocked_groups
    for name, depth in places.items():
        if depth < first_trained:
            model.get_parameter(name).requires_grad_(False)


def freeze_statistics(model: nn.Module) -> None:
    """Put BatchNorm layers whose weights are locked into eval mode, so that their running statistics stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()


_HEAD = 10**6  # stands for one above the deepest block until that is known
_STEM = re.compile(r"(conv[123]|bn[123]|class_embedding|positional_embedding|ln_pre|token_embedding|cls_emb)\b")
_NORM = re.compile(r"(ln_post|ln_final)\b")
_PROJECTION = re.compile(r"(proj|text_projection|attnpool|head|attn_pool)\b")


def _depth(name: str, model: nn.Module, tower: str) -> int:
    """Depth of a weight of open_clip's own towers: ViT, ModifiedResNet, text transformer."""
    if block := re.match(r"transformer\.resblocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if stage := re.match(r"layer(\d+)\.", name):
        return int(stage[1])
    if _STEM.match(name):
        return 0
    if _NORM.match(name):
        text = getattr(model, "text", model)
        stack = model.visual.transformer if tower == "image" else text.transformer
        return len(stack.resblocks)
    if _PROJECTION.match(name):
        return _HEAD
    raise UserError(f"the {tower} tower has a weight {name} of unknown depth; train it without lock and layer decay")


def _timm_stages(visual: nn.Module) -> dict[str, int]:
    """{weight of a TimmModel: stage}, by timm's own grouping of the trunk."""
    from timm.models import group_parameters

    try:
        matcher = visual.trunk.group_matcher(coarse=True)
    except (AttributeError, TypeError) as error:
        raise UserError("this timm tower does not say how its layers are grouped; train it without lock") from error
    groups = group_parameters(visual.trunk, matcher, reverse=True)
    return {name: groups[name[6:]] if name.startswith("trunk.") else _HEAD for name, _ in visual.named_parameters()}
