"""Enlarge picture files of any size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_train.model import Clip
from clip_train.pictures import PictureError, decode_picture
from clip_train.settings import UserError
from diffusion.train_upsampler import load_upsampler
from diffusion.upsample import enlarge

LARGEST = 2**22  # pixels of an enlarged picture: 2048 x 2048


def enlarge_files(
    upsampler: Path | str,
    pictures: Sequence[Path],
    out: Sequence[Path],
    *,
    clip: Path | str | None = None,
    blind: bool = False,
    steps: int = 8,
    noise_level: float = 0.05,
    guidance: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Path]:
    """Enlarge picture i with the embedding of itself (blind: with none) and seed + i, into the PNG out[i].

    UserError: a picture that cannot be read or would become too large, another CLIP than the upsampler's, a full disk.
    """
    model, made = load_upsampler(upsampler, device)
    where = None if blind else clip or made.input_path("clip")
    if where is None and not blind:
        raise UserError(f"the CLIP of {upsampler}/ is not where it was; say where with --clip, or go without: --blind")
    encoder = Clip.load(where, device) if where else None
    if encoder and encoder.fingerprint != made.inputs["clip"]["fingerprint"]:
        raise UserError(f"{where}/ is not the CLIP that {upsampler}/ was trained with; pass that with --clip")
    for number, (source, target) in enumerate(zip(pictures, out, strict=True)):
        picture = _read(source)
        width, height = (side * model.config.factor for side in picture.size)
        if width * height > LARGEST:
            raise UserError(f"{source} would become {width} x {height}; at most {LARGEST / 1e6:.1f} million pixels")
        rows = encoder.encode_image(encoder.to_pixels(picture)[None]) if encoder else None
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        how = {"steps": steps, "noise_level": noise_level, "guidance": guidance}
        large = enlarge(model, pixels, rows, [seed + number], **how)[0]
        levels = ((large.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(target, "PNG")
    return list(out)


def _read(path: Path) -> Image.Image:
    try:
        return decode_picture(path.read_bytes())
    except (OSError, PictureError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
