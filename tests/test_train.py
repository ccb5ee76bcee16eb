import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import tiny
import torch

from clip_train.evaluate import evaluate_clip
from clip_train.feed import Feed, open_sources
from clip_train.fit import FitConfig
from clip_train.folder import read_manifest
from clip_train.model import Clip, preprocess_config
from clip_train.pictures import Pictures
from clip_train.presets import PRESETS, preset
from clip_train.settings import UserError
from clip_train.shards import write_shards
from clip_train.train import ClipConfig, Kept, train_clip

VIT = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
CONFIG = ClipConfig(
    vision=VIT, image_size=16, embed_dim=32, text_width=32, text_layers=1, text_heads=2, context_length=16, augment=0.2
)
FIT = FitConfig(steps=6, batch_size=8, lr=3e-3, precision="fp32", log_every=1)


def weights(folder):
    return Clip.load(folder).model.state_dict()


def test_training_writes_a_clip_folder_that_says_what_it_is(tmp_path):
    tiny.shards(tmp_path / "shards")
    made = train_clip(tmp_path / "shards", tmp_path / "clip", CONFIG, FIT, device="cpu")
    assert made == read_manifest(tmp_path / "clip", "clip")
    assert (
        made.result["steps"] == 6 and made.result["pairs"] == 10 and made.result["chance"] == pytest.approx(np.log(8))
    )
    assert made.input_path("shards") == tmp_path / "shards"
    assert made.fingerprint.startswith("sha256:")
    assert Clip.load(tmp_path / "clip").embed_dim == 32


def test_clip_learns_to_tell_pictures_apart(tmp_path):
    one_caption = [dataclasses.replace(s, captions=s.captions[:1], meta={}) for s in tiny.samples(24)]
    write_shards(one_caption, tmp_path / "shards")
    config = dataclasses.replace(CONFIG, augment=0.0)
    longer = dataclasses.replace(FIT, steps=120, batch_size=24, lr=0.01)
    made = train_clip(tmp_path / "shards", tmp_path / "clip", config, longer, device="cpu")
    found = evaluate_clip(tmp_path / "shards", tmp_path / "clip")["text_to_image"]
    assert made.result["loss"] < 0.5 * made.result["chance"]
    assert found["chance"]["R@1"] == pytest.approx(1 / 24) and found["recall"]["R@1"] > 0.3


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_clip_killed_and_resumed_equals_clip_unbroken(tmp_path, averaging):
    class Killed(Exception):
        pass

    def die(done, total, **numbers):
        if "loss" in numbers and done == 4:
            raise Killed

    tiny.shards(tmp_path / "shards")
    schedule = dataclasses.replace(FIT, save_every=0.0, ema=averaging)
    train_clip(tmp_path / "shards", tmp_path / "whole", CONFIG, schedule, device="cpu")
    with pytest.raises(Killed):
        train_clip(tmp_path / "shards", tmp_path / "broken", CONFIG, schedule, device="cpu", on_progress=die)
    assert not (tmp_path / "broken").exists()
    train_clip(tmp_path / "shards", tmp_path / "broken", CONFIG, schedule, device="cpu")
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert read_manifest(tmp_path / "whole").fingerprint == read_manifest(tmp_path / "broken").fingerprint


def test_a_second_run_does_nothing_and_other_settings_or_shards_are_refused(tmp_path):
    tiny.shards(tmp_path / "shards"), tiny.shards(tmp_path / "more", 12)
    first = train_clip(tmp_path / "shards", tmp_path / "clip", CONFIG, FIT, device="cpu")

    def never(*_, **__):
        pytest.fail("ran")

    again = train_clip(tmp_path / "shards", tmp_path / "clip", CONFIG, FIT, device="cpu", on_progress=never)
    assert again == first
    with pytest.raises(UserError, match="augment = 0.2, but 0.5"):
        train_clip(tmp_path / "shards", tmp_path / "clip", dataclasses.replace(CONFIG, augment=0.5), FIT, device="cpu")
    with pytest.raises(UserError, match="other shards"):
        train_clip(tmp_path / "more", tmp_path / "clip", CONFIG, FIT, device="cpu")


def test_a_caption_of_ten_thousand_characters_and_a_corrupt_picture_do_not_stop_training(tmp_path):
    samples = tiny.samples(10)
    samples[2] = dataclasses.replace(samples[2], captions=["word " * 2000])
    write_shards(samples, tmp_path / "shards")
    tar = next((tmp_path / "shards").glob("*.tar"))
    data = tar.read_bytes()
    tar.write_bytes(data.replace(samples[4].image, b"x" * len(samples[4].image)))
    made = train_clip(tmp_path / "shards", tmp_path / "clip", CONFIG, FIT, device="cpu")
    assert made.result["bad_pictures"] == 1 and made.result["bad_first"][0][0] == "s004"


