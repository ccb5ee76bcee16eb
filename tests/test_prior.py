import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_train.fit import FitConfig
from clip_train.settings import UserError
from diffusion.denoiser import denoising_loss
from diffusion.pairs import Pairs, shuffled
from diffusion.prior import PriorConfig, PriorDenoiser, null_cond, sample_prior, text_cond

D = 16


def unit(rows, seed, wide=D):
    return F.normalize(torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed)), dim=-1)


def small_prior(predict="x0", loud=False, **more):
    torch.manual_seed(0)
    prior = PriorDenoiser(PriorConfig(embed_dim=D, width=32, depth=2, heads=2, predict=predict, **more)).eval()
    own = prior.network
    own.linear.weight.copy_(torch.eye(D))
    own.linear.output_mean.copy_(unit(1, 5)[0])
    if loud:  # silent layers would hide every mistake
        for layer in own.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(own.null_text)
    return prior


def test_before_training_the_prior_is_its_linear_guess():
    prior, text = small_prior(), unit(3, 1)
    x, sigma = 5 * torch.randn(3, D), torch.full((3,), 5.0)
    expected = (prior.network.linear.output_mean + text) * D**0.5
    assert torch.allclose(prior(x, sigma, text_cond(text)), expected, atol=1e-5)
    assert torch.allclose(
        prior(x, sigma, null_cond(text_cond(text))), prior.network.linear.output_mean * D**0.5, atol=1e-5
    )


def test_a_dropped_text_leaves_no_trace():
    prior, x, sigma = small_prior(loud=True), torch.randn(4, D), torch.ones(4)
    drop = torch.tensor([False, True, True, False])
    a = prior(x, sigma, {"text": unit(4, 1), "drop": drop})
    b = prior(x, sigma, {"text": unit(4, 2), "drop": drop})
    assert torch.equal((a == b).all(dim=1), drop)


def test_guidance_reaches_the_prior():
    prior, text = small_prior(loud=True), unit(2, 1)
    free, follow, over = (sample_prior(prior, text, [0, 1], steps=3, guidance=g) for g in (0.0, 1.0, 3.0))
    other = sample_prior(prior, unit(2, 9), [0, 1], steps=3, guidance=0.0)
    assert torch.allclose(free, other) and not torch.allclose(free, follow) and not torch.allclose(follow, over)


@pytest.mark.parametrize("sampler", ["heun", "ddim", "ddpm"])
def test_samples_are_unit_rows_that_depend_on_their_own_seed_alone(sampler):
    prior, text = small_prior(loud=True), unit(5, 1)
    together = sample_prior(prior, text, [7, 8, 9, 10, 11], steps=4, sampler=sampler, eta=0.5)
    alone = sample_prior(prior, text[2:3], [9], steps=4, sampler=sampler, eta=0.5)
    assert torch.allclose(together.norm(dim=1), torch.ones(5))
    assert torch.allclose(together[2:3], alone, atol=1e-5)
    other = sample_prior(prior, text[2:3], [10], steps=4, sampler=sampler, eta=0.5)
    assert not torch.allclose(alone, other, atol=1e-3)


def test_of_several_candidates_the_one_nearest_to_the_text_is_kept():
    prior, text = small_prior(loud=True), unit(6, 0)
    seeds = range(6)
    one, two, four = (sample_prior(prior, text, seeds, steps=4, candidates=n) for n in (1, 2, 4))
    cosine = [(rows * text).sum(1) for rows in (one, two, four)]
    assert (cosine[1] >= cosine[0] - 1e-6).all() and (cosine[2] >= cosine[1] - 1e-6).all()
    assert cosine[2].mean() > cosine[0].mean() + 1e-3
    alone = sample_prior(prior, text[3:4], [3], steps=4, candidates=4)
    assert torch.allclose(alone[0], four[3], atol=1e-5)


@pytest.mark.parametrize("predict, near", [("x0", 0.8), ("edm", 0.3)])
def test_training_finds_what_a_linear_guess_cannot(predict, near):
    # the picture is +a or -a by a coin that the text shows only through a product: linear regression sees nothing
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (512, 2), generator=rng) * 2.0 - 1
    axes = torch.eye(D)
    text = F.normalize(signs @ axes[:2] + 0.05 * torch.randn(512, D, generator=rng), dim=-1)
    image = signs.prod(1, keepdim=True) * axes[5]
    prior = small_prior(predict, sigma_data=1.0, dropout=0.0)
    prior.network.linear.weight.zero_()
    prior.network.linear.output_mean.zero_()
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(150):
        pick = torch.randint(0, 512, (128,), generator=rng)
        sigma = torch.exp(1.5 * torch.randn(128, generator=rng))
        noise = torch.randn(128, D, generator=rng)
        loss = denoising_loss(
            prior, image[pick] * D**0.5, text_cond(text[pick]), sigma, noise, prior.scaling.weight(sigma)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = sample_prior(prior, text[:64], range(64), steps=8)
    assert ((made * image[:64]).sum(1) > near).float().mean() > 0.95


def test_batches_of_pairs_are_a_pure_function_of_the_step_and_visit_each_pair_once_an_epoch():
    pairs = Pairs(
        np.arange(14, dtype=np.float32)[:, None],
        np.arange(7, dtype=np.float32)[:, None] * 10,
        np.repeat(np.arange(7), 2),
    )
    batches = pairs.batches(FitConfig(steps=9, batch_size=4))
    stream = batches(0)
    first = [next(stream) for _ in range(7)]
    later = next(batches(5))
    assert torch.equal(first[5]["text"], later["text"])
    seen = torch.cat([batch["text"] for batch in first]).flatten()
    assert sorted(seen[:14].tolist()) == sorted(seen[14:].tolist()) == list(range(14))
    assert not torch.equal(seen[:14], seen[14:])
    assert all(torch.equal(batch["image"], batch["text"].floor_divide(2) * 10) for batch in first)


def test_a_caption_mix_shows_every_picture_once_an_epoch_with_captions_in_the_shares_asked_for():
    pairs = Pairs(
        np.arange(3000, dtype=np.float32)[:, None],
        np.arange(1000, dtype=np.float32)[:, None],
        np.repeat(np.arange(1000), 3),
        mix=(0.5, 0.5),  # the first caption half of the time, the other two share the rest
    )
    stream = pairs.batches(FitConfig(steps=9, batch_size=100))(0)
    seen = [next(stream) for _ in range(40)]
    picture = torch.cat([batch["image"] for batch in seen]).flatten()
    which = torch.cat([batch["text"] for batch in seen]).flatten() - 3 * picture
    assert sorted(picture[:1000].tolist()) == list(range(1000))
    shares = torch.bincount(which.long(), minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.03)


def test_shuffled_goes_on_across_epochs_as_if_there_were_no_batches():
    whole = shuffled(0, 25, 10, seed=3)
    assert np.array_equal(np.concatenate([shuffled(s, 5, 10, seed=3) for s in range(0, 25, 5)]), whole)
    assert not np.array_equal(whole[:10], shuffled(0, 10, 10, seed=4))


def test_a_prior_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="not a multiple of heads"):
        PriorConfig(embed_dim=8, width=30, heads=4)
    with pytest.raises(ValueError, match="2 texts but 1 seeds"):
        sample_prior(small_prior(), unit(2, 0), [1])
