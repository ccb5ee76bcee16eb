"""The upsampler: a small picture and its CLIP embedding -> the same picture at several times the size.

The second stage of a cascade (unCLIP, Ramesh et al. 2022, arXiv 2204.06125, section 2.1; Ho et al. 2021, arXiv
2106.15282): a diffusion model that sees the small picture, enlarged, at every step. In training the small picture is
blurred and noised by random amounts, and the network is told how much noise: so it does not stumble over what the
decoder gets wrong, and noise can be added to a small picture when it is enlarged, to hide its flaws.

Nothing here looks further than its neighbours: convolutions, and norms over the channels of one cell. So weights that
were trained on crops enlarge pictures of any size, and what comes out at a place depends on its surroundings alone.
What is diffused is the difference to the bicubic enlargement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.settings import UserError
from diffusion.denoiser import Cond, Denoiser, Scaling, refuse_absurd, refuse_unknown
from diffusion.guidance import clamped, classifier_free
from diffusion.layers import NoiseLevelEmbedding, silent
from diffusion.samplers import SampleNoise, sample
from diffusion.schedule import karras_sigmas


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Everything that decides what the upsampler is and what it trains on. Saved beside the weights.

    Sigmas count in units of sigma_data.
    """

    embed_dim: int = 0  # width of the CLIP embedding; 0: what the CLIP folder says
    factor: int = 4  # how many times wider and higher a picture becomes
    crop: int = 64  # side of the squares cut out of the pictures in training, pixels
    picture_size: int = 0  # short side of the pictures they are cut from; 0: as wide as the pictures are, up to 512
    patch: int = 2  # side of the squares of pixels that become one cell of the finest grid
    widths: tuple[int, ...] = (32, 64, 96)  # channels per level; each level halves the grid
    blocks: tuple[int, ...] = (1, 2, 2)  # residual blocks per level, on the way down and again on the way up
    cond_width: int = 128  # of the vector that steers every block
    dropout: float = 0.0  # inside residual blocks
    drop_image: float = 0.1  # share of samples that lose their image embedding, so that guidance works
    blur: float = 0.9  # largest std of the blur of the small picture, in its pixels
    blurred: float = 0.5  # share of the small pictures that are blurred
    noise: float = 0.3  # largest std of the noise added to the small picture, whose pixels lie in [-1, 1]
    predict: str = "edm"  # what the network puts out: edm, v, x0, eps, flow
    sigma_data: float = 0.15  # std of a pixel of what bicubic enlargement leaves over; measured by train_upsampler
    density: str = "log_normal"  # of sigma in training (schedule.DENSITIES)
    sigma_mean: float = 0.0  # of ln sigma, for log_normal
    sigma_std: float = 1.4
    sigma_min: float = 0.05  # where sampling ends
    sigma_max: float = 6.0  # where it starts: above the strongest wave of what bicubic leaves over (4, of emoji)

    @property
    def multiple(self) -> int:
        """What width and height of the large picture have to be multiples of."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def __post_init__(self) -> None:
        refuse_unknown("upsampler", self.predict, self.density)
        refuse_absurd("upsampler", self)
        if min(self.crop, self.patch, self.cond_width, *self.widths) < 1 or not self.widths:
            raise UserError("upsampler: crop, patch, cond_width and widths must be at least 1")
        if self.factor < 2:
            raise UserError(f"upsampler: factor {self.factor} must be at least 2")
        if self.crop % self.factor or self.crop % self.multiple:
            raise UserError(
                f"upsampler: crop {self.crop} must be a multiple of factor {self.factor} and of {self.multiple} "
                f"(patch {self.patch}, {len(self.widths)} levels)"
            )
        if len(self.blocks) != len(self.widths):
            raise UserError(f"upsampler: {len(self.widths)} widths but {len(self.blocks)} blocks; one number per level")
        if self.picture_size and self.picture_size < self.crop:
            raise UserError(f"upsampler: picture_size {self.picture_size} is smaller than crop {self.crop}")
        if not 0 <= self.blur <= 1 or not 0 <= self.blurred <= 1 or self.noise < 0:
            raise UserError("upsampler: blur and blurred must be in [0, 1], noise at least 0")
        for name in ("dropout", "drop_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"upsampler: {name} {getattr(self, name)} must be in [0, 1]")
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(f"upsampler: sigma_min {self.sigma_min} must be above 0 and below sigma_max")


IMAGE_SIZE = 0.2  # of a coordinate of the image embedding where the network reads it, see decoder.py


class Upsampler(nn.Module):
    """The network; see the top of the file. Wrap it with `UpsamplerDenoiser` to get denoised pictures."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        widths, cond, cell = config.widths, config.cond_width, 3 * config.patch**2
        self.noise_level, self.small_level = NoiseLevelEmbedding(cond), NoiseLevelEmbedding(cond)
        self.null_image = nn.Parameter(torch.zeros(config.embed_dim))
        self.image_in = nn.Linear(config.embed_dim, cond)
        if config.embed_dim:  # torch's own start is so small that the noise levels would drown it
            nn.init.normal_(self.image_in.weight, std=1 / IMAGE_SIZE / config.embed_dim**0.5)
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())

        self.enter = nn.Conv2d(3 * cell, widths[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.merge, self.up = (nn.ModuleList() for _ in range(5))
        for level, width in enumerate(widths):
            self.down.append(nn.ModuleList(Block(width, config) for _ in range(config.blocks[level])))
            self.up.append(nn.ModuleList(Block(width, config) for _ in range(config.blocks[level])))
            self.merge.append(nn.Conv2d(2 * width, width, 1))
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(4 * width, widths[level + 1], 1))
                self.grow.append(nn.Conv2d(widths[level + 1], 4 * width, 1))
        self.leave = silent(nn.Conv2d(widths[0], cell, 3, padding=1))
        self.shortcut, self.shortcut_gain = silent(nn.Conv2d(2 * cell, cell, 3, padding=1)), nn.Linear(cond, cell)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, 3, H, W), relative to the guess, of unit size; noise_level: (B,). Returns raw, shaped like x.

        cond: guess and rough, shaped like x (see UpsamplerDenoiser); level (B,), std of the noise in the small picture;
        image (B, D) unit rows; drop_image (B,) bool, True where the embedding is to be ignored.
        """
        image = cond["image"] * (IMAGE_SIZE * self.config.embed_dim**0.5)
        image = torch.where(cond["drop_image"][:, None], self.null_image.to(image.dtype), image)
        small_level = self.small_level((cond["level"] + 0.01).log() / 4)
        steer = self.steer(self.noise_level(noise_level) + small_level + self.image_in(image))

        cells = F.pixel_unshuffle(torch.cat([x, cond["rough"]], dim=1), self.config.patch)
        h = self.enter(torch.cat([cells, F.pixel_unshuffle(cond["guess"], self.config.patch)], dim=1))
        kept = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, steer)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](F.pixel_unshuffle(h, 2))
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = F.pixel_shuffle(self.grow[level](h), 2)
            h = self.merge[level](torch.cat([h, kept[level]], dim=1))
            for block in self.up[level]:
                h = block(h, steer)
        # noise can be told by its roughness: a linear filter takes that off from the first hundred steps on
        filtered = self.shortcut(cells) * (1 + self.shortcut_gain(steer)[:, :, None, None])
        return F.pixel_shuffle(self.leave(F.silu(unit_cells(h))) + filtered, self.config.patch)


class Block(nn.Module):
    """Residual block: norm, two 3x3 convolutions with the steering (scale and shift) between them."""

    def __init__(self, width: int, config: UpsamplerConfig):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.steer = nn.Linear(config.cond_width, 2 * width)
        self.drop = nn.Dropout(config.dropout)
        self.second = silent(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, h: Tensor, steer: Tensor) -> Tensor:
        scale, shift = self.steer(steer)[:, :, None, None].chunk(2, dim=1)
        inner = self.first(F.silu(unit_cells(h)))
        return h + self.second(self.drop(F.silu(inner * (1 + scale) + shift)))


def unit_cells(h: Tensor) -> Tensor:
    """(B, C, H, W) with each cell's C numbers scaled to mean square 1: a norm that does not know the picture's size."""
    return h * torch.rsqrt(h.float().square().mean(1, keepdim=True) + 1e-6).to(h.dtype)


class UpsamplerDenoiser(Denoiser):
    """An Upsampler as a denoiser of pixels in [-1, 1], which it sees relative to the bicubic enlargement."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__(Upsampler(config), Scaling(config.predict, config.sigma_data))
        self.config = config

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x: (B, 3, H, W), H and W multiples of config.multiple; sigma: (B,); cond: from small_cond."""
        moved = x - cond["guess"]
        rough = roughness(moved, sigma)
        return cond["guess"] + super().forward(moved, sigma, cond | {"rough": rough})


def roughness(moved: Tensor, sigma: Tensor) -> Tensor:
    """What a noisy picture has beyond its blurred self, in units of sigma, within 3 of them (see decoder.py)."""
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    return 3 * torch.tanh((moved - blurred) / sigma[:, None, None, None] / 3)


def small_cond(small: Tensor, level: Tensor, image: Tensor, factor: int) -> Cond:
    """The upsampler's condition: small pictures (B, 3, h, w) in [-1, 1] as they are to be seen, i.e. blurred and noised
    already; level (B,): std of the noise in them; image (B, D): unit rows."""
    drop = torch.zeros(len(small), dtype=torch.bool, device=small.device)
    return {"guess": bicubic(small, factor), "level": level, "image": image, "drop_image": drop}


def null_cond(cond: Cond) -> Cond:
    """The same small pictures without their embeddings."""
    return cond | {"drop_image": torch.ones_like(cond["drop_image"])}


def bicubic(pixels: Tensor, factor: float) -> Tensor:
    """(B, 3, h, w) enlarged by bicubic interpolation as Pillow does it (a = -0.5)."""
    height, width = (round(side * factor) for side in pixels.shape[2:])
    return F.interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True)


def reduced(pixels: Tensor, factor: int, how: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H / factor, W / factor); how (B,) bool: bicubic where True, else the mean of each square.

    Pictures are made small in either way before they reach a decoder; an upsampler that knew only one would take the
    other's edges for wrong ones.
    """
    small = tuple(side // factor for side in pixels.shape[2:])
    smooth = F.interpolate(pixels, small, mode="bicubic", antialias=True).clamp(-1, 1)
    return torch.where(how[:, None, None, None], smooth, F.avg_pool2d(pixels, factor))


def blurred(pixels: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """Gaussian blur of (B, 3, H, W), edges repeated; along, across (B,): its std from side to side and from top to
    bottom, each picture's own, in pixels and at most 1."""
    taps = torch.arange(-2, 3, device=pixels.device, dtype=pixels.dtype)
    batch, channels, height, width = pixels.shape
    kernels = [torch.exp(-(taps**2) / 2 / std.clamp(min=1e-3)[:, None] ** 2) for std in (along, across)]
    wide, high = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
    wide, high = (kernel.repeat_interleave(channels, 0)[:, None] for kernel in (wide, high))  # (B * 3, 1, 5)
    flat = F.pad(pixels, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]  # (1, B * 3, H + 4, W + 4)
    flat = F.conv2d(flat, wide[:, :, None, :], groups=batch * channels)
    flat = F.conv2d(flat, high[:, :, :, None], groups=batch * channels)
    return flat.view(batch, channels, height, width)


def degraded(pixels: Tensor, config: UpsamplerConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small pictures as bad as a decoder's, from large ones (B, 3, H, W) in [-1, 1], and the noise added to each (B,).

    Reduced in one of two ways; then some are blurred, by amounts of their own in the two directions (Gaussian blur of
    the small picture: Ho et al. 2021, arXiv 2106.15282, section 4.2; the directions from BSR, Zhang et al. 2021, arXiv
    2103.14006), and to each is added Gaussian noise of a random std up to config.noise, more often little than much
    (Saharia et al. 2022, arXiv 2205.11487, section 2.3: the network is told the amount).
    """

    def uniform() -> Tensor:
        return torch.rand(len(pixels), generator=rng, device=pixels.device)

    small = reduced(pixels, config.factor, uniform() < 0.5)
    some = uniform() < config.blurred
    small = blurred(small, *(uniform() * config.blur * some for _ in range(2)))
    level = config.noise * uniform() ** 2
    noise = torch.randn(small.shape, generator=rng, device=pixels.device)
    return small + level[:, None, None, None] * noise, level


def drop_some(cond: Cond, config: UpsamplerConfig, rng: torch.Generator) -> Cond:
    """Take the embedding away from its share of the samples."""
    lost = torch.rand(len(cond["image"]), generator=rng, device=cond["image"].device) < config.drop_image
    return cond | {"drop_image": lost}


AT_ONCE = 2**20  # pixels of large pictures that are in work at a time: what bounds the memory


@torch.no_grad()
def enlarge(
    upsampler: UpsamplerDenoiser,
    pixels: Tensor,
    rows: Tensor | None,
    seeds: Sequence[int],
    *,
    steps: int = 8,
    guidance: float = 1.0,
    sampler: str = "heun",
    noise_level: float = 0.05,
) -> Tensor:
    """Pictures (B, 3, h, w) in [-1, 1] -> (B, 3, factor h, factor w) in [-1, 1], picture i from seeds[i] alone.

    rows: (B, D) unit rows, the pictures' CLIP image embeddings; None: enlarge without. steps: 1 gives the mean of all
    large pictures that could have become this small one, which is nearest to the true one by squared error, and
    blurred; more give one of them. noise_level: std of the noise added to the small picture before; 0 trusts it to the
    pixel, more lets the upsampler draw anew what is small, up to config.noise.
    """
    config, device = upsampler.config, next(upsampler.parameters()).device
    if len(seeds) != len(pixels):
        raise ValueError(f"{len(pixels)} pictures but {len(seeds)} seeds")
    if not 0 <= noise_level <= config.noise:
        raise UserError(f"noise_level {noise_level:g} must be in [0, {config.noise:g}], as this upsampler was trained")
    height, width = pixels.shape[2:]
    down, right = (-side % (config.multiple // math.gcd(config.multiple, config.factor)) for side in (height, width))
    large = [config.factor * (height + down), config.factor * (width + right)]
    sigmas = karras_sigmas(steps, config.sigma_data * config.sigma_min, config.sigma_data * config.sigma_max)
    count, made = max(1, AT_ONCE // (large[0] * large[1])), []
    for start in range(0, len(pixels), count):
        some, own = slice(start, start + count), seeds[start : start + count]
        small = pixels[some].to(device).float()
        small = small + noise_level * SampleNoise(own, small.shape[1:], device, stream=5)()
        small = F.pad(small, (0, right, 0, down), mode="replicate")
        image = small.new_zeros(len(small), config.embed_dim) if rows is None else rows[some].to(device).float()
        cond = small_cond(small, small.new_full((len(small),), noise_level), image, config.factor)
        cond = null_cond(cond) if rows is None else cond
        denoise = clamped(classifier_free(upsampler, cond, null_cond(cond), guidance))
        noise = SampleNoise(own, (3, *large), device, stream=3)
        start = cond["guess"] + float(sigmas[0]) * noise()  # from noise alone all would come out greyer
        made.append(sample(sampler, denoise, sigmas, noise, start=start))
    whole = torch.cat(made) if made else pixels.new_zeros(0, 3, *large)
    return whole[:, :, : config.factor * height, : config.factor * width].clamp(-1, 1)
