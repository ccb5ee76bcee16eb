import pytest
import torch
from torch import nn

from diffusion.denoiser import Denoiser, Scaling, denoising_loss

KINDS = ["edm", "v", "x0", "eps"]


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


def meaning(kind, x0, noise, sigma):
    """The closed form of each target in the variance-preserving process, alpha = 1 / sqrt(1 + sigma^2)."""
    alpha = 1 / (1 + sigma[:, None] ** 2).sqrt()
    beta = sigma[:, None] * alpha
    v = alpha * noise - beta * x0  # Salimans and Ho 2022, section 4
    return {"x0": x0, "eps": noise, "v": v, "edm": -v}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_puts_out_the_true_target_gives_the_clean_sample(kind):
    x0, noise, sigma, x = noisy()
    denoiser = Denoiser(Fixed(meaning(kind, x0, noise, sigma)), Scaling(kind, sigma_data=1.0))
    assert torch.allclose(denoiser(x, sigma), x0, atol=1e-9)


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
    with pytest.raises(ValueError, match="take edm, v, x0, eps"):
        Scaling("epsilon")
