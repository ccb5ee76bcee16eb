"""Judge: what is measured on a set of made pictures, the same whatever drew them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clip_train import metrics
from clip_train.model import Clip
from clip_train.settings import Progress, UserError
from diffusion.distances import clip_score, compare, figure_of, variance_ratio
from diffusion.features import Features, open_features
from diffusion.heldout import HeldOut
from diffusion.intervals import flat, of_mean, of_median, of_share


class Judge:
    """Examines pictures drawn for the rows `picked` of `held` against the real pictures of the rows `others`.

    clip: the one whose embeddings were drawn from; it ranks the round trip. features: in which distances are counted.
    """

    def __init__(
        self,
        held: HeldOut,
        picked: Sequence[int],
        others: Sequence[int],
        clip: Clip,
        features: Sequence[Features],
        seed: int = 0,
        on_progress: Progress | None = None,
    ):
        if len({one.name for one in features}) < len(features):
            raise UserError(f"features {', '.join(one.name for one in features)}: name each once")
        self.held, self.picked, self.others = held, np.asarray(picked), np.asarray(others)
        self.clip, self.features, self.seed, self.on_progress = clip, list(features), seed, on_progress
        self.own = next((one for one in features if one.clip is clip), None) or open_features(clip)
        self._real: dict[int, dict[str, np.ndarray]] = {}
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """All figures of pictures[i], drawn for row picked[i].

        round_trip: see round_trip(). variance: of their pixels, relative to real ones (variance_ratio).
        clip_score: of each CLIP among the features, and the own one, with the rows' captions.
        features: {name: frechet, kernel x 1000, precision, recall, density, coverage}, each with "interval".
        """
        return self.figures(self.look(pictures), pictures[0].width)

    def figures(self, seen: dict[str, np.ndarray], size: int) -> dict[str, Any]:
        """The same of pictures that have been looked at, of `size` pixels."""
        real = self.reference(size)
        captions = [self.held.captions[row] for row in self.picked]
        return {
            "round_trip": round_trip(seen[self.own.name], self.picked, self.held.rows, self.held.groups),
            "clip_score": {
                one.name: flat({"score": clip_score(unit(seen[one.name]), self._text(one, captions))})
                for one in self._extractors()
                if one.clip is not None
            },
            "variance": flat({"ratio": figure_of(variance_ratio, real["pixels"], seen["pixels"], self.seed)}),
            "features": {
                one.name: flat(_named(one, compare(real[one.name], seen[one.name], self.seed))) for one in self.features
            },
        }

    def real(self, size: int) -> dict[str, Any]:
        """The same figures of the real pictures of the rows `picked`, at `size` pixels: what no decoder can better.

        Their distances are those of real from real of the same number: the floor.
        """
        return self(self.held.pictures(self.picked, size, self.on_progress))

    def chance(self) -> dict[str, float]:
        """The round trip of pictures that have nothing to do with their rows."""
        return chance(self.picked, len(self.held), self.held.groups)

    def _extractors(self) -> list[Features]:
        return self.features if self.own in self.features else [*self.features, self.own]

    def look(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Features by extractor's name, and "pixels" (N, 3 S S) in 0..1: all that figures() needs of pictures."""
        out = {}
        for one in self._extractors():
            tell = _staged(self.on_progress, f"look ({one.name})")
            out[one.name] = one(pictures, tell)
        pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
        return out | {"pixels": pixels.reshape(len(pixels), -1) / 255}

    def reference(self, size: int) -> dict[str, np.ndarray]:
        """look() at the real pictures that made ones are compared with, at `size` pixels."""
        if size not in self._real:
            self._real[size] = self.look(self.held.pictures(self.others, size, self.on_progress))
        return self._real[size]

    def _text(self, one: Features, captions: list[str]) -> np.ndarray:
        if one.name not in self._texts:
            blocks = [captions[low : low + 256] for low in range(0, len(captions), 256)]
            self._texts[one.name] = np.concatenate([one.clip.encode_text(some).numpy() for some in blocks])
        return self._texts[one.name]


def round_trip(
    seen: np.ndarray, picked: Sequence[int], rows: np.ndarray, labels: Sequence | None = None
) -> dict[str, Any]:
    """seen (Q, D): embeddings of made pictures, meant to be those of rows[picked]; rows (N, D).

    labels (N,): pictures with the label of the right one are right as well. top1, top10: share whose best right answer
    ranks so high among all rows; median_rank; cosine to the true row. "interval": 95 % of each, for other captions.
    """
    picked = np.asarray(picked)
    groups = np.arange(len(rows)) if labels is None else np.asarray(labels)
    rank = metrics.ranks(seen, rows, groups[picked], groups)
    return flat(
        {
            "top1": of_share(rank == 1),
            "top10": of_share(rank <= 10),
            "median_rank": of_median(rank),
            "cosine": of_mean(metrics.paired_cosines(seen, rows[picked])),
        }
    ) | {"count": len(rank), "rows": len(rows)}


def chance(picked: Sequence[int], count: int, labels: Sequence | None = None) -> dict[str, float]:
    """What pictures that have nothing to do with their embeddings would reach among `count` rows, on average."""
    groups = np.arange(count) if labels is None else np.asarray(labels)
    values, sizes = np.unique(groups, return_counts=True)
    right = sizes[np.searchsorted(values, groups[np.asarray(picked)])].tolist()
    return {
        "top1": float(np.mean([metrics.chance_recall(m, count, 1) for m in right])),
        "top10": float(np.mean([metrics.chance_recall(m, count, 10) for m in right])),
        "median_rank": float(np.median([metrics.chance_rank(m, count) for m in right])),
    }


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) at length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _named(features: Features, figures: dict[str, Any]) -> dict[str, Any]:
    return {features.called(name): figure for name, figure in figures.items()}


def _staged(on_progress: Progress | None, stage: str) -> Any:
    return None if on_progress is None else lambda done, total: on_progress(done, total, stage=stage)
