import numpy as np

from diffusion.lab.chance import above_chance, p_value, permutations


def test_the_band_begins_where_the_p_value_is_small_enough():
    null = np.arange(1999.0)
    low = above_chance(null, level=0.01)
    assert p_value(low, null) <= 0.01 < p_value(np.nextafter(low, -np.inf), null)


def test_what_chance_always_reaches_is_below_the_band():
    assert above_chance(np.zeros(2000)) > 0
    assert above_chance(np.full(50, 0.25)) > 0.25  # too few draws for the level: above the largest


def test_chance_reaches_the_band_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    reached = [rng.standard_normal() >= above_chance(rng.standard_normal(199), level=0.05) for _ in range(2000)]
    assert 0.035 < np.mean(reached) < 0.065  # 0.05, standard error 0.005


def test_permutations_are_orders_each_as_likely():
    drawn = permutations(6000, 3, np.random.default_rng(0))
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 6 and (abs(counts - 1000) < 150).all()
