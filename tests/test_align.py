from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from clip_train.model import Clip, preprocess_config
from diffusion.align import clip_features, misalignment

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_misalignment_is_0_where_features_point_alike_1_where_they_have_nothing_in_common_2_where_opposite():
    true = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    other = torch.zeros_like(true)
    other[:, 0], other[:, 1] = true[:, 1], -true[:, 0]
    for made, truth in ((7 * true, 0), (-true, 2), (other, 1)):
        assert misalignment(
            made, true * torch.tensor([1.0, 1, 0, 0])[:, None, None] if truth == 1 else true
        ).item() == (pytest.approx(truth, abs=1e-5))
    finer = true.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert misalignment(finer, true).item() == pytest.approx(0, abs=1e-5)


def test_the_features_of_a_convolutional_tower_are_what_its_embedding_is_pooled_from():
    config = {
        "embed_dim": 8,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    clip = Clip(config, preprocess_config(32)).eval()
    features = clip_features(clip, PIXELS)
    assert features.shape == (2, 512, 1, 1)
    pooled = F.normalize(clip.model.visual.head(features.mean((2, 3))), dim=1)
    assert torch.allclose(pooled, clip.encode_image(PIXELS), atol=1e-4)


def test_the_features_of_a_vision_transformer_are_its_patches_each_in_its_place(tmp_path: Path):
    clip = Clip.load(tiny.clip(tmp_path / "clip"))  # 16 pixels, patches of 8
    pixels = PIXELS[:, :, :16, :16]
    base = clip_features(clip, pixels)
    assert base.shape == (2, 32, 2, 2)
    changed = pixels.clone()
    changed[:, :, :8, 8:] = 255 - changed[:, :, :8, 8:]
    moved = (clip_features(clip, changed) - base).norm(dim=1)
    assert moved.flatten(1).argmax(1).tolist() == [1, 1]  # row 0, column 1


def test_pictures_of_another_size_are_scaled_to_the_clips(tmp_path: Path):
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    small = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.allclose(clip_features(clip, small), clip_features(clip, small.repeat(1, 1, 4, 4)), atol=1e-4)
