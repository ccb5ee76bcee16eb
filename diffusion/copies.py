"""Is a made picture a training picture over again? Its nearest one, held against how near those are to one another.

The threshold is a quantile of the cosines of training pictures to their nearest other training picture, so that a
generator which makes new pictures like the training ones is told of copying in a known share of cases (5 % by default).
Pictures that are stored twice are left out of it, on both sides: they would put the threshold at 1. Other drawings of
the same thing, with the same label, stay in: they are near without being copies, and a threshold without them would
call every good picture of a thing that was trained on a copy.

A cosine of CLIP rows says "shows the same thing in the same way"; it takes pixels to say "is the same picture". Where
the pictures are at hand, pixel_distance() looks at the nearest few (Somepalli et al. 2022, arXiv 2212.03860, and
Carlini et al. 2023, arXiv 2301.13188, judge by features and by pixels).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.folder import write_file
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore

Blocks = Callable[[], Iterator[tuple[int, np.ndarray]]]  # (first row, (b, D)) through all training rows

TWINS = 0.999  # cosine from which two stored rows are of one picture; float16 rounds equal rows to above 0.9995
QUANTILE = 0.95  # of the training pictures that are farther from one another than the threshold
SAMPLED = 4096  # training rows that the threshold is calibrated on
FILE = "copies.json"  # in an embeddings folder: its threshold


@dataclass(frozen=True)
class Nearest:
    """The training picture nearest to a made one."""

    key: str
    cosine: float
    is_copy: bool  # nearer than training pictures are to one another
    threshold: float

    def to_json(self) -> dict[str, Any]:
        """For a picture's provenance."""
        return asdict(self)


