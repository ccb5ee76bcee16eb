import numpy as np
import pytest
import tiny_drawing
import torch

from clip_train.settings import UserError
from diffusion.again import make_again
from diffusion.generate import Sampling
from diffusion.inpaint import inpaint, kept, walk_back_and_forth
from diffusion.samplers import SampleNoise, sample
from diffusion.schedule import karras_sigmas
from diffusion.source import mask_pixels, read_mask

COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 1.0]])


def denoise(x, sigma):
    """Exact, for data from N(0, COVARIANCE): C (C + sigma^2 I)^-1 x; x (B, 2)."""
    return x @ torch.linalg.solve(COVARIANCE + sigma[0] ** 2 * torch.eye(2), COVARIANCE)


def painted_given(known, repeats):
    """Many draws of the second coordinate where the first is known."""
    seeds, painted = list(range(1500)), torch.tensor([False, True])
    fixed = torch.tensor([[known, 0.0]])
    noise = SampleNoise(seeds, (2,), stream=1)
    sigmas = karras_sigmas(24, 0.02, 20.0)
    start = torch.where(painted, 0.0, fixed) + sigmas[0] * noise()
    x = walk_back_and_forth(
        "ddim", kept(denoise, fixed, painted), sigmas, noise, start, repeats=repeats, jump=2, eta=1.0
    )
    assert torch.equal(x[:, 0], torch.full((len(seeds),), known))
    return x[:, 1]


def test_going_back_and_forth_brings_what_is_painted_to_its_distribution_given_the_rest():
    """Of two coordinates with correlation 0.9 the second has, given the first, mean 0.9 and variance 0.19."""
    once, often = painted_given(1.0, 1), painted_given(1.0, 8)
    assert abs(often.mean() - 0.9) < 0.05 and abs(often.var() - 0.19) < 0.05
    assert abs(once.mean() - 0.9) > 0.1  # only replacing does not look at the rest enough


def test_walked_once_it_is_the_sampler_itself():
    sigmas, seeds = karras_sigmas(7, 0.02, 20.0), [3, 4]
    for sampler, eta in (("heun", 0.0), ("ddim", 0.0), ("ddim", 1.0)):
        noise = SampleNoise(seeds, (2,), stream=1)
        whole = sample(sampler, denoise, sigmas, noise, eta=eta)
        noise, told = SampleNoise(seeds, (2,), stream=1), []
        parts = walk_back_and_forth(
            sampler, denoise, sigmas, noise, sigmas[0] * noise(), repeats=1, jump=3, eta=eta,
            on_step=lambda step, denoised, told=told: told.append(step),
        )  # fmt: skip
        assert torch.allclose(whole, parts, atol=1e-5) and told == list(range(7))


def test_what_is_kept_stays_to_the_last_bit_and_the_rest_is_new():
    generator, picture, mask = tiny_drawing.generator(), tiny_drawing.source(1), tiny_drawing.mask((10, 0, 20, 20))
    marks = read_mask(mask, picture)
    rows = np.repeat(picture.row(generator.clip)[None], 2, axis=0)
    how = Sampling(steps=4, guidance=1.0, sampler="ddim")
    made = inpaint(generator, rows, picture, marks, [3, 4], how, mask_told=mask.told, repeats=2)
    painted = mask_pixels(marks, 8)[0].numpy()
    true = ((picture.pixels(8) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    first, second = (np.asarray(one.picture) for one in made)
    assert np.array_equal(first[~painted], true[~painted]) and np.array_equal(second[~painted], true[~painted])
    assert np.abs(first.astype(int) - second)[painted].max() > 5
    again = make_again(generator, made[1].provenance, [mask, picture])
    assert np.abs(np.asarray(again.picture).astype(int) - second).max() <= 1
    assert again.provenance == made[1].provenance
    with pytest.raises(UserError, match="made from mask.png"):
        make_again(generator, made[1].provenance, [picture])
    with pytest.raises(UserError, match="leave candidates"):
        inpaint(generator, rows, picture, marks, [3, 4], Sampling(candidates=2))


def test_a_mask_is_black_and_white_and_as_large_as_the_picture():
    picture = tiny_drawing.source(1)
    with pytest.raises(UserError, match=r"mask.png is 30 x 30 pixels but picture1.png is 20 x 20"):
        read_mask(tiny_drawing.mask((0, 0, 5, 5), 30), picture)
    grey = tiny_drawing.mask((0, 0, 20, 20))
    grey.picture.paste((128, 128, 128), (0, 0, 20, 10))
    with pytest.raises(UserError, match="50% of the mask mask.png is grey"):
        read_mask(grey, picture)
    for box, words in (((0, 0, 0, 0), "marks nothing"), ((0, 0, 20, 20), "marks all of it")):
        with pytest.raises(UserError, match=words):
            mask_pixels(read_mask(tiny_drawing.mask(box), picture), 8)


def test_a_pixel_that_the_mask_touches_is_painted():
    marks = read_mask(tiny_drawing.mask((10, 0, 11, 20)), tiny_drawing.source(1))  # one column of 20
    painted = mask_pixels(marks, 8)[0]
    assert painted[:, 4].all() and not painted[:, :3].any() and not painted[:, 6:].any()
