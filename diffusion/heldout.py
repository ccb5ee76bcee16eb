"""HeldOut: the rows, captions, labels and pictures that a generator is examined on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_train.model import Clip
from clip_train.pictures import PictureError, decode_picture, to_pixels
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingStore


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Pictures with their CLIP rows; every list has one entry per row."""

    name: str  # of the folder
    rows: np.ndarray  # (N, D) CLIP image embeddings
    captions: list[str]  # the first of each picture
    labels: list[str]  # in lower case; pictures of one label are each other's right answers
    keys: list[str]
    shards: Path | str | None = None  # where the pictures are
    fingerprint: str = ""
    places: list[int] | None = field(default=None, repr=False)  # of each row in the shards, where known

    @classmethod
    def open(cls, embeddings: Path | str, shards: str | None = None) -> "HeldOut":
        """An embeddings folder; shards: by default those it was made from, where they were then."""
        store = EmbeddingStore.open(embeddings)
        return cls(
            name=Path(embeddings).name,
            rows=store.image(),
            captions=store.first_captions(),
            labels=label_names(store),
            keys=store.keys,
            shards=shards or store.manifest.input_path("shards"),
            fingerprint=store.fingerprint,
        )

    @classmethod
    def of_shards(cls, shards: str, clip: Clip, on_progress: Progress | None = None) -> "HeldOut":
        """Pictures straight from tars, embedded here and now; those that cannot be decoded are left out."""
        samples = ShardSet(shards)
        rows, places = [], []
        for start in range(0, len(samples), 64):
            pixels = []
            for place in range(start, min(start + 64, len(samples))):
                try:
                    pixels.append(clip.to_pixels(decode_picture(samples.picture(place))))
                    places.append(place)
                except PictureError:
                    continue
            if pixels:
                rows.append(clip.encode_image(torch.stack(pixels)).numpy())
            if on_progress:
                on_progress(min(start + 64, len(samples)), len(samples), stage="embed")
        if not rows:
            raise UserError(f"{shards} holds no picture that can be decoded")
        about = [samples.about(place) for place in places]
        return cls(
            name=Path(str(shards)).name,
            rows=np.concatenate(rows),
            captions=[captions[0] for captions, _ in about],
            labels=[(label or captions[0]).lower() for captions, label in about],
            keys=[samples.keys[place] for place in places],
            shards=shards,
            fingerprint=samples.fingerprint,
            places=places,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def groups(self) -> np.ndarray:
        """(N,) the labels as integers."""
        return np.unique(self.labels, return_inverse=True)[1]

    def split(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """`count` rows to draw and as many others to compare with, chosen by `seed`; half of all rows if there are
        fewer. UserError: fewer than 40 rows.
        """
        if len(self) < 40:
            raise UserError(f"{self.name} holds {len(self)} pictures; two sets of 20 to compare need 40 at least")
        count = min(count, len(self) // 2)
        order = np.random.default_rng(seed).permutation(len(self))
        return order[:count], order[count : 2 * count]

    def pictures(self, rows: Sequence[int], size: int, on_progress: Progress | None = None) -> list[Image.Image]:
        """The real pictures of some rows at `size` pixels, as a decoder of that size would see them in training."""
        out = []
        for done, row in enumerate(rows, 1):
            place = self._place(int(row))
            try:
                picture = decode_picture(self._samples.picture(place))
            except PictureError as error:
                raise UserError(f"{self.keys[row]} of {self.shards} cannot be decoded ({error})") from error
            out.append(Image.fromarray(to_pixels(picture, size).permute(1, 2, 0).numpy()))
            if on_progress and (done % 64 == 0 or done == len(rows)):
                on_progress(done, len(rows), stage="real pictures")
        return out

    @cached_property
    def _samples(self) -> ShardSet:
        if self.shards is None:
            raise UserError(f"the shards that {self.name}/ was made from are not where they were; say where: --shards")
        return ShardSet(str(self.shards))

    def _place(self, row: int) -> int:
        place = self._samples.row_of(self.keys[row]) if self.places is None else self.places[row]
        if place is None:
            raise UserError(
                f"{self.shards} has no sample {self.keys[row]}, which {self.name}/ has: give its own --shards"
            )
        return place


def label_names(store: EmbeddingStore) -> list[str]:
    """One per row, in lower case: its label, or its caption where it has none."""
    labels, captions = store.table.column("label"), store.first_captions()
    return [str(caption if label is None else label).lower() for label, caption in zip(labels, captions, strict=True)]


def labels_of(store: EmbeddingStore) -> np.ndarray:
    """(N,) integers: rows of one label (of one caption, where there are no labels) are each other's right answers."""
    return np.unique(label_names(store), return_inverse=True)[1]
