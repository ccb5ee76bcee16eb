import numpy as np
import tiny

from diffusion.lab.chance import above_chance
from diffusion.lab.neighbours import kept_neighbours, principal, tsne


def islands(count: int = 6, each: int = 12, dim: int = 40):
    centres = np.repeat(tiny.unit_rows(count, dim, seed=1), each, axis=0)
    return centres + 0.3 * tiny.unit_rows(count * each, dim, seed=2), np.repeat(np.arange(count), each)


def test_islands_in_forty_dimensions_are_islands_on_the_map():
    rows, kind = islands()
    flat = tsne(rows, perplexity=8, steps=300)
    away = np.linalg.norm(flat[:, None] - flat[None], axis=2) + np.diag(np.full(len(flat), np.inf))
    assert (kind[away.argmin(axis=1)] == kind).all()
    kept, null = kept_neighbours(rows, flat, k=8, permutations=300)
    assert kept > above_chance(null) and kept > kept_neighbours(rows, principal(rows), k=8)[0]
    assert np.isclose(null.mean(), 8 / (len(rows) - 1), atol=0.01)


def test_a_perfect_map_keeps_every_neighbour_and_a_random_one_none_but_by_chance():
    flat = np.random.default_rng(0).standard_normal((50, 2))
    assert kept_neighbours(flat, 3 * flat + 1, k=5)[0] == 1
    kept, null = kept_neighbours(flat, np.random.default_rng(1).standard_normal((50, 2)), k=5, permutations=200)
    assert kept < above_chance(null)


def test_the_same_rows_give_the_same_map():
    rows, _ = islands(3, 5)
    assert np.array_equal(tsne(rows, steps=60), tsne(rows, steps=60))


def test_main_axes_are_those_of_most_variance():
    rows = np.random.default_rng(0).standard_normal((300, 5)) * [1, 5, 1, 3, 1]
    assert np.allclose(abs(principal(rows)).max(axis=0), abs(rows - rows.mean(axis=0))[:, [1, 3]].max(axis=0), rtol=0.1)
