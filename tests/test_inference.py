import copy

import pytest
import torch
import torch.nn.functional as F
from test_towers import CAPTIONS, KNOWN, SIZE, UNKNOWN, config, pair
from torch import nn

from clip_train import inference, precision
from clip_train.lora import add_lora
from clip_train.model import Clip, preprocess_config
from clip_train.settings import UserError


@pytest.fixture(autouse=True)
def bf16_is_native(monkeypatch):
    """What "auto" comes to must not depend on the machine that runs the tests."""
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: True)


def ready(cfg):
    """A CLIP, open_clip's rows for some pictures and captions, and these pictures."""
    clip, theirs, pixels, tokens = pair(cfg)
    clip.eval().requires_grad_(False)
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image((pixels - clip.mean) / clip.std, normalize=True).float()
        text = theirs.encode_text(tokens, normalize=True).float()
    return clip, image, text, pixels


@pytest.mark.parametrize("cfg", KNOWN.values(), ids=KNOWN)
def test_in_bf16_every_known_tower_keeps_within_a_ten_thousandth_of_open_clips_fp32(cfg):
    clip, image, text, pixels = ready(cfg)
    made = clip.for_inference("auto")
    assert made.precision == {"image": "bf16", "text": "bf16"}
    for found, wanted in ((made.encode_image(pixels), image), (made.encode_text(CAPTIONS), text)):
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found, wanted).min() >= 0.9999
        assert not torch.equal(found, wanted)  # it is bf16


@pytest.mark.parametrize("cfg", [cfg for cfg, _ in UNKNOWN.values()], ids=UNKNOWN)
def test_towers_of_other_kinds_are_computed_too_and_fp32_is_open_clips(cfg):
    clip, image, text, pixels = ready(cfg)
    exact, short = clip.for_inference("fp32"), clip.for_inference("auto")
    assert torch.allclose(exact.encode_image(pixels), image, atol=2e-5)
    assert torch.allclose(exact.encode_text(CAPTIONS), text, atol=2e-5)
    assert F.cosine_similarity(short.encode_image(pixels), image).min() >= 0.9998
    assert F.cosine_similarity(short.encode_text(CAPTIONS), text).min() >= 0.9999


def test_the_clip_itself_stays_as_it_is_and_the_copy_knows_what_it_knows():
    clip, image, _, pixels = ready(config())
    before = copy.deepcopy(clip.state_dict())
    made = clip.for_inference("bf16")
    assert all(torch.equal(clip.state_dict()[name], t) for name, t in before.items())
    assert torch.allclose(clip.encode_image(pixels), image, atol=1e-5)
    assert (made.embed_dim, made.image_size, made.fingerprint) == (clip.embed_dim, clip.image_size, clip.fingerprint)
    assert made.model.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert made.model.visual.proj.dtype == made.model.positional_embedding.dtype == torch.float32


def test_norms_are_folded_into_the_convolutions_before_them():
    clip = Clip(config({"timm_model_name": "resnet10t"}), preprocess_config(SIZE))
    for module in clip.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as training leaves them
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias), nn.init.uniform_(module.weight, 0.5, 2)
    clip.eval().requires_grad_(False)
    pixels = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    made = clip.for_inference("fp32")
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in one.modules()) for one in (clip, made)]
    assert norms[0] == 14 and norms[1] <= 2
    assert torch.allclose(made.encode_image(pixels), clip.encode_image(pixels), atol=1e-5)


class _Backwards(nn.Module):
    """A tower whose norm stands after its convolution and runs before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        nn.init.uniform_(self.norm.running_var, 2, 3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.conv(self.norm(x)).mean((2, 3)) @ torch.eye(3, 48)


def test_a_norm_that_runs_elsewhere_is_left_alone():
    clip = Clip(config(), preprocess_config(SIZE)).eval().requires_grad_(False)
    clip.model.visual, clip._quick_image = _Backwards().eval().requires_grad_(False), False
    pixels = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    made = clip.for_inference("fp32")
    assert isinstance(made.model.visual.norm, nn.BatchNorm2d)
    assert torch.allclose(made.encode_image(pixels), clip.encode_image(pixels), atol=1e-6)


def test_a_tower_whose_rows_would_move_stays_in_fp32_unless_bf16_is_asked_for():
    clip, *_ = ready(config())
    for weight in clip.model.visual.transformer.parameters():  # attention to one token each, chosen by a hair
        weight.mul_(5)
    made = clip.for_inference("auto")
    assert made.precision == {"image": "fp32", "text": "bf16"}
    pixels = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    assert torch.allclose(made.encode_image(pixels), clip.encode_image(pixels), atol=1e-5)
    asked = clip.for_inference("bf16")
    assert asked.precision == {"image": "bf16", "text": "bf16"}
    assert F.cosine_similarity(asked.encode_image(pixels), clip.encode_image(pixels)).min() < 0.9999
    assert clip.for_inference({"image": "bf16", "text": "fp32"}).precision == {"image": "bf16", "text": "fp32"}


def test_bf16_costs_more_on_a_cpu_without_it_so_auto_is_fp32_there(monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: False)
    assert ready(config())[0].for_inference("auto").precision == {"image": "fp32", "text": "fp32"}


def test_adapters_are_folded_in():
    clip, _, _, pixels = ready(config())
    add_lora(clip, rank=2)
    for name, weight in clip.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(weight, std=0.02)
    made = clip.for_inference("fp32")
    assert torch.allclose(made.encode_image(pixels), clip.encode_image(pixels), atol=1e-5)
    assert not any("parametrizations" in name for name, _ in made.named_parameters())


def test_pictures_are_encoded_in_pieces_that_fit_the_cache_and_rows_do_not_change():
    clip, image, _, pixels = ready(config())
    made = clip.for_inference("fp32")
    assert made.chunk == inference.CHUNK_BYTES // (2 * 17 * 256)
    made.chunk = 4
    assert torch.allclose(made.encode_image(pixels), image, atol=1e-5)


def test_a_compiled_clip_is_called_with_as_many_pictures_each_time(monkeypatch):
    clip, image, _, pixels = ready(config())
    made, seen = clip.for_inference("fp32"), []
    monkeypatch.setattr(torch, "compile", lambda work, dynamic: lambda some: seen.append(len(some)) or work(some))
    made.compile()
    assert torch.allclose(made.encode_image(pixels), image, atol=1e-5)
    assert torch.allclose(made.encode_image(pixels[:2]), image[:2], atol=1e-5)
    assert seen == [6, 6]


def test_fp16_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        ready(config())[0].for_inference("fp16")
