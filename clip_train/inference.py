"""A Clip for encoding alone: weights cast to 16 bits once, wherever its rows stay those of fp32.

What stays in fp32, because it decides how far the rows move: the sum that runs through a transformer's blocks, their
norms, and the projection. In a text tower also queries, keys and values: where a caption's attention hangs between two
tokens, scores of 8 bits choose another one. benchmarks/embed.py has figures.
"""

import copy
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip_train.lora import has_lora, merged_state
from clip_train.model import Clip
from clip_train.precision import resolved_precision
from clip_train.settings import UserError
from clip_train.towers import QuickBlock, is_quick

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAITHFUL = 0.9999  # least cosine to the fp32 rows that "auto" puts up with, on CHECKED made-up pictures and captions
CHECKED = 8
CHUNK_BYTES = 2**23  # of the largest activation: what a CPU encodes at a time stays in its cache and in freed memory


def for_inference(clip: Clip, precision: str | Mapping[str, str] = "auto") -> Clip:
    """See Clip.for_inference."""
    if any(one != "fp32" for one in clip.precision.values()):
        raise ValueError("for_inference() wants the CLIP as it was loaded, not what for_inference() made of it")
    asked = precision if isinstance(precision, Mapping) else dict.fromkeys(("image", "text"), precision)
    plain = _merged(clip) if has_lora(clip) else _copy(clip)
    plain.eval().requires_grad_(False)
    if plain.device.type == "cpu":
        plain.chunk = _chunk(plain)
    if not is_quick(plain.model)[0]:
        plain.model.visual.to(memory_format=torch.channels_last)
        _fold_norms(plain)
    plain.precision = dict.fromkeys(asked, "fp32")
    wanted = {tower: resolved_precision(one, plain.device) for tower, one in asked.items()}
    if wanted == plain.precision:
        return plain
    made = _copy(plain)
    for tower, one in wanted.items():
        if one == "fp32":
            continue
        done = _shorten(made, plain, tower, DTYPES[one], FAITHFUL)
        if not done and asked[tower] != "auto":  # as it was asked for, then
            done = _shorten(made, plain, tower, DTYPES[one], -1.0)
            if not done:
                raise UserError(f"this CLIP's {tower} tower cannot be computed in {one}; use precision fp32 or auto")
        made.precision[tower] = one if done else "fp32"
    return made


def _shorten(made: Clip, plain: Clip, tower: str, dtype: torch.dtype, least: float) -> bool:
    """Cast a tower in the first of the known ways whose rows have a cosine of `least` to plain's; False if none."""
    for way in _WAYS[tower]:
        if way(made, tower, dtype):
            if _least_cosine(made, plain, tower) >= least:
                return True
            _put_back(made, plain, tower)
    return False


class _Casting(nn.Linear):
    """A linear layer that takes its input in its own type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


def _short_blocks(clip: Clip, tower: str, dtype: torch.dtype, attention: bool) -> bool:
    """Cast the matrices of a quick tower's blocks, those in front of the attention too if asked; False if not quick."""
    image, text = is_quick(clip.model)
    if not (image if tower == "image" else text):
        return False
    part = clip.model.visual if tower == "image" else getattr(clip.model, "text", clip.model)
    for block in part.transformer.resblocks:
        assert isinstance(block, QuickBlock)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.__class__ = _Casting
            layer.to(dtype)
        if attention:
            block.attn.in_proj_weight.data = block.attn.in_proj_weight.data.to(dtype)
            block.attn.in_proj_bias.data = block.attn.in_proj_bias.data.to(dtype)
    if tower == "image":
        part.conv1.to(dtype)
    return True


def _short_throughout(clip: Clip, tower: str, dtype: torch.dtype) -> bool:
    """Cast a tower of any other kind as a whole, but for timm's last projection; False for a text tower in parts."""
    part = clip.model.visual if tower == "image" else getattr(clip.model, "text", None)
    if part is None or is_quick(clip.model)[tower == "text"]:
        return False
    part.to(dtype)
    if tower == "image":
        clip.pixel_dtype = dtype
        if hasattr(part, "trunk"):
            part.head.float().register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return True


