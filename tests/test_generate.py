import copy
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
from diffusion import sweep
from diffusion.copies import CopyCheck
from diffusion.decoder import DecoderConfig, DecoderDenoiser
from diffusion.evaluate import evaluate_loop_folders
from diffusion.evaluate_prior import evaluate_prior_folder
from diffusion.generate import CANDIDATES, Generator, Sampling, read_captions, to_pixels
from diffusion.prior import PriorConfig
from diffusion.provenance import read_provenance, save_png
from diffusion.samplers import SampleNoise, sample
from diffusion.steering import look
from diffusion.train_decoder import DECODER_PRESETS, train_decoder
from diffusion.train_prior import PRIOR_PRESETS, train_prior
from diffusion.trained import load_decoder, settings
from diffusion.upsample import UpsamplerConfig, UpsamplerDenoiser

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


@pytest.fixture(scope="module")
def wild(house, generator):
    """The generator with large random weights, whose conditions all make a difference, and a weaker one beside it."""
    torch.manual_seed(0)
    decoders = [copy.deepcopy(generator.decoder), copy.deepcopy(generator.decoder)]
    for decoder, size in zip(decoders, (0.12, 0.06), strict=True):
        for name, weight in decoder.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=size)
    prints = {**generator.fingerprints, "guide": "sha256:weak"}
    return Generator(generator.clip, generator.prior, decoders[0], guide=decoders[1], fingerprints=prints)


class Counted:
    """A decoder that counts its calls and their samples."""

    def __init__(self, decoder):
        self.decoder, self.network, self.calls = decoder, decoder.network, []

    def __call__(self, x, sigma, cond):
        self.calls.append(len(x))
        return self.decoder(x, sigma, cond)


def drawn(generator, captions=CAPTIONS[:2], **change):
    how = Sampling(**{"steps": 2, "prior_steps": 1, "sampler": "euler"} | change)
    return generator.from_captions(captions, range(5, 5 + len(captions)), how)


def calls_of(generator, **change):
    counted = copy.copy(generator)
    counted.network = Counted(generator.decoder)
    drawn(counted, **change)
    return counted.network.calls


def test_a_step_takes_one_network_call_and_guidance_one_of_a_batch_twice_as_long(wild):
    assert calls_of(wild, guidance=1.0) == calls_of(wild, guidance=0.0) == [2, 2]
    assert calls_of(wild, guidance=2.0) == calls_of(wild, guidance=2.0, text_guidance=2.0) == [4, 4]
    assert calls_of(wild, guidance=2.0, text_guidance=3.0) == [6, 6]
    assert calls_of(wild, guidance=2.0, guidance_from=0.1, guidance_to=1.0) == [2, 2]  # sigmas are 20 and 0.01
    assert calls_of(wild, guidance=2.0, guidance_to=1.0) == [2, 4]


COUNTED = [
    {"guidance": 1.0}, {"guidance": 0.0}, {"guidance": 2.0, "sampler": "heun"},
    {"guidance": 2.0, "text_guidance": 3.0}, {"guidance": 1.0, "text_guidance": 3.0},
    {"guidance": 1.0, "text_guidance": 0.0}, {"guidance": 2.0, "text_guidance": 0.0},
    {"guidance": 2.0, "text_guidance": 2.0}, {"guidance": 3.0, "guidance_to": 1.0},
    {"guidance": 1.0, "autoguidance": 2.0}, {"guidance": 2.0, "autoguidance": 2.0}, {"autoguidance": 0.0},
    {"guidance": 1.0, "self_attention": 0.5}, {"guidance": 2.0, "self_attention": 0.5},
    {"guidance": 1.0, "self_attention": 0.5, "autoguidance": 2.0, "text_guidance": 1.0}, {"candidates": 3},
]  # fmt: skip


@pytest.mark.parametrize("kind", COUNTED, ids=str)
def test_what_a_sweep_says_a_picture_costs_is_what_goes_through_the_networks(wild, kind):
    seen = []
    hooks = [
        network.register_forward_hook(lambda module, inputs, made: seen.append(len(inputs[0])))
        for network in (wild.decoder, wild.guide)
    ]
    try:
        drawn(wild, **kind)
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(seen) == 2 * sweep.calls(Sampling(**{"steps": 2, "sampler": "euler"} | kind))


