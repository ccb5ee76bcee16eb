"""The decoder's network: a noisy picture and a CLIP image embedding -> the picture.

A frame around one of the bodies of levels.py. The embedding enters twice, as in unCLIP (Ramesh et al. 2022, arXiv
2204.06125, section 2.1): added to the noise-level embedding that steers every block, and as extra tokens that attention
looks at. The text tower's states can be looked at too. The embedding may be noisy: the network is then told how much,
and sees what wiener.py leaves of it.

What is diffused is the difference to a linear guess at the picture (ridge.py), which the network sees as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.captions import check_mix
from clip_train.settings import UserError
from diffusion.denoiser import Cond, Denoiser, Scaling, refuse_absurd, refuse_unknown
from diffusion.layers import NoiseLevelEmbedding, silent
from diffusion.levels import PLANS, Levels, norm
from diffusion.ridge import LinearGuess
from diffusion.wiener import Wiener


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that decides what the decoder is and on what noise it trains. Saved beside the weights."""

    embed_dim: int = 0  # width of the CLIP embedding; 0: what the CLIP folder says
    image_size: int = 32  # side of the pictures, pixels
    network: str = "hybrid"  # levels.PLANS: hybrid, unet, uvit, dit
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
    noise_image: float = 0.0  # largest std of the noise added to the embedding (times sqrt(D)) in training; 0: none
    caption_mix: tuple[float, ...] = ()  # weights of a picture's 1st, 2nd, ... caption, see captions.pick_caption
    predict: str = "edm"  # what the network puts out: edm, v, x0, eps, flow
    sigma_data: float = 0.5  # std of a pixel in [-1, 1]
    density: str = "log_normal"  # of sigma in training (schedule.DENSITIES)
    sigma_mean: float = -0.8  # of ln sigma, for log_normal: where training looks most
    sigma_std: float = 1.1
    weighting: str = "even"  # of the noise levels in the loss (denoiser.WEIGHTINGS)
    align: float = 0.0  # weight of the loss that aligns hidden states to the CLIP's own features, see align.py; 0: off
    align_width: int = 0  # of these features; 0: what the CLIP folder says
    few_steps: int = 0  # steps this network was distilled to sample in; 0: it was not

    @property
    def guess_size(self) -> int:
        """Side of the linear guess, pixels: what is finer is not linear in the embedding."""
        return min(self.image_size, 32)

    def __post_init__(self) -> None:
        refuse_unknown("decoder", self.predict, self.density, self.weighting)
        refuse_absurd("decoder", self)
        check_mix(self.caption_mix)
        if self.network not in PLANS:
            raise UserError(f"decoder: no network {self.network!r}: take {', '.join(PLANS)}")
        if min(self.noise_image, self.align, self.few_steps) < 0:
            raise UserError("decoder: noise_image, align and few_steps must be at least 0")
        for name in ("dropout", "drop_image", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"decoder: {name} {getattr(self, name)} must be in [0, 1]")
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


# What Decoder.prepared() adds to a cond.
PREPARED = ("guess", "ready", "tokens", "keep")

# Size of a coordinate of the image embedding where the network reads it. At 1, an Adam step on the layers that read
# D of them moves their outputs by lr * D, and learning rates above 1e-3 do not train; at 0.2, up to 3e-3 do.
IMAGE_SIZE = 0.2


