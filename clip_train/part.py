"""One shard -> one part of an embeddings folder: read, decode, encode, write. The unit of work of every engine.

A shard's batches depend on the shard and the batch size alone, so its part is the same wherever it is made.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train.embed import encode_texts
from clip_train.model import Clip, pixel_maker
from clip_train.pictures import PictureError, decode_picture
from clip_train.sample import Sample
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingWriter, first_not_unit


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar to embed, as it was when the work was planned."""

    part: int
    tar: str
    count: int  # of its samples
    size: int  # bytes
    mtime_ns: int

    def open(self) -> ShardSet:
        """Its samples; UserError if the tar is not the one that was planned with."""
        stat, samples = os.stat(self.tar), ShardSet(self.tar)
        if (stat.st_size, stat.st_mtime_ns, len(samples)) != (self.size, self.mtime_ns, self.count):
            raise UserError(f"{self.tar} changed while it was being used; run the same command again")
        return samples


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How parts are made: all that a process must know to make some. Small, and the same for all of them."""

    clip: str  # as Clip.load takes it
    fingerprint: str  # of that CLIP
    preprocess_cfg: dict[str, Any]
    precision: dict[str, str]  # of the towers
    device: str
    batch_size: int
    compile: bool
    folder: str  # where the parts go
    parts: int  # how many there will be in all

    def load(self) -> Clip:
        """The CLIP, ready to encode; UserError if it is another one by now."""
        clip = Clip.load(self.clip, device=self.device)
        if clip.fingerprint != self.fingerprint:
            raise UserError(f"{self.clip} changed while it was being used; run the same command again")
        return self.ready(clip)

    def ready(self, clip: Clip) -> Clip:
        """A CLIP -> one that encodes in the way of this recipe; the same one if it does so already."""
        made = clip if clip.precision == self.precision else clip.for_inference(self.precision)
        return made.compile() if self.compile else made

    def writer(self) -> EmbeddingWriter:
        """What writes the parts."""
        return EmbeddingWriter(Path(self.folder), self.parts)


@dataclass(kw_only=True)
class Batch:
    """Some samples of one shard: the pixels of those that can be decoded, what is known of them, and the others."""

    pixels: torch.Tensor | None  # (B, 3, H, W) uint8; None: none can be decoded
    metadata: list[dict[str, Any]]  # B: image_path, caption, captions, then the sample's json
    bad: list[tuple[str, str]]  # key, reason
    shard: str  # fingerprint of the tar that they are from


@dataclass(kw_only=True)
class Part:
    """A part on its way: what is known of its samples, batch after batch."""

    metadata: list[dict[str, Any]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    shard: str = ""

    def add(self, batch: Batch) -> None:
        self.metadata += batch.metadata
        self.bad += batch.bad
        self.shard = batch.shard

    @property
    def texts(self) -> list[str]:
        """Every caption of every sample."""
        return [text for one in self.metadata for text in one["captions"]]

    def write(self, writer: EmbeddingWriter, shard: Shard, image: np.ndarray, captions: np.ndarray) -> None:
        """Write the part, whole or not at all. image (n, D) and captions (m, D): unit rows of metadata and of texts.

        UserError, naming the sample, if one of them is not of length 1.
        """
        row = np.repeat(np.arange(len(self.metadata)), [len(one["captions"]) for one in self.metadata]).astype(np.int64)
        for what, emb in (("picture", image), ("caption", captions)):
            wrong = first_not_unit(emb)
            if wrong is not None:
                key = self.metadata[wrong if what == "picture" else row[wrong]]["image_path"]
                raise UserError(f"the CLIP makes no finite embedding of the {what} of sample {key}; train it again")
        note = {"shard": self.shard, "rows": len(image), "captions": len(captions), "bad": self.bad}
        writer.write(shard.part, image, captions, row, self.metadata, note)


def make_part(
    shard: Shard,
    recipe: Recipe,
    clip: Clip,
    writer: EmbeddingWriter,
    pool: Executor,
    report: Callable[[int, int], None],
) -> None:
    """Embed one shard. report(samples done, bad ones among them) after every batch."""
    part, rows = Part(), []
    for batch in batches_of(shard, recipe, pool):
        if batch.pixels is not None:
            pixels = batch.pixels.pin_memory() if clip.device.type == "cuda" else batch.pixels
            rows.append(clip.image_rows(pixels))  # a GPU goes on by itself; its rows are fetched at the end
        part.add(batch)
        report(len(part.metadata) + len(part.bad), len(part.bad))
    image = torch.cat(rows).cpu().numpy() if rows else np.empty((0, clip.embed_dim), dtype=np.float32)
    part.write(writer, shard, image, encode_texts(clip, part.texts, batch_size=recipe.batch_size))


def batches_of(shard: Shard, recipe: Recipe, pool: Executor) -> Iterator[Batch]:
    """A shard's samples in order; the next batch is decoded while this one is used."""
    if not shard.count:
        return
    samples, to_pixels = shard.open(), pixel_maker(recipe.preprocess_cfg)

    def decode(row: int) -> tuple[Sample, torch.Tensor | PictureError]:
        sample = samples.read(row)
        try:
            return sample, to_pixels(decode_picture(sample.image))
        except PictureError as error:
            return sample, error

    size = recipe.batch_size
    ahead = [pool.submit(decode, row) for row in range(min(size, shard.count))]
    for low in range(size, shard.count + size, size):
        now, ahead = ahead, [pool.submit(decode, row) for row in range(low, min(low + size, shard.count))]
        yield _batch([future.result() for future in now], samples.fingerprint)


def _batch(decoded: Sequence[tuple[Sample, torch.Tensor | PictureError]], shard: str) -> Batch:
    good, metadata, bad = [], [], []
    for sample, pixels in decoded:
        if isinstance(pixels, PictureError):
            bad.append((sample.key, str(pixels)))
            continue
        good.append(pixels)
        taken = {"image_path": sample.key, "caption": sample.caption, "captions": sample.captions}
        metadata.append(taken | {name: value for name, value in sample.meta.items() if name not in taken})
    return Batch(pixels=torch.stack(good) if good else None, metadata=metadata, bad=bad, shard=shard)