KINDS = [
    {"guidance": 3.0, "rescale": 0.7},
    {"guidance": 2.0, "text_guidance": 4.0},
    {"negative": "one of many"},
    {"autoguidance": 2.0},
    {"self_attention": 0.5},
    {"clip_guidance": 0.1},
    {"candidates": 3},
    {"guidance": 1.0, "self_attention": 0.5, "clip_guidance": 0.1, "autoguidance": 1.5, "guidance_to": 5.0},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind))
def test_every_kind_of_guidance_changes_the_picture_at_any_batch_size_alike_and_can_be_made_again(wild, kind):
    captions = CAPTIONS[:3]
    made = drawn(wild, captions, steps=3, **kind)
    how = Sampling(**made[0].provenance["sampling"])
    alone = [wild.from_captions([caption], [5 + i], how)[0] for i, caption in enumerate(captions)]
    plain = drawn(wild, captions, steps=3)
    assert near(pixels(made), pixels(alone))
    assert not all(np.array_equal(a, b) for a, b in zip(pixels(made), pixels(plain), strict=True))
    again = wild.regenerate(json.loads(json.dumps(alone[1].provenance)))
    assert np.array_equal(pixels([again])[0], pixels(alone)[1]) and again.provenance == alone[1].provenance


def test_each_kind_of_guidance_is_off_at_the_strength_that_says_so(wild):
    plain = pixels(drawn(wild))
    for kind in ({"text_guidance": 2.0}, {"rescale": 0.7, "guidance": 2.0, "guidance_to": 1e-3, "guidance_from": 1e-4}):
        same = np.array_equal(pixels(drawn(wild, **kind)), plain)
        assert same == ("rescale" not in kind)  # outside its interval guidance is 1, not 2
    itself = Generator(wild.clip, wild.prior, wild.decoder, guide=wild.decoder)
    assert near(pixels(drawn(itself, autoguidance=3.0)), plain)


def test_guidance_zero_draws_the_same_whatever_was_asked_for(wild):
    first, second = (pixels(drawn(wild, [caption], guidance=0.0)) for caption in ("a fox", "two hearts"))
    assert np.array_equal(first, second)
    first, second = (pixels(drawn(wild, [caption])) for caption in ("a fox", "two hearts"))
    assert not np.array_equal(first, second)


def test_a_negative_prompt_that_is_the_prompt_leaves_nothing_to_overshoot(wild):
    plain = wild.from_captions(["a fox"], [0], Sampling(steps=2, sampler="euler", prior_steps=1, guidance=1.0))
    how = Sampling(steps=2, sampler="euler", prior_steps=1, guidance=7.0, negative="a fox")
    assert near(pixels(wild.from_captions(["a fox"], [0], how)), pixels(plain))


def test_of_several_candidates_the_one_nearest_to_the_caption_by_clip_is_kept(wild):
    chosen = drawn(wild, ["a fox"] * 4, candidates=4)
    first = drawn(wild, ["a fox"] * 4)
    wanted = wild.clip.encode_text(["a fox"])[0]
    nearness = [wild.seen([one.picture for one in made]) @ wanted for made in (chosen, first)]
    assert (nearness[0] >= nearness[1] - 1e-6).all() and (nearness[0] > nearness[1] + 1e-4).any()
    how = Sampling(steps=2, sampler="euler", prior_steps=1)
    row, text, streams = (
        wild.image_embeddings(["a fox"], [5], how),
        ["a fox"],
        [1, *(CANDIDATES + n for n in (1, 2, 3))],
    )
    noise = [SampleNoise([5], (3, 8, 8), stream=s) for s in streams]
    denoise, guess = wild.denoise(row, text, how), wild.guess(row)
    each = [sample("euler", denoise, how.sigmas(), one, start=guess + how.sigma_max * one()) for one in noise]
    best = max(each, key=lambda x0: float(wild.seen([Image.fromarray(to_pixels(x0)[0])])[0] @ wanted))
    assert np.array_equal(np.asarray(chosen[0].picture), to_pixels(best)[0])


