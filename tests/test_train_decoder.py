"""Training the decoder with all its levers on: text, noise on the embedding, alignment, a transformer."""

from dataclasses import replace

import crew
import pytest
import tiny
import torch

from clip_train.fit import FitConfig
from clip_train.model import Clip
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from diffusion.decoder import DecoderConfig
from diffusion.train_decoder import DECODER_PRESETS, settings_from, train_decoder
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


def test_training_goes_on_from_another_decoders_weights(house, tmp_path):
    made = house / "shards", house / "clip"
    first = train_decoder(*made, tmp_path / "first", EVERYTHING, FIT, device="cpu")
    config, fit_config = settings_from(tmp_path / "first", "tiny", ["steps=1", "minutes=0", "lr=1e-9", "dropout=0.1"])
    assert config == replace(load_decoder(tmp_path / "first")[0].config, dropout=0.1)
    same = replace(FIT, steps=1, lr=1e-9)
    more = train_decoder(*made, tmp_path / "more", config, same, init=tmp_path / "first", device="cpu")
    assert more.inputs["init"]["fingerprint"] == first.fingerprint
    one, other = weights(tmp_path / "first"), weights(tmp_path / "more")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    plain = replace(config, align=0.0, align_width=0)
    train_decoder(*made, tmp_path / "plain", plain, same, init=tmp_path / "first", device="cpu")
    again = replace(config, align=0.5, align_width=0)
    train_decoder(*made, tmp_path / "aligned", again, same, init=tmp_path / "plain", device="cpu")
    assert torch.allclose(weights(tmp_path / "aligned")["network.enter.weight"], one["network.enter.weight"], atol=1e-6)


def test_what_does_not_fit_an_init_is_refused_in_one_line(house, tmp_path):
    train_decoder(house / "shards", house / "clip", tmp_path / "first", EVERYTHING, FIT, device="cpu")
    config = load_decoder(tmp_path / "first")[0].config
    tiny.clip(tmp_path / "other", seed=1)
    for clip, changed, said in (
        (tmp_path / "other", config, "another CLIP"),
        (house / "clip", replace(config, widths=(16, 64)), "the config needs"),
    ):
        with pytest.raises(UserError, match=said):
            train_decoder(house / "shards", clip, tmp_path / "d", changed, FIT, init=tmp_path / "first", device="cpu")
    with pytest.raises(UserError, match="no preset 'huge'"):
        settings_from(tmp_path / "first", "huge")
