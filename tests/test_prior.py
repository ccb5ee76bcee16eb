from dataclasses import replace

import crew
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from clip_train.fit import FitConfig
from clip_train.settings import UserError
from clip_train.tensors import load_tensors
from diffusion.baselines import open_prior
from diffusion.contrastive import ContrastiveConfig, ContrastivePrior, contrastive_prior_loss
from diffusion.denoiser import denoising_loss
from diffusion.evaluate_prior import prior_guesses
from diffusion.pairs import Pairs, blurred, shuffled
from diffusion.prior import UNKNOWN, PriorConfig, PriorDenoiser, null_cond, sample_prior, text_cond
from diffusion.ridge import ridge_regression
from diffusion.train_prior import train_prior
from diffusion.trained import load_prior
from diffusion.words import NO_WORD, bpe_ids

D = 16


def unit(rows, seed, wide=D):
    return F.normalize(torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed)), dim=-1)


def small_prior(predict="x0", loud=False, **more):
    torch.manual_seed(0)
    prior = PriorDenoiser(PriorConfig(embed_dim=D, width=32, depth=2, heads=2, predict=predict, **more)).eval()
    own = prior.network
    if own.words is not None:
        own.words.known.copy_(torch.arange(100, 100 + len(own.words.known)))
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


WORDS = {"words": 6, "vocabulary": 20}


def some_words(count, seed=0):
    """(count, 6) ids that the network knows; the last caption has two only."""
    words = torch.randint(100, 120, (count, 6), generator=torch.Generator().manual_seed(seed))
    words[-1, 2:] = NO_WORD
    return words


def test_no_token_sees_those_after_it():
    prior = small_prior(loud=True, **WORDS).network
    cond = text_cond(unit(1, 1), torch.tensor([[100, 101, 102, 103, 104, 105]]))
    past = prior.past(cond)["past"]  # (1, depth, 2, heads, tokens, C)
    for changed in range(6):
        words = cond["words"].clone()
        words[0, changed] = 119
        other = prior.past(cond | {"words": words})["past"]
        same = torch.isclose(past, other, atol=1e-6).all(-1).all(3)[0].all(1)  # (depth, tokens)
        assert same[:, :changed].all() and not same[:, changed].any()
        assert not same[1:, changed + 1 :].any()  # from the second block on, later tokens know of it
    moved = prior.past(cond | {"text": unit(1, 2)})["past"]
    assert torch.isclose(past, moved, atol=1e-6)[..., :6, :].all()


def test_the_query_sees_every_token_and_the_noisy_embedding_none_that_follows():
    prior = small_prior(loud=True, **WORDS).network
    cond, x, level = text_cond(unit(2, 1), some_words(2)), unit(2, 3) * D**0.5, torch.zeros(2)
    said = prior(x, level, cond)
    for other in (
        prior(x, level, cond | {"words": some_words(2, 1)}),
        prior(x, level, cond | {"text": unit(2, 2)}),
        prior(x, level + 1, cond),
        prior(x + 1, level, cond),
    ):
        assert (said - other).abs().amax(1).min() > 1e-3
    seen = []
    prior.blocks[1].norm_look.register_forward_hook(lambda m, i, o: seen.append(o))
    prior(x, level, cond)
    prior(x + 1, level, cond)
    before, after = (h for h in seen if h.shape[1] == 3)  # noise level, noisy embedding, query
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.isclose(before[:, 1:], after[:, 1:]).all(-1).any()


def test_the_order_of_words_counts_and_what_stands_after_a_captions_end_does_not():
    prior, x, sigma = small_prior(loud=True, **WORDS), torch.randn(2, D), torch.ones(2)
    words = some_words(2)
    base = prior(x, sigma, text_cond(unit(2, 1), words))
    assert not torch.allclose(
        base[0], prior(x, sigma, text_cond(unit(2, 1), words[:, [1, 0, 2, 3, 4, 5]]))[0], atol=1e-3
    )
    cut = prior(x[1:], sigma[1:], text_cond(unit(2, 1)[1:], words[1:, :2]))
    assert torch.allclose(base[1:], cut, atol=1e-5)


