"""open_clip's own ViT and text transformer, computed with less work: same weights, same files, same mathematics.

What is saved, next to open_clip's forward: the last block is computed for the pooled token alone; captions are cut to
the longest of the batch; on CPUs attention is three plain matrix products, as the fused bf16 kernel is the slow part
there (benchmarks/clip_train.py has the figures). A tower of any other kind keeps open_clip's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_train.settings import UserError


def quicken(model: nn.Module) -> None:
    """Give an open_clip model (CLIP or CustomTextCLIP) the faster forward for each tower that is of a kind known here.

    In place, by swapping classes, as torch's parametrize and FSDP do: weights, their names and hooks stay, and
    encode_image and encode_text go on being the way in.
    """
    if _known_image(model.visual):
        _quicken_blocks(model.visual.transformer)
        model.visual.__class__ = QuickVisionTransformer
    if type(model) is CLIP and model.text_pool_type == "argmax" and model.attn_mask is not None:
        if _known_stack(model.transformer) and _known(model.ln_final, LayerNorm, LayerNormFp32):
            _quicken_blocks(model.transformer)
            model.__class__ = QuickClip
    elif _known_text(getattr(model, "text", None)):
        _quicken_blocks(model.text.transformer)
        model.text.__class__ = QuickTextTransformer


def is_quick(model: nn.Module) -> tuple[bool, bool]:
    """Whether the image tower and the text tower of an open_clip model are computed by this file."""
    text = isinstance(model, QuickClip) or isinstance(getattr(model, "text", None), QuickTextTransformer)
    return isinstance(model.visual, QuickVisionTransformer), text


@dataclass(frozen=True)
class Packing:
    """Rows of different lengths without their padding: token i of row b is kept where i < lengths[b]."""

    batch: int
    length: int  # of the longest row
    places: torch.Tensor  # (R,) int64: where the kept tokens stand among batch * length
    ends: torch.Tensor  # (B,) int64: where each row's last token stands among the R kept ones

    @classmethod
    def of(cls, lengths: torch.Tensor) -> "Packing":
        """lengths: (B,) int64, at least 1 each."""
        longest = int(lengths.max())
        kept = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(len(lengths), longest, kept.flatten().nonzero()[:, 0], lengths.cumsum(0) - 1)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, W) -> (B, T, W), zeros where nothing was kept."""
        empty = rows.new_zeros(self.batch * self.length, rows.shape[-1])
        return empty.index_copy(0, self.places, rows).view(self.batch, self.length, -1)

    def pack(self, spread: torch.Tensor) -> torch.Tensor:
        """(B, T, W) -> (R, W)"""
        return spread.flatten(0, 1).index_select(0, self.places)


class QuickBlock(ResidualAttentionBlock):
    """open_clip's pre-norm transformer block, its attention written out."""

    def forward(
        self,
        q_x: torch.Tensor,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
        only: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q_x (B, L, W) -> the same shape; or q_x (R, W), the rows that `packing` kept of (B, L, W) -> the same shape.

        With `only` (B,), the one token of each row that is wanted, counted through all of q_x's: -> (B, 1, W).
        attn_mask: added to the scores, (L, L), with `only` (B, 1, L). k_x, v_x: for cross-attention, always None here.
        """
        weight, bias, heads = self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.num_heads
        x, y, width = q_x, self.ln_1(q_x).to(weight.dtype), q_x.shape[-1]  # of another type in inference.py alone
        if only is None:
            all_three = F.linear(y, weight, bias)
            all_three = packing.spread(all_three) if packing else all_three
            mixed = _attend(*all_three.chunk(3, -1), heads, attn_mask)
            mixed = packing.pack(mixed) if packing else mixed
        else:
            x = x.view(-1, width).index_select(0, only)[:, None]
            queries = F.linear(y.view(-1, width).index_select(0, only)[:, None], weight[:width], bias[:width])
            keys_values = F.linear(y, weight[width:], bias[width:])
            keys_values = packing.spread(keys_values) if packing else keys_values
            mixed = _attend(queries, *keys_values.chunk(2, -1), heads, attn_mask)
        x = x + self.ls_1(self.attn.out_proj(mixed))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class QuickVisionTransformer(VisionTransformer):
    """open_clip's ViT; the last block for the class token alone where that is what is pooled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised -> (B, D)."""
        x = self._embeds(x)
        if self.pool_type == "tok":
            first = torch.arange(len(x), device=x.device) * x.shape[1]
            pooled = self.ln_post(_run(self.transformer, x, only=first)[:, 0])
        else:
            pooled, _ = self._pool(_run(self.transformer, x))
        return pooled if self.proj is None else pooled @ self.proj

    def _embeds(self, x: torch.Tensor) -> torch.Tensor:
        (down, right), (rows, columns) = self.patch_size, self.grid_size
        if x.shape[2:] != (down * rows, right * columns):
            return super()._embeds(x)  # says what is wrong
        # a convolution whose patches do not overlap is a matrix product
        x = x.reshape(len(x), 3, rows, down, columns, right).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        weight, place = self.conv1.weight.flatten(1), self.positional_embedding
        x = F.linear(x.to(weight.dtype), weight)
        place = place.to(x.dtype) if weight.dtype == place.dtype else place  # inference.py keeps the sum in fp32
        first = (self.class_embedding.to(place.dtype) + place[0]).expand(len(x), 1, -1)
        return self.ln_pre(self.patch_dropout(torch.cat([first, x + place[1:]], 1)))


class QuickTextTransformer(TextTransformer):
    """open_clip's text tower, causal, pooled at the end token."""

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, D)."""
        return _text_rows(self, text)


class QuickClip(CLIP):
    """open_clip's CLIP, which holds the parts of its text tower itself."""

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(B, T) token ids -> (B, D)."""
        rows = _text_rows(self, text)
        return F.normalize(rows, dim=-1) if normalize else rows


def set_patch_dropout(visual: nn.Module, share: float) -> None:
    """Set the share of patches that a ViT, open_clip's or timm's, leaves out in training. UserError for others."""
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(share) if share else nn.Identity()
    elif hasattr(getattr(visual, "trunk", None), "patch_drop"):
        from timm.layers import PatchDropout as TimmPatchDropout

        prefix = visual.trunk.num_prefix_tokens
        visual.trunk.patch_drop = TimmPatchDropout(share, num_prefix_tokens=prefix) if share else nn.Identity()
    elif share:
        raise UserError("patch dropout needs an image tower made of patches; this one has none: set it to 0")


def text_states(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The normalised states (B, T, W) that an open_clip text tower (CLIP itself, or its `text`) pools from."""
    length = tokens.shape[1]
    mask = tower.attn_mask[:length, :length] if tower.attn_mask is not None else None
    return tower.ln_final(tower.transformer(_text_embeds(tower, tokens), attn_mask=mask))