class CopyCheck:
    """Finds the nearest training picture of CLIP image rows, and whether it is as near as a copy.

    Make one with CopyCheck.open(embeddings folder) or CopyCheck.fit(rows). clip: fingerprint of the CLIP whose rows
    they are ("" if unknown). keys: of the training rows; their numbers if None.
    """

    def __init__(
        self, blocks: Blocks, threshold: float, keys: Sequence[str] | None = None, clip: str = "", quantile: float = 0.0
    ):
        self.blocks, self.threshold, self.keys = blocks, threshold, keys
        self.clip, self.quantile = clip, quantile

    @classmethod
    def fit(
        cls,
        rows: np.ndarray,
        keys: Sequence[str] | None = None,
        *,
        quantile: float = QUANTILE,
        clip: str = "",
        seed: int = 0,
    ) -> "CopyCheck":
        """Calibrate on the training rows themselves: unit rows (N, D). UserError: fewer than 20 different pictures."""
        rows = np.asarray(rows, dtype=np.float32)
        blocks = _blocks_of(rows)
        return cls(blocks, calibrated(rows, blocks, quantile, seed), keys, clip, quantile)

    @classmethod
    def open(cls, embeddings: Path | str, *, quantile: float = QUANTILE, seed: int = 0) -> "CopyCheck":
        """Of an embeddings folder; its threshold is kept there as copies.json, if the folder can be written to."""
        store = EmbeddingStore.open(embeddings)
        clip = store.manifest.inputs.get("clip", {}).get("fingerprint", "")
        asked = {
            "embeddings": store.fingerprint,
            "quantile": quantile,
            "twins": TWINS,
            "sampled": SAMPLED,
            "seed": seed,
        }
        threshold = _kept(Path(embeddings) / FILE, asked)
        if threshold is None:
            rng = np.random.default_rng(seed)
            some = np.sort(rng.permutation(len(store))[:SAMPLED])
            threshold = calibrated(store.image(some), store.blocks, quantile, own=some)
            try:
                data = json.dumps(asked | {"threshold": threshold}, indent=1)
                write_file(Path(embeddings) / FILE, data.encode())
            except OSError:  # read-only: it is calibrated anew each time
                pass
        return cls(store.blocks, threshold, store.keys, clip, quantile)

    def check(self, rows: np.ndarray) -> list[Nearest]:
        """rows: CLIP image rows of made pictures (Q, D), of any length."""
        cosine, which = self.nearest(rows, 1)
        return [
            Nearest(self.key(row), float(score), bool(score >= self.threshold), self.threshold)
            for score, row in zip(cosine[:, 0], which[:, 0].tolist(), strict=True)
        ]

    def nearest(
        self, rows: np.ndarray, k: int = 1, on_progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and numbers of the k nearest training rows, best first: (Q, k) each."""
        rows = np.asarray(rows, dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if rows.ndim != 2 or not np.isfinite(rows).all() or not lengths.all():
            raise UserError("rows to check for copies must be (Q, D), finite and not zero")
        return nearest_rows(rows / lengths, self.blocks, k, on_progress=on_progress)

    def key(self, row: int) -> str:
        """The key of a training row."""
        return str(row) if self.keys is None else str(self.keys[row])

    def refuse_other_clip(self, fingerprint: str) -> None:
        """UserError unless rows of the CLIP of that fingerprint can be checked."""
        if self.clip and self.clip != fingerprint:
            raise UserError(
                f"the embeddings to check copies against are of CLIP {_short(self.clip)}, the pictures of "
                f"{_short(fingerprint)}; embed the training pictures with the latter: unclip embed"
            )


def calibrated(
    rows: np.ndarray,
    blocks: Blocks,
    quantile: float = QUANTILE,
    seed: int = 0,
    own: np.ndarray | None = None,
) -> float:
    """The quantile of training rows' cosine to their nearest other row that is no twin of theirs.

    rows (n, D): the rows asked about, of number `own` (n,) among those of `blocks`; by default all of them, of which
    4,096 are taken by `seed`.
    """
    if not 0 < quantile <= 1:
        raise UserError(f"quantile {quantile:g} must be above 0 and at most 1")
    if own is None:
        own = np.sort(np.random.default_rng(seed).permutation(len(rows))[:SAMPLED])
        rows = rows[own]
    cosine, _ = nearest_rows(rows, blocks, 1, own=own, below=TWINS)
    found = cosine[np.isfinite(cosine)]
    if len(found) < 20:
        raise UserError(f"{len(found)} different training pictures are too few to say what a copy is; 20 at least")
    return float(np.quantile(found, quantile))


def nearest_rows(
    queries: np.ndarray,
    blocks: Blocks,
    k: int = 1,
    *,
    own: np.ndarray | None = None,
    below: float = np.inf,
    on_progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the highest inner product, exactly, block by block: scores and numbers, (Q, k) each, best first.

    own (Q,): the number of each query's own row, which does not count; nor do scores of `below` and more. Where fewer
    than k rows are left the score is -inf.
    """
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    which = np.zeros((len(queries), k), dtype=np.int64)
    for start, rows in blocks():
        for low in range(0, len(queries), 1024):
            some = slice(low, low + 1024)
            scores = queries[some] @ rows.T
            scores[scores >= below] = -np.inf
            if own is not None:
                at = own[some] - start
                inside = np.flatnonzero((at >= 0) & (at < len(rows)))
                scores[inside, at[inside]] = -np.inf
            few = min(k, len(rows))
            top = np.argpartition(-scores, few - 1, axis=1)[:, :few]
            scores = np.concatenate([best[some], np.take_along_axis(scores, top, 1)], axis=1)
            rank = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best[some] = np.take_along_axis(scores, rank, 1)
            which[some] = np.take_along_axis(np.concatenate([which[some], top + start], axis=1), rank, 1)
        if on_progress:
            on_progress(start + len(rows), start + len(rows))
    return best, which


def pixel_distance(made: np.ndarray, training: np.ndarray) -> np.ndarray:
    """(Q, k) root mean squared difference, in units of 0..255; made (Q, 3, S, S), training (Q, k, 3, S, S) uint8."""
    difference = made[:, None].astype(np.float32) - training.astype(np.float32)
    return np.sqrt((difference**2).mean(axis=(2, 3, 4)))


def _blocks_of(rows: np.ndarray) -> Blocks:
    return lambda: iter([(start, rows[start : start + 65536]) for start in range(0, len(rows), 65536)])


def _kept(path: Path, asked: dict[str, Any]) -> float | None:
    """The threshold in the file, if it was calibrated as asked."""
    try:
        data = json.loads(path.read_text())
        threshold = float(data.pop("threshold"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return threshold if data == asked and 0 < threshold <= 1 else None


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:10]