def test_unknown_words_are_all_one_and_no_words_are_as_none_given():
    prior, x, sigma = small_prior(loud=True, **WORDS), torch.randn(2, D), torch.ones(2)
    words = some_words(2)

    def said(words):
        return prior(x, sigma, text_cond(unit(2, 1), words))

    strange, hidden = words.clone(), words.clone()
    strange[:, 1], hidden[:, 1] = 7, UNKNOWN
    assert torch.equal(said(strange), said(hidden)) and not torch.allclose(said(words), said(hidden), atol=1e-3)
    assert torch.allclose(said(torch.full_like(words, NO_WORD)), said(None), atol=1e-6)


def test_dropping_the_text_drops_its_words_too():
    prior, x, sigma = small_prior(loud=True, **WORDS), torch.randn(3, D), torch.ones(3)
    one = prior(x, sigma, null_cond(text_cond(unit(3, 1), some_words(3))))
    other = prior(x, sigma, null_cond(text_cond(unit(3, 2), some_words(3, 9))))
    assert torch.equal(one, other)
    assert torch.allclose(one, prior(x, sigma, null_cond(text_cond(unit(3, 2)))), atol=1e-6)


def test_what_is_read_once_says_the_same_as_what_is_read_at_each_step():
    prior = small_prior(loud=True, **WORDS)
    cond = text_cond(unit(3, 1), some_words(3))
    cond["drop"][1] = True
    x, sigma = torch.randn(6, D), torch.rand(6) + 0.1
    twice = {name: part.repeat_interleave(2, 0) for name, part in cond.items()}
    expected = prior(x, sigma, twice)
    assert torch.allclose(prior(x, sigma, cond), expected, atol=1e-5)  # several noise levels for each condition
    assert torch.allclose(prior(x, sigma, prior.prepared(cond)), expected, atol=1e-5)


def test_captions_become_the_ids_of_openais_vocabulary():
    ids = bpe_ids(["A red  fox", "", "a photo of unbelievableness"], 4)
    assert ids[0].tolist() == [320, 736, 3240, NO_WORD] and (ids[1] == NO_WORD).all()
    assert ids[2, 0] == 320 and (ids[2] != NO_WORD).all()


def test_texts_are_blurred_along_what_texts_are_made_of_and_no_further_than_asked():
    text = F.normalize(unit(400, 0, 3) @ unit(3, 1, 12) + 0.01 * unit(400, 2, 12), dim=-1)  # nearly three-dimensional
    rng = torch.Generator().manual_seed(0)
    moved = blurred(text, 1.0, rng)
    assert torch.allclose(moved.norm(dim=1), torch.ones(400))
    assert 0.5 < (moved * text).sum(1).mean() < 0.97
    before, after = (torch.linalg.svdvals(rows) for rows in (text, moved))
    assert after[3:].norm() < 2 * before[3:].norm()
    assert (blurred(text, 0.1, rng) * text).sum(1).min() > 0.95


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


def test_a_lower_temperature_draws_nearer_to_the_mean():
    prior, text = small_prior(sigma_data=0.3), unit(8, 1)
    mean = sample_prior(prior, text, range(8), steps=1)
    away = [(sample_prior(prior, text, range(8), steps=6, temperature=t) - mean).norm() for t in (0.0, 0.3, 1.0)]
    assert away[0] <= away[1] <= away[2]


WORLD = {"image": tiny.unit_rows(60, D, 1), "text": tiny.unit_rows(60, D, 2)}
QUICK = FitConfig(steps=6, batch_size=16, lr=3e-3, precision="fp32", ema=0.9)
TINY = {
    "diffusion": PriorConfig(width=32, depth=2, heads=2, words=4, text_noise=1.0, draws=2, weighting="min_snr"),
    "contrastive": ContrastiveConfig(width=32, depth=1, words=4, text_noise=1.0),
}


@pytest.fixture(scope="module")
def emb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "emb"
    tiny.store(folder, WORLD["image"], WORLD["text"])
    return folder


@pytest.mark.parametrize("kind", TINY)
def test_training_killed_and_resumed_equals_training_unbroken(emb, kind, tmp_path):
    def train(name, stop=0):
        def on_progress(step, total, **numbers):
            if step == stop:
                raise KeyboardInterrupt

        config = replace(QUICK, save_every=0.0)
        return train_prior(emb, tmp_path / name, TINY[kind], config, device="cpu", on_progress=on_progress)

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("broken", stop=4)
    assert (tmp_path / "broken.partial").exists()
    train("broken")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", TINY)
