import dataclasses
import json

import pytest
import torch
from torch import nn

from clip_train import estimate as module
from clip_train.estimate import count_flops, count_parameters, estimate, matmul_rate, render
from clip_train.fit import FitConfig
from clip_train.model import Clip, preprocess_config
from clip_train.presets import PRESETS
from clip_train.settings import UserError
from clip_train.train import ClipConfig

CONFIG = ClipConfig(
    vision={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    image_size=32,
    embed_dim=24,
    text_width=32,
    text_layers=2,
    text_heads=2,
    context_length=16,
    augment=0.2,
)
FIT = FitConfig(steps=300, batch_size=16, precision="fp32", ema=0.9)


def made(config=CONFIG):
    torch.manual_seed(0)
    return Clip(config.model_config(), preprocess_config(config.image_size))


def estimated(clip=None, config=CONFIG, fit_config=FIT, seconds=1.0, **options):
    return estimate(clip or made(config), config, fit_config, "cpu", seconds=seconds, **options)


@pytest.fixture(scope="module")
def plain():
    """The estimate of CONFIG and FIT."""
    return estimated(pairs=1000, peak=100)


@pytest.mark.parametrize("name, image, text", [("vit-b-32", 8.82, 5.96), ("vit-b-16", 35.13, 5.96)])
def test_flops_are_those_of_open_clips_table(name, image, text):
    config = PRESETS[name].clip
    with torch.device("meta"):
        clip = Clip(config.model_config(), preprocess_config(224))
    found = count_flops(clip)
    assert found["image"] / 1e9 == pytest.approx(image, abs=0.006)
    assert found["text"] / 1e9 == pytest.approx(text, abs=0.006)


def transformer_flops(tokens, width, layers):
    """12 w^2 multiplications and additions a token for the matrices, 2 T w for attention; twice that many FLOPs."""
    return 2 * layers * tokens * (12 * width**2 + 2 * tokens * width)


def test_flops_of_a_small_model_are_those_of_the_formula():
    found = count_flops(made())
    patches = 16 * 8 * 8 * 3 * 32 * 2
    assert found["image"] == pytest.approx(patches + transformer_flops(17, 32, 2) + 2 * 32 * 24, rel=0.01)
    assert found["text"] == pytest.approx(transformer_flops(16, 32, 2) + 2 * 32 * 24, rel=0.01)


def test_towers_share_all_parameters_and_what_is_locked_counts_as_frozen():
    clip = made()
    clip.lock("image")
    image, text = count_parameters(clip, "image"), count_parameters(clip, "text")
    assert image["trainable"] == 0 and text["frozen"] == 0
    assert image["frozen"] == sum(p.numel() for p in clip.model.visual.parameters())
    assert image["frozen"] + text["trainable"] + 1 == sum(p.numel() for p in clip.parameters())  # 1: temperature
    found = estimated(clip)
    assert found["flops"]["train"] == found["flops"]["image"] + 3 * found["flops"]["text"]
    assert found["memory"]["adamw"] == 2 * found["memory"]["gradients"] == 8 * (text["trainable"] + 1)


def test_what_a_step_needs_beyond_the_weights_is_counted_in_bytes(plain):
    weight = nn.Linear(64, 32)
    with module._saved({p.untyped_storage().data_ptr() for p in weight.parameters()}) as total:
        torch.relu(weight(torch.randn(10, 64)))
    assert total[0] == 4 * (10 * 64 + 10 * 32)  # the layer's input and relu's output; the weights not again
    found = plain["memory"]
    state = sum(4 * t.numel() for t in made().state_dict().values())
    assert found["weights"] == found["ema"] == state
    assert found["total"] == pytest.approx(
        sum(found[n] for n in ("weights", "gradients", "adamw", "ema", "activations", "loss"))
    )
    twice = estimated(fit_config=dataclasses.replace(FIT, batch_size=32))["memory"]
    assert twice["activations"] - found["activations"] == pytest.approx(16 * found["activations_per_pair"])
    assert twice["loss"] == pytest.approx(4 * found["loss"])


def test_parts_need_less_memory_and_a_second_forward_pass(plain):
    whole = plain
    parts = estimated(fit_config=dataclasses.replace(FIT, accumulate=4))
    assert parts["memory"]["activations"] < 0.5 * whole["memory"]["activations"]
    assert parts["flops"]["executed"] == pytest.approx(4 / 3 * whole["flops"]["executed"], rel=0.05)
    assert parts["local_batch"] == 4 and parts["flops"]["train"] == whole["flops"]["train"]


def test_shorter_captions_take_fewer_flops(plain):
    long, short = plain, estimated(caption_tokens=5)
    assert (long["caption_tokens"], short["caption_tokens"]) == (16, 5)
    assert short["flops"]["executed"] < 0.8 * long["flops"]["executed"]
    assert short["flops"]["train"] == long["flops"]["train"]


def test_time_follows_from_a_measured_step_and_the_model_is_left_as_it_was():
    clip = made()
    before = {name: t.clone() for name, t in clip.state_dict().items()}
    found = estimated(clip, pairs=1000, peak=100)
    time = found["time"]
    assert time["measured_batch"] == 16 and time["hours"] == pytest.approx(300 * time["step"] / 3600)
    assert time["pairs_per_second"] == pytest.approx(16 / time["step"]) and time["epochs"] == 300 * 16 / 1000
    assert time["mfu"] == pytest.approx(time["pairs_per_second"] * found["flops"]["train"] / time["matmul"])
    assert 0 < time["mfu"] < 2
    assert time["elsewhere"]["pairs_per_second"] == pytest.approx(40e12 / found["flops"]["train"])
    assert all(torch.equal(before[name], t) for name, t in clip.state_dict().items())
    assert all(p.grad is None for p in clip.parameters())


def test_minutes_become_the_steps_that_fit():
    time = estimated(fit_config=dataclasses.replace(FIT, steps=0, minutes=3.0), peak=100)["time"]
    assert time["steps"] == max(1, int(180 / time["step"])) and time["elsewhere"]["hours"] is None


def test_a_clusters_batch_is_extrapolated_and_never_allocated():
    huge = dataclasses.replace(FIT, batch_size=1 << 22, steps=1000)
    found = estimated(fit_config=huge, seconds=0.2)
    assert found["time"]["measured_batch"] < 1 << 20 and found["memory"]["total"] > 1e12
    text = render(found)
    assert f"extrapolated from {found['time']['measured_batch']} pairs" in text
    assert "use more devices or a smaller batch" in text  # what the loss compares does not fit, whatever the parts
    spread = estimated(fit_config=dataclasses.replace(huge, batch_size=1 << 20), ranks=1 << 10, seconds=0.2)
    assert spread["local_batch"] == 1 << 10
    with pytest.raises(UserError, match="batch_size 16 is too small for 32 devices"):
        estimated(ranks=32)


def test_siglip_and_a_convolutional_tower_are_estimated_too():
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    config = dataclasses.replace(CONFIG, vision=vision, loss="siglip", image_size=32)
    clip = made(config)
    statistics = {name: t.clone() for name, t in clip.state_dict().items() if "running" in name}
    found = estimated(clip, config)
    assert found["flops"]["executed"] > 0 and found["time"]["step"] > 0
    assert statistics and all(torch.equal(t, clip.state_dict()[name]) for name, t in statistics.items())


def test_the_table_is_aligned_and_names_every_setting(plain):
    text = render(json.loads(json.dumps(plain)))
    lines = text.splitlines()
    for name in ("clip.image_size", "clip.vision", "fit.batch_size", "image tower", "memory: adamw", "speed", "time"):
        assert any(line.startswith(name) for line in lines)
    starts = {line.index(word) for line in lines for word in ("parameters", "pairs/s") if word in line.split("  ")[1:2]}
    assert len(starts) <= 1
    assert "4.8 epochs" in text and "measured, on cpu in fp32" in text


def test_sizes_and_times_are_written_for_people():
    assert [module._si(v, "B") for v in (0, 999, 1234567, 1.15e12)] == ["0 B", "999 B", "1.23 MB", "1.15 TB"]
    assert [module._duration(h) for h in (0.5, 3.25, 500)] == ["30 min", "3.25 h", "20.8 days"]


def test_matrix_products_are_timed():
    assert matmul_rate(torch.device("cpu"), "fp32") > 1e9
