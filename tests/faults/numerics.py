"""Numbers: losses and gradients in float32 and bf16 against float64, embeddings in any batch and through every door,
indexes that were changed, two ranks against one. A loss is a number outside its band."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import added_deleted
import batch_sizes
import doors
import torch
import two_ranks
from bands import Bands
from outcome import Outcome, Tally
from trainings import TRAININGS
from trial import Case, bounded, tried_all

SECONDS = 240  # that one case may take

Errors = Callable[[random.Random, Path], tuple[dict[str, float], str]]
MODULES: dict[str, Errors] = {
    "batch sizes 1, 7, 64": batch_sizes.errors,
    "one picture through every door": doors.errors,
    "index, added and deleted": added_deleted.errors,
    "two ranks against one": two_ranks.errors,
}
ROUND = {  # cases of each kind in a round
    "InfoNCE training of a CLIP": 6,
    "sigmoid training of a CLIP": 5,
    "contrastive losses of rows": 10,
    "prior": 8,
    "contrastive prior": 6,
    "decoder": 6,
    "upsampler": 6,
    "batch sizes 1, 7, 64": 4,
    "one picture through every door": 3,
    "index, added and deleted": 5,
    "two ranks against one": 1,
}
ORDER = [kind for kind, count in ROUND.items() for _ in range(count)]

# Of losses and gradients in float32, then of both in bf16: shares, see REASONS.
OF_CLIP = {
    "": (1e-5, 1e-4, 6e-2, 3e-1),
    ", scale 100": (1e-5, 1e-4, 6e-2, 3e-1),
    ", equal rows": (1e-5, 1e-4, 1.5e-1, 1.0),
    ", ResNet": (1e-5, 2e-2, 2e-1, 8e-1),
}
BANDS = {f"{loss} training of a CLIP{how}": band for loss in ("InfoNCE", "sigmoid") for how, band in OF_CLIP.items()}
BANDS |= {
    "contrastive losses of rows": (1e-5, 1e-4, 1e-5, 1e-4),
    "contrastive losses of rows, scale 100": (1e-5, 4e-4, 1e-5, 4e-4),
    "prior": (1e-5, 1e-4, 1e-2, 4e-2),
    "contrastive prior": (1e-5, 1e-4, 2e-2, 2e-1),
    "decoder": (5e-5, 2e-4, 1e-2, 1e-1),
    "upsampler": (5e-5, 2e-4, 6e-2, 2e-1),
}
COLUMNS = ("loss, fp32", "gradients, fp32", "loss, bf16", "gradients, bf16")
OTHERS = {
    "embeddings of pictures, by batch size": 1e-5,
    "embeddings of captions, by batch size": 1e-5,
    "rows that embed writes, by --batch-size": 5e-4,
    "one picture, every door: vectors": 3e-5,
    "one picture, every door: rows that embed wrote": 3e-4,
    "one picture, every door: scores": 1e-5,
    "one picture, every door: not itself first": 0.0,
    **{f"index after changes, {kind}: scores": 1e-6 for kind in added_deleted.KINDS},
    "two ranks: gathered loss": 1e-6,
    "two ranks: gathered gradients": 1e-5,
    "two ranks: weights of the small towers": 1e-5,
    "two ranks: weights of train clip": 2e-4,
}
LIMITS = OTHERS | {
    f"{name}: {column}": limit for name, limits in BANDS.items() for column, limit in zip(COLUMNS, limits, strict=True)
}
REASONS = """
Losses and gradients are measured against float64. Of a loss: the error as a share of it, or of 0.1. Of all gradients:
the norm of the error as a share of their norm, or of 1/100 (times the scale), which is 1/100 of clip_norm. All bands
are twice the worst of three seeds or more, those of a CLIP the same for both losses. With bands of their own: scale
100, the largest temperature, which makes errors of cosines 100 times larger; equal rows, one picture or caption
throughout, where the gradients of the pairs cancel (a share of the scale itself); ResNet, where a ReLU whose input is
within rounding of 0 makes gradients leap. The losses of rows are float32 under bf16, too. Decoder and upsampler: the
fastest wave of the noise level turns by 201 a unit of log sigma, of which float32 knows 1e-7: up to 4e-5 of the wave.
Embeddings: the largest difference of a coordinate, 1e-5 between batch sizes, 3e-5 between our way and open_clip's;
where embed has written them, half of a float16 step, or one step between batch sizes. Indexes: the largest difference
of a score; 9 where other rows were found. Weights of train clip: AdamW moves a weight whose gradient is nothing but
rounding by up to lr (1e-3) a step, in either direction. The page uploads pictures to /api/search, which is among the
doors.
"""


def errors(kind: str, rng: random.Random, folder: Path) -> tuple[dict[str, float], str]:
    """The errors of one case by the names of their bands, and what it was."""
    if kind in MODULES:
        return MODULES[kind](rng, folder)
    training = TRAININGS[kind](rng)
    return training.errors(kind), training.what


def case(seed: int, n: int, bands: Bands) -> Case:
    kind = ORDER[n % len(ORDER)]

    def attempt(folder: Path) -> Outcome:
        torch.manual_seed(seed * 1_000_003 + n)

        def work() -> Outcome:
            found, what = errors(kind, random.Random(f"numerics {seed} {n}"), folder)
            outcome = bands.judge(found)
            return outcome if outcome.how == "done" else Outcome("wrong", f"{outcome.line} of {what}")

        return bounded(work, seconds=SECONDS)

    return Case(kind, f"seed {seed}", attempt)


def run(numbers: Iterable[int], seed: int, folder: Path, tell: Callable) -> Tally:
    bands = Bands(LIMITS)
    tally = tried_all(lambda seed, n: case(seed, n, bands), numbers, seed, folder, tell)
    tally.notes += [bands.grid(BANDS, COLUMNS), bands.table(OTHERS), REASONS.strip()]
    return tally
