"""Pictures that a user gives to be changed, and masks of what is to be painted anew.

A file is opened as CLIP's training opens one: turned upright as its EXIF says, transparency put on white, of at most 64
million pixels. The decoder's pixels are its middle: the short side scaled to the decoder's size, the rest cut off.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_train.model import Clip
from clip_train.pictures import PictureError, decode_picture, to_pixels
from clip_train.settings import UserError

TOUCHED = 0.1  # of white: a pixel that a mask covers by more than this share is painted anew
GREY = 0.05  # share of a mask that may be neither nearly black nor nearly white: its edges


@dataclass(frozen=True)
class Source:
    """A picture as it was given."""

    picture: Image.Image  # RGB
    sha256: str  # of the file
    name: str  # of the file, for people

    @classmethod
    def open(cls, path: Path | str) -> "Source":
        """Read a picture file. UserError if that is not possible."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls.read(data, Path(path).name)

    @classmethod
    def read(cls, data: bytes, name: str = "the picture") -> "Source":
        """The picture in a file's bytes. UserError if it is none."""
        try:
            return cls(decode_picture(data), hashlib.sha256(data).hexdigest(), name)
        except PictureError as error:
            raise UserError(f"{name} cannot be read as a picture: {error}") from error

    @property
    def told(self) -> dict[str, str]:
        """What a record says of it."""
        return {"name": self.name, "sha256": self.sha256}

    def pixels(self, size: int) -> Tensor:
        """(3, size, size) in [-1, 1]: the short side scaled to `size` (bicubic), then the middle."""
        return to_pixels(self.picture, size).float() / 127.5 - 1

    def row(self, clip: Clip | None) -> np.ndarray:
        """Its CLIP embedding, (D,) float32."""
        if clip is None:
            raise UserError("a picture is embedded by the CLIP that the decoder was trained with; say where: --clip")
        return clip.encode_image(clip.to_pixels(self.picture)[None]).numpy()[0]


def read_mask(mask: Source, picture: Source) -> Image.Image:
    """A mask as grey values: white, or transparent, is what is to be painted anew; black stays.

    UserError: of another size than the picture, not black and white, or without anything black or white.
    """
    if mask.picture.size != picture.picture.size:
        raise UserError(
            f"the mask {mask.name} is {_size(mask.picture)} but {picture.name} is {_size(picture.picture)}; "
            f"make them the same size"
        )
    grey = mask.picture.convert("L")
    values = np.asarray(grey)
    between = float(((values > 64) & (values < 192)).mean())
    if between > GREY:
        raise UserError(
            f"{between:.0%} of the mask {mask.name} is grey; paint it black where {picture.name} stays, white where not"
        )
    return grey


def mask_pixels(mask: Image.Image, size: int) -> Tensor:
    """(1, size, size) bool, True where to paint anew; the geometry of Source.pixels.

    UserError if nothing is left to paint, or nothing of the picture.
    """
    painted = to_pixels(mask.convert("RGB"), size)[:1].float() / 255 > TOUCHED
    if not painted.any() or painted.all():
        marks = "nothing" if not painted.any() else "all of it"
        raise UserError(
            f"the mask marks {marks}, in the {size} x {size} pixels that the decoder sees of the picture: its middle; "
            f"white is what is painted anew, black stays"
        )
    return painted


def to_x0(sources: "list[Source] | tuple[Source, ...]", size: int, device: torch.device | str) -> Tensor:
    """(B, 3, size, size) in [-1, 1]."""
    return torch.stack([source.pixels(size) for source in sources]).to(device)


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height} pixels"
