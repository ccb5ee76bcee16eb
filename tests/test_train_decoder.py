"""Training the decoder with all its levers on: text, noise on the embedding, alignment, a transformer."""

from dataclasses import replace

import crew
import pytest
import tiny
import torch

from clip_train.fit import FitConfig
from clip_train.model import Clip
from clip_train.shards import ShardSet
from diffusion.decoder import DecoderConfig
from diffusion.train_decoder import DECODER_PRESETS, train_decoder
from diffusion.trained import load_decoder, settings

EVERYTHING = DecoderConfig(
    image_size=8,
    network="uvit",
    widths=(16, 32),
    blocks=(1, 1),
    attention=(),
    head_width=16,
    cond_width=32,
    text=True,
    noise_image=0.3,
    align=0.5,
    weighting="min_snr",
)
FIT = FitConfig(steps=5, batch_size=4, ema=0.5, precision="fp32", save_every=0.0, log_every=1)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    tiny.shards(root / "shards")
    tiny.clip(root / "clip")
    return root


def weights(folder):
    return load_decoder(folder)[0].state_dict()


def test_a_decoder_killed_and_resumed_equals_one_trained_unbroken(house):
    class Killed(Exception):
        pass

    def kill(done, total, **numbers):
        if "loss" in numbers and done == 3:
            raise Killed

    made = house / "shards", house / "clip"
    train_decoder(*made, house / "unbroken", EVERYTHING, FIT, device="cpu")
    with pytest.raises(Killed):
        train_decoder(*made, house / "broken", EVERYTHING, FIT, device="cpu", on_progress=kill)
    train_decoder(*made, house / "broken", EVERYTHING, FIT, device="cpu")
    one, other = weights(house / "unbroken"), weights(house / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["network.wiener.axes"].norm() > 1 and one["features.0.weight"].any()
    log = (house / "unbroken" / "metrics.jsonl").read_text()
    assert log.count("misalignment") == 5


def test_states_of_stored_tokens_are_those_of_the_captions(house):
    clip, captions = Clip.load(house / "clip"), ["picture number 3", "one"]
    states, real = clip.text_states(clip.tokenize(captions))
    known, kept = clip.text_states(captions)
    assert torch.equal(states, known) and torch.equal(real, kept)


def test_each_picture_is_trained_with_a_caption_of_its_own(house, monkeypatch, tmp_path):
    seen = []

    def fit_twice(model, batches, loss, config, folder, **rest):
        stream = batches(0)
        seen.extend(next(stream) for _ in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusion.train_decoder.fit", fit_twice)
    with pytest.raises(KeyboardInterrupt):
        train_decoder(house / "shards", house / "clip", tmp_path / "d", EVERYTHING, FIT, device="cpu")
    clip, samples = Clip.load(house / "clip"), ShardSet(str(house / "shards"))
    for batch in seen:
        for row, tokens in zip(batch["row"].tolist(), batch["tokens"], strict=True):
            assert tokens.tolist() in clip.tokenize(samples.captions(row)).tolist()


def train_on_ranks(folder):
    for parallel in ("ddp", "fsdp"):
        config = replace(FIT, parallel=parallel, save_every=60.0)
        train_decoder(folder / "shards", folder / "clip", folder / parallel, EVERYTHING, config, device="cpu")


def test_two_ranks_train_the_same_decoder_whole_or_in_parts(house):
    crew.run(2, train_on_ranks, house)
    whole, parts = weights(house / "ddp"), weights(house / "fsdp")
    assert all(torch.allclose(whole[name], parts[name], atol=1e-4) for name in whole)


@pytest.mark.parametrize("preset", DECODER_PRESETS)
def test_a_preset_can_be_built_from_the_command_line(preset):
    config, fit_config = settings(DECODER_PRESETS, preset, ["steps=2", "minutes=0"])
    assert fit_config.steps == 2 and config.image_size in (32, 64)
