import math
from statistics import NormalDist

import pytest
import torch

from diffusion import schedule

GRIDS = sorted(schedule.GRIDS)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 35])
def test_a_grid_falls_from_sigma_max_and_ends_in_zero(grid, steps):
    sigmas = schedule.GRIDS[grid](steps, 0.01, 50.0)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0].item() == pytest.approx(50.0) and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert steps == 1 or sigmas[-2].item() == pytest.approx(0.01, rel=1e-4)


def test_karras_grid_is_that_of_equation_5_worked_by_hand():
    # rho = 1 is a straight line; rho = 2 is straight in the square root
    assert schedule.karras_sigmas(3, 1.0, 9.0, rho=1).tolist() == pytest.approx([9, 5, 1, 0])
    assert schedule.karras_sigmas(3, 1.0, 9.0, rho=2).tolist() == pytest.approx([9, 4, 1, 0])


def test_log_and_flow_grids_worked_by_hand():
    assert schedule.log_sigmas(3, 0.1, 10.0).tolist() == pytest.approx([10, 1, 0.1, 0])
    # times 3/4, 1/2, 1/4
    assert schedule.flow_sigmas(3, 1 / 3, 3.0).tolist() == pytest.approx([3, 1, 1 / 3, 0])


@pytest.mark.parametrize(
    "grid, time",
    [
        ("cosine", torch.atan),
        ("flow", lambda sigma: sigma / (1 + sigma)),
        ("log", torch.log),
        ("karras", lambda sigma: sigma ** (1 / 7)),
        # 9.95 u^2 + 0.1 u = ln(1 + sigma^2)
        ("vp_linear", lambda sigma: (-0.1 + (0.01 + 39.8 * torch.log1p(sigma**2)).sqrt()) / 19.9),
    ],
)
def test_a_grid_steps_equally_in_its_own_time(grid, time):
    times = time(schedule.GRIDS[grid](9, 0.1, 10.0)[:-1].double())
    assert torch.allclose(times.diff(), times.diff().mean().expand(8), atol=1e-6)


def test_cosine_sigma_has_the_signal_share_of_the_paper():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    alpha_bar = 1 / (1 + schedule.cosine_sigma(u) ** 2)
    assert torch.allclose(alpha_bar, torch.cos(math.pi / 2 * u) ** 2)


def test_vp_linear_sigma_is_the_limit_of_ddpms_product_of_linear_betas():
    far = []
    for steps in (1000, 10_000):  # DDPM's own 1000 first, then the same in ten times finer steps
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - betas, 0)
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        ours = schedule.vp_linear_sigma(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
        far.append((ours / sigma - 1).abs()[steps // 100 :].max().item())
    assert far[0] < 0.04 and far[1] < far[0] / 8
    assert sigma[-1].item() == pytest.approx(152.2, rel=0.01)


def test_flow_sigma_mixes_clean_and_noise_in_the_shares_of_its_time():
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = schedule.flow_sigma(u)
    # x / (1 + sigma) = (1 - time) x0 + time noise
    assert torch.allclose(1 / (1 + sigma), 1 - u) and torch.allclose(sigma / (1 + sigma), u)


def test_log_normal_sigma_has_the_quantiles_of_a_gaussian_logarithm():
    for u in (0.01, 0.3, 0.5, 0.9):
        expected = NormalDist(-1.2, 1.2).inv_cdf(u)
        assert schedule.log_normal_sigma(torch.tensor(u, dtype=torch.float64)).log().item() == pytest.approx(expected)


def test_a_logit_normal_time_of_the_flow_is_a_log_normal_sigma():
    for u in (0.01, 0.3, 0.9):
        time = 1 / (1 + math.exp(-NormalDist(0.4, 0.7).inv_cdf(u)))
        here = schedule.log_normal_sigma(torch.tensor(u, dtype=torch.float64), 0.4, 0.7).item()
        assert here / (1 + here) == pytest.approx(time)


@pytest.mark.parametrize("density", sorted(schedule.DENSITIES))
def test_a_density_is_a_rising_quantile_function_finite_on_all_that_is_drawn(density):
    u = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
    sigma = schedule.DENSITIES[density](u)
    assert sigma.isfinite().all() and sigma[0] > 0 and (sigma.diff() > 0).all()


def test_stratified_numbers_fall_one_in_each_strip_and_in_no_order():
    u = schedule.stratified(100, torch.Generator().manual_seed(0))
    assert ((u * 100).floor().sort().values == torch.arange(100)).all()
    assert not (u.sort().values == u).all()
    assert u.min() > 0 and u.max() < 1


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        schedule.karras_sigmas(0)
    for grid in GRIDS:
        with pytest.raises(ValueError, match="sigma_min < sigma_max"):
            schedule.GRIDS[grid](5, 2.0, 1.0)
