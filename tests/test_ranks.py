"""Several processes on this machine, talking over gloo, as torchrun starts them; see crew.py."""

import dataclasses
import sys
import time

import crew
import pytest
import tiny
import torch
import torch.nn.functional as F

from clip_train import ranks
from clip_train.fit import FitConfig
from clip_train.loss import contrastive_loss, distillation_loss, same_caption, sigmoid_loss
from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.prior import PriorConfig
from diffusion.train_prior import train_prior  # noqa
from diffusion.trained import load_prior  # noqa

LOSSES = {
    "infonce": lambda p: contrastive_loss(p["image"], p["text"], p["scale"], same_caption(p["group"], p["caption"])),
    "infonce, own caption alone": lambda p: contrastive_loss(p["image"], p["text"], p["scale"]),
    "infonce, smoothed": lambda p: contrastive_loss(p["image"], p["text"], p["scale"], smoothing=0.2),
    "siglip": lambda p: sigmoid_loss(p["image"], p["text"], p["scale"], p["bias"], (p["group"], p["caption"]), chunk=2),
    "siglip, own caption alone": lambda p: sigmoid_loss(p["image"], p["text"], p["scale"], p["bias"]),
    "distillation": lambda p: distillation_loss(
        p["image"], p["text"], p["scale"], p["far"], p["away"], torch.tensor(7.0)
    ),
}


def pairs(first=0, last=12):
    """Rows first .. last of twelve pairs with repeated groups and captions, and a temperature and bias to train."""
    rng = torch.Generator().manual_seed(3)
    made = {n: F.normalize(torch.randn(12, 5, generator=rng), dim=-1) for n in ("image", "text", "far", "away")}
    made["group"] = torch.tensor([0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 10, 3])
    made["caption"] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 10, 11])
    made = {name: t[first:last] for name, t in made.items()}
    made |= {"scale": torch.tensor(4.0), "bias": torch.tensor(-1.5)}
    for name in ("image", "text", "scale", "bias"):
        made[name].requires_grad_()
    return made


def each_loss(folder):
    share = 12 // ranks.world_size()
    made = {}
    for name, loss in LOSSES.items():
        mine = pairs(ranks.rank() * share, ranks.rank() * share + share)
        value = loss(mine)
        value.backward()
        made[name] = {n: mine[n].grad for n in ("image", "text", "scale", "bias") if mine[n].grad is not None}
        made[name]["loss"] = value.detach()
    torch.save(made, folder / f"{ranks.rank()}.pt")
    assert ranks.broadcast("main" if ranks.is_main() else "other") == "main"
    assert ranks.total(torch.tensor(1.0)) == ranks.world_size()


@pytest.mark.parametrize("count", [2, 3])
def test_losses_and_gradients_of_several_ranks_equal_those_of_one(tmp_path, count):
    crew.run(count, each_loss, tmp_path)
    by_rank = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(count)]
    for name, loss in LOSSES.items():
        whole = pairs()
        value = loss(whole)
        value.backward()
        several = [made[name] for made in by_rank]
        assert torch.stack([s["loss"] for s in several]).mean().item() == pytest.approx(value.item(), abs=1e-6), name
        for part in ("image", "text"):  # what a rank's rows get is averaged over the ranks together with the weights
            assert torch.cat([s[part] for s in several]).div(count).allclose(whole[part].grad, atol=1e-6), (name, part)
        for part in {"scale", "bias"} & several[0].keys():
            assert torch.stack([s[part] for s in several]).mean(0).allclose(whole[part].grad, atol=1e-6), (name, part)


def main_refuses():
    def work():
        if ranks.rank():
            raise AssertionError("the others only listen")
        raise UserError("no such shards")

    with pytest.raises(UserError, match="no such shards"):
        ranks.from_main(work)
    assert ranks.from_main(lambda: [ranks.rank(), {"any": "thing"}]) == [0, {"any": "thing"}]


def test_what_the_main_rank_finds_or_refuses_all_ranks_hear():
    crew.run(2, main_refuses)


def one_fails():
    if ranks.rank() == 1:
        sys.exit(3)


def test_a_rank_that_fails_leaves_without_waiting_and_holds_nobody_up():
    started = time.monotonic()
    crew.run(2, one_fails, expect=[0, 3])
    assert time.monotonic() - started < 60


def test_leaving_without_a_process_group_is_an_ordinary_exit():
    with pytest.raises(SystemExit) as stop:
        ranks.leave(7)
    assert stop.value.code == 7


def train_twice(shards, out):
    from test_train import CONFIG, FIT

    from clip_train.train import train_clip

    config = dataclasses.replace(CONFIG, augment=0.0)
    made = train_clip(shards, out, config, FIT, device="cpu")
    assert made.result["steps"] == 6
    assert train_clip(shards, out, config, FIT, device="cpu") == made  # and finds it done


def test_clip_trained_by_two_ranks_equals_clip_trained_by_one(tmp_path):
    from test_train import CONFIG, FIT

    from clip_train.train import train_clip

    tiny.shards(tmp_path / "shards")
    crew.run(2, train_twice, tmp_path / "shards", tmp_path / "two")
    config = dataclasses.replace(CONFIG, augment=0.0)
    train_clip(tmp_path / "shards", tmp_path / "one", config, FIT, device="cpu")
    # the models, not the weights: keys' biases have no gradient but rounding, which Adam blows up to whole steps
    one, two = (Clip.load(tmp_path / name) for name in ("one", "two"))
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = [f"picture number {i}" for i in range(8)]
    assert torch.allclose(one.encode_image(pixels), two.encode_image(pixels), atol=1e-4)
    assert torch.allclose(one.encode_text(captions), two.encode_text(captions), atol=1e-4)
    assert torch.allclose(one.model.logit_scale, two.model.logit_scale, atol=1e-5)


PRIOR = {"config": PriorConfig(width=32, depth=1, heads=2), "device": "cpu"}
PRIOR_FIT = FitConfig(steps=15, batch_size=32, lr=3e-3, precision="fp32", log_every=1, ema=0.9)


def train_a_prior(folder):
    made = {}
    for parallel in ("ddp", "fsdp"):
        config = dataclasses.replace(PRIOR_FIT, parallel=parallel)
        done = train_prior(folder / "emb", folder / parallel, fit_config=config, **PRIOR)
        made[parallel] = done.result["loss"]
    return made


def test_two_ranks_train_a_prior_that_loads_and_is_as_good_as_that_of_one(tmp_path):
    tiny.store(tmp_path / "emb", tiny.unit_rows(64, 32, 1), tiny.unit_rows(64, 32, 2))
    crew.run(2, train_a_prior, tmp_path)
    alone = train_prior(tmp_path / "emb", tmp_path / "one", fit_config=PRIOR_FIT, **PRIOR).result["loss"]
    losses, weights = [], []
    for parallel in ("ddp", "fsdp"):
        denoiser, manifest = load_prior(tmp_path / parallel)
        losses.append(manifest.result["loss"])
        weights.append(denoiser.state_dict())
    assert losses == pytest.approx([alone] * 2, rel=0.1)  # each rank draws noise of its own: close, not equal
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