def test_shards_that_cannot_train_are_refused_before_anything_is_written(tmp_path):
    def tar(name, members):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as file:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return tmp_path / name

    whole = tar("whole", [(f"{s.key}.{e}", d) for s in tiny.samples(4) for e, d in (("png", s.image), ("txt", b"a"))])
    data = (whole / "0.tar").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "0.tar").write_bytes(data[: len(data) // 2])
    cases = {
        tmp_path / "missing": "missing",
        tar("empty", []): "no samples",
        tar("silent", [("a.png", tiny.picture(0))]): "caption",
        tmp_path / "cut": "cut short or damaged: only",
    }
    for folder, word in cases.items():
        with pytest.raises(UserError, match=word) as caught:
            train_clip(folder, tmp_path / "clip", CONFIG, FIT, device="cpu")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "clip.partial").exists()


def test_a_batch_smaller_than_two_pairs_is_refused(tmp_path):
    tiny.shards(tmp_path / "shards")
    with pytest.raises(UserError, match="fewer than 2 pairs to tell apart"):
        train_clip(tmp_path / "shards", tmp_path / "clip", CONFIG, dataclasses.replace(FIT, batch_size=1), device="cpu")


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_presets_build_and_make_512_wide_unit_rows(name):
    config, _ = preset(name)
    clip = Clip(config.model_config(), preprocess_config(config.image_size)).eval()
    rows = clip.encode_image(torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8))
    assert rows.shape == (2, 512) and torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)


def test_preset_takes_settings_for_model_and_schedule_alike():
    config, schedule = preset("tiny", ["augment=0.5", "lr=0.01"])
    assert (config.augment, schedule.lr) == (0.5, 0.01)
    assert PRESETS["tiny"].clip.augment != 0.5
    with pytest.raises(UserError, match="no preset"):
        preset("huge")


def one_step(**changes):
    return dataclasses.replace(FIT, **{"steps": 2, **changes})


def test_training_goes_on_from_given_weights_and_records_whose(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "base", CONFIG, FIT, device="cpu")
    tuned = dataclasses.replace(CONFIG, init=str(tmp_path / "base"), layer_decay=0.5)
    made = train_clip(tmp_path / "shards", tmp_path / "tuned", tuned, one_step(lr=1e-6), device="cpu")
    assert made.inputs["init"]["fingerprint"] == Clip.load(tmp_path / "base").fingerprint
    before, after = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert 0 < max(moved.values()) < 1e-5  # the steps are tiny, so it started where the base ended
    assert moved["visual.proj"] > 0


def test_a_locked_tower_stays_as_it_was_and_the_other_learns(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "base", CONFIG, FIT, device="cpu")
    tuned = dataclasses.replace(CONFIG, init=str(tmp_path / "base"), lock="image")
    train_clip(tmp_path / "shards", tmp_path / "tuned", tuned, FIT, device="cpu")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("visual."))
    assert not torch.equal(before["text_projection"], after["text_projection"])


def test_low_rank_training_leaves_a_plain_clip_whose_matrices_moved_by_that_rank(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "base", CONFIG, FIT, device="cpu")
    tuned = dataclasses.replace(CONFIG, init=str(tmp_path / "base"), lora_rank=2)
    train_clip(tmp_path / "shards", tmp_path / "tuned", tuned, dataclasses.replace(FIT, ema=0.5), device="cpu")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    assert before.keys() == after.keys()
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    change = torch.linalg.svdvals((after[name] - before[name]).double())
    assert change[0] > 1e-5 and change[2] < 1e-3 * change[0]


@pytest.mark.parametrize("changes", [{"loss": "siglip"}, {"patch_dropout": 0.5}, {"checkpointing": True}])
def test_ways_to_train_give_a_folder_that_loads(tmp_path, changes):
    tiny.shards(tmp_path / "shards")
    made = train_clip(tmp_path / "shards", tmp_path / "clip", dataclasses.replace(CONFIG, **changes), FIT, device="cpu")
    assert np.isfinite(made.result["loss"]) and made.result["chance"] > 0
    assert Clip.load(tmp_path / "clip").encode_text(["a"]).shape == (1, 32)
    assert hasattr(Clip.load(tmp_path / "clip").model, "logit_bias") and (
        (Clip.load(tmp_path / "clip").model.logit_bias is not None) == (changes.get("loss") == "siglip")
    )


