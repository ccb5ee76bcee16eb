import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from clip_train.ema import read_snapshots, reconstruct
from clip_train.fit import FitConfig
from clip_train.folder import read_manifest
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.tensors import load_tensors
from diffusion.decoder import DecoderConfig
from diffusion.ema_commands import ema
from diffusion.posthoc import AS_TRAINED, choose_average, upsampler_losses
from diffusion.prior import PriorConfig
from diffusion.train_decoder import train_decoder
from diffusion.train_prior import train_prior
from diffusion.train_upsampler import load_upsampler, train_upsampler
from diffusion.trained import load_decoder, load_prior
from diffusion.upsample import UpsamplerConfig

FIT = FitConfig(steps=8, batch_size=4, precision="fp32", ema=0.5, ema_snapshots=4, lr=1e-2)
UPSAMPLER = UpsamplerConfig(crop=16, widths=(16,), blocks=(1,), cond_width=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posthoc")
    tiny.shards(folder / "shards", 8), tiny.shards(folder / "val", 12), tiny.clip(folder / "clip")
    train_upsampler(folder / "shards", folder / "clip", folder / "up", UPSAMPLER, FIT, device="cpu")
    return folder


def test_the_best_of_the_averages_is_written_as_a_folder_that_loads(made):
    done = choose_average(made / "up", [0.15, 0.05], made / "best", shards=made / "val", count=12)
    table = {row["average"]: row for row in done.result["table"]}
    assert list(table) == [AS_TRAINED, "0.05", "0.15"] and table["0.05"]["profile"] < 1e-6
    losses = {name: row["loss"] for name, row in table.items()}
    best = min(losses, key=losses.get)
    assert done.result["sigma_rel"] == table[best]["sigma_rel"] and table[best]["behind"] == 0
    assert all(row["behind"] == pytest.approx(row["loss"] - losses[best], abs=1e-9) for row in table.values())
    weights = load_tensors(made / "best" / "model.safetensors")[0]
    asked = done.result["sigma_rel"]
    truth = load_tensors(made / "up" / "model.safetensors")[0]
    if asked is not None:
        truth = reconstruct(read_snapshots(made / "up"), asked)[0]
    assert all(torch.equal(weights[name], truth[name]) for name in truth)
    upsampler, manifest = load_upsampler(made / "best")
    assert upsampler.config == load_upsampler(made / "up")[0].config
    assert manifest.inputs["clip"] == read_manifest(made / "up").inputs["clip"]
    assert {"clip", "shards", "upsampler", "held_out"} == set(manifest.inputs)
    again = choose_average(made / "up", [0.05, 0.15], made / "best", shards=made / "val", count=12)
    assert again.created == done.created


def test_the_same_noise_meets_all_of_them_and_the_better_weights_have_the_lower_loss(made):
    upsampler, manifest = load_upsampler(made / "up")
    losses = upsampler_losses(
        upsampler.config, ShardSet(str(made / "val")), Clip.load(made / "clip"), made / "val", 12, 0
    )
    first = losses(upsampler)
    assert np.array_equal(first, losses(upsampler)) and len(first) == 1
    with torch.no_grad():
        for weight in upsampler.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert losses(upsampler).mean() > first.mean()


def test_a_decoder_and_a_prior_are_chosen_in_the_same_way(made):
    small = {"image_size": 8, "widths": (16,), "blocks": (1,), "attention": (), "head_width": 16, "cond_width": 16}
    train_decoder(made / "shards", made / "clip", made / "decoder", DecoderConfig(**small), FIT, device="cpu")
    best = choose_average(made / "decoder", [0.1], made / "decoder-best", shards=made / "val", count=12)
    assert best.kind == "decoder" and len(best.result["table"]) == 2
    assert load_decoder(made / "decoder-best")[1].fingerprint == best.fingerprint

    tiny.store(made / "emb", tiny.unit_rows(12, 8)), tiny.store(made / "emb-val", tiny.unit_rows(12, 8, seed=1))
    config = PriorConfig(width=16, depth=1, heads=2)
    train_prior(made / "emb", made / "prior", config, replace(FIT, batch_size=8), device="cpu")
    best = choose_average(made / "prior", [0.1], made / "prior-best", embeddings=made / "emb-val")
    assert best.kind == "prior" and all(0 < row["loss"] < 100 for row in best.result["table"])
    assert load_prior(made / "prior-best")[1].inputs["embeddings"] == read_manifest(made / "prior").inputs["embeddings"]


def test_what_cannot_be_chosen_is_said_with_the_way_out(made, tmp_path):
    with pytest.raises(UserError, match="pass --shards"):
        choose_average(made / "up", [0.1], tmp_path / "out")
    with pytest.raises(UserError, match="no widths"):
        choose_average(made / "up", [], tmp_path / "out", shards=made / "val")
    tiny.store(made / "other", tiny.unit_rows(4, 8))
    with pytest.raises(UserError, match="give a prior, decoder or upsampler"):
        choose_average(made / "other", [0.1], tmp_path / "out", shards=made / "val")
    shutil.copytree(made / "up", tmp_path / "plain", ignore=shutil.ignore_patterns("snapshots"))
    with pytest.raises(UserError, match="--set ema_snapshots"):
        choose_average(tmp_path / "plain", [0.1], tmp_path / "out", shards=made / "val")


def test_the_command_prints_the_table(made, tmp_path):
    arguments = [made / "up", "--sigma-rel", "0.1,0.2", "--shards", made / "val", "--out", tmp_path / "best"]
    answer = CliRunner().invoke(ema, [*map(str, arguments), "--count", "12", "--device", "cpu"])
    assert answer.exit_code == 0, answer.exception
    assert answer.stdout.splitlines()[0].split() == ["average", "loss", "behind", "error", "profile"]
    assert AS_TRAINED in answer.stdout and (tmp_path / "best" / "model.safetensors").exists()


def test_pictures_it_was_trained_on_choose_no_average(made, tmp_path):
    with pytest.raises(UserError, match="was trained on"):
        choose_average(made / "up", [0.15], tmp_path / "best", shards=made / "shards", count=8)