def cut(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T) without the padding that the whole batch shares: the tower is causal, so nothing else changes."""
    return tokens[:, : int(tokens.argmax(-1).max()) + 1]


def _text_rows(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    last = tokens.argmax(-1)  # the end token has the highest id; a causal tower's state there knows nothing of padding
    if torch.compiler.is_compiling():  # each other count of tokens would be another program
        packing, only = None, torch.arange(len(tokens), device=tokens.device) * tokens.shape[1] + last
    else:
        packing = Packing.of(last + 1)
        tokens, only = tokens[:, : packing.length], packing.ends
    x, mask = _text_embeds(tower, tokens), tower.attn_mask[: tokens.shape[1], : tokens.shape[1]]
    states = _run(tower.transformer, packing.pack(x) if packing else x, mask, packing, only, mask[last][:, None])
    pooled, projection = tower.ln_final(states[:, 0]), tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _text_embeds(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]


def _run(
    stack: Transformer,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    packing: Packing | None = None,
    only: torch.Tensor | None = None,
    only_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """x through the blocks, the last one for the tokens `only`, if given; see QuickBlock."""
    *blocks, last = stack.resblocks
    steps = [(block, mask, None) for block in blocks]
    steps += [(last, mask, None) if only is None else (last, only_mask, only)]
    for block, added, wanted in steps:
        if stack.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, None, None, added, packing, wanted, use_reentrant=False)
        else:
            x = block(x, None, None, added, packing, wanted)
    return x


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention: queries (B, Q, W), keys and values (B, L, W) -> (B, Q, W).

    mask: None, (L, L), which is causal in all towers here, or (B, Q, L).
    """
    batch, count, width = queries.shape
    queries, keys, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, keys, values))
    if queries.device.type != "cpu":
        causal = mask is not None and mask.ndim == 2
        added = None if causal or mask is None else mask[:, None].to(queries.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=added, is_causal=causal)
        return mixed.transpose(1, 2).reshape(batch, count, width)
    queries, keys, values = (t.reshape(batch * heads, -1, width // heads) for t in (queries, keys, values))
    scale, added = (width // heads) ** -0.5, queries.new_zeros(1)
    if mask is not None:
        added = mask.to(queries.dtype)
        added = added.repeat_interleave(heads, 0) if mask.ndim == 3 else added
    scores = torch.baddbmm(added, queries, keys.transpose(1, 2), beta=float(mask is not None), alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), values)
    return mixed.view(batch, heads, count, -1).transpose(1, 2).reshape(batch, count, width)


def _quicken_blocks(stack: Transformer) -> None:
    for block in stack.resblocks:
        block.__class__ = QuickBlock


def _known(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes exactly as one of `kinds`; what parametrize has wrapped does."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _known_image(tower: nn.Module) -> bool:
    return (
        _known(tower, VisionTransformer)
        and tower.attn_pool is None
        and tower.pool_type in ("tok", "avg")
        and not tower.output_tokens
        and _known(tower.patch_dropout, nn.Identity, PatchDropout)
        and _known(tower.ln_pre, LayerNorm, LayerNormFp32, nn.Identity)
        and _known(tower.ln_post, LayerNorm, LayerNormFp32)
        and _known_stack(tower.transformer)
    )


def _known_text(tower: nn.Module | None) -> bool:
    return (
        _known(tower, TextTransformer)
        and tower.cls_emb is None
        and not tower.use_pad_mask
        and tower.attn_mask is not None
        and tower.pool_type == "argmax"
        and not tower.output_tokens
        and _known(tower.ln_final, LayerNorm, LayerNormFp32)
        and _known_stack(tower.transformer)
    )


def _known_stack(stack: nn.Module) -> bool:
    return _known(stack, Transformer) and stack.batch_first and all(_known_block(b) for b in stack.resblocks)


def _known_block(block: nn.Module) -> bool:
    parts: list[Callable[[], bool]] = [
        lambda: _known(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv"),
        lambda: _known(block.attn, nn.MultiheadAttention) and block.attn.in_proj_weight is not None,
        lambda: block.attn.in_proj_bias is not None and block.attn.bias_k is None and not block.attn.add_zero_attn,
        lambda: block.attn.dropout == 0 and block.attn.batch_first,
        lambda: all(_known(norm, LayerNorm, LayerNormFp32) for norm in (block.ln_1, block.ln_2)),
        lambda: all(_known(scale, nn.Identity, LayerScale) for scale in (block.ls_1, block.ls_2)),
        lambda: _known(block.mlp, nn.Sequential) and _known(block.mlp.gelu, nn.GELU, QuickGELU),
    ]
    return all(part() for part in parts)
