"""The exact denoiser of a mixture of Gaussians is known in closed form, and so is where each sampler must end."""

import math

import pytest
import torch
from gauss import LINE, PLANE, Gaussians, energy_distance
from torch import nn

from diffusion.denoiser import KINDS, Denoiser, Scaling, raw_of
from diffusion.multistep import sample_dpmpp_2m, sample_unipc
from diffusion.samplers import SAMPLERS, SampleNoise, invert, sample
from diffusion.schedule import GRIDS, cosine_sigmas, flow_sigmas, karras_sigmas
from diffusion.singlestep import sample_ddim, sample_ddpm, sample_euler

STD = 0.5
GOOD = [name for name in SAMPLERS if name != "ddpm_mean"]
SMOOTH = [name for name in GOOD if not SAMPLERS[name].random]


def gaussian(x, sigma):
    """E[x0 | x] for x0 ~ N(0, STD^2): linear in x, so that noise goes through a sampler as it came."""
    return STD**2 / (STD**2 + sigma[:, None] ** 2) * x


def unit(rows, wide, seed=0, dtype=torch.float64):
    return torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_like(x, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def exact_std(name, denoise, sigmas, start, eta=None):
    """Std of what a sampler makes of a Gaussian x of std `start` under a linear denoiser, without drawing anything.

    Each noise goes into a coordinate of its own, so the coordinates come out as the weights of a sum of unit Gaussians.
    """
    x, drawn = torch.zeros(1, len(sigmas) + 1, dtype=torch.float64), [0]
    x[0, 0] = start

    def noise():
        drawn[0] += 1
        return torch.nn.functional.one_hot(torch.tensor([drawn[0]]), x.shape[1]).double()

    return sample(name, denoise, sigmas, noise, eta=eta, start=x).square().sum().sqrt().item()


# Where the samplers end


class Knowing(nn.Module):
    """A network that puts out the exact raw of the mixture, from nothing but what a network is shown."""

    def __init__(self, kind, scaling, truth):
        super().__init__()
        self.kind, self.scaling, self.truth = kind, scaling, truth

    def forward(self, x, noise_level, cond):
        sigma = (4 * noise_level).exp()
        x = x / self.scaling.factors(sigma[:, None])[2]
        denoised = self.truth.denoise(x, sigma)
        noise = (x - denoised) / sigma[:, None]
        return raw_of(self.kind, denoised, noise, sigma[:, None], self.scaling.sigma_data)


@pytest.fixture(scope="module")
def true_samples():
    """1000 samples of PLANE, and how far from them the farthest of twenty other thousands is."""
    truth = PLANE.draw(1000, 0)[0]
    return truth, max(energy_distance(PLANE.draw(1000, seed)[0], truth) for seed in range(1, 21))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_every_sampler_with_every_parametrisation_reaches_the_mixture(name, kind, true_samples):
    truth, farthest = true_samples
    scaling = Scaling(kind, sigma_data=1.5)
    denoiser = Denoiser(Knowing(kind, scaling, PLANE), scaling)
    steps = 80 if SAMPLERS[name].order == 1 else 25
    x = unit(1000, 2, seed=KINDS.index(kind))
    made = sample(name, denoiser, karras_sigmas(steps, 0.01, 40.0), noise_like(x, 7), start=40 * x)
    assert energy_distance(made, truth) < 1.5 * farthest


def test_the_distance_knows_a_wrong_share_a_wrong_place_and_a_wrong_size(true_samples):
    truth, farthest = true_samples
    centres, stds, shares = PLANE.centres.tolist(), PLANE.stds.tolist(), PLANE.shares.tolist()
    moved = Gaussians((0.85 * PLANE.centres).tolist(), stds, shares)
    small = Gaussians(centres, (0.5 * PLANE.stds).tolist(), shares)
    for wrong in (Gaussians(centres, stds, [0.3, 0.4, 0.3]), moved, small):
        assert energy_distance(wrong.draw(1000, 99)[0], truth) > 1.5 * farthest


@pytest.mark.parametrize("name", GOOD)
def test_every_sampler_leaves_each_mode_its_share_and_its_size(name):
    steps = 150 if SAMPLERS[name].order == 1 else 60
    count = 6000 if SAMPLERS[name].random else 1000
    x = 40 * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    made = sample(name, LINE.denoise, karras_sigmas(steps, 0.01, 40.0), noise_like(x), start=x)[:, 0]
    left = made < 0.5
    assert left.double().mean().item() == pytest.approx(0.25, abs=0.02)
    for mode, centre, std in ((made[left], -1, 0.4), (made[~left], 2, 0.3)):
        assert mode.mean().item() == pytest.approx(centre, abs=0.03)
        assert mode.std().item() == pytest.approx(std, rel=0.07)


def test_ddpm_without_its_noise_collapses():
    # every step shrinks a Gaussian's x by s^2 + after^2 over s^2 + now^2: it ends s / sigma_max as wide as it should be
    start = 20.0
    std = exact_std("ddpm_mean", gaussian, karras_sigmas(300, 0.002, start).double(), start)
    assert std == pytest.approx(STD**2 * start / (STD**2 + start**2), rel=0.03)  # a fortieth of STD
    truth, x = PLANE.draw(1000, 0)[0], 20 * unit(1000, 2)
    fallen = sample("ddpm_mean", PLANE.denoise, karras_sigmas(100, 0.01, 20.0), None, start=x)
    whole = sample("ddpm", PLANE.denoise, karras_sigmas(100, 0.01, 20.0), noise_like(x), start=x)
    assert fallen.var(0).sum() < 0.2 * truth.var(0).sum() < 0.25 * whole.var(0).sum()
    assert energy_distance(fallen, truth) > 50 * abs(energy_distance(whole, truth))


# How fast they get there


@pytest.mark.parametrize("name, order", [(name, SAMPLERS[name].order) for name in SMOOTH] + [("unipc of order 3", 3.5)])
def test_error_falls_by_the_order_when_the_steps_double(name, order):
    # down to 0.05, not 0: the last step is first order in the last sigma whatever the sampler
    share = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    x, end, errors = LINE.quantile(share, 20.0), LINE.quantile(share, 0.05), []
    for steps in (64, 128, 256):
        sigmas = karras_sigmas(steps + 1, 0.05, 20.0).double()[:-1]
        if name == "unipc of order 3":
            reached = sample_unipc(LINE.denoise, x, sigmas, order=3)
        else:
            reached = sample(name, LINE.denoise, sigmas, None, eta=0, start=x)
        errors.append((reached - end).abs().mean().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        measured = math.log2(coarse / fine)
        assert measured == pytest.approx(order, abs=0.15) if order <= 3 else measured > 3.3


@pytest.mark.parametrize(
    "name, eta, order", [("ddpm", None, 1), ("ddim", 0.5, 1), ("dpmpp_2m_sde", 1, 2), ("dpmpp_2m_sde", 0.5, 2)]
)
def test_variance_of_a_random_sampler_comes_right_by_its_order(name, eta, order):
    errors = []
    for steps in (64, 128, 256):
        sigmas = karras_sigmas(steps + 1, 0.05, 20.0).double()[:-1]
        start, end = (math.hypot(STD, float(sigma)) for sigma in (sigmas[0], sigmas[-1]))
        errors.append(abs(exact_std(name, gaussian, sigmas, start, eta) / end - 1))
    assert errors[-1] < 0.02
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_samplers_beat_ddim_at_few_steps_on_every_grid_leaps_included(name, grid):
    share = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    x, end = LINE.quantile(share, 20.0), LINE.quantile(share, 1e-6)

    def missed(sampler):
        sigmas = GRIDS[grid](12, 0.002, 20.0).double()
        return (sample(sampler, LINE.denoise, sigmas, None, start=x) - end).abs().mean()

    assert missed(name) < 0.75 * missed("ddim")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_calls_the_denoiser_as_often_as_it_says_and_never_at_zero(name):
    calls, seen, drawn, x = [], [], [], unit(2, 3)

    def counting(x, sigma):
        assert sigma.shape == (2,) and (sigma == sigma[0]).all()
        calls.append(sigma[0].item())
        return gaussian(x, sigma)

    def noise():
        drawn.append(1)
        return unit(2, 3)

    made = sample(name, counting, karras_sigmas(6), noise, start=x, on_step=lambda step, d: seen.append((step, d)))
    assert len(calls) == SAMPLERS[name].calls(6) and min(calls) > 0
    assert bool(drawn) == SAMPLERS[name].random
    assert [step for step, _ in seen] == list(range(6))
    assert torch.allclose(made, seen[-1][1])  # to sigma 0 the last guess is what it puts out


# What they have in common


def test_ddim_without_eta_is_deterministic_and_is_euler():
    x = 80 * unit(5, 2)
    once = sample_ddim(PLANE.denoise, x, karras_sigmas(20))
    assert torch.equal(once, sample_ddim(PLANE.denoise, x, karras_sigmas(20), 0.0, noise_like(x, 9)))
    assert torch.allclose(once, sample_euler(PLANE.denoise, x, karras_sigmas(20)))


def test_ddim_with_eta_one_is_ddpm_step_for_step():
    x = 80 * unit(5, 2)
    ddim = sample_ddim(PLANE.denoise, x, karras_sigmas(20), 1.0, noise_like(x, 9))
    assert torch.allclose(ddim, sample_ddpm(PLANE.denoise, x, karras_sigmas(20), noise_like(x, 9)))
    assert not torch.allclose(ddim, sample_ddpm(PLANE.denoise, x, karras_sigmas(20), noise_like(x, 8)))


def test_without_a_memory_the_multistep_samplers_are_ddim_and_ddpm():
    x, sigmas = 80 * unit(5, 2), torch.tensor([80.0, 20.0], dtype=torch.float64)
    ddim = sample_ddim(PLANE.denoise, x, sigmas)
    assert torch.allclose(sample_dpmpp_2m(PLANE.denoise, x, sigmas), ddim)
    assert torch.allclose(sample_unipc(PLANE.denoise, x, sigmas), ddim)
    ddpm = sample_ddpm(PLANE.denoise, x, sigmas, noise_like(x))
    assert torch.allclose(sample_dpmpp_2m(PLANE.denoise, x, sigmas, 1.0, noise_like(x)), ddpm)


@pytest.mark.parametrize("name, etas", [("ddim", (0, 0.3, 1)), ("ddpm", (None,)), ("dpmpp_2m_sde", (0, 0.3, 1, 2))])
def test_around_a_single_point_every_step_leaves_exactly_the_noise_of_its_sigma(name, etas):
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    for eta in etas:
        for end in range(2, 6):
            std = exact_std(name, lambda x, sigma: torch.zeros_like(x), sigmas[:end], 20.0, eta)
            assert std == pytest.approx(sigmas[end - 1].item(), rel=1e-12)


def test_eta_is_the_samplers_own_unless_told():
    x = 20 * unit(5, 2)

    def made(name, eta=None):
        return sample(name, PLANE.denoise, karras_sigmas(8), noise_like(x), eta=eta, start=x)

    assert torch.equal(made("ddim"), made("ddim", 0.0)) and not torch.equal(made("ddim"), made("ddim", 1.0))
    assert torch.equal(made("dpmpp_2m_sde"), made("dpmpp_2m_sde", 1.0))
    assert torch.equal(made("dpmpp_2m_sde", 0.0), made("dpmpp_2m"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_one_and_of_seven_give_the_same_samples(sampler):
    def denoise(x, sigma):
        return LINE.denoise(x.double().flatten()[:, None], sigma.double().repeat_interleave(4)).reshape(x.shape).float()

    seeds = [3, 1, 4, 1, 5, 9, 2]
    together = sample(sampler, denoise, karras_sigmas(10), SampleNoise(seeds, (4,)), eta=0.5)
    for row, seed in enumerate(seeds):
        alone = sample(sampler, denoise, karras_sigmas(10), SampleNoise([seed], (4,)), eta=0.5)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(together[1], together[3]) and not torch.equal(together[0], together[1])


def test_a_start_of_ones_own_takes_the_place_of_the_noise():
    sigmas, x = karras_sigmas(10, 0.01, 3.0), 3 * SampleNoise([5], (2,))()
    given = sample("heun", PLANE.denoise, sigmas, None, start=x.double())
    assert torch.allclose(given, sample("heun", PLANE.denoise, sigmas, lambda: SampleNoise([5], (2,))().double()))
    other = sample("heun", PLANE.denoise, sigmas, lambda: SampleNoise([6], (2,))().double())
    assert not torch.allclose(given, other)


# Up the grid again


@pytest.mark.parametrize("grid", [karras_sigmas, cosine_sigmas, flow_sigmas])
def test_what_is_inverted_and_sampled_again_comes_back(grid):
    x0, which = PLANE.draw(300, 3)
    sigmas = grid(20, 0.01, 20.0).double()
    away = (sample_ddim(PLANE.denoise, invert(PLANE.denoise, x0, sigmas), sigmas) - x0).norm(dim=1)
    assert away.median() < 0.003 and away.quantile(0.99) < 0.1 and away.max() < PLANE.stds[which].max()
    exact = invert(PLANE.denoise, x0, sigmas, rounds=6)
    assert (sample_ddim(PLANE.denoise, exact, sigmas) - x0).norm(dim=1).median() < 1e-5


def test_inversion_finds_the_noise_that_the_ode_comes_from():
    share = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    x0, noisy, errors = LINE.quantile(share, 1e-6), LINE.quantile(share, 20.0), []
    for steps in (60, 120):
        found = invert(LINE.denoise, x0, karras_sigmas(steps, 0.002, 20.0).double())
        errors.append((found - noisy).abs().mean().item() / 20)
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # of DDIM's order


def test_inversion_can_stop_half_way_and_tells_of_its_steps():
    x0, seen = PLANE.draw(50, 4)[0], []
    sigmas = karras_sigmas(20, 0.01, 20.0).double()[8:]
    x = invert(PLANE.denoise, x0, sigmas, on_step=lambda step, denoised: seen.append((step, denoised.shape)))
    assert (sample_ddim(PLANE.denoise, x, sigmas) - x0).norm(dim=1).median() < 0.003
    assert seen == [(step, x0.shape) for step in range(12)]
    one = Gaussians([[0.0, 0.0]], [STD], [1.0])
    end = invert(one.denoise, x0, sigmas)  # of a Gaussian the ODE keeps x / std: the direction stays
    assert torch.allclose(end / end.norm(dim=1, keepdim=True), x0 / x0.norm(dim=1, keepdim=True))


# Noise, and what there is not


def test_streams_and_draws_of_one_seed_differ():
    first, other = SampleNoise([0], (1000,)), SampleNoise([0], (1000,), stream=1)
    a, b, c = first()[0], first()[0], other()[0]
    for x, y in [(a, b), (a, c), (b, c)]:
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.15


def test_names_and_noise_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="take one of heun"):
        sample("plms", gaussian, karras_sigmas(2), lambda: unit(1, 1))
    for draws in (sample_ddim, sample_dpmpp_2m):
        with pytest.raises(ValueError, match="draws noise"):
            draws(gaussian, unit(1, 1), karras_sigmas(2), eta=0.5)
    with pytest.raises(ValueError, match="non-negative"):
        SampleNoise([-1], (1,))
