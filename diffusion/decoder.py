"""The decoder's network: a noisy picture and a CLIP image embedding -> the picture.

A U-Net on space-to-depth pixels: convolutions where the grid is fine (locality is what small data teaches best),
attention where it is coarse. The embedding enters twice, as in unCLIP (Ramesh et al. 2022, arXiv 2204.06125, section
2.1): added to the noise-level embedding that steers every block, and as extra tokens that attention looks at. The
text tower's states can be looked at too.

What is diffused is the difference to a linear guess at the picture (ridge.py), which the network sees as well.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.captions import check_mix
from clip_train.settings import UserError
from diffusion.denoiser import Cond, Denoiser, Scaling, refuse_unknown
from diffusion.layers import Attention, NoiseLevelEmbedding, silent
from diffusion.ridge import LinearGuess


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that decides what the decoder is and on what noise it trains. Saved beside the weights."""

    embed_dim: int = 0  # width of the CLIP embedding; 0: what the CLIP folder says
    image_size: int = 32  # side of the pictures, pixels
    patch: int = 2  # side of the squares of pixels that become one cell of the finest grid
    widths: tuple[int, ...] = (64, 128, 256)  # channels per level; each level halves the grid
    blocks: tuple[int, ...] = (2, 1, 1)  # residual blocks per level, on the way down and again on the way up
    attention: tuple[int, ...] = (8, 4)  # grids (cells a side) at which cells look at each other and at the tokens
    head_width: int = 32  # channels per attention head
    cond_width: int = 256  # of the vector that steers every block, and of the tokens
    image_tokens: int = 4  # extra tokens made from the image embedding
    text: bool = False  # look at the text tower's states as well
    text_width: int = 0  # of these states; 0: what the CLIP folder says
    dropout: float = 0.0  # inside residual blocks
    drop_image: float = 0.1  # share of samples that lose their image embedding, so that guidance works
    drop_text: float = 0.5  # share of samples that lose their text tokens
    caption_mix: tuple[float, ...] = ()  # weights of a picture's 1st, 2nd, ... caption, see captions.pick_caption
    predict: str = "edm"  # what the network puts out: edm, v, x0, eps
    sigma_data: float = 0.5  # std of a pixel in [-1, 1]
    density: str = "log_normal"  # of sigma in training (schedule.DENSITIES)
    sigma_mean: float = -0.8  # of ln sigma, for log_normal: where training looks most
    sigma_std: float = 1.1

    @property
    def guess_size(self) -> int:
        """Side of the linear guess, pixels: what is finer is not linear in the embedding."""
        return min(self.image_size, 32)

    def __post_init__(self) -> None:
        refuse_unknown("decoder", self.predict, self.density)
        check_mix(self.caption_mix)
        sizes = (self.image_size, self.patch, self.head_width, self.cond_width, self.image_tokens, *self.widths)
        if min(sizes) < 1 or not self.widths:
            raise UserError(f"decoder: sizes and widths must be at least 1, not {min(sizes)}")
        grid = self.image_size / self.patch / 2 ** (len(self.widths) - 1)
        if grid != int(grid) or grid < 1:
            raise UserError(
                f"decoder: image_size {self.image_size} cannot be halved into patch {self.patch} and "
                f"{len(self.widths)} levels; choose an image_size that is a multiple of "
                f"{self.patch * 2 ** (len(self.widths) - 1)}"
            )
        if len(self.blocks) != len(self.widths):
            raise UserError(f"decoder: {len(self.widths)} widths but {len(self.blocks)} blocks; one number per level")
        wrong = [width for width in self.widths if width % self.head_width]
        if wrong:
            raise UserError(f"decoder: width {wrong[0]} is not a multiple of head_width {self.head_width}")


# Size of a coordinate of the image embedding where the network reads it. At 1, an Adam step on the layers that read
# D of them moves their outputs by lr * D, and learning rates above 1e-3 do not train; at 0.2, up to 3e-3 do.
IMAGE_SIZE = 0.2


