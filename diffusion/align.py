"""Alignment of the decoder's hidden states to what the CLIP itself sees where (REPA, arXiv 2410.06940, eq. 8).

A second loss while training, and nothing afterwards: cells half way through the network, through a small MLP, are to
point where the CLIP's features of the clean picture point. The CLIP is the user's own, so no other weights are needed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.model import Clip
from clip_train.settings import UserError
from diffusion.denoiser import Cond


class Watched:
    """A decoder in training, for denoising_loss: (x, sigma, cond) -> denoised; it keeps the features of that call."""

    def __init__(self, model: Callable[..., tuple[Tensor, Tensor]]):
        self.model = model
        self.features: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        denoised, self.features = self.model(x, sigma, cond, features=True)
        return denoised


def misalignment(made: Tensor, true: Tensor) -> Tensor:
    """1 - mean cosine of features (B, C, g, g) and (B, C, h, h), on the coarser of the two grids; in [0, 2]."""
    side = min(made.shape[-1], true.shape[-1])
    made, true = (F.adaptive_avg_pool2d(one.float(), side) for one in (made, true))
    return 1 - F.cosine_similarity(made, true, dim=1).mean()


@torch.no_grad()
def clip_features(clip: Clip, pixels: Tensor) -> Tensor:
    """What the image tower sees where: uint8 pixels (B, 3, S, S) of any size -> (B, C, h, h) float32.

    Of a ViT the patch tokens, of one of timm's networks what it pools, of open_clip's ResNets likewise. UserError for
    other towers.
    """
    size, visual = clip.image_size, clip.model.visual
    pixels = pixels.to(clip.device).float()
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
    x = (pixels - clip.mean) / clip.std
    if hasattr(visual, "trunk"):
        found = visual.trunk.forward_features(x)
    elif hasattr(visual, "attnpool"):
        found = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
    elif hasattr(visual, "forward_intermediates"):
        found = visual.forward_intermediates(x, indices=1, normalize_intermediates=True)["image_intermediates"][-1]
    else:
        raise UserError("align: this CLIP's image tower shows no features of places; set align=0")
    if found.ndim == 3:  # tokens, perhaps after others that stand for the whole picture
        side = int(found.shape[1] ** 0.5)
        found = found[:, found.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))
    return found.float()
