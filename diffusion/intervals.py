"""How sure a figure is: 95 % intervals for means, shares, medians, and for any measure of two sets of samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMAL, STUDENT_19 = 1.959964, 2.093024  # 97.5 % quantiles: of a Gaussian, of Student's t with 19 degrees of freedom
GROUPS = 20  # of a jackknife: one more than the degrees of freedom above


@dataclass(frozen=True)
class Figure:
    """A measured number, and between which two it would lie for 95 of 100 other sets of samples of the same size."""

    value: float
    low: float
    high: float


def flat(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """{name: value, ..., "interval": {name: [low, high]}}: how figures stand in json.

    An interval is null where there are too few samples for one.
    """
    return {name: one.value for name, one in figures.items()} | {
        "interval": {name: None if math.isnan(one.low) else [one.low, one.high] for name, one in figures.items()}
    }


def of_mean(values: Sequence[float] | np.ndarray) -> Figure:
    """Mean of independent values (N,); mean -+ 1.96 std / sqrt(N). One value alone has no interval (nan)."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    error = NORMAL * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Figure(mean, mean - error, mean + error)


def of_share(hits: Sequence[bool] | np.ndarray) -> Figure:
    """Share of independent hits (N,) that are true; Wilson's interval (1927), which 0 of N and N of N have as well."""
    hits = np.asarray(hits, dtype=bool)
    count, share, z = len(hits), float(hits.mean()), NORMAL**2
    middle = (share + z / (2 * count)) / (1 + z / count)
    half = math.sqrt(z * (share * (1 - share) / count + z / (4 * count**2))) / (1 + z / count)
    low = 0.0 if share == 0 else max(0.0, middle - half)
    return Figure(share, low, 1.0 if share == 1 else min(1.0, middle + half))


def of_median(values: Sequence[float] | np.ndarray) -> Figure:
    """Median of independent values (N,), between two of them: the places that a fair coin thrown N times stays within.

    Needs no assumption about their distribution; below 6 values it is from the least to the greatest.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    below = np.cumsum([math.exp(_log_choose(count, i) - count * math.log(2)) for i in range(count)])
    cut = max(0, int(np.searchsorted(below, 0.025, side="right")) - 1) if count else 0
    return Figure(float(np.median(ordered)), float(ordered[cut]), float(ordered[count - 1 - cut]))


def jackknife(
    measure: Callable[[np.ndarray, np.ndarray], Sequence[float]], count_a: int, count_b: int, seed: int = 0
) -> list[Figure]:
    """Figures of a measure of two sets, from what it becomes when a twentieth of both is left out, each in its turn.

    measure(rows_a, rows_b): its values for these rows of the sets, which have count_a and count_b. variance = 19/20 of
    the sum of squared deviations of the 20 values (Efron and Stein 1981; delete-a-group: Kott 2001). Unlike a
    bootstrap it never counts a sample twice, which a distance with nearest neighbours or a U-statistic takes ill.
    The value is the measure of all rows, biased by their number as the measure is: compare sets of one size.
    """
    rng = np.random.default_rng(seed)
    everything = np.arange(count_a), np.arange(count_b)
    values = [float(value) for value in measure(*everything)]
    if min(count_a, count_b) < GROUPS:
        return [Figure(value, math.nan, math.nan) for value in values]
    groups_a, groups_b = (rng.permutation(count) % GROUPS for count in (count_a, count_b))
    without = np.array([measure(everything[0][groups_a != g], everything[1][groups_b != g]) for g in range(GROUPS)])
    error = STUDENT_19 * np.sqrt((GROUPS - 1) / GROUPS * ((without - without.mean(0)) ** 2).sum(0))
    return [Figure(value, value - half, value + half) for value, half in zip(values, error.tolist(), strict=True)]


def _log_choose(count: int, some: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(some + 1) - math.lgamma(count - some + 1)
