import numpy as np
import pytest
import tiny

from diffusion.lab import gap
from diffusion.lab.chance import above_chance


def clouds(shift: float, n: int = 200, dim: int = 24, noise: float = 0.3):
    """Pairs that share a direction, pictures moved one way and captions the other."""
    centre, towards = tiny.unit_rows(n, dim, seed=3), tiny.unit_rows(1, dim, seed=4)
    made = [
        centre + sign * shift * towards + noise * tiny.unit_rows(n, dim, seed=seed) for sign, seed in ((1, 5), (-1, 6))
    ]
    return [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in made]


def test_two_clouds_lie_apart_and_a_plane_parts_them():
    found = gap.measure(*clouds(0.5), permutations=300)
    assert found.distance > above_chance(found.distances_by_chance) and found.parted > 0.9
    assert found.parted_by_chance.mean() == pytest.approx(0.5, abs=0.02)
    assert found.along[0].mean() > 0 > found.along[1].mean()  # pictures to the right, captions to the left


def test_one_cloud_has_no_gap():
    found = gap.measure(*clouds(0.0), permutations=300)
    assert found.distance < above_chance(found.distances_by_chance)
    assert found.parted < above_chance(found.parted_by_chance) and 0.4 < found.parted < 0.6


def test_the_plane_is_judged_on_pairs_that_it_was_not_fitted_to():
    """In 500 dimensions a line between two means parts the very rows it was drawn through, gap or no gap."""
    image, text = tiny.unit_rows(60, 500, seed=0), tiny.unit_rows(60, 500, seed=1)
    assert 0.3 < gap.measure(image, text, permutations=50).parted < 0.7
    axis = image.mean(axis=0) - text.mean(axis=0)
    assert (image @ axis > text @ axis).mean() > 0.9


def test_closing_the_gap_brings_the_centres_together():
    image, text = gap.closed(*clouds(0.5))
    assert np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)) < 0.1
    assert np.allclose(np.linalg.norm(image, axis=1), 1)


def test_swapping_the_two_sides_mirrors_the_picture():
    image, text = clouds(0.4)
    one, other = gap.measure(image, text, permutations=2), gap.measure(text, image, permutations=2)
    assert one.parted == other.parted and np.allclose(one.along, -other.along[::-1][[1, 0]][::-1], atol=1e-5)
