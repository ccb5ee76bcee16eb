import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_train.fit import FitConfig, learning_rate, parameter_groups
from clip_train.loss import contrastive_loss, same_caption, sigmoid_chance, sigmoid_loss
from clip_train.model import Clip, preprocess_config
from clip_train.watch import NUMBERS, Watcher, describe, duplicates_floor, effective_rank, lowest_loss, pairing

COLOURS = np.array(
    [[230, 30, 30], [30, 180, 60], [40, 60, 220], [250, 250, 250], [10, 10, 10], [240, 220, 40], [250, 150, 190]]
)
START, END = 8, 9  # tokens; 0 pads, 1 to 7 name the colours


def world(count=2000, seed=0):
    """Pictures of four coloured quarters, uint8 (N, 3, 16, 16), and captions that name them, tokens (N, 6)."""
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, len(COLOURS), (count, 4))
    pixels = COLOURS[pick].reshape(count, 2, 2, 3).repeat(8, 1).repeat(8, 2).transpose(0, 3, 1, 2)
    pixels = np.clip(pixels + rng.integers(-10, 10, pixels.shape), 0, 255).astype(np.uint8)
    tokens = np.concatenate([np.full((count, 1), START), pick + 1, np.full((count, 1), END)], 1)
    return torch.from_numpy(pixels), torch.from_numpy(tokens)


def small_clip(seed=0, scale=None, bias=None):
    """One layer a tower; `scale`: a logit scale that does not learn; `bias`: SigLIP's."""
    torch.manual_seed(seed)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 6, "vocab_size": 10, "width": 32, "heads": 2, "layers": 1},
    }
    clip = Clip(config | ({"init_logit_bias": bias} if bias else {}), preprocess_config(16)).train()
    if scale:
        clip.model.logit_scale.requires_grad_(False).fill_(math.log(scale))
    return clip


def locked(*towers):
    clip = small_clip()
    for name, parameter in clip.model.named_parameters():
        if "logit" not in name and ("image" if "visual" in name else "text") in towers:
            parameter.requires_grad_(False)
    return clip


def watched(tokens=None, *, clip=None, steps=60, batch=64, lr=3e-3, begin=True, hold=(), **options):
    """Train for real, looking every 10 steps: all warnings, and the numbers of the last look.

    hold: the tower whose gradients are lost on the way.
    """
    pixels, right = world()
    tokens = right if tokens is None else tokens
    names = torch.unique(tokens, dim=0, return_inverse=True)[1]
    clip = clip or small_clip()
    config = FitConfig(steps=steps, batch_size=batch, lr=lr)
    optimizer = torch.optim.AdamW(parameter_groups(clip, 0.05), betas=(0.9, 0.98))
    watcher = Watcher(batch, warmup=round(0.05 * steps), lr=lr, clip=clip, every=10, grace=30, **options)
    rng, warnings, last = np.random.default_rng(0), [], {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        rows = rng.choice(len(pixels), batch, replace=False)
        image, text, scale, *bias = clip(pixels[rows], tokens[rows])
        image = image.detach() if "image" in hold else image
        if bias:
            loss, chance = sigmoid_loss(image, text, scale, *bias, [names[rows]]), sigmoid_chance(1 / batch, batch)
        else:
            loss, chance = contrastive_loss(image, text, scale, same_caption(names[rows])), None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clip.clamp_temperature()
        if begin:
            watcher.begin(image, text)
        said = watcher(step + 1, loss.item(), scale.item(), image, text, chance=chance, ids=[names[rows]])
        last = said[0] or last
        warnings += said[1]
    return warnings, last


def shuffled():
    tokens = world()[1]
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(3))]


def repeated(different):
    tokens = world()[1]
    return tokens[torch.arange(len(tokens)) % different]


@pytest.mark.parametrize("how", [{}, {"batch": 24}, {"lr": 1e-2}, {"begin": False}], ids=str)
def test_training_that_goes_well_is_not_warned_about(how):
    warnings, last = watched(**how, steps=80)
    assert warnings == []
    assert last["top1"] > 0.3 and set(last) <= set(NUMBERS)


