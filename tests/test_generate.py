import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clip_train.embed import embed
from clip_train.fit import FitConfig
from clip_train.folder import read_manifest
from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.decoder import DecoderConfig
from diffusion.evaluate import evaluate_loop_folders
from diffusion.evaluate_prior import evaluate_prior_folder
from diffusion.generate import Generator, Sampling, read_captions, read_provenance, save_png
from diffusion.prior import PriorConfig
from diffusion.train_decoder import DECODER_PRESETS, train_decoder
from diffusion.train_prior import PRIOR_PRESETS, train_prior
from diffusion.trained import load_decoder, settings

FEW = FitConfig(steps=3, batch_size=4, ema=0.5, precision="fp32")
DECODER = DecoderConfig(
    image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32, text=True
)
PRIOR = PriorConfig(width=32, depth=1, heads=2)
QUICK = Sampling(steps=3, prior_steps=2)
CAPTIONS = ["picture number 1", "one of many", "ein Fuchs, größer als ☃", "picture number 1"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Shards, CLIP, embeddings, prior and decoder, each made from the one before."""
    root = tmp_path_factory.mktemp("house")
    shards, clip = tiny.shards(root / "shards"), tiny.clip(root / "clip")
    embed(shards, clip, root / "emb")
    train_prior(root / "emb", root / "prior", PRIOR, FEW, device="cpu")
    train_decoder(shards, clip, root / "decoder", DECODER, FEW, device="cpu")
    return root


@pytest.fixture(scope="module")
def generator(house):
    return Generator.open(house / "decoder", house / "prior")


def pixels(made):
    return [np.asarray(one.picture).astype(int) for one in made]


def near(a, b):
    """Equal but for the last bit of a pixel, which the order of a sum of floats can move."""
    return all(np.abs(x - y).max() <= 1 for x, y in zip(a, b, strict=True))


def test_training_leaves_config_weights_and_the_fingerprints_of_its_inputs(house):
    for kind, inputs in [("prior", {"embeddings", "clip"}), ("decoder", {"shards", "clip"})]:
        manifest = read_manifest(house / kind, kind)
        assert set(manifest.inputs) == inputs
        assert manifest.inputs["clip"]["fingerprint"] == Clip.load(house / "clip").fingerprint
        assert manifest.input_path("clip") == house / "clip"
        assert manifest.result["steps"] == 3 and np.isfinite(manifest.result["loss"])
        names = {path.name for path in (house / kind).iterdir()}
        assert names == {"config.json", "model.safetensors", "metrics.jsonl", "manifest.json"}


def test_the_averaged_weights_are_the_ones_saved(house, tmp_path):
    plain = FitConfig(steps=3, batch_size=4, precision="fp32")
    train_decoder(house / "shards", house / "clip", tmp_path / "last", DECODER, plain, device="cpu")
    last, averaged = load_decoder(tmp_path / "last")[0], load_decoder(house / "decoder")[0]
    assert not torch.equal(last.network.enter.weight, averaged.network.enter.weight)


def test_a_finished_training_is_not_done_again_and_other_settings_are_refused(house):
    before = (house / "prior" / "model.safetensors").stat().st_mtime_ns
    again = train_prior(house / "emb", house / "prior", PRIOR, FEW, device="cpu")
    assert again.fingerprint == read_manifest(house / "prior").fingerprint
    assert (house / "prior" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="fit.steps = 3, but 4 is asked for now"):
        train_prior(house / "emb", house / "prior", PRIOR, replace(FEW, steps=4), device="cpu")


def test_every_caption_gives_a_picture_of_the_decoders_size(generator):
    made = generator.from_captions(CAPTIONS, how=QUICK)
    assert [one.picture.size for one in made] == [(8, 8)] * 4
    assert [one.provenance["caption"] for one in made] == CAPTIONS
    assert [one.provenance["seed"] for one in made] == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", ["heun", "ddim", "ddpm"])
def test_the_same_seed_gives_the_same_picture_at_any_batch_size(generator, sampler):
    how = Sampling(steps=3, prior_steps=2, sampler=sampler, eta=0.5)
    seeds = [5, 6, 7, 8]
    together = pixels(generator.from_captions(CAPTIONS, seeds, how))
    alone = pixels(generator.from_captions(CAPTIONS, seeds, how, batch_size=1))
    assert near(together, alone)
    assert np.abs(together[0] - together[3]).max() > 10  # one caption, two seeds


def test_guidance_and_clamp_and_steps_change_the_picture(generator):
    base = pixels(generator.from_captions(CAPTIONS[:1], [1], QUICK))
    for change in ({"guidance": 50.0}, {"steps": 5}, {"sampler": "ddpm"}, {"clamp": 0.0}, {"precision": "bf16"}):
        other = pixels(generator.from_captions(CAPTIONS[:1], [1], Sampling(**{"steps": 3, "prior_steps": 2} | change)))
        assert not np.array_equal(base[0], other[0]), change


def test_steps_and_guidance_of_the_prior_change_the_embedding(generator):
    base, steps, guided = (
        generator.image_embeddings(CAPTIONS[:1], [1], Sampling(prior_steps=s, prior_guidance=g))
        for s, g in ((2, 1.0), (4, 1.0), (2, 8.0))
    )
    assert not torch.allclose(base, steps) and not torch.allclose(base, guided)


def test_guidance_outside_its_interval_is_one(generator):
    rows = tiny.unit_rows(2, 32)
    one = generator.from_embeddings(rows, how=Sampling(steps=3, guidance=1.0))
    never = generator.from_embeddings(rows, how=Sampling(steps=3, guidance=9.0, guidance_from=1e6))
    assert np.array_equal(pixels(one), pixels(never))


def test_a_picture_can_be_made_again_from_its_own_file(generator, tmp_path):
    from_captions = generator.from_captions(CAPTIONS[2:3], [41], QUICK)
    from_embeddings = generator.from_embeddings(3 * tiny.unit_rows(1, 32), [42], QUICK)
    for made in (*from_captions, *from_embeddings):
        save_png(made.picture, tmp_path / "a.png", made.provenance)
        again = generator.regenerate(read_provenance(tmp_path / "a.png"))
        with Image.open(tmp_path / "a.png") as saved:
            assert np.array_equal(np.asarray(again.picture), np.asarray(saved))
        assert again.provenance == made.provenance


def test_the_file_says_how_the_picture_was_made_in_both_customs(generator, tmp_path):
    made = generator.from_captions(CAPTIONS[2:3], [41], QUICK)[0]
    save_png(made.picture, tmp_path / "a.png", made.provenance)
    with Image.open(tmp_path / "a.png") as saved:
        saved.load()
        info = saved.info
    record = json.loads(info["unclip"])
    assert record["caption"] == CAPTIONS[2] and record["seed"] == 41 and record["sampling"]["sampler"] == "heun"
    assert set(record["fingerprints"]) == {"clip", "prior", "decoder"}
    prompt, settings = info["parameters"].split("\n")
    assert prompt == CAPTIONS[2]
    assert settings.startswith("Steps: 3, Sampler: Heun, CFG scale: 2.0, Seed: 41, Size: 8x8, Model hash: ")


def test_other_weights_refuse_to_make_a_picture_again(generator):
    record = generator.from_captions(CAPTIONS[:1], [1], QUICK)[0].provenance
    record["fingerprints"]["decoder"] = "sha256:0123456789abcdef"
    with pytest.raises(UserError, match="made with decoder 0123456789"):
        generator.regenerate(record)
    with pytest.raises(UserError, match="damaged"):
        generator.regenerate({"seed": 1, "sampling": {}})


def test_folders_that_do_not_belong_together_are_refused(house, tmp_path):
    other = tiny.clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained with CLIP"):
        Generator.open(house / "decoder", house / "prior", other)
    embed(house / "shards", other, tmp_path / "emb")
    train_prior(tmp_path / "emb", tmp_path / "prior", PRIOR, FEW, device="cpu")
    with pytest.raises(UserError, match="trained with different CLIPs"):
        Generator.open(house / "decoder", tmp_path / "prior")
    with pytest.raises(UserError, match="of kind prior, but decoder"):
        Generator.open(house / "prior")


def test_embeddings_need_no_prior_but_captions_do(house):
    generator = Generator.open(house / "decoder")
    assert len(generator.from_embeddings(tiny.unit_rows(2, 32), how=QUICK)) == 2
    with pytest.raises(UserError, match="pass --prior"):
        generator.from_captions(["a fox"])


def test_bad_input_is_refused_in_one_line(generator, house, tmp_path):
    with pytest.raises(UserError, match=r"must be \(N, 32\)"):
        generator.from_embeddings(tiny.unit_rows(2, 16))
    with pytest.raises(UserError, match="finite"):
        generator.from_embeddings(np.full((1, 32), np.nan))
    with pytest.raises(UserError, match="2 pictures but 1 seeds"):
        generator.from_captions(["a", "b"], [1])
    with pytest.raises(UserError, match="non-negative"):
        generator.from_captions(["a"], [-1])
    with pytest.raises(UserError, match="no sampler 'plms'"):
        Sampling(sampler="plms")
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="does not say how it was made"):
        read_provenance(tmp_path / "plain.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        read_provenance(tmp_path / "no.png")
    with pytest.raises(UserError, match="embed_dim is 64"):
        train_prior(house / "emb", tmp_path / "p", PriorConfig(embed_dim=64), FEW, device="cpu")


def test_the_decoder_is_shown_each_pictures_own_embedding(house, monkeypatch, tmp_path):
    seen = {}

    def fit_once(model, batches, loss, config, folder, **rest):
        batch = next(batches(0))
        seen.update(batch)
        return SimpleNamespace(steps=1, seconds=1.0, loss=1.0, averaged=None)

    monkeypatch.setattr("diffusion.train_decoder.fit", fit_once)
    train_decoder(house / "shards", house / "clip", tmp_path / "d", DECODER, FEW, device="cpu")
    from clip_train.pictures import Pictures
    from clip_train.shards import ShardSet

    own = Clip.load(house / "clip").encode_image(Pictures(ShardSet(str(house / "shards")), 16).pixels(seen["row"]))
    assert torch.allclose(seen["image"], own, atol=1e-3)
    assert seen["text"].shape[0] == 4 and seen["keep_text"].dtype == torch.bool


def test_the_house_can_be_evaluated_and_other_clips_embeddings_are_refused(house, tmp_path):
    table = evaluate_prior_folder(house / "emb", house / "prior")
    assert set(table) >= {"prior", "prior mean", "ridge", "text", "mean image", "unrelated"}
    numbers, sheet = evaluate_loop_folders(house / "emb", house / "prior", house / "decoder", count=3, how=QUICK)
    assert set(numbers) == {"true", "prior", "text", "chance"} and sheet.width > 100
    embed(house / "shards", tiny.clip(tmp_path / "other", seed=1), tmp_path / "emb")
    with pytest.raises(UserError, match="different CLIPs"):
        evaluate_prior_folder(tmp_path / "emb", house / "prior")


def test_presets_take_settings_by_name():
    config, fit_config = settings(PRIOR_PRESETS, "tiny", ["depth=2", "steps=7", "minutes=0"])
    assert (config.depth, fit_config.steps) == (2, 7)
    config, fit_config = settings(DECODER_PRESETS, "small", ["blocks=[1,1,1,2]", "lr=0.01"])
    assert (config.blocks, config.image_size, fit_config.lr) == ((1, 1, 1, 2), 64, 0.01)
    with pytest.raises(UserError, match="there are: tiny, small"):
        settings(DECODER_PRESETS, "huge")


def test_captions_are_read_line_by_line(tmp_path):
    (tmp_path / "c.txt").write_text("a fox\n\n  größer \n", encoding="utf-8")
    assert read_captions(tmp_path / "c.txt") == ["a fox", "größer"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no captions"):
        read_captions(tmp_path / "empty.txt")
