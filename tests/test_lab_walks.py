"""A walk that is watched ends where the sampler alone ends; the collapse without noise is the closed form's."""

import pytest
import torch

from diffusion.lab.spiral import Spiral
from diffusion.lab.walks import at_level, lattice, shrunk, walk
from diffusion.samplers import SAMPLERS, sample
from diffusion.schedule import karras_sigmas

GRID = karras_sigmas(8, 0.01, 10.0)


def gaussian(x, sigma):
    """The denoiser of a unit Gaussian."""
    return x / (1 + sigma[:, None] ** 2)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "ddpm_mean"])
def test_a_watched_walk_ends_where_the_sampler_ends_and_counts_its_calls(name):
    watched = walk(name, gaussian, GRID, 50, seed=3)
    rng = torch.Generator().manual_seed(3)
    alone = sample(name, gaussian, GRID, lambda: torch.randn(50, 2, generator=rng))
    assert torch.equal(watched.end, alone)
    assert watched.calls == SAMPLERS[name].calls(8) == len(watched.x)
    assert watched.sigmas[0].item() == pytest.approx(10.0) and torch.equal(watched.path[-1], alone)


def test_one_seed_starts_all_samplers_alike_and_another_elsewhere():
    starts = [walk(name, gaussian, GRID, 5, seed=seed).x[0] for name, seed in (("ddpm", 0), ("ddim", 0), ("ddim", 1))]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


def test_without_its_noise_ddpm_shrinks_a_gaussian_as_the_closed_form_says():
    ends = walk("ddpm_mean", gaussian, karras_sigmas(200, 0.01, 10.0), 4000).end
    assert ends.std().item() == pytest.approx(10 / 101, rel=0.05)  # s^2 sigma / (s^2 + sigma^2), singlestep.py
    assert walk("ddpm", gaussian, karras_sigmas(200, 0.01, 10.0), 4000).end.std().item() == pytest.approx(1, abs=0.05)


def test_the_shrunk_plane_shows_noise_at_the_datas_size_and_data_as_it_is():
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    assert shrunk(80 * noise, 80.0).std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.allclose(shrunk(noise, 1e-4), noise, atol=1e-6)


def test_the_lattice_is_even_within_its_reach_and_a_level_is_given_to_every_place():
    places = lattice(5, 1.0)
    assert places.shape == (25, 2) and sorted({round(v, 3) for v in places[:, 0].tolist()}) == [-0.8, -0.4, 0, 0.4, 0.8]
    spiral = Spiral.of(60)
    assert torch.equal(at_level(spiral.denoise, places, 0.3), spiral.denoise(places, torch.full((25,), 0.3)))
