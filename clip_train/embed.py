"""Shards -> EmbeddingStore: every picture and every caption through CLIP, one shard at a time, restartable.

A shard is the unit of work: its part is written whole when its last picture is encoded, and a rerun skips it. Pictures
that cannot be decoded are left out, counted, and named in bad.csv.
"""

import csv
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_train.folder import MANIFEST, Input, Manifest, Workspace, partial_of, read_manifest, write_file
from clip_train.model import Clip
from clip_train.pictures import Pictures
from clip_train.precision import PRECISIONS, resolved_precision
from clip_train.ranks import pick_device
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet


def embed(
    shards: str | Path,
    clip: Path | str,
    out: Path | str,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    workers: int = 1,
    engine: str = "local",
    compile: bool = False,
    on_progress: Progress | None = None,
) -> Manifest | None:
    """Write the embeddings folder `out` of all samples in `shards`, made by the CLIP that Clip.load finds as `clip`.

    engine: "local", by `workers` processes of this machine (1: this one); "ranks", likewise, but this rank's share of
    the shards alone, when several ranks write one folder (engines.Share); "ray", by `workers` encoding actors of a Ray
    cluster. The rows are the same whichever it is. precision: as Clip.for_inference takes it, "auto" keeping to what an
    unfinished `out` was begun with. compile: the image tower, by torch.compile.

    Returns None on a rank whose share is done while shards of others are not: whoever is last publishes the folder, or
    a run by another engine does.

    What was made of the same CLIP and of fewer shards, finished or not, is taken over and replaced when all is there.

    on_progress counts samples, and is told of `bad` pictures so far and of `resumed`, the parts that were there before.
    The manifest's result has rows, captions, dim, parts, bad (pictures that could not be read), skipped (samples
    without picture or caption), and shards (the tars, relative to the input "shards").
    UserError: no picture can be read, the CLIP makes rows that are not finite, or what ShardSet and Clip.load refuse.
    """
    from clip_train import engines
    from clip_train.earlier import PARTS, Earlier
    from clip_train.part import Recipe, Shard

    if engine not in engines.ENGINES:
        raise UserError(f"there is no engine {engine!r}; use one of: {', '.join(engines.ENGINES)}")
    if precision not in PRECISIONS:
        raise UserError(f"there is no precision {precision!r}; use one of: {', '.join(PRECISIONS)}")
    share = engines.Share.of(os.environ if engine == "ranks" else {})
    device = engines.device_on_ray(str(device)) if engine == "ray" else str(pick_device(str(device)))
    if engine == "ranks":
        device = engines.device_of(device, int(os.environ.get("LOCAL_RANK", "0")))
    if precision != "auto":
        resolved_precision(precision, torch.device(device))  # refuses what the device cannot do
    samples = ShardSet(shards)
    tars = [Path(os.path.abspath(path)) for path in samples.paths]
    stats = [tar.stat() for tar in tars]
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    encoder, where = Clip.load(clip, device="cpu" if engine == "ray" else device), _place_of(clip)
    inputs = {"shards": Input(samples.fingerprint, root), "clip": Input(encoder.fingerprint, where)}

    config = _begun_with(out) if precision == "auto" else {"precision": {"image": precision, "text": precision}}
    if config is None and engine == "ray":
        config = {"precision": engines.precision_on_ray(str(where), device)}
    elif config is None:
        encoder = encoder.for_inference("auto")
        config = {"precision": encoder.precision}
    earlier = Earlier.of(Path(out), config, inputs, tars) if share.ranks == 1 else Earlier(out=Path(out))
    space = Workspace.open(out, "embeddings", config, inputs, shared=share.ranks > 1, replaces=earlier.replaces)
    if space.done:
        earlier.remove()
        return space.done
    recipe = Recipe(
        clip=str(where),
        fingerprint=inputs["clip"].fingerprint,
        preprocess_cfg=encoder.preprocess_cfg,
        precision=config.get("precision", {"image": "fp32", "text": "fp32"}),
        device=device,
        batch_size=batch_size,
        compile=compile,
        folder=str(space.path.absolute()),
        parts=len(tars),
    )
    plan = [
        Shard(part=part, tar=str(tar), count=count, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        for part, (tar, count, stat) in enumerate(zip(tars, samples.counts, stats, strict=True))
    ]

    writer = recipe.writer()
    mine = [shard for shard in plan if share.has(shard.part)]
    notes = {shard.part: writer.finished(shard.part) or earlier.give(shard, writer) for shard in mine}
    told = {shard.part: (shard.count, len(notes[shard.part]["bad"])) for shard in mine if notes[shard.part]}
    todo = [shard for shard in mine if not notes[shard.part]]
    resumed, began = len(told), time.monotonic()

    def report() -> None:
        if on_progress:
            done, bad = (sum(numbers) for numbers in zip((0, 0), *told.values(), strict=True))
            on_progress(done, sum(shard.count for shard in mine), bad=bad, resumed=resumed)

    def on_part(part: int, done: int, bad: int) -> None:
        told[part] = done, bad
        report()

    report()
    if engine == "ray" and todo:
        engines.make_on_ray(todo, recipe, workers, on_part)
    elif workers > 1 and len(todo) > 1:
        engines.make_in_processes(todo, recipe, workers, space.lock, on_part)
    elif todo:
        engines.make_here(todo, recipe, recipe.ready(encoder), on_part)
    seconds = time.monotonic() - began

    if share.ranks > 1:
        if None in map(writer.finished, range(len(plan))):
            space.release()
            return None
        if not space.alone():  # another rank saw that all is there a moment earlier
            space.release()
            return read_manifest(out, "embeddings")
    made = [writer.finished(shard.part) for shard in plan]
    bad = [tuple(one) for note in made for one in note["bad"]]
    rows, captions = (sum(note[what] for note in made) for what in ("rows", "captions"))
    if not rows:
        raise UserError(f"{shards}: none of the {len(bad)} pictures can be read; the first: {': '.join(bad[0])}")
    if bad or samples.skipped:
        write_file(space.path / "bad.csv", _table([("key", "reason"), *bad, *samples.skipped]))
    write_file(space.path / PARTS, json.dumps(made).encode())
    done = space.publish(
        {
            "rows": rows,
            "captions": captions,
            "dim": encoder.embed_dim,
            "parts": len(tars),
            "bad": len(bad),
            "skipped": len(samples.skipped),
            "shards": [tar.relative_to(root).as_posix() for tar in tars],
            "samples_per_second": round(sum(shard.count for shard in todo) / max(seconds, 1e-9), 1),
        }
    )
    earlier.remove()
    return done


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


def _place_of(clip: Path | str) -> Path | str:
    """Where a CLIP is, for other processes and for the manifest: a folder, or a name and tag of open_clip's."""
    name, _, rest = str(clip).partition(":")
    folder = Path(rest if name == "local-dir" else clip)
    return folder.absolute() if folder.is_dir() else str(clip)


def _begun_with(out: Path | str) -> dict[str, Any] | None:
    """The config of what is in `out`, finished or not; None if nothing is."""
    for place in (Path(out) / MANIFEST, partial_of(out) / "plan.json"):
        try:
            found = json.loads(place.read_text())
            if found["kind"] == "embeddings":
                return found["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or damaged: Workspace.open says so
    return None


def _table(rows: Sequence[Sequence[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()
