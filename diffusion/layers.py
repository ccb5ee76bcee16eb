"""The parts both networks are made of: attention, the noise-level embedding, and layers that start silent."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseLevelEmbedding(nn.Module):
    """c_noise = log(sigma) / 4 (B,) -> (B, width): sines and cosines of doubling frequency, then a small MLP.

    Twelve octaves over c_noise in about [-1.6, 1.1]: the slowest wave tells clean from noise, the fastest tells
    neighbouring steps of a sampler apart.
    """

    def __init__(self, width: int, frequencies: int = 32):
        super().__init__()
        octaves = torch.linspace(-3, 5, frequencies)
        self.register_buffer("waves", 2 * math.pi * 2**octaves, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):  # torch's own start is so small that other inputs drown the level
            nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)

    def forward(self, noise_level: Tensor) -> Tensor:
        angle = noise_level.float()[:, None] * self.waves
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, watch: list[Tensor] | None = None) -> Tensor:
    """Softmax attention. q: (B, H, Q, C); k, v: (B, H, K, C); keep: (B, K) bool, False = not to be looked at.

    On CPU as plain matrix products: the fused kernel has no fast bf16 path there (1.45x slower, whole step).
    watch: gets the probabilities, averaged over the heads, (B, Q, K).
    """
    mask = None if keep is None else keep[:, None, None, :]
    if q.is_cuda and watch is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    shares = scores.softmax(-1)
    if watch is not None:
        watch.append(shares.float().mean(1))
    return shares.to(v.dtype) @ v


class Attention(nn.Module):
    """Tokens (B, N, width) look at each other and at context tokens (B, T, context_width); starts by adding nothing.

    watch: None, or a list that gets, at every call, who looks at what: probabilities (B, N, T + N), averaged over the
    heads, the context tokens first (what self-attention guidance needs).
    """

    def __init__(self, width: int, heads: int, context_width: int = 0):
        super().__init__()
        self.heads = heads
        self.watch: list[Tensor] | None = None
        self.qkv = nn.Linear(width, 3 * width)
        self.context = nn.Linear(context_width, 2 * width) if context_width else None
        self.out = silent(nn.Linear(width, width))

    def forward(self, tokens: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """keep: (B, T) bool for the context tokens; None keeps all. Returns what is to be added, (B, N, width)."""
        q, k, v = (self._by_head(part) for part in self.qkv(tokens).chunk(3, dim=-1))
        if context is not None:
            more_k, more_v = (self._by_head(part) for part in self.context(context).chunk(2, dim=-1))
            k, v = torch.cat([more_k, k], dim=2), torch.cat([more_v, v], dim=2)
            if keep is not None:
                keep = torch.cat([keep, keep.new_ones(tokens.shape[:2])], dim=1)
        return self.out(attend(q, k, v, keep, self.watch).transpose(1, 2).flatten(2))

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def silent(layer: nn.Linear | nn.Conv2d):
    """The layer with zero weights: a residual branch that ends in it starts as the identity, which trains steadily."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