def test_a_teacher_is_imitated(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "teacher", CONFIG, FIT, device="cpu")
    student = dataclasses.replace(CONFIG, teacher=str(tmp_path / "teacher"), distill=1.0, augment=0.0)
    longer = dataclasses.replace(FIT, steps=60, lr=1e-2)
    made = train_clip(tmp_path / "shards", tmp_path / "student", student, longer, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert "teacher" in made.inputs
    assert lines[-1]["distill"] < lines[0]["distill"]


def test_validation_is_logged_and_drawn_and_changes_nothing(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "plain", CONFIG, FIT, device="cpu")
    checked = dataclasses.replace(FIT, validate_every=3)
    made = train_clip(
        tmp_path / "shards", tmp_path / "clip", CONFIG, checked, kept=Kept(shards=tmp_path / "shards"), device="cpu"
    )
    lines = [json.loads(line) for line in (tmp_path / "clip" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_t2i_R@1" in line] == [3, 6]
    assert 0 <= made.result["validation"]["val_t2i_R@10"] <= 1
    assert (tmp_path / "clip" / "curves.png").stat().st_size > 10_000
    assert sum("gap" in line for line in lines) == 1  # the watcher looked once, at the first step
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "clip")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sources_are_mixed_in_the_shares_asked_for(tmp_path):
    tiny.shards(tmp_path / "a")
    other = [dataclasses.replace(s, key=f"b{n}", image=tiny.picture(100 + n)) for n, s in enumerate(tiny.samples(8))]
    write_shards(other, tmp_path / "b")
    sources = open_sources([tmp_path / "a", tmp_path / "b"], [3, 1])
    clip = Clip(CONFIG.model_config(), preprocess_config(16))
    feed = Feed(sources, clip, tmp_path, batch_size=8, seed=0, weights=[3, 1])
    firsts = {row.numpy().tobytes() for row in Pictures(sources[0].samples, 16, fast=True).pixels(range(10))}
    batch = next(feed(5))
    assert sum(pixels.numpy().tobytes() in firsts for pixels in batch["pixels"]) == 6
    made = train_clip([tmp_path / "a", tmp_path / "b"], tmp_path / "clip", CONFIG, FIT, weights=[3, 1], device="cpu")
    assert made.config["mix"] == [3, 1] and made.result["pairs"] == 18
    with pytest.raises(UserError, match="a weight above 0 for each of the 2"):
        open_sources([tmp_path / "a", tmp_path / "b"], [3])


def test_remote_shards_are_streamed(tmp_path):
    tiny.shards(tmp_path / "shards")
    names = sorted((tmp_path / "shards").glob("*.tar"))
    spec = "::".join(f"pipe:cat {name}" for name in names)
    made = train_clip(spec, tmp_path / "clip", CONFIG, FIT, device="cpu")
    assert made.result["pairs"] is None and made.result["steps"] == 6


def test_settings_that_contradict_each_other_are_refused():
    for changes, said in (
        ({"lock": "image"}, "needs one worth keeping: --init"),
        ({"lora_rank": 4}, "so it needs some: --init"),
        ({"loss": "hinge"}, "must be infonce or siglip"),
        ({"layer_decay": 1.5}, "must be in"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(CONFIG, **changes)


def test_given_weights_are_trained_gently_unless_told_otherwise():
    config, fit = preset("tiny", ["init=somewhere"])
    assert (fit.lr, fit.weight_decay, config.smoothing) == (1e-5, 0.1, 0)
    assert preset("tiny", ["init=somewhere", "lora_rank=8"])[1].lr == 1e-4
    assert preset("tiny", ["lr=0.5", "init=somewhere"])[1].lr == 0.5
    assert preset("tiny", ["loss=siglip"])[0].smoothing == 0
    with pytest.raises(UserError, match="image_size=64 does not go with init: somewhere has its own"):
        preset("tiny", ["init=somewhere", "image_size=64"])


def test_the_manifest_names_the_sizes_of_the_model_that_was_given(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "base", CONFIG, FIT, device="cpu")
    tuned = dataclasses.replace(PRESETS["tiny"].clip, init=str(tmp_path / "base"))
    made = train_clip(tmp_path / "shards", tmp_path / "tuned", tuned, FIT, device="cpu")
    assert (made.config["image_size"], made.config["text_width"], made.config["context_length"]) == (16, 32, 16)


def test_a_locked_tower_gets_no_low_rank_changes_either(tmp_path):
    tiny.shards(tmp_path / "shards")
    train_clip(tmp_path / "shards", tmp_path / "base", CONFIG, FIT, device="cpu")
    tuned = dataclasses.replace(CONFIG, init=str(tmp_path / "base"), lock="image", lora_rank=2)
    train_clip(tmp_path / "shards", tmp_path / "tuned", tuned, FIT, device="cpu")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("visual."))
    assert not torch.equal(
        before["transformer.resblocks.0.mlp.c_fc.weight"], after["transformer.resblocks.0.mlp.c_fc.weight"]
    )
