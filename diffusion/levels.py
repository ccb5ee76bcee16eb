"""The body of the decoder's network: blocks on grids, each half as fine as the one before, down and up again.

Four networks are one plan each (PLANS): which grids have convolutions, which have a transformer's blocks, and what goes
over from the way down to the way up.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.layers import Attention, silent

if TYPE_CHECKING:
    from diffusion.decoder import DecoderConfig


@dataclass(frozen=True)
class Plan:
    """What a network is made of."""

    about: str
    transformer: str  # grids whose blocks are a transformer's: "none", "last" or "all"; the others have convolutions
    skips: str  # what the way up gets to see of the way down: "level", "block" (each block's output), or "none"


PLANS = {
    "hybrid": Plan("convolutions, with attention on the coarse grids", "none", "level"),
    "unet": Plan(
        "the same with a skip from every block (ADM, arXiv 2105.05233; with patch 1 as there)", "none", "block"
    ),
    "uvit": Plan(
        "convolutions around a transformer (simple diffusion, arXiv 2301.11093, section 3.3)", "last", "block"
    ),
    "dit": Plan("a transformer on patches (arXiv 2212.09748), usually of one level", "all", "none"),
}


class Levels(nn.Module):
    """Cells (B, widths[0], G, G) -> the same shape, steered by a vector and looking at tokens."""

    def __init__(self, config: "DecoderConfig"):
        super().__init__()
        plan, widths, last = PLANS[config.network], config.widths, len(config.widths) - 1
        self.down, self.up, self.merge, self.shrink, self.grow, self.places = (nn.ModuleList() for _ in range(6))
        for level, width in enumerate(widths):
            grid = config.image_size // config.patch // 2**level
            turns = plan.transformer == "all" or (plan.transformer == "last" and level == last)
            self.places.append(Places(width, grid) if turns else nn.Identity())
            for way in (self.down, self.up):
                kind = [TransformerBlock(width, config) if turns else Block(width, config, grid in config.attention)
                        for _ in range(config.blocks[level])]  # fmt: skip
                way.append(nn.ModuleList(kind))
            count = {"none": 0, "block": config.blocks[level], "level": int(level < last)}[plan.skips]
            self.merge.append(nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(count)))
            if level < last:
                self.shrink.append(nn.Conv2d(4 * width, widths[level + 1], 1))
                self.grow.append(nn.Conv2d(widths[level + 1], 4 * width, 1))

    def forward(self, h: Tensor, steer: Tensor, tokens: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """steer: (B, cond_width); tokens: (B, T, cond_width); keep: (B, T) bool or None.

        Returns the cells, and the coarsest ones half way, (B, widths[-1], g, g).
        """
        kept: list[list[Tensor]] = []
        for level, blocks in enumerate(self.down):
            h = self.places[level](h)
            kept.append([])
            for block in blocks:
                h = block(h, steer, tokens, keep)
                kept[-1].append(h)
            if level < len(self.shrink):
                h = self.shrink[level](F.pixel_unshuffle(h, 2))
        middle = h
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = F.pixel_shuffle(self.grow[level](h), 2)
            for number, block in enumerate(self.up[level]):
                if number < len(self.merge[level]):
                    h = self.merge[level][number](torch.cat([h, kept[level].pop()], dim=1))
                h = block(h, steer, tokens, keep)
        return h, middle


class Block(nn.Module):
    """Residual block: norm, two 3x3 convolutions with the steering (scale and shift) between them, then attention."""

    def __init__(self, width: int, config: "DecoderConfig", looks: bool):
        super().__init__()
        self.norm = norm(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.steer = nn.Linear(config.cond_width, 2 * width)
        self.drop = nn.Dropout(config.dropout)
        self.second = silent(nn.Conv2d(width, width, 3, padding=1))
        self.norm_cells = nn.LayerNorm(width) if looks else None
        self.look = Attention(width, width // config.head_width, config.cond_width) if looks else None

    def forward(self, h: Tensor, steer: Tensor, tokens: Tensor, keep: Tensor | None) -> Tensor:
        scale, shift = self.steer(steer)[:, :, None, None].chunk(2, dim=1)
        inner = self.first(F.silu(self.norm(h)))
        h = h + self.second(self.drop(F.silu(inner * (1 + scale) + shift)))
        if self.look is not None:
            cells = h.flatten(2).transpose(1, 2)
            cells = cells + self.look(self.norm_cells(cells), tokens, keep)
            h = cells.transpose(1, 2).unflatten(2, h.shape[2:])
        return h


class TransformerBlock(nn.Module):
    """Attention, then two linear layers, each steered before and after (adaLN, DiT, arXiv 2212.09748, section 3.2)."""

    def __init__(self, width: int, config: "DecoderConfig"):
        super().__init__()
        self.steer = silent(nn.Linear(config.cond_width, 6 * width))
        self.norm_look, self.norm_think = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.look = Attention(width, width // config.head_width, config.cond_width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), silent(nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, steer: Tensor, tokens: Tensor, keep: Tensor | None) -> Tensor:
        cells = h.flatten(2).transpose(1, 2)
        scale, shift, gain, scale2, shift2, gain2 = self.steer(steer)[:, None].chunk(6, dim=2)
        inner = self.look(self.norm_look(cells) * (1 + scale) + shift, tokens, keep)
        cells = cells + inner * (1 + gain)
        inner = self.narrow(
            self.drop(F.gelu(self.widen(self.norm_think(cells) * (1 + scale2) + shift2), approximate="tanh"))
        )
        cells = cells + inner * (1 + gain2)
        return cells.transpose(1, 2).unflatten(2, h.shape[2:])


class Places(nn.Module):
    """Tells each cell of a grid where it is: added numbers, at first sines and cosines of row and column."""

    def __init__(self, width: int, grid: int):
        super().__init__()
        waves = torch.exp(-torch.linspace(0, 1, width // 4) * torch.log(torch.tensor(float(max(grid, 2)))))
        angle = torch.arange(grid)[:, None] * waves * torch.pi / 2  # the fastest turns in 4 cells
        line = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (width / 2, G)
        both = torch.cat([line[:, :, None].expand(-1, -1, grid), line[:, None, :].expand(-1, grid, -1)])
        self.positional_embedding = nn.Parameter(F.pad(both, (0, 0, 0, 0, 0, width - len(both))).clone())

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, G, G) -> the same."""
        return h + self.positional_embedding


def norm(width: int) -> nn.GroupNorm:
    """Group norm with 16 channels a group, where these divide the width."""
    return nn.GroupNorm(width // 16 if width % 16 == 0 else 1, width)
