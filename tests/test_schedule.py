import math
from statistics import NormalDist

import pytest
import torch

from diffusion import schedule

GRIDS = [schedule.karras_sigmas, schedule.cosine_sigmas]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 35])
def test_a_grid_falls_from_sigma_max_and_ends_in_zero(grid, steps):
    sigmas = grid(steps, 0.01, 50.0)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0].item() == pytest.approx(50.0) and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert steps == 1 or sigmas[-2].item() == pytest.approx(0.01, rel=1e-4)


def test_karras_grid_is_that_of_equation_5_worked_by_hand():
    # rho = 1 is a straight line; rho = 2 is straight in the square root
    assert schedule.karras_sigmas(3, 1.0, 9.0, rho=1).tolist() == pytest.approx([9, 5, 1, 0])
    assert schedule.karras_sigmas(3, 1.0, 9.0, rho=2).tolist() == pytest.approx([9, 4, 1, 0])


def test_cosine_grid_steps_equally_in_the_angle():
    angles = schedule.cosine_sigmas(5, 0.1, 10.0)[:-1].double().atan()
    assert torch.allclose(angles.diff(), angles.diff().mean().expand(4), atol=1e-6)


def test_cosine_sigma_has_the_signal_share_of_the_paper():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    alpha_bar = 1 / (1 + schedule.cosine_sigma(u) ** 2)
    assert torch.allclose(alpha_bar, torch.cos(math.pi / 2 * u) ** 2)


def test_log_normal_sigma_has_the_quantiles_of_a_gaussian_logarithm():
    for u in (0.01, 0.3, 0.5, 0.9):
        expected = NormalDist(-1.2, 1.2).inv_cdf(u)
        assert schedule.log_normal_sigma(torch.tensor(u, dtype=torch.float64)).log().item() == pytest.approx(expected)


def test_stratified_numbers_fall_one_in_each_strip_and_in_no_order():
    u = schedule.stratified(100, torch.Generator().manual_seed(0))
    assert ((u * 100).floor().sort().values == torch.arange(100)).all()
    assert not (u.sort().values == u).all()
    assert u.min() > 0 and u.max() < 1


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        schedule.karras_sigmas(0)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        schedule.cosine_sigmas(5, 2.0, 1.0)
