"""A picture continued beyond its edges.

The canvas is scaled so that its short side is the decoder's size. Along the long side the decoder looks at it through
windows that overlap by half, and the guess of a pixel is the mean of the windows' guesses, weighted towards their
middles (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113, eq. 5); so pictures may be longer than the decoder's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling
from diffusion.inpaint import JUMP, REPEATS, filled
from diffusion.inversion import own_records, refuse_choices
from diffusion.samplers import Denoise, OnStep
from diffusion.source import Source

LONGEST = 8  # times the short side


def outpaint(
    generator: Generator,
    rows: np.ndarray,
    picture: Source,
    margins: Sequence[int],
    seeds: Sequence[int],
    how: Sampling | None = None,
    *,
    captions: Sequence[str] | None = None,
    repeats: int = REPEATS,
    jump: int = JUMP,
    on_step: OnStep = None,
) -> list[Generated]:
    """The picture with margins (left, right, top, bottom), in its own pixels, painted towards embeddings (B, D).

    The new pictures' short side is the decoder's size, whatever the picture's was. repeats, jump: see inpaint.
    """
    how, rows, seeds = how or generator.how, generator.rows(rows), list(seeds)
    refuse_choices(how, "outpainting")
    old, painted = (part.to(generator.device) for part in canvas(picture.picture, margins, generator.size))
    task = {"name": "outpaint", "margins": list(margins), "repeats": repeats, "jump": jump, "sources": [picture.told]}
    records = own_records(task, rows, captions)
    known = generator.recalled(records, seeds, how)
    if known is not None:
        return known
    places = windows(*old.shape[-2:], generator.size)
    everywhere = rows.repeat(len(places), 1)
    many = generator.denoise(everywhere, captions and list(captions) * len(places), how)
    denoise = through_windows(many, places, generator.size)
    each = generator.guess(everywhere, how)
    blank, sigma = old.expand(len(rows), -1, -1, -1), torch.ones(len(rows), device=old.device)
    guess = through_windows(lambda x, sigma: each, places, generator.size)(blank, sigma)
    x0 = filled(generator, denoise, guess, old, painted, seeds, how, repeats, jump, on_step)
    return generator.finished(x0, records, seeds, how, rows=rows)


def margins_of(picture: Image.Image, factor: float) -> list[int]:
    """(left, right, top, bottom) that make a picture `factor` times as wide and high, the old one in the middle."""
    more_wide, more_high = (max(1, round((factor - 1) * side)) for side in picture.size)
    return [more_wide // 2, more_wide - more_wide // 2, more_high // 2, more_high - more_high // 2]


def canvas(picture: Image.Image, margins: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """known (1, 3, H, W) in [-1, 1] with the picture in its place, and painted (1, H, W) bool, True around it.

    min(H, W) is `size`. UserError: no margin, a negative one, or a canvas that is too long.
    """
    left, right, top, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise UserError("say how far to continue it, in its own pixels: --left, --right, --top, --bottom, or --factor")
    wide, high = picture.width + left + right, picture.height + top + bottom
    if max(wide, high) > LONGEST * min(wide, high):
        raise UserError(f"a canvas of {wide} x {high} is more than {LONGEST} times as long as wide; ask for less")
    scale = size / min(wide, high)
    # edges are rounded, not lengths, so that what is new on two sides is as wide as it should be on each
    box = [round(scale * edge) for edge in (left, top, left + picture.width, top + picture.height)]
    width, height = round(scale * wide), round(scale * high)
    shape = (box[2] - box[0], box[3] - box[1])
    if min(shape) < 1:
        raise UserError(
            f"the picture would be {shape[0]} x {shape[1]} pixels of {width} x {height}; ask for less around it"
        )
    if shape == (width, height):
        raise UserError(f"the margins are less than a pixel of the {width} x {height} that are drawn; ask for more")
    small = np.array(picture.resize(shape, Image.Resampling.BICUBIC), dtype=np.float32)
    known, painted = torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
    known[..., box[1] : box[3], box[0] : box[2]] = torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1
    painted[..., box[1] : box[3], box[0] : box[2]] = False
    return known, painted


def windows(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Top left corners of windows of `size` that cover the canvas, at equal distances of at most half a window."""

    def starts(side: int) -> list[int]:
        count = 1 + -(-2 * (side - size) // size)
        return np.linspace(0, side - size, count).round().astype(int).tolist()

    return [(top, left) for top in starts(height) for left in starts(width)]


def through_windows(denoise: Denoise, places: Sequence[tuple[int, int]], size: int) -> Denoise:
    """The denoise of (B, 3, H, W) made of one of (len(places) * B, 3, size, size), window by window."""
    if places == [(0, 0)]:
        return denoise
    ramp = torch.minimum(torch.arange(1.0, size + 1), torch.arange(float(size), 0, -1))
    weight = torch.outer(ramp, ramp)

    def whole(x: Tensor, sigma: Tensor) -> Tensor:
        pieces = torch.cat([x[..., top : top + size, left : left + size] for top, left in places])
        guesses = denoise(pieces, sigma.repeat(len(places))).chunk(len(places))
        total, each = torch.zeros_like(x), weight.to(x)
        weights = x.new_zeros(x.shape[-2:])
        for (top, left), guess in zip(places, guesses, strict=True):
            total[..., top : top + size, left : left + size] += each * guess
            weights[top : top + size, left : left + size] += each
        return total / weights

    return whole