def _short_with_attention(clip: Clip, tower: str, dtype: torch.dtype) -> bool:
    return _short_blocks(clip, tower, dtype, attention=True)


def _short_without_attention(clip: Clip, tower: str, dtype: torch.dtype) -> bool:
    return _short_blocks(clip, tower, dtype, attention=False)


def _short_if_fused(clip: Clip, tower: str, dtype: torch.dtype) -> bool:
    """On GPUs, whose fused attention keeps its scores in fp32."""
    return clip.device.type != "cpu" and _short_blocks(clip, tower, dtype, attention=True)


_WAYS = {  # the fastest first
    "image": (_short_with_attention, _short_without_attention, _short_throughout),
    "text": (_short_if_fused, _short_without_attention, _short_throughout),
}


def _put_back(clip: Clip, plain: Clip, tower: str) -> None:
    """Give `clip` the fp32 tower of `plain` again."""
    name = "visual" if tower == "image" else "text" if hasattr(plain.model, "text") else "transformer"
    setattr(clip.model, name, copy.deepcopy(getattr(plain.model, name)))
    if tower == "image":
        clip.pixel_dtype = torch.float32


def _least_cosine(clip: Clip, plain: Clip, tower: str) -> float:
    """Of a tower's rows to those of `plain`, over some pictures or captions; -2 if they cannot be computed."""
    try:
        if tower == "image":
            found, wanted = (one.encode_image(_pictures(plain)) for one in (clip, plain))
        else:
            found, wanted = (one.encode_text(_CAPTIONS) for one in (clip, plain))
    except RuntimeError:  # a layer that does not compute in this type
        return -2.0
    return float(F.cosine_similarity(found, wanted).nan_to_num(-2.0).min())


def _pictures(clip: Clip) -> torch.Tensor:
    """(CHECKED, 3, H, W) uint8: soft colours with some grain, always the same."""
    rng = torch.Generator().manual_seed(0)
    height, width = clip.picture_shape
    soft = 255 * torch.rand(CHECKED, 3, 6, 6, generator=rng)
    soft = F.interpolate(soft, (height, width), mode="bicubic")
    return (soft + 20 * torch.randn(soft.shape, generator=rng)).clamp(0, 255).to(torch.uint8)


_CAPTIONS = [
    "a red fox",
    "",
    "a photo of two dogs that run through deep snow near a lake",
    "12:45",
    "Woman: light skin tone, with a hat",
    "the flag of Japan",
    "stock photo, isolated on white",
    "a close view of a blue circle in the middle and a green bar near the bottom, number 8127",
]


def _copy(clip: Clip) -> Clip:
    """A deep copy, but for the tokenizer, which is large and never changes."""
    return copy.deepcopy(clip, {id(clip.tokenizer): clip.tokenizer})


def _merged(clip: Clip) -> Clip:
    """A copy with the LoRA adapters folded in."""
    made = Clip(clip.model_cfg, clip.preprocess_cfg)
    made.model.load_state_dict(merged_state(clip.model, None))
    made.fingerprint = clip.fingerprint
    return made.to(clip.device)


def _fold_norms(clip: Clip) -> None:
    """Fold every BatchNorm that directly follows a convolution into it, if the rows change by rounding alone."""
    visual, wanted = copy.deepcopy(clip.model.visual), clip.encode_image(_pictures(clip))
    for module in visual.modules():
        for (name, conv), (then, norm) in itertools.pairwise(list(module.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and conv.out_channels == norm.num_features:
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, then, nn.Identity())
    before, clip.model.visual = clip.model.visual, visual
    if F.cosine_similarity(clip.encode_image(_pictures(clip)), wanted).min() < 1 - 1e-5:  # they run in another order
        clip.model.visual = before


def _chunk(clip: Clip) -> int:
    """How many pictures a CPU encodes at a time."""
    visual = clip.model.visual
    height, width = clip.picture_shape
    widest = 32 * height * width  # of a convolutional tower: 64 channels at half the size
    if is_quick(clip.model)[0]:
        tokens = 1 + visual.grid_size[0] * visual.grid_size[1]
        widest = 2 * tokens * visual.transformer.resblocks[0].mlp.c_fc.out_features
    return max(4, CHUNK_BYTES // widest)
