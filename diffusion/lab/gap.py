"""The modality gap: pictures and captions of one CLIP lie in two clouds that a plane can part.

Liang et al. 2022, "Mind the gap" (arXiv 2203.02053). Its size depends on the temperature that the CLIP was trained at.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_train import metrics
from diffusion.lab.style import BLUE, GREY, ORANGE, drawing, panels, save

LINES = 150  # pairs drawn


@dataclass(frozen=True, eq=False)
class Gap:
    """How far apart the two clouds are, and what chance gives: the same after swapping the two rows of random pairs."""

    distance: float  # between the mean picture row and the mean caption row
    distances_by_chance: np.ndarray  # (P,)
    parted: float  # share of held-out rows on the right side of the plane in the middle
    parted_by_chance: np.ndarray  # (P,)
    along: np.ndarray  # (2, M) held-out pictures' and captions' places along the line of the means, 0 in the middle
    across: np.ndarray  # (2, M) their places along the axis of most variance that is at right angles to it


def measure(image: np.ndarray, text: np.ndarray, permutations: int = 2000, seed: int = 0) -> Gap:
    """image, text (N, D): unit rows, row i of both a pair.

    The plane stands at right angles to the line between the two means, half way; line and plane come from one half of
    the pairs, `parted` from the other half. Chance: 0.5.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(image))
    fit, held = order[: len(order) // 2], order[len(order) // 2 :]
    half, middle = (image - text) / 2, (image + text) / 2  # a pair is middle + half (picture) and middle - half
    signs = np.where(rng.random((permutations, len(image))) < 0.5, -1, 1).astype(np.float32)

    means = 2 * signs @ half / len(image)
    axes = np.concatenate([half[fit].mean(axis=0)[None], signs[:, fit] @ half[fit] / len(fit)])
    signs = np.concatenate([np.ones_like(signs[:1]), signs])[:, held]
    away, side = axes @ half[held].T, axes @ (middle[held] - middle[fit].mean(axis=0)).T  # (1 + P, M)
    parted = ((side + signs * away > 0).mean(axis=1) + (side - signs * away < 0).mean(axis=1)) / 2

    axis = axes[0] / max(float(np.linalg.norm(axes[0])), 1e-12)
    both = np.stack([image[held], text[held]]) - middle[fit].mean(axis=0)  # (2, M, D)
    along = both @ axis
    flat = (both - along[..., None] * axis).reshape(-1, image.shape[1])
    main = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][0]
    main *= np.sign(main[np.abs(main).argmax()])  # a singular vector's sign is anybody's choice
    return Gap(
        distance=metrics.modality_gap(image, text),
        distances_by_chance=np.linalg.norm(means, axis=1),
        parted=float(parted[0]),
        parted_by_chance=parted[1:],
        along=along,
        across=(flat @ main).reshape(2, -1),
    )


def closed(image: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both clouds moved so that their means coincide, as unit rows again."""
    shift = (image.mean(axis=0) - text.mean(axis=0)) / 2
    moved = (image - shift, text + shift)
    return tuple(one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in moved)


def draw(path: Path, gap: Gap) -> None:
    """Seen along the plane: each caption joined to its picture, and above them both clouds' histograms."""
    with drawing():
        figure, axes = panels(2, 1, width=8.0, height=3.1, sharex=True, gridspec_kw={"height_ratios": [1, 2.4]})
        top, below = axes[:, 0]
        (image, text), (image_across, text_across) = gap.along, gap.across
        edges = np.linspace(gap.along.min(), gap.along.max(), 49)
        top.hist(text, edges, color=ORANGE, alpha=0.7, label="captions")
        top.hist(image, edges, color=BLUE, alpha=0.6, label="pictures")
        top.set(ylabel="how many", yticks=[], ylim=(0, 1.3 * top.get_ylim()[1]))
        top.legend(loc="upper right", ncols=2)
        top.set_title(f"The modality gap: a plane parts {gap.parted:.0%} of pictures and captions")
        some = slice(LINES)
        below.plot([image[some], text[some]], [image_across[some], text_across[some]], color=GREY, linewidth=0.7,
                   alpha=0.45)  # fmt: skip
        below.scatter(text[some], text_across[some], s=26, color=ORANGE, zorder=3, linewidths=0)
        below.scatter(image[some], image_across[some], s=26, color=BLUE, zorder=3, linewidths=0)
        below.set(
            xlabel=f"along the line through both centres, {gap.distance:.2f} apart (length of a row: 1)",
            ylabel="main axis across it",
        )
        for panel in (top, below):
            panel.axvline(0, ymax=0.8 if panel is top else 1, color="black", linewidth=1.2, linestyle="--")
        save(figure, path)
