import math

import numpy as np
import pytest

from diffusion.intervals import flat, jackknife, of_mean, of_median, of_share


def test_wilsons_interval_is_the_published_one_and_exists_for_none_and_all():
    half = of_share([True] * 10 + [False] * 10)
    assert (half.low, half.high) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    none, everything = of_share([False] * 20), of_share([True] * 20)
    assert (none.low, none.high) == pytest.approx((0, 0.1611), abs=1e-4)
    assert (everything.low, everything.high) == pytest.approx((0.8389, 1), abs=1e-4)


def test_a_medians_interval_is_between_the_places_of_the_sign_test():
    figure = of_median(np.arange(10)[::-1])  # the 2nd and 9th of ten: 97.9 %
    assert (figure.value, figure.low, figure.high) == (4.5, 1, 8)
    hundred = of_median(range(1, 101))  # the 40th and 61st of a hundred: 96.5 %
    assert (hundred.low, hundred.high) == (40, 61)
    assert of_median([3]).low == of_median([3]).high == 3


def test_a_means_interval_holds_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    figures = [of_mean(rng.exponential(size=200)) for _ in range(500)]
    assert np.mean([one.low <= 1 <= one.high for one in figures]) == pytest.approx(0.95, abs=0.03)
    assert math.isnan(of_mean([2.0]).low)


def test_the_jackknife_of_a_mean_is_the_means_own_interval():
    """For a linear measure the groups' variance is that of the samples, up to the chance of how they are grouped."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=4000), rng.normal(size=2000)
    (figure,) = jackknife(lambda i, j: [a[i].mean() - b[j].mean()], len(a), len(b))
    assert figure.value == pytest.approx(a.mean() - b.mean())
    error = math.sqrt(1 / 4000 + 1 / 2000)
    assert (figure.high - figure.low) / 2 == pytest.approx(2.09 * error, rel=0.4)


def test_too_few_samples_have_a_value_but_no_interval():
    (figure,) = jackknife(lambda i, j: [len(i) + len(j)], 19, 30)
    assert figure.value == 49 and math.isnan(figure.low) and flat({"x": figure})["interval"]["x"] is None
    assert flat({"x": of_share([True, False])}).keys() == {"x", "interval"}