def test_what_clip_sees_in_tensors_is_what_it_sees_in_pictures(generator):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in values]
    assert torch.allclose(look(generator.clip, values / 127.5 - 1), generator.seen(pictures), atol=1e-5)


def test_a_walk_can_begin_at_a_noisy_picture(wild):
    rows, how = torch.from_numpy(tiny.unit_rows(2, 32)), Sampling(steps=3)
    whole = wild.walk(rows, None, [3, 4], how)
    noise = SampleNoise([3, 4], (3, 8, 8), stream=1)()
    start = wild.guess(rows) + how.sigma_max * noise  # around nothing, pictures would come out greyer
    assert torch.equal(wild.walk(rows, None, [3, 4], how, start=start, sigma=how.sigma_max), whole)
    x0 = torch.linspace(-0.8, 0.8, 384).view(2, 3, 8, 8)
    near_by = wild.walk(rows, None, [3, 4], how, start=x0 + 0.02 * noise, sigma=0.02)
    assert (near_by - x0).abs().mean() < 0.1 and (whole - x0).abs().mean() > 0.3
    with pytest.raises(UserError, match="begins above sigma_min"):
        wild.walk(rows, None, [3, 4], how, start=x0, sigma=0.001)


def test_something_can_be_put_around_the_guided_denoise(wild):
    known = torch.linspace(-0.8, 0.8, 192).view(1, 3, 8, 8)
    kept = wild.walk(torch.from_numpy(tiny.unit_rows(1, 32)), None, [3], around=lambda denoise: lambda x, sigma: known)
    assert torch.allclose(kept, known, atol=1e-6)


def test_a_picture_is_the_same_alone_and_among_sixteen(wild):
    rows, seeds = tiny.unit_rows(16, 32), range(100, 116)
    many = wild.from_embeddings(rows, seeds, QUICK)
    alone = [wild.from_embeddings(rows[i : i + 1], [seeds[i]], QUICK, batch_size=1)[0] for i in (0, 7, 15)]
    assert near(pixels([many[i] for i in (0, 7, 15)]), pixels(alone))


def test_the_same_seed_twice_on_a_cpu_is_the_same_picture_to_the_bit(wild):
    rows = torch.from_numpy(tiny.unit_rows(3, 32))
    assert torch.equal(wild.walk(rows, None, [1, 2, 3], QUICK), wild.walk(rows, None, [1, 2, 3], QUICK))


def test_noise_on_the_embedding_is_for_decoders_that_were_trained_with_it(wild):
    with pytest.raises(UserError, match=r"image_noise 0.5 is more than .*\(noise_image=0\)"):
        drawn(wild, image_noise=0.5)
    torch.manual_seed(0)
    decoder = DecoderDenoiser(replace(wild.decoder.config, noise_image=1.0)).eval()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.12)
    noisy = Generator(wild.clip, wild.prior, decoder)
    plain, told = drawn(noisy), drawn(noisy, image_noise=0.5)
    assert not np.array_equal(pixels(plain)[0], pixels(told)[0])
    assert near(
        pixels(told)[1:], pixels(noisy.from_captions(CAPTIONS[1:2], [6], Sampling(**told[1].provenance["sampling"])))
    )


def test_an_upsampler_makes_every_picture_larger_and_is_part_of_its_record(wild):
    upsampler = UpsamplerDenoiser(UpsamplerConfig(embed_dim=32, crop=16, widths=(16,), blocks=(1,))).eval()
    prints = {**wild.fingerprints, "upsampler": "sha256:large"}
    both = Generator(wild.clip, wild.prior, wild.decoder, upsampler=upsampler, fingerprints=prints)
    (large,), (small,) = drawn(both, ["a fox"], upsample_steps=2), drawn(wild, ["a fox"], upsample_steps=2)
    assert large.picture.size == (32, 32) and large.provenance["size"] == [32, 32]
    assert large.provenance["fingerprints"]["upsampler"] == "sha256:large"
    assert np.array_equal(pixels([both.regenerate(large.provenance)]), pixels([large]))
    assert np.array_equal(pixels([both.regenerate(small.provenance)]), pixels([small]))  # made without it
    with pytest.raises(UserError, match="made with upsampler"):
        wild.regenerate(large.provenance)
    told = both.finished(
        torch.zeros(1, 3, 8, 8), [{"caption": "a fox"}], [5], Sampling(prior_steps=1, upsample_steps=2)
    )
    assert told[0].picture.size == (32, 32)  # the embedding is found from the caption


