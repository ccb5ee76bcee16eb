"""The exact denoisers of a Gaussian and of a mixture of two are known in closed form: every sampler must reach them."""

import math

import pytest
import torch

from diffusion.samplers import SampleNoise, sample, sample_ddim, sample_ddpm, sample_euler, sample_heun
from diffusion.schedule import karras_sigmas

MEAN, STD = 0.7, 0.5


def gaussian(x, sigma):
    """E[x0 | x] for x0 ~ N(MEAN, STD^2)."""
    sigma = sigma[:, None]
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def two_gaussians(x, sigma):
    """E[x0 | x] for a quarter N(-1, 0.1^2) and three quarters N(2, 0.1^2), in one dimension."""
    variance = 0.01 + sigma[:, None] ** 2
    centres, shares = torch.tensor([-1.0, 2.0], dtype=x.dtype), torch.tensor([0.25, 0.75], dtype=x.dtype)
    belongs = torch.softmax(shares.log() - (x[..., None] - centres) ** 2 / (2 * variance[..., None]), -1)
    each = centres + 0.01 / variance[..., None] * (x[..., None] - centres)
    return (belongs * each).sum(-1)


def unit(rows, wide, seed=0, dtype=torch.float64):
    return torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_like(x, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def run(name, denoise, x, sigmas):
    if name == "ddpm":
        return sample_ddpm(denoise, x, sigmas, noise_like(x))
    if name.startswith("ddim"):
        return sample_ddim(denoise, x, sigmas, float(name[4:]), noise_like(x))
    return {"euler": sample_euler, "heun": sample_heun}[name](denoise, x, sigmas)


NAMES = ["ddpm", "ddim0", "ddim0.5", "ddim1", "euler", "heun"]


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_reaches_the_gaussian(name):
    x = 80 * unit(200, 500)
    reached = run(name, gaussian, x, karras_sigmas(200))
    assert reached.mean().item() == pytest.approx(MEAN, abs=0.02)
    # ancestral steps lose a little variance: 2.5 % at 200 steps, half of that at 400
    assert reached.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_reaches_both_modes_in_their_shares(name):
    x = 80 * unit(100, 400)
    reached = run(name, two_gaussians, x, karras_sigmas(100))
    left = reached < 0.5
    assert left.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert reached[left].mean().item() == pytest.approx(-1, abs=0.02)
    assert reached[~left].mean().item() == pytest.approx(2, abs=0.02)
    assert reached[~left].std().item() == pytest.approx(0.1, rel=0.15)


def exact_end(x, start):
    """Where the ODE takes x: for a Gaussian it keeps (x - mean) / std of the noisy distribution."""
    return MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + start**2)


@pytest.mark.parametrize("name, factor", [("euler", 2), ("ddim0", 2), ("heun", 4)])
def test_error_falls_by_the_order_when_the_steps_double(name, factor):
    x = 10 * unit(1, 50)
    errors = []
    for steps in (128, 256, 512):
        # the step to sigma = 0 is of first order whatever the sampler; a tiny last sigma keeps it out of the way
        reached = run(name, gaussian, x, karras_sigmas(steps, 1e-5, 10.0).double())
        errors.append((reached - exact_end(x, 10.0)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.1)


def test_ddim_without_eta_is_deterministic_and_is_euler():
    x = 80 * unit(5, 7)
    once = sample_ddim(two_gaussians, x, karras_sigmas(20))
    assert torch.equal(once, sample_ddim(two_gaussians, x, karras_sigmas(20), 0.0, noise_like(x, 9)))
    assert torch.allclose(once, sample_euler(two_gaussians, x, karras_sigmas(20)))


def test_ddim_with_eta_one_is_ddpm_step_for_step():
    x = 80 * unit(5, 7)
    ddim = sample_ddim(two_gaussians, x, karras_sigmas(20), 1.0, noise_like(x, 9))
    assert torch.allclose(ddim, sample_ddpm(two_gaussians, x, karras_sigmas(20), noise_like(x, 9)))
    assert not torch.allclose(ddim, sample_ddpm(two_gaussians, x, karras_sigmas(20), noise_like(x, 8)))


def test_heun_calls_the_denoiser_twice_a_step_but_once_in_the_last():
    calls, seen = [], []

    def counting(x, sigma):
        calls.append(sigma[0].item())
        return gaussian(x, sigma)

    sample_heun(counting, unit(2, 3), karras_sigmas(6), lambda step, denoised: seen.append((step, denoised.shape)))
    assert len(calls) == 11 and min(calls) > 0
    assert seen == [(step, (2, 3)) for step in range(6)]


@pytest.mark.parametrize("sampler", ["heun", "ddim", "ddpm", "euler"])
def test_a_batch_of_one_and_of_seven_give_the_same_samples(sampler):
    def denoise(x, sigma):
        return two_gaussians(x.double(), sigma.double()).float()

    seeds = [3, 1, 4, 1, 5, 9, 2]
    together = sample(sampler, denoise, karras_sigmas(10), SampleNoise(seeds, (4,)), eta=0.5)
    for row, seed in enumerate(seeds):
        alone = sample(sampler, denoise, karras_sigmas(10), SampleNoise([seed], (4,)), eta=0.5)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(together[1], together[3]) and not torch.equal(together[0], together[1])


def test_streams_and_draws_of_one_seed_differ():
    first, other = SampleNoise([0], (1000,)), SampleNoise([0], (1000,), stream=1)
    a, b, c = first()[0], first()[0], other()[0]
    for x, y in [(a, b), (a, c), (b, c)]:
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.15


def test_names_and_noise_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="take one of heun"):
        sample("plms", gaussian, karras_sigmas(2), lambda: unit(1, 1))
    with pytest.raises(ValueError, match="draws noise"):
        sample_ddim(gaussian, unit(1, 1), karras_sigmas(2), eta=0.5)
    with pytest.raises(ValueError, match="non-negative"):
        SampleNoise([-1], (1,))
