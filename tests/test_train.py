import dataclasses
import io
import tarfile

import numpy as np
import pytest
import tiny
import torch

from clip_train.evaluate import evaluate_clip
from clip_train.fit import FitConfig
from clip_train.folder import read_manifest
from clip_train.model import Clip, preprocess_config
from clip_train.pictures import Batches, Pictures
from clip_train.settings import UserError
from clip_train.shards import ShardSet, write_shards
from clip_train.train import PRESETS, CaptionedBatches, CaptionTable, ClipConfig, preset, train_clip

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


def test_every_caption_of_a_sample_comes_round_and_its_ids_say_what_is_right(tmp_path):
    samples = ShardSet(tiny.shards(tmp_path / "shards"))
    clip = Clip(CONFIG.model_config(), preprocess_config(16))
    table = CaptionTable(samples, clip)
    rows = np.array([3] * 200)
    drawn = table.pick(rows, np.random.default_rng(0).random(200))
    expected = clip.tokenize(["picture number 3", "one of many"])
    seen = {tuple(t.tolist()) for t in drawn["tokens"]}
    assert seen == {tuple(t.tolist()) for t in expected}
    # labels: samples 2i and 2i + 1 share one; the caption that all samples share has one id
    assert table.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(table.caption.unique()) == 11


def test_the_batch_of_a_step_is_the_same_whether_training_began_there_or_not(tmp_path):
    samples = ShardSet(tiny.shards(tmp_path / "shards"))
    clip = Clip(CONFIG.model_config(), preprocess_config(16))
    batches = CaptionedBatches(Batches(Pictures(samples, 16), 4, seed=1), CaptionTable(samples, clip), seed=1)
    from_start, from_five = batches(0), batches(5)
    for _ in range(5):
        next(from_start)
    one, other = next(from_start), next(from_five)
    assert one.keys() == {"pixels", "tokens", "caption", "group"}
    assert all(torch.equal(one[name], other[name]) for name in one)


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
