"""The spiral is worked by hand, its exact denoiser held against the mixture of tests/gauss.py and its own density."""

import math

import pytest
import torch
from gauss import Gaussians

from clip_train.settings import UserError
from diffusion.lab.spiral import BINS, CLASSES, FIRST, LAST, NOTHING, Spiral, class_of, coverage, curve, nearest

SPIRAL = Spiral.of(120, spread=0.05)


def noisy(sigma, count=40, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return SPIRAL.draw(count, rng)[0] + sigma * torch.randn(count, 2, generator=rng), torch.full((count,), sigma)


def test_the_curve_is_archimedes_spiral_from_a_third_of_the_radius_to_all_of_it():
    ends = curve(torch.tensor([0.0, 1.0]))
    assert ends[0].tolist() == pytest.approx([0, -1 / 3], abs=1e-5)  # angle 3/2 pi
    assert ends[1].tolist() == pytest.approx([0, 1], abs=1e-5)  # angle 9/2 pi
    points = curve(torch.linspace(0, 1, 500))
    angle = points.norm(dim=1) * LAST
    assert FIRST - 1e-3 < angle.min() and angle.max() < LAST + 1e-3
    assert torch.allclose(
        torch.stack([angle.cos(), angle.sin()], 1), points / points.norm(dim=1, keepdim=True), atol=1e-3
    )


def test_equal_shares_of_the_arc_are_equal_lengths():
    steps = curve(torch.linspace(0, 1, 2000)).diff(dim=0).norm(dim=1)
    assert steps.max() / steps.min() < 1.01


def test_points_fill_the_curve_and_the_three_classes_alike():
    assert nearest(SPIRAL.points)[0].max() < 2e-3
    assert torch.bincount(SPIRAL.label).tolist() == [40, 40, 40]
    assert class_of(torch.tensor([0.0, 0.3, 0.34, 0.66, 0.67, 1.0])).tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(SPIRAL.points, Spiral.of(120, seed=1).points)
    assert torch.equal(SPIRAL.points, Spiral.of(120, seed=0).points)


def test_true_samples_lie_about_their_training_points_with_the_spread():
    drawn, row = SPIRAL.draw(20_000, torch.Generator().manual_seed(0))
    away = drawn - SPIRAL.points[row]
    assert away.std().item() == pytest.approx(0.05, rel=0.02) and away.mean().abs() < 1e-3


def test_the_distance_to_the_curve_is_how_far_a_point_was_moved_off_it():
    arc = torch.tensor([0.2, 0.5, 0.8])
    on, ahead = curve(arc), curve(arc + 1e-4)
    along = (ahead - on) / (ahead - on).norm(dim=1, keepdim=True)
    across = torch.stack([-along[:, 1], along[:, 0]], dim=1)
    distance, place = nearest(on + 0.07 * across)
    assert distance.tolist() == pytest.approx([0.07] * 3, abs=1e-3)
    assert place.tolist() == pytest.approx(arc.tolist(), abs=2e-3)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_the_exact_denoiser_is_the_mixtures(sigma):
    truth = Gaussians(SPIRAL.points.tolist(), [0.05] * 120, [1 / 120] * 120)
    x, level = noisy(sigma)
    assert torch.allclose(SPIRAL.denoise(x, level).double(), truth.denoise(x.double(), level.double()), atol=2e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_exact_denoiser_points_up_the_slope_of_the_log_density(sigma):
    x, level = noisy(sigma)
    x = x.double().requires_grad_()
    away = (x[:, None] - SPIRAL.points.double()).square().sum(-1)
    log_density = (-away / (2 * (0.05**2 + sigma**2))).logsumexp(1).sum()
    (score,) = torch.autograd.grad(log_density, x)
    tweedie = (SPIRAL.denoise(x.detach(), level.double()) - x.detach()) / sigma**2
    assert torch.allclose(tweedie, score, rtol=1e-3, atol=1e-3)


def test_with_a_label_the_exact_denoiser_knows_that_class_alone_and_with_none_all():
    x, level = noisy(0.5)
    cond = {"label": torch.full((40,), 2)}
    part = Spiral(SPIRAL.points[SPIRAL.label == 2], SPIRAL.arc[SPIRAL.label == 2], 0.05)
    assert torch.allclose(SPIRAL.denoise(x, level, cond), part.denoise(x, level), atol=1e-5)
    nothing = {"label": torch.full((40,), NOTHING)}
    assert torch.allclose(SPIRAL.denoise(x, level, nothing), SPIRAL.denoise(x, level), atol=1e-5)
    assert torch.allclose(SPIRAL.denoise(x, level, cond, wrong=1.0), SPIRAL.denoise(x, level), atol=1e-5)


def test_coverage_is_the_share_of_bins_that_are_not_all_but_empty():
    every, even = torch.arange(BINS), (torch.arange(960) + 0.5) / 960
    assert coverage(even, every, 960) == 1
    assert coverage(even[even < 0.25], every, 960) == pytest.approx(0.25)
    assert coverage(torch.full((960,), 0.5), every, 960) == pytest.approx(1 / BINS)
    assert coverage(even[:0], every, 960) == 0
    assert coverage(even[::20], every, 960) == 0  # one point where twenty should be is as good as none


def test_a_spiral_of_too_few_points_is_refused_in_one_line():
    with pytest.raises(UserError, match="at least 48 points"):
        Spiral.of(10)
    assert len(CLASSES) == 3 and math.isclose(SPIRAL.reach, 0.25)
