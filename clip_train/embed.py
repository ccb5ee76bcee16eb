"""Shards -> EmbeddingStore: every picture and every caption through CLIP, one shard at a time, restartable.

A shard is the unit of work: its part is written whole when its last picture is encoded, and a rerun skips it. Pictures
that cannot be decoded are left out, counted, and named in bad.csv.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.model import Clip
from clip_train.pictures import PictureError, Pictures, decode_picture, to_pixels
from clip_train.sample import Sample
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingWriter, first_not_unit

Decoded = tuple[Sample, torch.Tensor | PictureError]


def embed(
    shards: str | Path,
    clip: Path | str,
    out: Path | str,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the embeddings folder `out` of all samples in `shards`, made by the CLIP in folder `clip`.

    on_progress counts samples. The manifest's result has rows, captions, dim, parts, bad (pictures that could not be
    read), skipped (samples without picture or caption), and shards (the tars, relative to the input "shards").
    UserError: no picture can be read, the CLIP makes rows that are not finite, or what ShardSet and Clip.load refuse.
    """
    shard_set = ShardSet(shards)
    encoder = Clip.load(clip, device=device)
    tars = [Path(os.path.abspath(path)) for path in shard_set.paths]
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    inputs = {"shards": Input(shard_set.fingerprint, root), "clip": Input(encoder.fingerprint, clip)}
    space = Workspace.open(out, "embeddings", {}, inputs)
    if space.done:
        return space.done

    writer = EmbeddingWriter(space.path, len(tars))
    ends = np.cumsum([0, *shard_set.counts]).tolist()
    rows = captions = fresh = 0
    bad: list[tuple[str, str]] = []
    began = time.monotonic()

    def report(done: int) -> None:
        if on_progress:
            on_progress(done, len(shard_set), bad=len(bad))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
            note = writer.finished(part)
            if note is None:
                batches = _decoded(shard_set, range(first, end), encoder.image_size, batch_size, pool)
                note = _embed_part(writer, part, batches, encoder, batch_size, lambda n, first=first: report(first + n))
                fresh += end - first
            rows, captions, bad = rows + note["rows"], captions + note["captions"], bad + note["bad"]
            report(end)
    if not rows:
        key, reason = bad[0]
        raise UserError(f"{shards}: none of the {len(bad)} pictures can be read; the first: {key}: {reason}")
    if bad or shard_set.skipped:
        write_file(space.path / "bad.csv", _table([("key", "reason"), *bad, *shard_set.skipped]))
    return space.publish(
        {
            "rows": rows,
            "captions": captions,
            "dim": encoder.embed_dim,
            "parts": len(tars),
            "bad": len(bad),
            "skipped": len(shard_set.skipped),
            "shards": [tar.relative_to(root).as_posix() for tar in tars],
            "samples_per_second": round(fresh / max(time.monotonic() - began, 1e-9), 1),
        }
    )


def encode_rows(
    clip: Clip,
    pictures: Pictures,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds the pictures in these rows of the shards, or all usable ones (pictures.rows).

    Returns (N, D) float32 unit rows and the (N,) rows of the shards they belong to, without pictures that turn out bad.
    """
    rows = np.asarray(pictures.rows if rows is None else rows, dtype=np.int64)
    made, kept = [np.empty((0, clip.embed_dim), dtype=np.float32)], [rows[:0]]
    for low in range(0, len(rows), batch_size):
        pixels, found = pictures.load(rows[low : low + batch_size])
        if len(found):
            made.append(clip.encode_image(pixels).numpy())
            kept.append(found)
        if on_progress:
            on_progress(min(low + batch_size, len(rows)), len(rows))
    return np.concatenate(made), np.concatenate(kept)


def encode_texts(clip: Clip, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
    """(N, D) float32 unit rows; equal texts are encoded once."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # a batch costs what its longest text costs
    place = {text: i for i, text in enumerate(distinct)}
    out = np.empty((len(distinct), clip.embed_dim), dtype=np.float32)
    for low in range(0, len(distinct), batch_size):
        some = distinct[low : low + batch_size]
        out[low : low + len(some)] = clip.encode_text(some).numpy()
    return out[[place[text] for text in texts]]


def _embed_part(
    writer: EmbeddingWriter,
    part: int,
    batches: Iterator[list[Decoded]],
    clip: Clip,
    batch_size: int,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Encode one shard and write its part. Returns the part's note: rows, captions, bad."""
    images, metadata, texts, texts_row = [np.empty((0, clip.embed_dim), dtype=np.float32)], [], [], []
    bad: list[tuple[str, str]] = []
    for batch in batches:
        good = []
        for sample, pixels in batch:
            if isinstance(pixels, PictureError):
                bad.append((sample.key, str(pixels)))
                continue
            good.append(pixels)
            texts += sample.captions
            texts_row += [len(metadata)] * len(sample.captions)
            taken = {"image_path": sample.key, "caption": sample.caption, "captions": sample.captions}
            metadata.append(taken | {name: value for name, value in sample.meta.items() if name not in taken})
        if good:
            images.append(clip.encode_image(torch.stack(good)).numpy())
        report(len(metadata) + len(bad))
    image, caption = np.concatenate(images), encode_texts(clip, texts, batch_size=batch_size)
    for what, emb in (("picture", image), ("caption", caption)):
        wrong = first_not_unit(emb)
        if wrong is not None:
            key = metadata[wrong if what == "picture" else texts_row[wrong]]["image_path"]
            raise UserError(f"the CLIP makes no finite embedding of the {what} of sample {key}; train it again")
    note = {"rows": len(image), "captions": len(texts), "bad": bad}
    writer.write(part, image, caption, np.asarray(texts_row, dtype=np.int64), metadata, note)
    return note


def _decoded(
    shards: ShardSet, rows: range, size: int, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[Decoded]]:
    """Batches of (sample, (3, S, S) uint8 or why not); the next batch is decoded while this one is encoded."""

    def decode(row: int) -> Decoded:
        sample = shards.read(row)
        try:
            return sample, to_pixels(decode_picture(sample.image), size)
        except PictureError as error:
            return sample, error

    ahead = [pool.submit(decode, row) for row in rows[:batch_size]]
    for low in range(0, len(rows), batch_size):
        batch, ahead = ahead, [pool.submit(decode, row) for row in rows[low + batch_size : low + 2 * batch_size]]
        yield [future.result() for future in batch]


def _table(rows: Sequence[Sequence[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()
