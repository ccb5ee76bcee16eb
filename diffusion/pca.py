"""Principal axes of the CLIP space, and what a picture keeps when only some of them are kept.

unCLIP (Ramesh et al. 2022, arXiv 2204.06125), section 4 and figure 7: few axes hold what kind of thing a picture shows,
more of them what it looks like.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore
from diffusion.generate import Generated, Generator, Sampling
from diffusion.samplers import OnStep


@dataclass(frozen=True)
class Pca:
    """Axes of embeddings: the mean (D,), the axes (D, D), one a row, and the variance (D,) along each, falling."""

    mean: np.ndarray
    axes: np.ndarray
    variance: np.ndarray

    @classmethod
    def fit(cls, store: EmbeddingStore) -> "Pca":
        """Of all image embeddings of a folder, read in blocks: the eigenvectors of their covariance."""
        count, total, square = 0, np.zeros(store.dim), np.zeros((store.dim, store.dim))
        for _, block in store.blocks():
            block = block.astype(np.float64)
            count, total, square = count + len(block), total + block.sum(0), square + block.T @ block
        mean = total / count
        variance, axes = np.linalg.eigh(square / count - np.outer(mean, mean))
        return cls(mean, axes[:, ::-1].T.copy(), variance[::-1].clip(0))

    def kept(self, row: np.ndarray, count: int) -> np.ndarray:
        """The row (D,) moved to the nearest point that the mean and `count` axes reach, then made a unit row."""
        if not 0 <= count <= len(self.axes):
            raise UserError(f"{count} of {len(self.axes)} axes; keep 0 to {len(self.axes)}")
        some = self.axes[:count]
        point = self.mean + (np.asarray(row, np.float64) - self.mean) @ some.T @ some
        return (point / np.linalg.norm(point)).astype(np.float32)

    def share(self, count: int) -> float:
        """Share of the variance of the embeddings that the first `count` axes hold."""
        return float(self.variance[:count].sum() / self.variance.sum())


def reconstruct(
    generator: Generator,
    row: np.ndarray,
    pca: Pca,
    counts: Sequence[int],
    seed: int = 0,
    how: Sampling | None = None,
    *,
    on_step: OnStep = None,
) -> list[Generated]:
    """A picture of embedding `row` (D,) for each count of axes kept, all with one seed.

    Each record says the share of the variance that these axes hold, and the cosine of what is left with the row.
    """
    row = np.asarray(row, np.float32) / np.linalg.norm(row)
    points = np.stack([pca.kept(row, count) for count in counts])
    notes = [
        {"name": "reconstruct", "axes": count, "variance": round(pca.share(count), 4), "cosine": round(float(near), 4)}
        for count, near in zip(counts, points @ row, strict=True)
    ]
    return generator.from_embeddings(points, [seed] * len(points), how, tasks=notes, on_step=on_step)
