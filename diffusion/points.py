"""Points of the CLIP space as a user names them: a picture file, a sample's key, a vector, or a caption.

    fox.jpg    image:fox.jpg    key:train000123    vector:row.npy    "a red fox"    text:key:a caption

A name without a prefix is a file if there is one of that name, else a caption; the prefixes are those of unclip search.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.settings import UserError
from clip_train.store import EmbeddingStore, read_vectors
from diffusion.generate import Generator, Sampling
from diffusion.neighbours import key_row
from diffusion.source import Source

PREFIX = re.compile(r"(image|key|vector|text):\s*(.*)", re.DOTALL)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Point:
    """An image embedding, and where it comes from."""

    row: np.ndarray  # (D,) float32
    name: str  # for people
    picture: Source | None = None  # that it is the embedding of
    task: dict[str, Any] = field(default_factory=dict)  # what a record is to say of it


def kind_of(spec: str) -> tuple[str, str]:
    """A name as its kind (image, key, vector, text) and what is left of it. UserError: nothing left, no such file."""
    match = PREFIX.fullmatch(spec.strip())
    kind, value = (match[1], match[2]) if match else ("", spec.strip())
    if not value:
        raise UserError(f"{spec!r} names nothing; give a picture, key:KEY, vector:FILE.npy or a caption")
    if kind:
        return kind, value
    suffix = Path(value).suffix.lower()
    if suffix in PICTURES or suffix == ".npy":
        if not os.path.isfile(value):
            raise UserError(f"there is no file {value}; if it is a caption, write text:{value}")
        return ("image" if suffix in PICTURES else "vector"), value
    return ("image" if os.path.isfile(value) else "text"), value


def point(
    generator: Generator,
    spec: str,
    store: EmbeddingStore | None = None,
    *,
    seed: int = 0,
    how: Sampling | None = None,
) -> Point:
    """The point with that name. seed, how: of the prior, for a caption. UserError: what it takes is not at hand."""
    kind, value = kind_of(spec)
    if kind == "image":
        picture = Source.open(value)
        return Point(picture.row(generator.clip), picture.name, picture)
    if kind == "key":
        return Point(of_key(store, value), value, task={"key": value})
    if kind == "vector":
        rows = read_vectors(value)
        if len(rows) != 1:
            raise UserError(f"{value} holds {len(rows)} vectors; a point is one")
        return Point(rows[0], Path(value).name)
    return Point(generator.image_embeddings([value], [seed], how).numpy()[0], value, task={"text": value})


def of_key(store: EmbeddingStore | None, key: str) -> np.ndarray:
    """The image embedding (D,) of a sample; store: of --embeddings."""
    if store is None:
        raise UserError(f"the key {key} is of a sample in an embeddings folder; say which: --embeddings emb")
    return key_row(store, key)
