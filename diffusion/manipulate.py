"""What one does with points of the CLIP space: variations, interpolation, text diffs, and a strip of the steps.

unCLIP (Ramesh et al. 2022, arXiv 2204.06125), section 3: an embedding says what a picture is about, the decoder's noise
(from a seed, or from a picture by inversion.py) all the rest. Each function returns pictures whose records make them
again, and tells `on_step` of every step as Generator.from_captions does; what that raises ends the drawing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_train.settings import UserError
from diffusion.generate import Generated, Generator, Sampling, to_pixels
from diffusion.inversion import picture_noise, redrawn, slerp_noise
from diffusion.samplers import SAMPLERS, OnStep, SampleNoise
from diffusion.source import Source

KINDS = ("embedding", "noise", "both")


def vary(
    generator: Generator,
    row: np.ndarray,
    count: int = 4,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    picture: Source | None = None,
    on_step: OnStep = None,
) -> list[Generated]:
    """Other pictures of one embedding (section 3.1): the same point (D,), with seeds seed, seed + 1, ...

    picture: the one that the embedding is of. Then its own noise is walked, and its eta says how much fresh noise is
    added on the way: 0 the picture itself, 1 hardly anything of it but what the embedding holds.
    """
    rows, seeds = np.repeat(np.asarray(row, dtype=np.float32)[None], count, axis=0), range(seed, seed + count)
    if picture is None:
        return generator.from_embeddings(rows, seeds, how, tasks=[{"name": "vary"}] * count, on_step=on_step)
    how = how or generator.how
    chosen = SAMPLERS[how.sampler]
    random = chosen.random if chosen.eta is None else how.own_eta > 0
    if not random and count > 1:
        mend = "set eta above 0" if chosen.eta is not None else f"{how.sampler} draws no noise: take ddim"
        raise UserError(f"without fresh noise all variations of a picture are the picture itself; {mend}")

    def noise() -> torch.Tensor:
        return picture_noise(generator, rows[:1], [picture], how, on_step=on_step).expand(count, -1, -1, -1)

    task = {"name": "vary", "sources": [picture.told]}
    return redrawn(generator, rows, noise, seeds, how, [task] * count, on_step=on_step)


def interpolate(
    generator: Generator,
    rows: np.ndarray,
    count: int = 5,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    kind: str = "embedding",
    pictures: Sequence[Source | None] = (None, None),
    on_step: OnStep = None,
) -> list[Generated]:
    """`count` pictures on the way from rows[0] to rows[1], both ends included (section 3.2); rows (2, D).

    kind "embedding": all have one seed, so that what changes from one to the next is what the embedding says. "noise":
    all have the embedding rows[0], and the noise goes from one to another. "both": both go, so with pictures the ends
    are the pictures. pictures: that the rows are of; a noise is an end's picture's own, or else the one of seed and of
    seed + 1. UserError: a count below 2.
    """
    if count < 2:
        raise UserError(f"{count} pictures do not reach from one end to the other; make 2 or more")
    shares = np.linspace(0, 1, count).tolist()
    points = np.stack([slerp(rows[0], rows[1], share) for share in shares])
    if kind == "embedding":
        tasks = [{"name": "interpolate", "share": share} for share in shares]
        return generator.from_embeddings(points, [seed] * count, how, tasks=tasks, on_step=on_step)
    how, tasks = how or generator.how, [interpolation_task(kind, share, pictures) for share in shares]
    if kind == "noise":
        points = np.repeat(points[:1], count, axis=0)

    def noise() -> torch.Tensor:
        return between_noises(generator, rows, points, shares, seed, how, pictures, on_step=on_step)

    return redrawn(generator, points, noise, [seed] * count, how, tasks, on_step=on_step)


def between_noises(
    generator: Generator,
    rows: np.ndarray,
    points: np.ndarray,
    shares: Sequence[float],
    seed: int,
    how: Sampling,
    pictures: Sequence[Source | None],
    *,
    on_step: OnStep = None,
) -> torch.Tensor:
    """x (len(shares), 3, S, S) at how.sigma_max, from the first end's noise to the second's; see interpolate.

    rows: of the ends. points (len(shares), D): what is drawn with it; a noise lies around their linear guess.
    """
    ends = []
    for number, picture in enumerate(pictures):
        if picture is None:
            noise = SampleNoise([seed + number], (3, generator.size, generator.size), generator.device, stream=1)
            ends.append(how.sigma_max * noise()[0])
        else:
            own = generator.rows(rows[number][None])
            noise = picture_noise(generator, own, [picture], how, on_step=on_step) - generator.guess(own, how)
            ends.append(noise[0])
    return generator.guess(generator.rows(points), how) + torch.stack([slerp_noise(*ends, share) for share in shares])


def interpolation_task(kind: str, share: float, pictures: Sequence[Source | None]) -> dict[str, Any]:
    """What a record says of a step between two noises: which ends are pictures (null: a seed's)."""
    if kind not in KINDS:
        raise UserError(f"interpolate {kind!r}: take {', '.join(KINDS)}")
    return {
        "name": "interpolate",
        "kind": kind,
        "share": share,
        "ends": [picture and picture.sha256 for picture in pictures],
        "sources": [picture.told for picture in pictures if picture],
    }


def edit(
    generator: Generator,
    row: np.ndarray,
    text: str,
    seed: int = 0,
    how: Sampling | None = None,
    *,
    source: str | None = None,
    strength: float | Sequence[float] = 0.5,
    picture: Source | None = None,
    on_step: OnStep = None,
) -> list[Generated]:
    """The picture of embedding `row` (D,) changed towards `text` (text diffs, section 3.3), once for each strength.

    The embedding is turned by `strength` (0 nothing, 1 all the way; the paper takes 0.25 to 0.5) towards the difference
    of the two texts (text_difference). source: a caption of the picture as it is; None: the empty caption. picture: the
    one that the embedding is of; then its own noise is walked, and what the texts do not say stays as it was.
    """
    strengths = list(strength) if isinstance(strength, Sequence) else [strength]
    for one in strengths:
        if not 0 <= one <= 1:
            raise UserError(f"strength {one:g} must be between 0 and 1")
    difference = text_difference(generator, text, source or "")
    points = np.stack([slerp(np.asarray(row, dtype=np.float32), difference, one) for one in strengths])
    tasks = [{"name": "edit", "text": text, "source": source or "", "strength": one} for one in strengths]
    seeds = [seed] * len(strengths)
    if picture is None:
        return generator.from_embeddings(points, seeds, how, tasks=tasks, on_step=on_step)
    how, tasks = how or generator.how, [{**task, "sources": [picture.told]} for task in tasks]

    def noise() -> torch.Tensor:
        own = picture_noise(generator, np.asarray(row)[None], [picture], how, on_step=on_step)
        return own.expand(len(strengths), -1, -1, -1)

    return redrawn(generator, points, noise, seeds, how, tasks, on_step=on_step)


def text_difference(generator: Generator, text: str, source: str) -> np.ndarray:
    """Where the space changes from `source` to `text`, (D,), not a unit row. UserError where the two mean the same.

    With a prior it is the difference of its guesses (of their means, where it draws them), and points along pictures.
    Without one, or with one that tells no texts apart, it is that of the texts themselves (section 3.3), which leads
    away from where pictures lie.
    """
    if generator.clip is None:
        raise UserError("an edit by text needs the CLIP that the decoder was trained with; say where: --clip")
    if generator.prior is not None:
        mean = replace(generator.how, prior_steps=1, prior_candidates=1, prior_guidance=1.0)
        target, origin = generator.image_embeddings([text, source], [0, 0], mean).numpy()
        if np.linalg.norm(target - origin) > 1e-4:
            return target - origin  # else it makes the same of all texts, as the baseline "mean" does
    target, origin = generator.clip.encode_text([text, source]).numpy()
    if not np.linalg.norm(target - origin) > 1e-4:
        raise UserError(f"the texts {source!r} and {text!r} mean the same to this CLIP: nothing to change")
    return target - origin


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

    of: a caption, or an image embedding (D,). Of candidates only the first is drawn: a strip is of one walk.
    """
    how, guesses = replace(how or generator.how, candidates=1), []

    def keep(step: int, denoised: torch.Tensor) -> None:
        guesses.append(denoised[:1].cpu())
        if on_step is not None:
            on_step(step, denoised)

    if isinstance(of, str):
        (made,) = generator.from_captions([of], [seed], how, on_step=keep)
    else:
        (made,) = generator.from_embeddings(np.asarray(of, dtype=np.float32)[None], [seed], how, on_step=keep)
    return [*frames_of(guesses, frames - 1), made.picture]


def frames_of(guesses: Sequence[torch.Tensor], most: int) -> list[Image.Image]:
    """Pictures of at most `most` guesses (1, 3, H, W), spread over all but the last, which is the picture itself."""
    before = guesses[:-1]
    chosen = np.unique(np.linspace(0, len(before) - 1, min(most, len(before))).round().astype(int))
    return [Image.fromarray(to_pixels(before[step])[0]) for step in chosen]


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
