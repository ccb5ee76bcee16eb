"""Part of a picture painted anew, the rest kept.

In every step the guess of what is kept is replaced by what is known of it; as x = x0 + sigma * noise, what is kept then
stays the known picture under its own noise all the way down, and comes out exact. What is new is drawn to fit by going
back: after a few steps down, noise is added again and the same steps are walked once more (RePaint, Lugmayr et al.
2022, arXiv 2201.09865, algorithm 1, with any sampler in place of DDPM).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling
from diffusion.inversion import own_records, refuse_choices
from diffusion.samplers import Denoise, OnStep, SampleNoise, sample
from diffusion.source import Source, mask_pixels, to_x0

REPEATS, JUMP = 4, 2  # how often each stretch is walked, and its steps


def inpaint(
    generator: Generator,
    rows: np.ndarray,
    picture: Source,
    mask: Image.Image,
    seeds: Sequence[int],
    how: Sampling | None = None,
    *,
    captions: Sequence[str] | None = None,
    mask_told: dict[str, str] | None = None,
    repeats: int = REPEATS,
    jump: int = JUMP,
    on_step: OnStep = None,
) -> list[Generated]:
    """The picture with what the mask marks painted anew, towards embeddings (B, D), with a seed each.

    mask: from read_mask; mask_told: its file's name and sha256, for the record. repeats: how often every `jump` steps
    are walked, so there are about repeats * how.steps steps; 1 only replaces. captions: for decoders that read text.
    """
    how, rows, seeds = how or generator.how, generator.rows(rows), list(seeds)
    refuse_choices(how, "inpainting")
    sources = [picture.told] + ([mask_told] if mask_told else [])
    task = {"name": "inpaint", "repeats": repeats, "jump": jump, "sources": sources}
    records = own_records(task, rows, captions)
    known = generator.recalled(records, seeds, how)
    if known is not None:
        return known
    painted = mask_pixels(mask, generator.size).to(generator.device)
    kept_pixels = to_x0([picture], generator.size, generator.device)
    denoise = generator.denoise(rows, captions, how)
    x0 = filled(
        generator, denoise, generator.guess(rows, how), kept_pixels, painted, seeds, how, repeats, jump, on_step
    )
    return generator.finished(x0, records, seeds, how, rows=rows)


@torch.no_grad()
def filled(
    generator: Generator,
    denoise: Denoise,
    guess: Tensor,
    known: Tensor,
    painted: Tensor,
    seeds: Sequence[int],
    how: Sampling,
    repeats: int,
    jump: int,
    on_step: OnStep = None,
) -> Tensor:
    """x0 (B, 3, H, W) that equals known (1, 3, H, W) where painted (1, H, W) is False, drawn by a guided denoise.

    guess (B, 3, H, W): the decoder's linear guess, around which the noise lies where it begins.
    """
    if repeats < 1 or jump < 1:
        raise UserError(f"repeats {repeats} and jump {jump} must be at least 1")
    noise = SampleNoise(seeds, known.shape[1:], generator.device, stream=1)
    sigmas = how.sigmas()
    start = torch.where(painted, guess, known) + float(sigmas[0]) * noise()
    return walk_back_and_forth(
        how.sampler, kept(denoise, known, painted), sigmas, noise, start,
        repeats=repeats, jump=jump, eta=how.eta, on_step=on_step,
    )  # fmt: skip


def kept(denoise: Denoise, known: Tensor, painted: Tensor) -> Denoise:
    """The denoise whose guess is `known` wherever painted is False; shapes that broadcast to x's."""
    return lambda x, sigma: torch.where(painted, denoise(x, sigma), known)


def walk_back_and_forth(
    sampler: str,
    denoise: Denoise,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    start: Tensor,
    *,
    repeats: int,
    jump: int,
    eta: float | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """Walk down the grid in stretches of `jump` steps, each `repeats` times; start: x at sigmas[0].

    Between two walks of a stretch, noise of variance (its first sigma)^2 - (its last sigma)^2 takes x back up. With
    repeats 1 this is the sampler itself, if that looks at nothing but the present x.
    """
    x, done = start, 0

    def tell(step: int, denoised: Tensor) -> None:
        nonlocal done
        if on_step is not None:
            on_step(done, denoised)
        done += 1

    for low in range(0, len(sigmas) - 1, jump):
        stretch = sigmas[low : low + jump + 1]
        for time in range(repeats):
            if time:
                x = x + float(stretch[0] ** 2 - stretch[-1] ** 2) ** 0.5 * noise()
            x = sample(sampler, denoise, stretch, noise, eta=eta, start=x, on_step=tell)
    return x
