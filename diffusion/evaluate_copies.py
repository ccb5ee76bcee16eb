"""Are made pictures copies? CopyCheck's verdict on each, then a look at the pixels, and a sheet to see for oneself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_train.model import Clip
from clip_train.settings import Progress, UserError
from clip_train.sheet import contact_sheet
from diffusion.copies import TWINS, CopyCheck, nearest_rows, pixel_distance
from diffusion.evaluate import embed_pictures
from diffusion.heldout import HeldOut
from diffusion.intervals import flat, of_share

LOOKED_AT = 8  # nearest training pictures whose pixels are compared
CALIBRATED_ON = 256  # training pictures that the pixel threshold is made from
SAME = 1.0  # rms difference of grey levels below which two training pictures are one stored twice


@dataclass(frozen=True)
class Verdict:
    """One made picture beside its nearest training picture."""

    name: str
    key: str  # nearest by CLIP
    cosine: float
    near: bool  # nearer than 95 % of training pictures are to one another
    pixel_key: str | None  # the most alike in pixels among the nearest few, where pictures are at hand
    pixel_rms: float | None  # difference to it, 0..255
    is_copy: bool  # near, and as alike in pixels as the 5 % most alike training pictures (near alone without pixels)


def find_copies(
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    clip: Clip,
    check: CopyCheck,
    training: HeldOut | None = None,
    *,
    held_rows: np.ndarray | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Verdict]]:
    """Verdicts on square pictures of one size, and the figures: share near and share copied, with what to expect.

    training: where the training pictures are, row for row those of `check`; None: no pixels. held_rows (N, D):
    embeddings of real pictures kept from training; the share of them called near is the false alarm.
    """
    check.refuse_other_clip(clip.fingerprint)
    if not pictures:
        raise UserError("there are no pictures to check")
    cosine, which = check.nearest(embed_pictures(clip, pictures), LOOKED_AT)
    near = cosine[:, 0] >= check.threshold
    verdicts = [
        Verdict(name, check.key(row), float(score), bool(hit), None, None, bool(hit))
        for name, row, score, hit in zip(names, which[:, 0].tolist(), cosine[:, 0], near, strict=True)
    ]
    figures: dict[str, Any] = {
        "count": len(pictures),
        "threshold": check.threshold,
        "near": flat({"share": of_share(near)}),
        "near_among_training": 1 - check.quantile,
        "cosine": {f"{q:.0%}": float(np.quantile(cosine[:, 0], q)) for q in (0.05, 0.5, 0.95, 1.0)},
    }
    if held_rows is not None:
        known = check.nearest(held_rows)[0][:, 0]
        figures["near_among_real_ones_kept_from_training"] = flat({"share": of_share(known >= check.threshold)})
    if training is not None:
        size = pictures[0].width
        limit = pixel_limit(training, size, 1 - check.quantile, seed, on_progress)
        made = np.stack([np.asarray(one.convert("RGB")).transpose(2, 0, 1) for one in pictures])
        apart = pixel_distance(made, _stacks(training, which, size, on_progress))
        best = apart.argmin(axis=1)
        verdicts = [
            replace(
                verdict,
                pixel_key=check.key(int(which[i, best[i]])),
                pixel_rms=float(apart[i, best[i]]),
                is_copy=bool(verdict.near and apart[i, best[i]] <= limit),
            )
            for i, verdict in enumerate(verdicts)
        ]
        figures["pixel_limit"] = limit
    figures["copied"] = flat({"share": of_share([verdict.is_copy for verdict in verdicts])})
    return figures, verdicts


def pixel_limit(
    training: HeldOut, size: int, share: float, seed: int = 0, on_progress: Progress | None = None
) -> float:
    """The rms difference that `share` of the training pictures stay below, to the most alike of their CLIP neighbours.

    On 256 training pictures; pictures stored twice (by CLIP or by pixels) are left out.
    """
    own = np.sort(np.random.default_rng(seed).permutation(len(training))[:CALIBRATED_ON])
    blocks = lambda: iter([(0, training.rows)])  # noqa: E731
    k = min(LOOKED_AT, len(training) - 1)
    scores, which = nearest_rows(training.rows[own], blocks, k, own=own, below=TWINS)
    pictures = np.stack([_array(one) for one in training.pictures(own, size, on_progress)])
    apart = pixel_distance(pictures, _stacks(training, which, size, on_progress))
    apart[(apart < SAME) | ~np.isfinite(scores)] = np.inf
    best = apart.min(axis=1)
    best = best[np.isfinite(best)]
    if len(best) < 20:
        raise UserError(f"{len(best)} different training pictures are too few to say what a copy is; 20 at least")
    return float(np.quantile(best, share))


def copies_sheet(
    pictures: Sequence[Image.Image], verdicts: Sequence[Verdict], training: HeldOut, most: int = 32
) -> Image.Image:
    """Made picture | nearest training picture, the nearest pairs first; copies are said to be so."""
    order = sorted(range(len(pictures)), key=lambda i: (not verdicts[i].is_copy, -verdicts[i].cosine))[:most]
    row_of = {key: row for row, key in enumerate(training.keys)}
    size = pictures[0].width
    real = training.pictures([row_of[verdicts[i].key] for i in order], size)
    cells, labels = [], []
    for i, nearest in zip(order, real, strict=True):
        verdict = verdicts[i]
        cells += [pictures[i], nearest]
        said = "COPY" if verdict.is_copy else "near" if verdict.near else "new"
        pixel = "" if verdict.pixel_rms is None else f", rms {verdict.pixel_rms:.0f}"
        labels += [f"{said}: {verdict.name}", f"{verdict.cosine:.3f}{pixel} {verdict.key}"]
    return contact_sheet(cells, labels, columns=8)


def _stacks(training: HeldOut, which: np.ndarray, size: int, on_progress: Progress | None) -> np.ndarray:
    """(Q, k, 3, S, S) uint8: the training pictures of these row numbers, each read once."""
    rows, place = np.unique(which, return_inverse=True)
    pictures = np.stack([_array(one) for one in training.pictures(rows, size, on_progress)])
    return pictures[place.reshape(which.shape)]


def _array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1)


def read_pictures(paths: Sequence[Path]) -> tuple[list[Image.Image], list[str]]:
    """PNG files, and all those below folders, as RGB; and their names. UserError: none, not square, several sizes.

    What unclip puts beside the pictures of a folder, strips of their steps and the sheet of a grid, is left out.
    """
    files = [one for path in paths for one in (sorted(path.rglob("*.png")) if path.is_dir() else [path])]
    files = [one for one in files if one in paths or not (one.stem.endswith("-steps") or one.name == "grid.png")]
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a picture ({error})") from error
        if pictures[-1].size != (pictures[0].width, pictures[0].width):
            raise UserError(
                f"{file} is {pictures[-1].width} x {pictures[-1].height} pixels and {files[0]} {pictures[0].width}; "
                f"give square pictures of one size"
            )
    if not files:
        raise UserError(f"no PNG in {', '.join(map(str, paths)) or 'nothing'}; give pictures made by unclip generate")
    return pictures, [file.name for file in files]
