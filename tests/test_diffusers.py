"""diffusers' schedulers, an implementation by others, take the same steps wherever they define the same sampler."""

import pytest
import torch
from gauss import PLANE

from diffusion.denoiser import clean_and_noise, raw_of
from diffusion.multistep import sample_dpmpp_2m, sample_unipc
from diffusion.samplers import sample_ddim, sample_ddpm, sample_euler

diffusers = pytest.importorskip("diffusers")

STEPS = list(range(998, 0, -111))  # nine of DDPM's thousand levels, the next of the last being none
EXACT = {"rtol": 0, "atol": 1e-9}  # DDPM's last step adds a noise of 1e-10
SINGLE = {"rtol": 0, "atol": 2e-5}  # some schedulers compute in float32 alone

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


def scheduler(name, **settings):
    """One of theirs on DDPM's linear betas, its table in float64; it is asked for STEPS."""
    theirs = getattr(diffusers, name)(num_train_timesteps=1000, prediction_type="epsilon", **settings)
    theirs.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas, 0)
    theirs.set_timesteps(len(STEPS))
    theirs.timesteps = torch.tensor(STEPS)
    return theirs


def levels():
    """The same noise levels as our sigmas, and 0."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[STEPS]
    return torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])


def start():
    return levels()[0] * torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise_of(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(6, 2, generator=rng, dtype=torch.float64)


def walked(sampler, *args, **kwargs):
    """Every guess a sampler of ours makes on its way, and where it ends: that of a step depends on all before it."""
    seen = []
    end = sampler(PLANE.denoise, start(), levels(), *args, on_step=lambda _, denoised: seen.append(denoised), **kwargs)
    return torch.stack([*seen, end])


def their_way(theirs, **step):
    """The same of theirs: they see x / sqrt(1 + sigma^2) and want the noise."""
    seen, sigmas = [], levels()
    x = start() / (1 + sigmas[0] ** 2).sqrt()
    for now, time in zip(sigmas, theirs.timesteps, strict=False):
        full = x * (1 + now**2).sqrt()
        denoised = PLANE.denoise(full, now.expand(6))
        seen.append(denoised)
        x = theirs.step((full - denoised) / now, time, x, **step).prev_sample.double()
    return torch.stack([*seen, x])


def with_our_sigmas(theirs):
    theirs.sigmas = levels()
    return theirs


def test_ddpm_and_ddim_are_diffusers_step_for_step():
    # ancestral sampling over the levels in STEPS, with the small variance of DDPM's eq. 7
    ddpm = scheduler("DDPMScheduler", clip_sample=False, variance_type="fixed_small")
    ddpm.previous_timestep = lambda time: time - 111
    theirs = their_way(ddpm, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(walked(sample_ddpm, noise_of(3)), theirs, **EXACT)
    for eta in (0.0, 0.4, 1.0):
        ddim = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=True)
        theirs = their_way(ddim, eta=eta, generator=torch.Generator().manual_seed(3) if eta else None)
        assert torch.allclose(walked(sample_ddim, eta, noise_of(3)), theirs, **EXACT), eta


@pytest.mark.parametrize("eta, algorithm", [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_dpm_solver_2m_is_diffusers_step_for_step(eta, algorithm):
    theirs = scheduler("DPMSolverMultistepScheduler", solver_order=2, algorithm_type=algorithm)
    rng = torch.Generator().manual_seed(3)
    single = noise_of(3)

    def noise():  # theirs draws in float32
        return torch.randn(6, 2, generator=rng).double() if eta else single()

    way = their_way(with_our_sigmas(theirs), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(walked(sample_dpmpp_2m, eta, noise), way, **SINGLE)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers_step_for_step(order):
    theirs = scheduler("UniPCMultistepScheduler", solver_order=order, solver_type="bh2", predict_x0=True)
    way = their_way(with_our_sigmas(theirs))
    same = len(STEPS) - 1 if order == 3 else len(STEPS) + 1  # its third order stops one step earlier before the end
    assert torch.allclose(walked(sample_unipc, order=order)[:same], way[:same], **SINGLE)


def test_euler_is_diffusers_in_both_its_frames():
    discrete = with_our_sigmas(scheduler("EulerDiscreteScheduler"))
    discrete.timesteps = discrete.timesteps.double()
    x, sigmas, ours = start(), levels(), walked(sample_euler)
    for time, now in zip(discrete.timesteps, sigmas, strict=False):
        discrete.scale_model_input(x, time)
        x = discrete.step((x - PLANE.denoise(x, now.expand(6))) / now, time, x).prev_sample.double()
    assert torch.allclose(ours[-1], x, **SINGLE)

    flow = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    times = sigmas / (1 + sigmas)
    flow.set_timesteps(len(STEPS))
    flow.sigmas, flow.timesteps = times, 1000 * times[:-1]
    x = start() * (1 - times[0])
    for time, now in zip(flow.timesteps, sigmas, strict=False):
        full = x * (1 + now)
        denoised = PLANE.denoise(full, now.expand(6))
        raw = raw_of("flow", denoised, (full - denoised) / now, now)
        x = flow.step(raw, time, x).prev_sample.double()
    assert torch.allclose(ours[-1], x, **SINGLE)


def test_conversions_are_diffusers():
    theirs = scheduler("DDPMScheduler", clip_sample=False)
    x0, noise = PLANE.draw(9, 0)[0], noise_of(1)()[:1].expand(9, 2)
    sigma, times = levels()[:-1, None], torch.tensor(STEPS)
    x = x0 + sigma * noise
    small = x / (1 + sigma**2).sqrt()
    assert torch.allclose(theirs.add_noise(x0, noise, times), small, **EXACT)
    velocity = theirs.get_velocity(x0, noise, times)
    assert torch.allclose(raw_of("v", x0, noise, sigma), velocity, **EXACT)
    assert torch.allclose(torch.stack(clean_and_noise("v", velocity, x, sigma)), torch.stack([x0, noise]), **EXACT)
    for kind, name in {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}.items():
        theirs = scheduler("DDPMScheduler", clip_sample=False)
        theirs.register_to_config(prediction_type=name)
        raw = raw_of(kind, x0, noise, sigma)
        for row, time in enumerate(STEPS):
            one = slice(row, row + 1)
            guess = theirs.step(raw[one], torch.tensor(time), small[one]).pred_original_sample
            assert torch.allclose(guess, x0[one], **EXACT), kind
