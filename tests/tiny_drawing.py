"""The smallest generator for tests: a random CLIP, and a decoder of 8-pixel pictures that is exact for its data."""

import functools
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from PIL import Image

from clip_train.model import Clip
from diffusion.decoder import DecoderConfig
from diffusion.generate import Generator
from diffusion.source import Source

SIDE = 8


class ExactDecoder(torch.nn.Module):
    """The exact denoiser of pictures that are Gaussian, std 0.4, around a linear function of their embedding."""

    def __init__(self, dim: int):
        super().__init__()
        self.config = DecoderConfig(embed_dim=dim, image_size=SIDE, widths=(16,), blocks=(1,), head_width=16)
        self.network = SimpleNamespace(config=self.config, guess=self.guess)
        self.weight = 0.5 * torch.randn(dim, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0))

    def guess(self, cond):
        middle = (cond["image"] @ self.weight).masked_fill(cond["drop_image"][:, None], 0.0)
        return middle.reshape(-1, 3, SIDE, SIDE)

    def forward(self, x, sigma, cond):
        pieces = self.guess(cond)
        trust = 0.16 / (0.16 + sigma[:, None, None, None] ** 2)
        return pieces + trust * (x - pieces)


@functools.cache
def generator() -> Generator:
    with tempfile.TemporaryDirectory() as folder:
        clip = Clip.load(tiny.clip(Path(folder) / "clip"))
    fingerprints = {"clip": clip.fingerprint, "decoder": "sha256:decoder"}
    return Generator(clip, None, ExactDecoder(clip.embed_dim), fingerprints=fingerprints)


def source(seed: int = 0, size: int = 20) -> Source:
    """A picture of four random colours."""
    return Source.read(tiny.picture(seed, size), f"picture{seed}.png")


def mask(box: tuple[int, int, int, int], size: int = 20) -> Source:
    """White where the box is, black elsewhere."""
    grey = Image.new("L", (size, size))
    grey.paste(255, box)
    file = io.BytesIO()
    grey.save(file, "PNG")
    return Source.read(file.getvalue(), "mask.png")
