import math

import pytest
import torch

from diffusion.lab import noising
from diffusion.samplers import SampleNoise
from diffusion.schedule import GRIDS, vp_linear_sigma

ENDS = {"sigma_min": 0.002, "sigma_max": 80.0}


@pytest.mark.parametrize("schedule", GRIDS)
def test_the_steps_of_a_walk_add_up_to_one_jump(schedule):
    x0, noise = torch.full((20_000,), 0.7), SampleNoise([3], (20_000,))
    sigmas = noising.rising(schedule, 30, **ENDS)
    assert sigmas[0] == 0 and sigmas[-1] == 80 and sigmas.diff().min() > 0
    walk = list(noising.random_walk(x0, sigmas, lambda: noise()[0]))
    assert len(walk) == 31 and torch.equal(walk[0], x0)
    for x, sigma in zip(walk[1:], sigmas[1:].tolist(), strict=True):
        assert float((x - x0).std()) == pytest.approx(sigma, rel=0.03)
        assert abs(float((x - x0).mean())) < 0.03 * sigma


def test_each_step_adds_noise_that_knows_nothing_of_the_step_before():
    noise = SampleNoise([0], (20_000,))
    walk = list(noising.random_walk(torch.zeros(20_000), torch.tensor([0.0, 1.0, 2.0]), lambda: noise()[0]))
    first, second = walk[1], walk[2] - walk[1]
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03
    assert float(second.var()) == pytest.approx(3, rel=0.05)  # 2^2 - 1^2


def test_the_preserving_process_keeps_unit_variance_and_draws_other_data_to_it():
    x0, noise = SampleNoise([1], (50_000,))(), SampleNoise([2], (50_000,))()
    for sigma in (0.1, 1.0, 10.0):
        assert float(noising.preserved(x0 + sigma * noise, sigma).var()) == pytest.approx(1, rel=0.03)
    quiet = noising.preserved(0.5 * x0 + noise, 1.0)
    assert float(quiet.var()) == pytest.approx((0.25 + 1) / 2, rel=0.03)


def test_the_betas_of_ddpm_are_the_linear_ones():
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    betas = noising.betas(vp_linear_sigma(times))
    theirs = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM, section 4
    assert torch.allclose(betas, theirs, rtol=0.015, atol=2e-5)  # beta against 1 - exp(-beta)


def test_beta_is_the_fresh_share_of_a_step():
    betas = noising.betas(torch.tensor([0.0, 1.0, 3.0]))
    assert betas.tolist() == pytest.approx([0.5, 0.8])  # 1 of 1 + 1, then 8 of 1 + 9


def test_bands_are_filled_from_the_clean_end():
    ratios = torch.tensor([1000.0, 100.0, 50.0, 1.0, 0.5, 0.001])
    assert noising.shares(ratios, (100.0, 1.0, 0.01)) == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6])


def test_signal_falls_with_the_square_of_the_noise():
    assert noising.signal_to_noise(torch.tensor([0.5, 1.0, 5.0]), 0.5).tolist() == pytest.approx([1, 0.25, 0.01])


def test_schedules_divide_the_way_as_their_formulas_say():
    edges, std = (100.0, 0.01), 0.5  # sigma 0.05 and 5
    middle = {name: noising.walk_shares(name, edges, std, steps=1000, **ENDS)[1] for name in GRIDS}
    assert middle["log"] == pytest.approx(math.log(100) / math.log(40_000), abs=0.005)
    assert middle["cosine"] == pytest.approx((math.atan(5) - math.atan(0.05)) * 2 / math.pi, abs=0.01)
    assert middle["flow"] == pytest.approx(5 / 6 - 0.05 / 1.05, abs=0.015)
    root = [sigma ** (1 / 7) for sigma in (0.002, 0.05, 5, 80)]
    assert middle["karras"] == pytest.approx((root[2] - root[1]) / (root[3] - root[0]), abs=0.005)
    trained = noising.training_shares("cosine", edges, std)[1]
    assert trained == pytest.approx((math.atan(5) - math.atan(0.05)) * 2 / math.pi, abs=0.005)


def test_a_way_is_measured_as_the_closed_form_says():
    picture = SampleNoise([5], (3, 40, 40))()[0].clamp(-1, 1)
    std = float(picture.std(correction=0))
    way = noising.Way.of(picture, noising.rising("cosine", 24, **ENDS), seed=1)
    sigma = way.sigmas.double().numpy()
    assert way.preserved == pytest.approx((std**2 + sigma**2) / (1 + sigma**2), rel=0.06)
    assert way.noise[1:] == pytest.approx(sigma[1:] ** 2, rel=0.06)
    assert len(way.shown) == len(noising.PARTS) and torch.equal(way.shown[0], picture)
    assert len(way.betas) == len(way.ratios) == 24
