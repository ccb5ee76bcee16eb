import numpy as np
import tiny

from diffusion.lab.chance import above_chance, permutations
from diffusion.lab.similarity import contrast, matched, signed


def test_contrast_is_the_diagonal_less_the_rest():
    cosines = np.array([[0.9, 0.1, 0.2], [0.0, 0.6, 0.3], [0.1, 0.2, 0.3]])
    assert np.isclose(contrast(cosines), 0.6 - 0.15)
    assert np.isclose(contrast(cosines, np.array([1, 2, 0])), (0.1 + 0.3 + 0.1) / 3 - (1.8 + 0.4) / 6)


def test_pairs_that_match_stand_above_chance_and_pairs_that_do_not_stay_below():
    image, noise = tiny.unit_rows(60, 32, seed=1), tiny.unit_rows(60, 32, seed=2)
    orders = permutations(500, 60, np.random.default_rng(0))
    for text, known in ((image + noise, True), (noise, False)):
        cosines = image @ text.T
        for number in (contrast, matched):
            assert (number(cosines) >= above_chance(number(cosines, orders))) == known


def test_a_batch_turned_round_loses_its_diagonal():
    image = tiny.unit_rows(40, 16)
    assert matched(image @ image.T) == 1 and matched(image @ image[::-1].T) == 0
    assert contrast(image @ image.T) > 0.9 > 0.1 > abs(contrast(image @ image[::-1].T))


def test_rows_that_are_all_alike_match_by_chance_alone():
    assert matched(np.ones((10, 10))) == 0.1


def test_numbers_are_written_with_a_true_minus_and_no_minus_zero():
    assert [signed(x) for x in (-0.001, 0.126, -0.5)] == ["0.00", "0.13", "−0.50"]