class Decoder(nn.Module):
    """The network; see the top of the file. Wrap it with `DecoderDenoiser` to get denoised pictures."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        widths, cond = config.widths, config.cond_width
        self.noise_level = NoiseLevelEmbedding(cond)
        self.null_image = nn.Parameter(torch.zeros(config.embed_dim))
        self.image_in = nn.Linear(config.embed_dim, cond)
        self.image_tokens = nn.Linear(config.embed_dim, config.image_tokens * cond)
        self.text_in = nn.Linear(config.text_width, cond) if config.text else None
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())

        grids = [config.image_size // config.patch // 2**level for level in range(len(widths))]
        looks = [grid in config.attention for grid in grids]
        self.linear = LinearGuess(config.embed_dim, 3 * config.guess_size**2)
        self.enter = nn.Conv2d(9 * config.patch**2, widths[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.merge, self.up = (nn.ModuleList() for _ in range(5))
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList(Block(width, config, looks[level]) for _ in range(config.blocks[level])))
            self.up.append(nn.ModuleList(Block(width, config, looks[level]) for _ in range(config.blocks[level])))
            self.merge.append(nn.Conv2d(2 * width, width, 1))
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(4 * width, widths[level + 1], 1))
                self.grow.append(nn.Conv2d(widths[level + 1], 4 * width, 1))
        cell = 3 * config.patch**2
        self.shortcut, self.shortcut_gain = silent(nn.Conv2d(2 * cell, cell, 3, padding=1)), nn.Linear(cond, cell)
        self.leave = nn.Sequential(
            norm(widths[0]), nn.SiLU(), silent(nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1))
        )

    def guess(self, cond: Cond) -> Tensor:
        """The ridge regression's picture for an embedding, or the mean one without; (B, 3, S, S) in about [-1, 1]."""
        size = self.config.guess_size
        small = self.linear(cond["image"], cond["drop_image"]).view(-1, 3, size, size)
        whole = size == self.config.image_size
        return small if whole else F.interpolate(small, self.config.image_size, mode="bilinear")

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, 3, S, S), relative to the guess; noise_level: (B,). Returns raw, shaped like x.

        cond: guess, and noisy (the picture as it is), shaped like x; image (B, D) unit rows; drop_image (B,) bool,
        True where the embedding is to be ignored; with text also text (B, T, W) states and keep_text (B, T) bool.
        """
        image = cond["image"] * (IMAGE_SIZE * cond["image"].shape[1] ** 0.5)
        image = torch.where(cond["drop_image"][:, None], self.null_image.to(image.dtype), image)
        steer = self.steer(self.noise_level(noise_level) + self.image_in(image))
        tokens, keep = self.image_tokens(image).unflatten(1, (self.config.image_tokens, -1)), None
        if self.text_in is not None and "text" in cond:
            keep = torch.cat([cond["keep_text"].new_ones(tokens.shape[:2]), cond["keep_text"]], dim=1)
            tokens = torch.cat([tokens, self.text_in(cond["text"])], dim=1)

        rough = self.roughness(cond["noisy"], noise_level)
        cells = F.pixel_unshuffle(torch.cat([x, rough], dim=1), self.config.patch)
        h = self.enter(torch.cat([cells, F.pixel_unshuffle(cond["guess"], self.config.patch)], dim=1))
        kept = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, steer, tokens, keep)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](F.pixel_unshuffle(h, 2))
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = F.pixel_shuffle(self.grow[level](h), 2)
            h = self.merge[level](torch.cat([h, kept[level]], dim=1))
            for block in self.up[level]:
                h = block(h, steer, tokens, keep)
        # much noise can be told by its roughness: a linear filter takes that off from the first hundred steps on
        filtered = self.shortcut(cells) * (1 + self.shortcut_gain(steer)[:, :, None, None])
        return F.pixel_shuffle(self.leave(h) + filtered, self.config.patch)

    @staticmethod
    def roughness(noisy: Tensor, noise_level: Tensor) -> Tensor:
        """What the noisy picture has beyond its blurred self, in units of sigma and kept within 3 of them.

        Where a picture is flat this is the noise, at one size for every sigma; in x itself the noise of a small sigma
        is so faint that a short training does not find it.
        """
        blurred = F.avg_pool2d(noisy, 3, stride=1, padding=1, count_include_pad=False)
        sigma = (4 * noise_level)[:, None, None, None].exp()
        return 3 * torch.tanh((noisy - blurred) / sigma / 3)


class Block(nn.Module):
    """Residual block: norm, two 3x3 convolutions with the steering (scale and shift) between them, then attention."""

    def __init__(self, width: int, config: DecoderConfig, looks: bool):
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


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // 16 if width % 16 == 0 else 1, width)


class DecoderDenoiser(Denoiser):
    """A Decoder as a denoiser of pixels in [-1, 1], which it sees relative to its linear guess."""

    def __init__(self, config: DecoderConfig):
        super().__init__(Decoder(config), Scaling(config.predict, config.sigma_data))
        self.config = config

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        guess = self.network.guess(cond)
        return guess + super().forward(x - guess, sigma, cond | {"guess": guess, "noisy": x})


def picture_cond(image: Tensor, text: Tensor | None = None, keep_text: Tensor | None = None) -> Cond:
    """The decoder's condition: image (B, D) unit rows; text states (B, T, W) and keep_text (B, T) bool, if any."""
    cond = {"image": image, "drop_image": torch.zeros(len(image), dtype=torch.bool, device=image.device)}
    return cond if text is None else cond | {"text": text, "keep_text": keep_text}


def null_cond(cond: Cond) -> Cond:
    """The same batch with nothing to go by: what guidance overshoots away from."""
    null = cond | {"drop_image": torch.ones_like(cond["drop_image"])}
    return null | {"keep_text": torch.zeros_like(cond["keep_text"])} if "text" in cond else null


def drop_some(cond: Cond, config: DecoderConfig, rng: torch.Generator) -> Cond:
    """Take image embedding and text away from their share of the samples, independently."""

    def lost(share: float) -> Tensor:
        return torch.rand(len(cond["image"]), generator=rng, device=cond["image"].device) < share

    dropped = cond | {"drop_image": lost(config.drop_image)}
    return dropped | {"keep_text": cond["keep_text"] & ~lost(config.drop_text)[:, None]} if "text" in cond else dropped
