"""A flat map of the space that keeps neighbours together, with the pictures on it, and how far it can be believed."""

from pathlib import Path

import numpy as np

from diffusion.lab.pairs import Pairs
from diffusion.lab.style import GREY, ORANGE, drawing, panels, save

EARLY = 150  # steps in which attraction is exaggerated twelvefold, so that clusters can pass through one another
THUMBNAIL = 1 / 18  # of the map's width


def tsne(rows: np.ndarray, perplexity: float = 30.0, steps: int = 500) -> np.ndarray:
    """(N, D) -> (N, 2): t-SNE (van der Maaten and Hinton 2008), begun at the two main axes; the same every time.

    perplexity: about how many neighbours each point minds. Exact, so O(N^2) a step: for a few hundred points.
    """
    rows = np.asarray(rows, dtype=np.float64)
    size = len(rows)
    nearness = _affinities(_distances(rows), min(perplexity, (size - 1) / 3))
    nearness = np.maximum((nearness + nearness.T) / (2 * size), 1e-12)
    at = principal(rows)
    at *= 1e-4 / max(at[:, 0].std(), 1e-12)
    speed, gain = np.zeros_like(at), np.ones_like(at)
    rate = max(size / 48, 50.0)  # Belkina et al. 2019: N / exaggeration, over 4 as in scikit-learn
    for step in range(steps):
        wanted = nearness * (12 if step < EARLY else 1)
        kernel = 1 / (1 + _distances(at))
        np.fill_diagonal(kernel, 0)
        pull = (wanted - np.maximum(kernel / kernel.sum(), 1e-12)) * kernel
        slope = 4 * (pull.sum(axis=1, keepdims=True) * at - pull @ at)
        gain = np.maximum(np.where(slope * speed < 0, gain + 0.2, gain * 0.8), 0.01)
        speed = (0.5 if step < EARLY else 0.8) * speed - rate * gain * slope
        at = at + speed
    return at - at.mean(axis=0)


def principal(rows: np.ndarray) -> np.ndarray:
    """(N, D) -> (N, 2): places on the two axes of most variance."""
    centred = rows - rows.mean(axis=0)
    left, values, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])
    return left[:, :2] * values[:2] * signs


def kept_neighbours(
    rows: np.ndarray, flat: np.ndarray, k: int = 10, permutations: int = 0, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Share of each point's k nearest on the map that are among its k nearest in the space, and (P,) shares by chance.

    Chance: the same map with its points handed out at random; k / (N - 1) on average.
    """
    true = np.zeros((len(rows), len(rows)), dtype=bool)
    near, far = _nearest(flat, k), _nearest(rows, k)
    np.put_along_axis(true, far, True, axis=1)
    rng = np.random.default_rng(seed)
    null = np.empty(permutations)
    for n in range(permutations):
        order = rng.permutation(len(rows))
        null[n] = true[order[:, None], order[near]].mean()
    return float(true[np.arange(len(rows))[:, None], near].mean()), null


def draw_map(path: Path, pairs: Pairs, rows: np.ndarray, image_at: np.ndarray, text_at: np.ndarray) -> None:
    """Each picture where it lies, as long as there is room for it, joined to an orange dot where its caption lies."""
    both = np.concatenate([image_at, text_at])
    low, high = both.min(axis=0), both.max(axis=0)
    image_at, text_at = ((at - low) / (high - low) for at in (image_at, text_at))
    side, placed = THUMBNAIL, []
    for i, at in enumerate(image_at):
        if all(np.abs(at - image_at[j]).max() > 1.03 * side for j in placed):
            placed.append(i)
    rest = np.setdiff1d(np.arange(len(rows)), placed)
    with drawing():
        figure, axes = panels(width=9.4, height=9.4)
        panel = axes[0, 0]
        ends = np.stack([image_at, text_at], axis=1)  # (N, 2, 2)
        panel.plot(ends[:, :, 0].T, ends[:, :, 1].T, color=GREY, linewidth=0.9, alpha=0.45, zorder=1)
        panel.scatter(*image_at[rest].T, s=16, color=GREY, zorder=1, linewidths=0, label="a picture without room")
        for i in placed:
            x, y = image_at[i]
            picture = pairs.thumbnail(int(rows[i]), 96)
            width, height = np.array(picture.size) / max(picture.size) * side
            box = (x - width / 2, x + width / 2, y - height / 2, y + height / 2)
            panel.imshow(np.asarray(picture), extent=box, zorder=2, interpolation="lanczos")
        label = "a caption, joined to its picture"
        panel.scatter(*text_at.T, s=18, color=ORANGE, zorder=3, edgecolors="white", linewidths=0.5, label=label)
        reach = 0.03
        panel.set(xlim=(-reach, 1 + reach), ylim=(-reach, 1 + reach), aspect="equal", xticks=[], yticks=[])
        panel.set_xlabel("t-SNE of the cosines: only nearness means something", fontsize=14)
        panel.spines[:].set_visible(False)
        panel.set_title(f"{len(rows)} pictures and their captions in one space, laid flat", fontsize=18)
        figure.legend(loc="outside lower center", ncols=2, fontsize=14, handletextpad=0.1, markerscale=2)
        save(figure, path)


def _distances(at: np.ndarray) -> np.ndarray:
    """(N, N) squared distances."""
    square = (at**2).sum(axis=1)
    return np.maximum(square[:, None] + square[None] - 2 * at @ at.T, 0)


def _affinities(distances: np.ndarray, perplexity: float) -> np.ndarray:
    """(N, N) probabilities, each row a Gaussian of its own width whose perplexity is as asked, by bisection."""
    size = len(distances)
    away = distances + np.diag(np.full(size, np.inf))
    away = away - away.min(axis=1, keepdims=True)
    low, high = np.full((size, 1), -20.0), np.full((size, 1), 20.0)  # log of the inverse width
    for _ in range(50):
        middle = (low + high) / 2
        weight = np.exp(-np.exp(middle) * away)
        share = weight / weight.sum(axis=1, keepdims=True)
        entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(axis=1, keepdims=True)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return share


def _nearest(at: np.ndarray, k: int) -> np.ndarray:
    """(N, k) each point's k nearest others."""
    distances = _distances(np.asarray(at, dtype=np.float64))
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]
