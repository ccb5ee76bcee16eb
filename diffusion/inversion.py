"""A picture -> the noise that it is drawn from: walk DDIM's deterministic way backwards.

unCLIP (Ramesh et al. 2022, arXiv 2204.06125), section 3: a picture is its CLIP embedding (what it is about) and that
noise (all the rest), from which the decoder makes it again. Change one of the two and the other half stays.

Backwards and forwards are one way only with the same steps, guidance 1 and unclamped guesses, so that is how the noise
is found; guidance above 1 on the way forward overshoots the picture itself too.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling
from diffusion.samplers import OnStep, invert
from diffusion.source import Source, to_x0

# Guidance of any kind and clamped guesses have no way back.
PLAIN = {
    "guidance": 1.0,
    "text_guidance": None,
    "clamp": 0.0,
    "autoguidance": 1.0,
    "self_attention": 0.0,
    "clip_guidance": 0.0,
    "negative": "",
}
# How a picture's own noise is walked: what keeps to the picture. The rest is as Sampling has it.
FAITHFUL = {"sampler": "ddim", "steps": 20, "guidance": 1.0, "clamp": 0.0}


@torch.no_grad()
def picture_noise(
    generator: Generator, rows: np.ndarray, pictures: Sequence[Source], how: Sampling, *, on_step: OnStep = None
) -> Tensor:
    """Pictures and their own CLIP embeddings, (B, D) -> x (B, 3, S, S) at noise level how.sigma_max.

    From there `redrawn` comes back to the pictures, as they are in the decoder's size; closer with more steps.
    """
    x0 = to_x0(tuple(pictures), generator.size, generator.device)
    denoise = generator.denoise(generator.rows(rows), None, replace(how, **PLAIN))
    return invert(denoise, x0, how.sigmas(), on_step)


def redrawn(
    generator: Generator,
    rows: np.ndarray,
    noise: Callable[[], Tensor],
    seeds: Sequence[int],
    how: Sampling,
    tasks: Sequence[dict[str, Any]],
    *,
    on_step: OnStep = None,
) -> list[Generated]:
    """Pictures of embeddings (B, D) from x (B, 3, S, S) at noise level how.sigma_max, instead of from their seeds.

    noise: makes x, asked if the pictures are not known. seeds: of the noise that a sampler with eta > 0 adds. tasks:
    what each record says, beside the embedding.
    """
    refuse_choices(how, "what keeps a picture's own noise")
    rows = generator.rows(rows)
    records = [{"task": own(task, row)} for task, row in zip(tasks, rows.numpy(), strict=True)]
    known = generator.recalled(records, seeds, how)
    if known is not None:
        return known
    x0 = generator.walk(rows, None, seeds, how, start=noise(), sigma=how.sigma_max, on_step=on_step)
    return generator.finished(x0, records, seeds, how, rows=rows)


def slerp_noise(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise a (share 0) to b (share 1) along the arc between them, lengths changing evenly; any one shape.

    A straight way would pass through too small a noise: half way between two independent ones, 0.7 of their length.
    """
    x, y = a.cpu().double().flatten(), b.cpu().double().flatten()  # not every accelerator has doubles
    long = (x.norm(), y.norm())
    angle = torch.arccos((x @ y / (long[0] * long[1])).clamp(-1, 1))
    if angle < 1e-6:
        return torch.lerp(a, b, share)
    way = (torch.sin((1 - share) * angle) * x / long[0] + torch.sin(share * angle) * y / long[1]) / torch.sin(angle)
    return (((1 - share) * long[0] + share * long[1]) * way).view_as(a).to(a)


def refuse_choices(how: Sampling, task: str) -> None:
    """UserError if the sampling asks for what only a plain drawing has."""
    if how.candidates > 1 or how.image_noise:
        raise UserError(f"{task} draws one picture of one embedding; leave candidates and image_noise out")


def own_records(task: dict[str, Any], rows: Tensor, captions: Sequence[str] | None) -> list[dict[str, Any]]:
    """Records of one task for embeddings (B, D), with their captions if there are any."""
    words = [{}] * len(rows) if captions is None else [{"caption": caption} for caption in captions]
    return [{"task": own(task | word, row)} for word, row in zip(words, rows.numpy(), strict=True)]


def own(task: dict[str, Any], row: np.ndarray) -> dict[str, Any]:
    """A task with its embedding inside: such a picture is not made again by its embedding and seed alone."""
    return {**task, "embedding": base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()}
