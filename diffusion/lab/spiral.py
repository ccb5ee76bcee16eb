"""A Swiss roll on the plane: pictures of two pixels, of which everything that a network should learn is known exactly.

Points lie within about [-1, 1]^2. The roll is cut into three equal parts, from the inside out: person, dog, cat.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_train.settings import UserError
from diffusion.denoiser import Cond
from diffusion.schedule import stratified

CLASSES = ("person", "dog", "cat")
NOTHING = len(CLASSES)  # the label that stands for no label
FIRST, LAST = 1.5 * math.pi, 4.5 * math.pi  # angles of the roll's ends; the radius is angle / LAST
BINS = 48  # parts of the curve in which points are counted, a third of them for each class


@dataclass(frozen=True, eq=False)
class Spiral:
    """Training points on the curve, each the middle of a small Gaussian: that mixture is the data, exactly."""

    points: Tensor  # (N, 2)
    arc: Tensor  # (N,) where on the curve: 0 at its inner end, 1 at its outer end, by length
    spread: float  # std of the Gaussian around each point

    @classmethod
    def of(cls, count: int = 1000, spread: float = 0.02, seed: int = 0) -> "Spiral":
        """count points, one in each of count equal parts of the curve, shuffled."""
        if count < BINS or spread <= 0:
            raise UserError(f"a spiral needs at least {BINS} points and a spread above 0, not {count} and {spread:g}")
        arc = stratified(count, seeded(seed))
        return cls(curve(arc), arc, spread)

    @property
    def label(self) -> Tensor:
        """(N,) the class of each point."""
        return class_of(self.arc)

    @property
    def reach(self) -> float:
        """Points farther from the curve than this do not count as on it."""
        return 5 * self.spread

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """True samples (count, 2), and the row of the training point that each is of, (count,)."""
        row = torch.randint(len(self.points), (count,), generator=rng)
        return self.points[row] + self.spread * torch.randn(count, 2, generator=rng), row

    def denoise(self, x: Tensor, sigma: Tensor, cond: Cond | None = None, wrong: float = 0.0) -> Tensor:
        """E[x0 | x] (and the label, if there is one): the denoiser that no network can beat. x (B, 2), sigma (B,).

        The score of the noisy points is (denoise(x) - x) / sigma^2 (Tweedie's formula). wrong: share of the training
        points whose label was drawn blindly.
        """
        spread = self.spread**2 + sigma[:, None] ** 2  # (B, 1)
        logits = -(torch.cdist(x, self.points.to(x), compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * spread)
        if cond is not None:
            label = cond["label"][:, None]
            right = (self.label == label) * (1 - wrong) + wrong / len(CLASSES)
            logits = logits + torch.where(label == NOTHING, 1.0, right).log()
        middle = logits.softmax(1) @ self.points.to(x)
        return middle + self.spread**2 / spread * (x - middle)


def seeded(seed: int) -> torch.Generator:
    """A generator for any seed made from the user's own: torch takes none above 2^64, fit none above 2^63."""
    return torch.Generator().manual_seed(seed % 2**63)


def curve(arc: Tensor) -> Tensor:
    """The points (N, 2) of the curve at those shares (N,) of its length."""
    angle = torch.linspace(FIRST, LAST, 20_001, dtype=torch.float64)
    length = (angle * (1 + angle**2).sqrt() + angle.asinh()) / 2  # of Archimedes' spiral of radius = angle
    length = (length - length[0]) / (length[-1] - length[0])
    after = torch.searchsorted(length, arc.double()).clamp(1, len(angle) - 1)
    share = (arc - length[after - 1]) / (length[after] - length[after - 1])
    at = torch.lerp(angle[after - 1], angle[after], share)
    return (at / LAST)[:, None].mul(torch.stack([at.cos(), at.sin()], dim=1)).float()


def nearest(points: Tensor, knots: int = 3000) -> tuple[Tensor, Tensor]:
    """Distance of each of the points (N, 2) to the curve, and where on the curve that is, each (N,)."""
    arc = torch.linspace(0, 1, knots)
    distance, row = torch.cdist(points, curve(arc), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return distance, arc[row]


def class_of(arc: Tensor) -> Tensor:
    """The class of each place on the curve: (N,) int64."""
    return (arc * len(CLASSES)).long().clamp(0, len(CLASSES) - 1)


def coverage(arc: Tensor, bins: Tensor, drawn: int, share: float = 0.1) -> float:
    """Share of the bins that hold at least `share` of the points there would be if all `drawn` were even over them.

    arc: (N,) places on the curve of those drawn points that count. bins: which of the BINS, such as torch.arange(BINS).
    """
    found = torch.bincount((arc * BINS).long().clamp(0, BINS - 1), minlength=BINS)[bins]
    return (found >= share * drawn / len(bins)).float().mean().item()
