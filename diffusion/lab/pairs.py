"""Captioned pictures of shards as pairs of points in a CLIP's space: what `lab space` looks at."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_train.embed import encode_rows, encode_texts
from clip_train.evaluate import groups_of
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.sheet import fit_picture

if TYPE_CHECKING:
    from PIL import Image

FEWEST = 8  # pictures below which nothing can be told from chance


@dataclass(frozen=True, eq=False)
class Pairs:
    """N pictures, each with its first caption, through a CLIP."""

    image: np.ndarray  # (N, D) float32 unit rows
    text: np.ndarray  # (N, D) float32 unit rows of the first captions
    captions: list[str]  # the first of each picture
    names: list[str]  # what each picture shows, in few words: its label, or its first caption where it has none
    said: list[list[str]]  # all captions of each picture
    scale: float  # the CLIP's logit scale: 1 / temperature
    samples: ShardSet
    rows: np.ndarray  # (N,) where each picture is in the shards

    @classmethod
    def read(
        cls,
        clip: Clip,
        samples: ShardSet,
        count: int,
        seed: int = 0,
        label_field: str = "label",
        on_progress: Progress | None = None,
    ) -> "Pairs":
        """`count` samples drawn at random (all, if there are no more), in the order of the shards.

        Labels that are bare numbers name nothing, and count as none. UserError: fewer than FEWEST usable pictures.
        """
        rng = np.random.default_rng(seed)
        rows = np.arange(len(samples))
        if count < len(rows):
            rows = np.sort(rng.choice(len(rows), count, replace=False))
        pictures = Pictures(samples, clip.image_size, cache_bytes=0)
        image, rows = encode_rows(clip, pictures, rows, batch_size=64, on_progress=on_progress)
        if len(rows) < FEWEST:
            raise UserError(f"{len(rows)} usable pictures are too few to see a space; give at least {FEWEST}")
        about = [samples.about(row, label_field) for row in rows.tolist()]
        said = [captions for captions, _ in about]
        captions = [some[0] for some in said]
        names = [label if label and not label.isdecimal() else said[0] for said, label in about]
        scale = float(clip.model.logit_scale.detach().exp())
        return cls(image, encode_texts(clip, captions), captions, names, said, scale, samples, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> np.ndarray:
        """(N,) equal for pictures of one name."""
        return groups_of(self.names, self.captions)

    def batch(self, size: int, seed: int = 0) -> np.ndarray:
        """(B <= size,) pairs in random order, of which no two share a name or a caption: one right answer each."""
        taken: set[str] = set()
        chosen = []
        for i in np.random.default_rng(seed).permutation(len(self)).tolist():
            own = {self.names[i].lower(), self.captions[i].lower()}
            if len(chosen) < size and not own & taken:
                chosen.append(i)
                taken |= own
        return np.array(chosen, dtype=np.int64)

    def thumbnail(self, i: int, side: int) -> "Image.Image":
        """Picture i on white, as large as fits a square of `side` pixels."""
        return fit_picture(self.samples.thumbnail(int(self.rows[i]), side), side)


def square(picture: "Image.Image", side: int) -> "Image.Image":
    """The picture in the middle of a white square of `side` pixels."""
    from PIL import Image

    picture = fit_picture(picture, side)
    out = Image.new("RGB", (side, side), "white")
    out.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return out


def ordinal(place: int) -> str:
    """1 as "1st", 2 as "2nd", 11 as "11th"."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{'th' if place % 100 in (11, 12, 13) else ending}"


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """The text in at most so many lines of `width` letters, without control characters; … where it was cut."""
    text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …"))