class Decoder(nn.Module):
    """The network; see the top of the file. Wrap it with `DecoderDenoiser` to get denoised pictures."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        cond = config.cond_width
        self.noise_level = NoiseLevelEmbedding(cond)
        self.null_image = nn.Parameter(torch.zeros(config.embed_dim))
        self.image_in = nn.Linear(config.embed_dim, cond)
        self.image_tokens = nn.Linear(config.embed_dim, config.image_tokens * cond)
        self.text_in = nn.Linear(config.text_width, cond) if config.text else None
        self.noise_in = nn.Linear(2, cond) if config.noise_image else None
        self.wiener = Wiener(config.embed_dim) if config.noise_image else None
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())

        self.linear = LinearGuess(config.embed_dim, 3 * config.guess_size**2)
        cell, side = 3 * config.patch**2, 1 if config.network == "dit" else 3
        self.enter = nn.Conv2d(3 * cell, config.widths[0], side, padding=side // 2)
        self.levels = Levels(config)
        self.shortcut, self.shortcut_gain = silent(nn.Conv2d(2 * cell, cell, 3, padding=1)), nn.Linear(cond, cell)
        last = silent(nn.Conv2d(config.widths[0], cell, side, padding=side // 2))
        self.leave = nn.Sequential(norm(config.widths[0]), nn.SiLU(), last)
        self.watch: list[Tensor] | None = None

    def guess(self, cond: Cond) -> Tensor:
        """The ridge regression's picture for an embedding, or the mean one without; (B, 3, S, S) in about [-1, 1]."""
        size = self.config.guess_size
        small = self.linear(self.told(cond), cond["drop_image"]).view(-1, 3, size, size)
        whole = size == self.config.image_size
        return small if whole else F.interpolate(small, self.config.image_size, mode="bilinear")

    def told(self, cond: Cond) -> Tensor:
        """The image embedding (B, D) as far as it can be trusted: see wiener.py."""
        return cond["image"] if self.wiener is None else self.wiener(cond["image"], cond["image_noise"])

    def prepared(self, cond: Cond) -> Cond:
        """cond with all that does not depend on sigma, computed once: for a sampler that asks many times.

        null_cond and drop_some take it off again. Adds guess (B, 3, S, S), ready (B, cond_width), tokens (B, T, W) and,
        with text, keep (B, T).
        """
        image = self.told(cond) * (IMAGE_SIZE * cond["image"].shape[1] ** 0.5)
        image = torch.where(cond["drop_image"][:, None], self.null_image.to(image.dtype), image)
        tokens, more = self.image_tokens(image).unflatten(1, (self.config.image_tokens, -1)), {}
        if self.text_in is not None and "text" in cond:
            more["keep"] = torch.cat([cond["keep_text"].new_ones(tokens.shape[:2]), cond["keep_text"]], dim=1)
            tokens = torch.cat([tokens, self.text_in(cond["text"])], dim=1)
        guess = cond["guess"] if "guess" in cond else self.guess(cond)
        ready = self.image_in(image)
        if self.noise_in is not None:
            noise = cond["image_noise"].to(image.dtype).masked_fill(cond["drop_image"], 0.0)
            ready = ready + self.noise_in(torch.stack([noise, noise.sqrt()], dim=1))
        return cond | more | {"guess": guess, "tokens": tokens, "ready": ready}

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, 3, S, S), relative to the guess; noise_level: (B,). Returns raw, shaped like x.

        cond: guess, and noisy (the picture as it is), shaped like x; image (B, D) unit rows; drop_image (B,) bool,
        True where the embedding is to be ignored; with text also text (B, T, W) states and keep_text (B, T) bool.
        """
        cond = cond if "tokens" in cond else self.prepared(cond)
        tokens, keep = cond["tokens"], cond.get("keep")
        steer = self.steer(self.noise_level(noise_level) + cond["ready"])

        rough = self.roughness(cond["noisy"], noise_level)
        cells = F.pixel_unshuffle(torch.cat([x, rough], dim=1), self.config.patch)
        h = self.enter(torch.cat([cells, F.pixel_unshuffle(cond["guess"], self.config.patch)], dim=1))
        h, middle = self.levels(h, steer, tokens, keep)
        if self.watch is not None:
            self.watch.append(middle)
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


class DecoderDenoiser(Denoiser):
    """A Decoder as a denoiser of pixels in [-1, 1], which it sees relative to its linear guess."""

    def __init__(self, config: DecoderConfig):
        super().__init__(Decoder(config), Scaling(config.predict, config.sigma_data))
        self.config = config
        wide = config.widths[-1]
        more = (nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, config.align_width)) if config.align else ()
        self.features = nn.Sequential(*more)

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond, features: bool = False) -> Any:
        """features: also return what the coarsest cells say the CLIP sees there, (B, align_width, g, g); align.py."""
        guess = cond["guess"] if "guess" in cond else self.network.guess(cond)
        cond = cond | {"guess": guess, "noisy": x}
        if not features:
            return guess + super().forward(x - guess, sigma, cond)
        self.network.watch = seen = []
        denoised = guess + super().forward(x - guess, sigma, cond)
        self.network.watch = None
        return denoised, self.features(seen[0].movedim(1, -1)).movedim(-1, 1)


def picture_cond(
    image: Tensor, text: Tensor | None = None, keep_text: Tensor | None = None, image_noise: Tensor | None = None
) -> Cond:
    """The decoder's condition: image (B, D) unit rows; text states (B, T, W) and keep_text (B, T) bool, if any.

    image_noise (B,): std of the noise that was added to the rows, see noised; None: none was.
    """
    cond = {"image": image, "drop_image": torch.zeros(len(image), dtype=torch.bool, device=image.device)}
    cond["image_noise"] = image.new_zeros(len(image)) if image_noise is None else image_noise
    return cond if text is None else cond | {"text": text, "keep_text": keep_text}


def noised(image: Tensor, image_noise: Tensor, noise: Tensor) -> Tensor:
    """Rows (B, D) that do not tell all: what the decoder's image_noise (B,) says was added, unit Gaussian noise (B, D).

    The std is in units of the row times sqrt(D), so 1 is as much noise as there is row. As the upsamplers' noise
    conditioning (Ho et al. 2021, arXiv 2106.15282, section 4.2), here against a prior that misses the true embedding.
    """
    return image + image_noise[:, None] * image.shape[1] ** -0.5 * noise


def null_cond(cond: Cond) -> Cond:
    """The same batch with nothing to go by: what guidance overshoots away from."""
    cond = {name: value for name, value in cond.items() if name not in PREPARED}
    null = cond | {"drop_image": torch.ones_like(cond["drop_image"])}
    return null | {"keep_text": torch.zeros_like(cond["keep_text"])} if "text" in cond else null


def drop_some(cond: Cond, config: DecoderConfig, rng: torch.Generator) -> Cond:
    """Take image embedding and text away from their share of the samples, independently."""

    def lost(share: float) -> Tensor:
        return torch.rand(len(cond["image"]), generator=rng, device=cond["image"].device) < share

    cond = {name: value for name, value in cond.items() if name not in PREPARED}
    dropped = cond | {"drop_image": lost(config.drop_image)}
    return dropped | {"keep_text": cond["keep_text"] & ~lost(config.drop_text)[:, None]} if "text" in cond else dropped