def test_a_copy_check_leaves_the_nearest_training_picture_in_the_record(wild):
    made = drawn(wild)
    checked = copy.copy(wild)
    checked.copies = CopyCheck.fit(np.concatenate([wild.seen([made[1].picture]).numpy(), tiny.unit_rows(40, 32)]))
    first, second = (one.provenance["nearest"] for one in drawn(checked))
    assert second["key"] == "0" and second["cosine"] > 0.999 and second["is_copy"] is True
    assert first["cosine"] < second["cosine"] and set(first) >= {"key", "cosine", "is_copy"}
    assert "nearest" not in made[0].provenance


def test_records_of_before_can_still_be_made_again(wild):
    now = drawn(wild, ["a fox"], sampler="heun")[0]
    old = {key: value for key, value in now.provenance["sampling"].items() if key in OLD_SETTINGS}
    again = wild.regenerate(now.provenance | {"sampling": old})
    assert np.array_equal(pixels([again]), pixels([now])) and again.provenance == now.provenance


OLD_SETTINGS = (
    "steps", "sampler", "eta", "guidance", "guidance_from", "guidance_to", "clamp", "prior_steps", "prior_candidates",
    "prior_guidance", "grid", "sigma_min", "sigma_max", "precision",
)  # fmt: skip


def test_a_compiled_decoder_fills_batches_up_and_gives_its_pictures_away(wild, monkeypatch):
    shapes, buffer = [], torch.zeros(64, 3, 8, 8)

    def compiler(module, **options):
        def translated(x, sigma, cond):  # like a CUDA graph, it writes every answer to the same place
            shapes.append(len(x))
            buffer[: len(x)] = module(x, sigma, cond)
            return buffer[: len(x)]

        return translated

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = Generator(wild.clip, wild.prior, wild.decoder, compile=True)
    for captions in (CAPTIONS[:4], CAPTIONS[:3], CAPTIONS[:1]):
        made = drawn(compiled, captions, sampler="heun", steps=3)
        assert near(pixels(made), pixels(drawn(wild, captions, sampler="heun", steps=3)))
    assert shapes == [8] * 5 + [8] * 5 + [2] * 5  # two for each picture


def test_a_baseline_can_stand_for_the_prior(house):
    generator = Generator.open(house / "decoder", "knn", embeddings=house / "emb")
    (made,) = generator.from_captions(["one of many"], how=QUICK)
    assert {"clip", "prior", "decoder"} == set(made.provenance["fingerprints"])
    assert np.array_equal(pixels([generator.regenerate(made.provenance)]), pixels([made]))


def test_the_training_pictures_embeddings_are_opened_for_the_copy_check(house, monkeypatch):
    opened = SimpleNamespace(refuse_other_clip=lambda fingerprint: opened.__dict__.update(clip=fingerprint))
    monkeypatch.setattr(CopyCheck, "open", lambda folder: opened)  # six pictures are too few to say what a copy is
    generator = Generator.open(house / "decoder", copies=house / "emb")
    assert generator.copies is opened and opened.clip == generator.clip.fingerprint


def test_a_weaker_decoder_guides_only_what_it_fits(house, tmp_path):
    generator = Generator.open(house / "decoder", house / "prior", guide=house / "decoder")
    (made,) = generator.from_captions(["a"], how=Sampling(steps=2, autoguidance=2.0))
    assert made.provenance["fingerprints"]["guide"] == made.provenance["fingerprints"]["decoder"]
    large = replace(DECODER, image_size=16)
    train_decoder(house / "shards", house / "clip", tmp_path / "large", large, FEW, device="cpu")
    with pytest.raises(UserError, match="draws 16 px and .* 8 px"):
        Generator.open(house / "decoder", house / "prior", guide=tmp_path / "large")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"autoguidance": 2.0}, "--guide"),
        ({"text_guidance": 2.0}, "needs captions"),
        ({"negative": "fox"}, "--prior"),
        ({"candidates": 2}, "--clip"),
        ({"clip_guidance": 0.1}, "--clip"),
    ],
)
def test_guidance_that_the_models_cannot_give_is_refused_before_anything_is_drawn(generator, setting, message):
    bare = Generator(None, None, generator.decoder)
    with pytest.raises(UserError, match=message):
        bare.from_embeddings(tiny.unit_rows(1, 32), how=Sampling(**setting))


