import pytest
import torch
from torch import nn

from clip_train.settings import UserError
from diffusion.denoiser import (
    KINDS,
    WEIGHTINGS,
    Denoiser,
    Scaling,
    clean_and_noise,
    denoising_loss,
    loss_weight,
    raw_of,
    refuse_unknown,
)


class Fixed(nn.Module):
    """Puts out what it is told, and remembers what it was shown."""

    def __init__(self, raw=None):
        super().__init__()
        self.raw = raw

    def forward(self, x, noise_level, cond):
        self.seen = (x, noise_level, cond)
        return torch.zeros_like(x) if self.raw is None else self.raw


def noisy(sigma_data=1.0, seed=0, count=6, wide=4000):
    rng = torch.Generator().manual_seed(seed)
    x0 = sigma_data * torch.randn(count, wide, generator=rng, dtype=torch.float64)
    noise = torch.randn(count, wide, generator=rng, dtype=torch.float64)
    sigma = torch.logspace(-2, 2, count, dtype=torch.float64)
    return x0, noise, sigma, x0 + sigma[:, None] * noise


def slope(of, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(of(at).sum(), at)[0]


def meaning(kind, x0, noise, sigma):
    """Each target for unit-size data, the velocities by differentiating the way from x0 to the noise."""
    angle, time = (way.expand_as(x0) for way in (sigma[:, None].atan(), (sigma / (1 + sigma))[:, None]))
    # Salimans and Ho 2022, appendix D; Liu et al. 2022, eq. 1
    v = slope(lambda angle: angle.cos() * x0 + angle.sin() * noise, angle)
    flow = slope(lambda time: (1 - time) * x0 + time * noise, time)
    return {"x0": x0, "eps": noise, "v": v, "edm": -v, "flow": flow}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_puts_out_the_true_target_gives_the_clean_sample(kind):
    x0, noise, sigma, x = noisy()
    denoiser = Denoiser(Fixed(meaning(kind, x0, noise, sigma)), Scaling(kind, sigma_data=1.0))
    assert torch.allclose(denoiser(x, sigma), x0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_its_closed_form_and_says_both_x0_and_noise(kind):
    x0, noise, sigma, x = noisy()
    raw, level = raw_of(kind, x0, noise, sigma[:, None]), sigma[:, None]
    assert torch.allclose(raw, meaning(kind, x0, noise, sigma), rtol=1e-13, atol=1e-13)
    clean, dirt = clean_and_noise(kind, raw, x, level)
    # "x0" alone leaves the noise to (x - x0) / sigma, and "eps" x0 to x - sigma noise: they lose digits at one end
    assert torch.allclose(clean, x0, rtol=0, atol=1e-12 if kind == "eps" else 1e-13)
    assert torch.allclose(dirt, noise, rtol=0, atol=1e-12 if kind == "x0" else 1e-13)


@pytest.mark.parametrize("sigma_data", [0.3, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_for_data_of_another_size_are_those_the_scaling_undoes(kind, sigma_data):
    x0, noise, sigma, x = noisy(sigma_data)
    raw = raw_of(kind, x0, noise, sigma[:, None], sigma_data)
    if kind in ("edm", "v"):  # unit size whatever sigma is: of x0 / sigma_data at sigma / sigma_data
        assert torch.allclose(raw, meaning(kind, x0 / sigma_data, noise, sigma / sigma_data), atol=1e-13)
        assert torch.allclose(raw.std(1), torch.ones(6, dtype=torch.float64), atol=0.05)
    denoiser = Denoiser(Fixed(raw), Scaling(kind, sigma_data))
    assert torch.allclose(denoiser(x, sigma), x0, rtol=0, atol=1e-12)
    clean, dirt = clean_and_noise(kind, raw, x, sigma[:, None], sigma_data)
    assert torch.allclose(clean, x0, rtol=0, atol=1e-12) and torch.allclose(dirt, noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_any_parametrisation_converts_into_any_other(here, there):
    x0, noise, sigma, x = noisy()
    level = sigma[:, None]
    converted = raw_of(there, *clean_and_noise(here, meaning(here, x0, noise, sigma), x, level), level)
    assert torch.allclose(converted, meaning(there, x0, noise, sigma), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_unit_size_at_every_noise_level(kind):
    _, _, sigma, x = noisy(sigma_data=0.5)
    denoiser = Denoiser(Fixed(), Scaling(kind, sigma_data=0.5))
    denoiser(x, sigma)
    seen, noise_level, _ = denoiser.network.seen
    assert torch.allclose(seen.std(1), torch.ones(6, dtype=torch.float64), atol=0.05)
    assert torch.allclose(noise_level, sigma.log() / 4)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
def test_loss_of_a_silent_network_is_one_at_every_noise_level(sigma_data):
    x0, noise, sigma, _ = noisy(sigma_data)
    scaling = Scaling("edm", sigma_data)
    for row in range(6):
        one = slice(row, row + 1)
        loss = denoising_loss(
            Denoiser(Fixed(), scaling), x0[one], None, sigma[one], noise[one], scaling.weight(sigma[one])
        )
        assert loss.item() == pytest.approx(1, abs=0.1)


def test_edm_weight_is_that_of_table_1():
    sigma = torch.tensor([0.1, 1.0, 7.0])
    assert torch.allclose(Scaling("edm", 0.5).weight(sigma), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    assert torch.allclose(Scaling("x0", 0.5).weight(sigma), torch.ones(3))
    assert torch.allclose(Scaling("eps", 0.5).weight(sigma), 1 / sigma**2)


@pytest.mark.parametrize("kind", KINDS)
def test_even_weight_counts_the_error_of_the_raw_output(kind):
    x0, noise, sigma, x = noisy(sigma_data=0.5)
    scaling = Scaling(kind, 0.5)
    raw = raw_of(kind, x0, noise, sigma[:, None], 0.5)
    missed = raw + torch.linspace(0.1, 0.6, 6, dtype=torch.float64)[:, None]
    loss = denoising_loss(Denoiser(Fixed(missed), scaling), x0, None, sigma, noise, loss_weight(scaling, sigma))
    assert loss.item() == pytest.approx((missed - raw).square().mean().item())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_weight_of_each_parametrisations_own_error(gamma):
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    snr = 1 / sigma**2
    # Hang et al. 2023, section 3.4; an error of the raw output is out times as large in the denoised sample
    paper = {"x0": snr.clamp(max=gamma), "eps": (gamma / snr).clamp(max=1), "v": snr.clamp(max=gamma) / (snr + 1)}
    for kind, expected in paper.items():
        out = Scaling(kind, 1.0).factors(sigma)[1]
        assert torch.allclose(loss_weight(Scaling(kind, 1.0), sigma, "min_snr", gamma) * out**2, expected), kind


def test_soft_min_snr_is_hourglass_diffusions_and_follows_min_snr_on_both_sides():
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    one = Scaling("edm", 1.0)
    # k-diffusion's weight of the error of the edm output: (sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2
    own = loss_weight(one, sigma, "soft_min_snr", 1.0) / loss_weight(one, sigma, "even")
    assert torch.allclose(own, sigma**2 / (sigma**2 + 1) ** 2)
    ratio = loss_weight(one, sigma, "soft_min_snr") / loss_weight(one, sigma, "min_snr")
    assert ratio[[0, -1]].min() > 0.99 and ratio.min() > 0.5


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_a_weighting_does_not_know_the_unit_of_the_data(kind):
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    small, large = (loss_weight(Scaling("edm", size), size * sigma, kind) * size**2 for size in (0.5, 3.0))
    assert torch.allclose(small, large) and torch.allclose(small, loss_weight(Scaling("edm", 1.0), sigma, kind))


def test_loss_is_the_weighted_mean_square_worked_by_hand():
    # x0-prediction of zeros: errors are x0 itself: (1, 2) -> 2.5 and (0, 4) -> 8; weights 2 and 1 -> (5 + 8) / 2
    x0 = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    loss = denoising_loss(
        Denoiser(Fixed(), Scaling("x0")), x0, None, torch.ones(2), torch.ones(2, 2), torch.tensor([2.0, 1.0])
    )
    assert loss.item() == pytest.approx(6.5)


def test_the_noise_reaches_the_network_at_the_size_of_sigma():
    denoiser = Denoiser(Fixed(), Scaling("eps", sigma_data=1.0))
    x0, noise, sigma, x = noisy()
    denoising_loss(denoiser, x0, {"a": sigma}, sigma, noise, torch.ones_like(sigma))
    seen, _, cond = denoiser.network.seen
    assert torch.allclose(seen * (sigma[:, None] ** 2 + 1).sqrt(), x) and cond["a"] is sigma


def test_an_unknown_parametrisation_is_refused():
    with pytest.raises(ValueError, match="take edm, v, x0, eps, flow"):
        Scaling("epsilon")
    with pytest.raises(ValueError, match="take edm, v, x0, eps, flow"):
        raw_of("epsilon", *torch.ones(3, 1))
    with pytest.raises(ValueError, match="take even, min_snr"):
        loss_weight(Scaling(), torch.ones(1), "p2")
    for wrong in [("epsilon", "flow", "even"), ("v", "uniform", "even"), ("v", "flow", "p2")]:
        with pytest.raises(UserError, match="prior: no"):
            refuse_unknown("prior", *wrong)
