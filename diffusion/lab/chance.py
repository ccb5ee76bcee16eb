"""What chance alone reaches: the null distribution that a finding's band starts above."""

import numpy as np

LEVEL = 0.01  # how often chance may reach a band


def above_chance(null: np.ndarray, level: float = LEVEL) -> float:
    """The least value whose permutation p-value, (1 + draws as large) / (1 + draws), is at most `level`.

    null (P,): the same statistic on P random rearrangements of the data. With fewer than 1 / level draws no value has
    such a p-value; the band then begins above the largest draw.
    """
    falling = np.sort(np.asarray(null, dtype=np.float64))[::-1]
    may_reach = max(0, int(level * (len(falling) + 1)) - 1)  # draws
    return float(np.nextafter(falling[may_reach], np.inf))


def p_value(found: float, null: np.ndarray) -> float:
    """(1 + draws as large as found) / (1 + draws), so never 0 (Phipson and Smyth 2010)."""
    return float((1 + np.count_nonzero(np.asarray(null) >= found)) / (1 + len(null)))


def permutations(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(count, size): random orders of 0 .. size - 1."""
    return np.argsort(rng.random((count, size), dtype=np.float32), axis=1)
