"""How far a set of made pictures is from a set of real ones: pure functions on their features (N, F).

None of these is "FID" or "KID" by itself: those are Frechet and kernel distance in the features of one network
(features.py). All depend on the number of samples; compare them at one size, beside the distance of real from real.
"""

from collections.abc import Callable

import numpy as np

from diffusion.intervals import Figure, jackknife, of_mean

MOST = 5000  # samples of each set that enter the measures which compare every pair


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of a (N, F) and b (M, F).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6), where the
    last trace is the sum of the singular values of Xa Xb^T / sqrt((N - 1)(M - 1)), X the centred samples: exact, and
    for fewer samples than features as well. Biased upwards by about F / N of the spread: compare at one size only.
    """
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x . y / F + 1)^3 of KID. a (N, F), b (M, F).

    Binkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012, eq. 3. Its mean is 0 for sets from one
    distribution whatever their size, so it can be slightly negative. Tables show it times 1000. Features should be of
    size about 1 per coordinate: unit rows times sqrt(F), or the kernel is all but linear.
    """
    return _mmd(*_dots(a, b), a.shape[1])


def precision_recall(real: np.ndarray, made: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of made samples within the real ones' reach, and of real samples within the made ones'.

    The reach of a set: the balls around each sample that end at its k-th nearest neighbour in the set
    (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-3). real (N, F), made (M, F).
    """
    rr, mm, rm = _distances(*_dots(real, made))
    return _precision_recall(rr, mm, rm, k)


def density_coverage(real: np.ndarray, made: np.ndarray, k: int = 5) -> tuple[float, float]:
    """In how many real balls a made sample lies, over k; and the share of real balls that hold a made sample.

    Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4: one stray real sample counts for less than in precision.
    Of two sets from one distribution density is 1 on average, coverage 1 - 1 / 2^k for many samples of each.
    """
    rr, _, rm = _distances(*_dots(real, made))
    return _density_coverage(rr, rm, k)


def variance_ratio(real: np.ndarray, made: np.ndarray) -> float:
    """Variance of the made samples (summed over features) over that of the real ones: 1, or less when they collapse."""
    return float(np.var(made, axis=0, ddof=1).sum() / np.var(real, axis=0, ddof=1).sum())


def clip_score(image: np.ndarray, text: np.ndarray) -> Figure:
    """100 x the mean of max(cosine, 0) of picture i and caption i; unit rows (N, D).

    Hessel et al. 2021 (arXiv 2104.08718), with 100 for their 2.5, as torchmetrics counts it. Its size is the CLIP's
    own: compare with the score of the real pictures.
    """
    cosine = (np.asarray(image, np.float64) * np.asarray(text, np.float64)).sum(axis=1)
    return of_mean(100 * cosine.clip(min=0))


def compare(real: np.ndarray, made: np.ndarray, seed: int = 0) -> dict[str, Figure]:
    """Every distance of two sets of features with its interval: frechet, kernel (x 1000), precision, recall, density,
    coverage.

    real (N, F), made (M, F). Of more than 5,000 samples the measures of pairs see 5,000, drawn by `seed`.
    ValueError: fewer than 20 samples in a set.
    """
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    if min(len(real), len(made)) < 20:
        raise ValueError(f"{len(real)} and {len(made)} samples are too few for a distance; 20 at least")
    (spread,) = jackknife(lambda i, j: [frechet(real[i], made[j])], len(real), len(made), seed)
    rng = np.random.default_rng(seed)
    real, made = (rows if len(rows) <= MOST else rows[rng.permutation(len(rows))[:MOST]] for rows in (real, made))
    dots = _dots(real, made)
    apart = _distances(*dots)

    def pairs(i: np.ndarray, j: np.ndarray) -> tuple[float, ...]:
        near = _some(apart, i, j)
        return (
            1000 * _mmd(*_some(dots, i, j), real.shape[1]),
            *_precision_recall(*near, 3),
            *_density_coverage(near[0], near[2], 5),
        )

    names = "kernel", "precision", "recall", "density", "coverage"
    figures = dict(zip(names, jackknife(pairs, len(real), len(made), seed), strict=True))
    for share in ("precision", "recall", "coverage"):
        one = figures[share]
        figures[share] = Figure(one.value, max(0.0, one.low), min(1.0, one.high))
    return {"frechet": spread} | figures


def kernel_difference(real: np.ndarray, a: np.ndarray, b: np.ndarray, seed: int = 0) -> Figure:
    """kernel(real, a) - kernel(real, b), times 1000, of two sets drawn for the same rows: a[i] goes with b[i].

    What both owe to the rows that happened to be drawn cancels, so the interval is narrower than either's.
    """
    real, a, b = (np.asarray(rows, np.float64)[:MOST] for rows in (real, a, b))
    of_a, of_b, wide = _dots(real, a), _dots(real, b), real.shape[1]

    def measure(i: np.ndarray, j: np.ndarray) -> list[float]:
        return [1000 * (_mmd(*_some(of_a, i, j), wide) - _mmd(*_some(of_b, i, j), wide))]

    return jackknife(measure, len(real), len(a), seed)[0]


Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a with a (N, N), b with b (M, M), a with b (N, M)


def figure_of(
    measure: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray, seed: int = 0
) -> Figure:
    """One measure of two sets, such as frechet(a, b), with its interval."""
    return jackknife(lambda i, j: [measure(a[i], b[j])], len(a), len(b), seed)[0]


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,), and a root: root.T @ root is the covariance."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = rows.mean(axis=0)
    centred = (rows - mean) / np.sqrt(len(rows) - 1)
    return mean, centred if len(rows) <= rows.shape[1] else np.linalg.qr(centred, mode="r")


def _dots(a: np.ndarray, b: np.ndarray) -> Matrices:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return a @ a.T, b @ b.T, a @ b.T


def _distances(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray) -> Matrices:
    """Squared Euclidean distances from inner products."""
    size_a, size_b = np.diagonal(aa), np.diagonal(bb)
    return (
        size_a[:, None] + size_a - 2 * aa,
        size_b[:, None] + size_b - 2 * bb,
        size_a[:, None] + size_b - 2 * ab,
    )


def _some(matrices: Matrices, i: np.ndarray, j: np.ndarray) -> Matrices:
    aa, bb, ab = matrices
    return aa[np.ix_(i, i)], bb[np.ix_(j, j)], ab[np.ix_(i, j)]


def _mmd(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray, wide: int) -> float:
    aa, bb, ab = ((dots / wide + 1) ** 3 for dots in (aa, bb, ab))

    def others(own: np.ndarray) -> float:  # mean over pairs of different samples
        return (own.sum() - np.trace(own)) / (len(own) * (len(own) - 1))

    return float(others(aa) + others(bb) - 2 * ab.mean())


def _precision_recall(rr: np.ndarray, mm: np.ndarray, rm: np.ndarray, k: int) -> tuple[float, float]:
    precision = (rm <= _reach(rr, k)[:, None]).any(axis=0).mean()
    recall = (rm <= _reach(mm, k)[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def _density_coverage(rr: np.ndarray, rm: np.ndarray, k: int) -> tuple[float, float]:
    inside = rm <= _reach(rr, k)[:, None]
    return float(inside.sum() / (k * rm.shape[1])), float(inside.any(axis=1).mean())


def _reach(own: np.ndarray, k: int) -> np.ndarray:
    """(N,) squared distance of every sample to its k-th nearest other one."""
    if k >= len(own):
        raise ValueError(f"{len(own)} samples have no {k}-th neighbour")
    own = own.copy()
    np.fill_diagonal(own, np.inf)
    return np.partition(own, k - 1, axis=1)[:, k - 1]
