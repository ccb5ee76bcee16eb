"""What one does with points of the CLIP space: variations, interpolation, text diffs, and a strip of the steps.

unCLIP (Ramesh et al. 2022, arXiv 2204.06125), section 3: an embedding says what a picture is about, the decoder's noise
(the seed) all the rest. Each function returns pictures whose records make them again, and tells `on_step` of every step
as Generator.from_captions does; what that raises ends the drawing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling, to_pixels
from diffusion.samplers import OnStep


def vary(
    generator: Generator,
    row: np.ndarray,
    count: int = 4,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    on_step: OnStep = None,
) -> list[Generated]:
    """Other pictures of one embedding (section 3.1): the same point (D,), with seeds seed, seed + 1, ..."""
    rows = np.repeat(np.asarray(row, dtype=np.float32)[None], count, axis=0)
    made = generator.from_embeddings(rows, range(seed, seed + count), how, on_step=on_step)
    return [_told(one, {"name": "vary"}) for one in made]


def interpolate(
    generator: Generator,
    rows: np.ndarray,
    count: int = 5,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    on_step: OnStep = None,
) -> list[Generated]:
    """`count` pictures on the way from rows[0] to rows[1], both ends included (section 3.2); rows (2, D).

    All have one seed, so that what changes from one to the next is what the embedding says. UserError: a count below 2.
    """
    if count < 2:
        raise UserError(f"{count} pictures do not reach from one end to the other; make 2 or more")
    shares = np.linspace(0, 1, count)
    points = np.stack([slerp(rows[0], rows[1], share) for share in shares])
    made = generator.from_embeddings(points, [seed] * count, how, on_step=on_step)
    return [_told(one, {"name": "interpolate", "share": float(s)}) for one, s in zip(made, shares, strict=True)]


def edit(
    generator: Generator,
    row: np.ndarray,
    text: str,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    source: str | None = None,
    strength: float = 0.35,
    on_step: OnStep = None,
) -> list[Generated]:
    """The picture of embedding `row` (D,) changed towards `text` (text diffs, section 3.3): a list of one.

    The embedding is turned by `strength` (0 nothing, 1 all the way; the paper takes 0.25 to 0.5) towards the direction
    text(text) - text(source). source: a caption of the picture as it is; None: the empty caption.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength:g} must be between 0 and 1")
    if generator.clip is None:
        raise UserError("an edit by text needs the CLIP that the decoder was trained with; say where: --clip")
    target, origin = generator.clip.encode_text([text, source or ""]).numpy()
    difference = target - origin
    if not np.linalg.norm(difference) > 1e-4:
        raise UserError(f"the texts {source or ''!r} and {text!r} mean the same to this CLIP: nothing to change")
    point = slerp(np.asarray(row, dtype=np.float32), difference, strength)
    how_told = {"name": "edit", "text": text, "source": source or "", "strength": strength}
    return [_told(one, how_told) for one in generator.from_embeddings(point[None], [seed], how, on_step=on_step)]


def strip(
    generator: Generator,
    of: "np.ndarray | str",
    seed: int = 0,
    how: Sampling | None = None,
    frames: int = 8,
    *,
    on_step: OnStep = None,
) -> list[Image.Image]:
    """What the decoder believes the picture to be after each of `frames` steps, spread over its walk; ends in it.

    of: a caption, or an image embedding (D,).
    """
    guesses: list[torch.Tensor] = []

    def keep(step: int, denoised: torch.Tensor) -> None:
        guesses.append(denoised[:1].cpu())
        if on_step is not None:
            on_step(step, denoised)

    if isinstance(of, str):
        (made,) = generator.from_captions([of], [seed], how, on_step=keep)
    else:
        (made,) = generator.from_embeddings(np.asarray(of, dtype=np.float32)[None], [seed], how, on_step=keep)
    before = guesses[:-1]  # the last guess is the picture, but for the last step's noise
    chosen = np.unique(np.linspace(0, len(before) - 1, min(frames - 1, len(before))).round().astype(int))
    return [Image.fromarray(to_pixels(before[step])[0]) for step in chosen] + [made.picture]


def slerp(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, share: float) -> np.ndarray:
    """The unit vector (D,) on the great circle from a (share 0) to b (share 1); UserError if they are opposite.

    sin((1 - s) w) / sin(w) a + sin(s w) / sin(w) b for unit a, b at angle w (Shoemake 1985).
    """
    a, b = (np.asarray(v, dtype=np.float64) / np.linalg.norm(v) for v in (a, b))
    angle = np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)) * 2  # exact for small angles too
    if angle > np.pi - 1e-4:
        raise UserError("the two embeddings are opposite: there is no one way between them")
    if angle < 1e-6:
        point = a
    else:
        point = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    return (point / np.linalg.norm(point)).astype(np.float32)


def _told(made: Generated, task: dict[str, Any]) -> Generated:
    return replace(made, provenance={**made.provenance, "task": task})
