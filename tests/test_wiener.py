import pytest
import torch

from diffusion.ridge import ridge_regression
from diffusion.wiener import Wiener


def rows_of(count, seed):
    """Gaussian rows in 16 directions, of which some are nearly empty; and what hangs on them linearly, and noise."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0]
    spread = torch.logspace(0, -3, 16)
    rows = 0.3 + torch.randn(count, 16, generator=rng) * spread @ mix.T
    target = (rows - 0.3) @ mix / spread @ torch.ones(16, 3) + 0.1 * torch.randn(count, 3, generator=rng)
    return rows, target


def test_clean_rows_stay_what_they_are():
    wiener, (rows, _) = Wiener(16), rows_of(50, 0)
    assert torch.equal(wiener(rows, torch.zeros(50)), rows)
    wiener.take([rows], 1e-4)
    assert torch.equal(wiener(rows, torch.zeros(50)), rows)


def test_what_is_left_of_noise_is_what_the_gaussian_posterior_leaves():
    known, _ = rows_of(200_000, 1)
    wiener = Wiener(16)
    wiener.take(known.split(70_000), 0.0)
    rows, _ = rows_of(20_000, 2)
    level = 0.4
    noisy = rows + level / 4 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    error = (wiener(noisy, torch.full((20_000,), level)) - rows).square().sum(1).mean().item()
    own = torch.logspace(0, -3, 16) ** 2
    assert error == pytest.approx((own * 0.01 / (own + 0.01)).sum().item(), rel=0.03)


def test_the_linear_guess_for_noisy_rows_is_the_ridge_regression_for_noisy_rows():
    rows, target = rows_of(2000, 4)
    linear, wiener, level = ridge_regression([(rows, target)]), Wiener(16), 0.8
    wiener.take([rows], linear.penalty)
    noisy = rows[:5] + 0.1 * torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    x, y = (rows - rows.mean(0)).double(), (target - target.mean(0)).double()
    inner = x.T @ x / len(x)
    inner += torch.eye(16) * (linear.penalty * inner.trace() / 16 + level**2 / 16)
    weight = torch.linalg.solve(inner, x.T @ y / len(x))
    truth = target.mean(0) + (noisy - rows.mean(0)).double() @ weight
    assert torch.allclose(linear(wiener(noisy, torch.full((5,), level))).double(), truth, atol=1e-3)
    assert not torch.allclose(linear(noisy).double(), truth, atol=0.1)