def test_an_interval_without_sigmas_and_more_noise_than_the_upsampler_knows_are_refused(wild):
    with pytest.raises(UserError, match="guidance_from 2.0 must be below"):
        Sampling(guidance_from=2.0, guidance_to=1.0)
    upsampler = UpsamplerDenoiser(UpsamplerConfig(embed_dim=32, crop=16, widths=(16,), blocks=(1,))).eval()
    with pytest.raises(UserError, match=r"upsample_noise 0.5 is more than .*\(noise=0.3\)"):
        drawn(Generator(wild.clip, wild.prior, wild.decoder, upsampler=upsampler), upsample_noise=0.5)


@pytest.mark.parametrize("setting", ["guidance", "text_guidance", "self_attention", "clip_guidance", "rescale", "eta"])
def test_settings_out_of_their_range_are_refused(setting):
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"{setting} {value}"):
            Sampling(**{setting: value})


@pytest.mark.parametrize("sampler", ["heun", "ddim", "ddpm"])
def test_the_same_seed_gives_the_same_picture_at_any_batch_size(generator, sampler):
    how = Sampling(steps=3, prior_steps=2, sampler=sampler, eta=0.5)
    seeds = [5, 6, 7, 8]
    together = pixels(generator.from_captions(CAPTIONS, seeds, how))
    alone = pixels(generator.from_captions(CAPTIONS, seeds, how, batch_size=1))
    assert near(together, alone)
    assert np.abs(together[0] - together[3]).max() > 10  # one caption, two seeds


def test_guidance_steps_sampler_grid_and_precision_change_the_picture(generator):
    base = pixels(generator.from_captions(CAPTIONS[:1], [1], QUICK))
    for change in ({"guidance": 50.0}, {"steps": 5}, {"sampler": "ddpm"}, {"grid": "flow"}, {"precision": "bf16"}):
        other = pixels(generator.from_captions(CAPTIONS[:1], [1], Sampling(**{"steps": 3, "prior_steps": 2} | change)))
        assert not np.array_equal(base[0], other[0]), change


def test_steps_and_guidance_of_the_prior_change_the_embedding(generator):
    lively = copy.copy(generator)
    lively.prior = copy.deepcopy(generator.prior)
    torch.manual_seed(0)
    for weight in lively.prior.parameters():  # three steps of training leave its silent layers all but silent
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    base, steps, guided = (
        lively.image_embeddings(CAPTIONS[:1], [1], Sampling(prior_steps=s, prior_guidance=g))
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
    assert record["caption"] == CAPTIONS[2] and record["seed"] == 41 and record["sampling"]["sampler"] == "dpmpp_2m"
    assert set(record["fingerprints"]) == {"clip", "prior", "decoder"}
    prompt, settings = info["parameters"].split("\n")
    assert prompt == CAPTIONS[2]
    assert settings.startswith("Steps: 3, Sampler: Dpmpp_2m, CFG scale: 2.0, Seed: 41, Size: 8x8, Model hash: ")


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
    assert seen["tokens"].shape == (4, 16) and seen["tokens"].dtype == torch.int64


def test_the_house_can_be_evaluated_and_other_clips_embeddings_are_refused(house, tmp_path):
    told = evaluate_prior_folder(house / "emb", house / "prior")
    table = told.figures
    assert told.sentence.startswith(f"{house / 'prior'}: trained on these very embeddings; best")
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
    with pytest.raises(UserError, match="there are: tiny, laptop, small"):
        settings(DECODER_PRESETS, "huge")


def test_captions_are_read_line_by_line(tmp_path):
    (tmp_path / "c.txt").write_text("a fox\n\n  größer \n", encoding="utf-8")
    assert read_captions(tmp_path / "c.txt") == ["a fox", "größer"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no captions"):
        read_captions(tmp_path / "empty.txt")
