"""Ridge regression in closed form: the first guess that prior and decoder start from.

A network that learns by small steps spends most of a short training on what a linear map already knows (which region of
the space means red, round, a face). So both find that map at once, and diffuse only what it leaves over. Adding noise
does not care where the origin is: `x - guess` is diffused, and nothing else changes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """The best linear map: output_mean + (rows - input_mean) @ weight."""

    input_mean: Tensor  # (D,)
    output_mean: Tensor  # (P,)
    weight: Tensor  # (D, P)
    penalty: float  # lambda, relative to the mean eigenvalue of the inputs' covariance
    spread: float  # std of a coordinate of (output - prediction), corrected for the fit

    def __call__(self, rows: Tensor) -> Tensor:
        """(B, D) -> (B, P)."""
        return self.output_mean + (rows - self.input_mean) @ self.weight


class LinearGuess(nn.Module):
    """A Linear among a network's buffers: saved with it, not trained with it. Zero until take() is called."""

    def __init__(self, wide: int, out: int):
        super().__init__()
        for name, shape in (("input_mean", (wide,)), ("output_mean", (out,)), ("weight", (wide, out))):
            self.register_buffer(name, torch.zeros(shape))

    def take(self, linear: Linear) -> None:
        """Copy the map's numbers."""
        for name in ("input_mean", "output_mean", "weight"):
            getattr(self, name).copy_(getattr(linear, name))

    def forward(self, rows: Tensor, drop: Tensor) -> Tensor:
        """rows (B, D), drop (B,) bool: where True, the mean output is the guess. Returns (B, P) float32."""
        with torch.autocast(rows.device.type, enabled=False):  # large weights of both signs: bf16 would not add up
            moved = (rows.float() - self.input_mean) @ self.weight
            return self.output_mean + moved.masked_fill(drop[:, None], 0.0)


def ridge_regression(pairs: Iterable[tuple[Tensor, Tensor]], independent: int | None = None) -> Linear:
    """Closed-form ridge regression, its penalty chosen by generalised cross-validation.

    Golub, Heath and Wahba 1979 (Technometrics 21, eq. 1.4). pairs: blocks of (input (n, D), output (n, P)), read once
    and kept only as D x D and D x P sums, so any number of pairs fits. independent: how many of the pairs count as
    independent (the number of pictures, when each has several captions); all of them by default.
    """
    count, sums = 0, None
    for rows, target in pairs:
        rows, target = rows.double(), target.double()
        block = (rows.sum(0), target.sum(0), rows.T @ rows, rows.T @ target, target.square().sum())
        sums = block if sums is None else tuple(a + b for a, b in zip(sums, block, strict=True))
        count += len(rows)
    input_mean, output_mean, inner, cross, square = (part / count for part in sums)
    inner, cross = inner - torch.outer(input_mean, input_mean), cross - torch.outer(input_mean, output_mean)
    variance = square - output_mean.square().sum()

    values, vectors = torch.linalg.eigh(inner)
    values = values.clamp(min=0)
    along = vectors.T @ cross
    power, size = along.square().sum(1), values.mean().clamp(min=1e-12)
    n = independent or count
    best = None
    for penalty in torch.logspace(-4, 4, 33, dtype=torch.float64).tolist():
        shrunk = 1 / (values + penalty * size)
        error = variance - ((2 * shrunk - values * shrunk**2) * power).sum()
        freedom = (values * shrunk).sum() + 1
        if freedom >= n:
            continue
        score = error / (1 - freedom / n) ** 2
        if best is None or score < best[0]:
            best = (score, penalty, shrunk)
    score, penalty, shrunk = best
    spread = float((score / len(output_mean)).clamp(min=1e-12)) ** 0.5
    return Linear(
        input_mean.float(), output_mean.float(), (vectors @ (shrunk[:, None] * along)).float(), penalty, spread
    )
