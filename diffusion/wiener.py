"""What a noisy embedding says about the clean one, linearly: its coordinates drawn in to the mean where they are noise.

The embeddings of one data set fill few of their D directions. A linear guess of the picture (ridge.py) has large
weights along the empty ones, so a little noise there would ruin it; so would a prior that misses the true embedding.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Wiener(nn.Module):
    """The best linear guess at the clean rows (Wiener's filter): kept among the buffers, the identity until take()."""

    def __init__(self, wide: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(wide))
        self.register_buffer("axes", torch.eye(wide))
        self.register_buffer("variance", torch.ones(wide))

    def take(self, rows: Iterable[Tensor], penalty: float) -> None:
        """Learn the mean and covariance of blocks of rows (n, D). penalty: the ridge regression's, relative to the mean
        eigenvalue; with it, the regression of what comes out is the ridge regression for rows of that noise."""
        count, total, square = 0, 0.0, 0.0
        for some in rows:
            some = some.double()
            count, total, square = count + len(some), total + some.sum(0), square + some.T @ some
        mean = total / count
        values, axes = torch.linalg.eigh(square / count - torch.outer(mean, mean))
        values = values.clamp(min=0)
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.variance.copy_(values + penalty * values.mean().clamp(min=1e-12))

    def forward(self, rows: Tensor, noise: Tensor) -> Tensor:
        """rows (B, D) with Gaussian noise of std noise (B,) / sqrt(D) a coordinate -> rows (B, D) float32."""
        with torch.autocast(rows.device.type, enabled=False):
            share = self.variance / (self.variance + noise.float()[:, None] ** 2 / rows.shape[1])
            moved = (rows.float() - self.mean) @ self.axes
            return rows.float() - (moved * (1 - share)) @ self.axes.T