# what is done wrong -> what the one warning has to say
WRONG = {
    "learning rate x 100": ({"lr": 0.3}, ["both towers make one point", "captions did fit", "(lr 0.3) is too high"]),
    "learning rate x 10": ({"lr": 0.03}, ["rank of the text tower's rows fell from 10.8", "(lr 0.03) is too high"]),
    "learning rate / 30,000": ({"lr": 1e-7}, ["have hardly moved", "(lr 1e-07) is too low"]),
    "captions shuffled": ({"tokens": shuffled()}, ["captions do not belong to their pictures", "nothing in common"]),
    "one caption": ({"tokens": repeated(1)}, ["about 64 of the 64 pairs of a batch share each caption"]),
    "three captions": ({"tokens": repeated(3)}, ["about 2", "of the 64 pairs of a batch share each caption"]),
    "image tower never trained": ({"clip": locked("image")}, ["image tower is locked, but was never trained"]),
    "text tower never trained": ({"clip": locked("text")}, ["text tower is locked, but was never trained"]),
    "both towers locked": ({"clip": locked("image", "text"), "trained": True}, ["neither tower changes"]),
    "gradients lost": ({"hold": ["image"]}, ["image tower has not changed", "gradients do not arrive"]),
    "batch of 4": ({"batch": 4}, ["a batch of 4 pairs is small", "raise batch_size"]),
    "temperature too high": ({"clip": small_clip(scale=0.5)}, ["at logit scale 0.50 even perfect rows reach 3.66"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_training_that_goes_wrong_is_told_why_once(name):
    how, words = WRONG[name]
    warnings, _ = watched(**how)
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert all(word in warnings[0] for word in words), warnings[0]


def test_a_locked_tower_that_was_trained_before_is_as_it_should_be():
    assert watched(clip=locked("image"), trained=True)[0] == []


def test_without_the_first_rows_a_high_learning_rate_and_shuffled_captions_are_both_named():
    warnings, _ = watched(shuffled(), begin=False)
    assert len(warnings) == 1 and "learning rate" in warnings[0] and "captions do not belong" in warnings[0]


def test_learning_that_breaks_down_later_is_blamed_on_the_learning_rate_and_dated():
    watcher = Watcher(16, lr=0.01)
    rows, point = F.normalize(torch.randn(16, 8), dim=1), F.normalize(torch.ones(16, 8), dim=1)
    losses = [2.7, 2.0, 1.5, 1.4, 1.4] + [math.log(16)] * 10
    said = [
        watcher(50 * i, loss, 14.0, *(rows, rows) if loss < 2.7 else (point, point)) for i, loss in enumerate(losses)
    ]
    warnings = [line for _, lines in said for line in lines]
    assert len(warnings) == 1 and "had been 54% of chance at step 200: the learning rate (lr 0.01)" in warnings[0]


def test_a_scale_at_its_limit_is_a_fault_only_while_pairs_are_not_told_apart():
    rows = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    for loss, expected in ((3.9, 1), (1.5, 0)):
        watcher, said = Watcher(64), []
        for step in range(0, 500, 50):
            said += watcher(step, loss, 100.0, rows, rows)[1]
        assert len(said) == expected and all("logit scale 100 has reached its limit" in line for line in said)


@pytest.mark.parametrize(
    "tokens, words", [(None, []), (shuffled(), ["captions do not belong"])], ids=["right", "wrong"]
)
def test_siglip_is_watched_against_its_own_chance_level(tokens, words):
    warnings, _ = watched(tokens, clip=small_clip(bias=-3.0), kind="siglip")
    assert len(warnings) == len(words) and all(word in line for word, line in zip(words, warnings, strict=True))


def test_between_looks_nothing_is_computed():
    watcher = Watcher(8, every=50)
    rows = torch.eye(8)
    assert watcher(10, 2.0, 14.0, rows, rows)[0] and watcher(60, 2.0, 14.0, rows, rows)[0]
    assert watcher(100, 2.0, 14.0, None, None) == ({}, [])
    assert watcher(120, math.nan, 14.0, rows * math.nan, rows) == ({}, [])  # fit's business


def test_effective_rank_counts_the_directions_that_are_used():
    assert effective_rank(torch.eye(7, 12)) == pytest.approx(7)
    assert effective_rank(torch.eye(7, 12).repeat(9, 1)) == pytest.approx(7)
    assert effective_rank(torch.ones(20, 5)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(effective_rank(torch.full((20, 5), math.inf)))
    # singular values 2 and 1: shares 2/3 and 1/3
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(3 / 2 ** (2 / 3))


def test_rows_are_described_as_worked_out_by_hand():
    image, text = torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    found = describe(image, text)
    assert found["gap"] == pytest.approx(math.hypot(0.5 - 0.7, 0.5 - 0.1))
    assert found["cos_right"] == pytest.approx(0.0) and found["cos_wrong"] == pytest.approx(0.8)
    assert found["top1"] == 0.0 and found["rank_image"] == found["rank_text"] == pytest.approx(2)


def test_no_rows_beat_the_lowest_loss_and_a_simplex_reaches_it():
    simplex = F.normalize(torch.eye(6, dtype=torch.float64) - 1 / 6, dim=1)
    for scale in (0.5, 3.0, 14.0):
        scale = torch.tensor(scale, dtype=torch.float64)
        assert contrastive_loss(simplex, simplex, scale).item() == pytest.approx(lowest_loss(scale.item(), 6))
        other = F.normalize(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
        assert contrastive_loss(other, other, scale).item() > lowest_loss(scale.item(), 6)
    assert lowest_loss(3.0, 2) == pytest.approx(math.log(1 + math.exp(-6)))


def test_duplicates_floor_is_what_perfect_rows_are_left_with():
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    rows = torch.eye(3)[ids]
    reached = contrastive_loss(rows, rows, torch.tensor(100.0), same_caption(ids)).item()
    assert duplicates_floor([ids]) == pytest.approx(reached) == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 6)


def test_towers_that_have_learned_nothing_tell_right_pairs_from_shuffled_ones():
    (pixels, right), clip = world(256), small_clip()
    with torch.no_grad():
        image, text, *_ = clip(pixels, right)
    assert pairing(image, text) > 10
    assert abs(pairing(image, text.roll(1, 0))) < 3
    assert pairing(image, text[:1].expand(256, -1)) == 0.0