def test_a_trained_folder_opens_as_what_it_is_and_guesses_by_words_too(emb, kind, tmp_path):
    made = train_prior(emb, tmp_path / "p", TINY[kind], QUICK, device="cpu")
    guess, fingerprints, manifest = open_prior(tmp_path / "p")
    assert manifest == made and fingerprints == {"prior": made.fingerprint, "clip": "sha256:clip"}
    assert guess.embed_dim == D and guess.config.vocabulary > 3
    text = torch.from_numpy(WORLD["text"][:3])
    read, mute = (guess.rows(text, captions, [0, 1, 2], steps=2) for captions in (["not row 1"] * 3, None))
    assert torch.allclose(read.norm(dim=1), torch.ones(3)) and not torch.allclose(read, mute, atol=1e-5)


def train_on_ranks(emb, folder):
    for kind, config in TINY.items():
        for parallel in ("ddp", "fsdp"):
            train_prior(emb, folder / f"{kind}-{parallel}", config, replace(QUICK, parallel=parallel), device="cpu")


def test_two_ranks_train_the_same_prior_with_words_whole_or_in_parts(emb, tmp_path):
    crew.run(2, train_on_ranks, emb, tmp_path)
    for kind in TINY:
        whole, parts = (load_tensors(tmp_path / f"{kind}-{how}" / "model.safetensors")[0] for how in ("ddp", "fsdp"))
        assert whole.keys() == parts.keys() and any("words.table" in name for name in whole)
        assert all(torch.allclose(whole[name], parts[name], atol=1e-4) for name in whole)


def test_a_contrastive_prior_tells_pictures_apart_that_a_linear_guess_cannot():
    # the picture's sign is the product of two signs of the text: what a ridge regression sees is chance
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (512, 4), generator=rng) * 2.0 - 1
    text = F.normalize(signs @ torch.eye(D)[:4] + 0.05 * torch.randn(512, D, generator=rng), dim=-1)
    products = torch.stack([signs[:, 0] * signs[:, 1], signs[:, 2] * signs[:, 3], signs[:, 0] * signs[:, 2]], dim=1)
    image = F.normalize(products @ torch.eye(D)[5:8], dim=-1)
    torch.manual_seed(0)
    prior = ContrastivePrior(ContrastiveConfig(embed_dim=D, width=64, depth=1, dropout=0.0))
    prior.linear.take(ridge_regression([(text, image)]))
    before = (prior.rows(text[400:], None, ()) @ image[400:].T).argmax(1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(100):
        pick = torch.randint(0, 400, (128,), generator=rng)
        loss = contrastive_prior_loss(prior(text_cond(text[pick])), image[pick], 0.2, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (name, made), *_ = prior_guesses(prior.eval(), text[400:], range(112), None, 16, 1.0).items()
    right = [
        (products[400:][best] == products[400:]).all(1).float().mean()
        for best in (before, (made @ image[400:].T).argmax(1))
    ]
    assert name == "contrastive" and right[1] > 0.9 > 0.5 > right[0]


def test_the_contrastive_loss_of_guesses_that_say_nothing_is_one_plus_chance():
    image = torch.eye(8)[:6]
    nothing = torch.eye(8)[7].expand(6, 8)
    assert contrastive_prior_loss(nothing, image, 0.5, 0.05).item() == pytest.approx(1 + 0.5 * np.log(6))
    twins = torch.cat([image[:3], image[:3]])  # two captions of each picture: both rows are right
    assert contrastive_prior_loss(nothing, twins, 0.5, 0.05).item() == pytest.approx(1 + 0.5 * np.log(3))
    assert contrastive_prior_loss(image, image, 0.5, 0.05).item() == pytest.approx(0, abs=1e-6)


def test_a_folder_of_the_other_kind_is_refused_in_one_line(emb, tmp_path):
    train_prior(emb, tmp_path / "p", TINY["contrastive"], QUICK, device="cpu")
    with pytest.raises(UserError, match="holds a contrastive prior"):
        load_prior(tmp_path / "p")


def test_a_prior_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="not a multiple of heads"):
        PriorConfig(embed_dim=8, width=30, heads=4)
    with pytest.raises(UserError, match="drop_word 1.5"):
        PriorConfig(drop_word=1.5)
    with pytest.raises(UserError, match="sigma_min 40"):
        PriorConfig(sigma_min=40.0)
    with pytest.raises(UserError, match="temperature 0"):
        ContrastiveConfig(temperature=0.0)
    with pytest.raises(ValueError, match="2 texts but 1 seeds"):
        sample_prior(small_prior(), unit(2, 0), [1])
