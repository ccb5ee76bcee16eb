"""Captioned pictures as people keep them -> shards: read (or fetched), decoded, scaled and packed by many threads.

Row n of the source becomes the sample with key n, so keys stay what they are when a rejected picture is mended. What
cannot be used is left out and listed with its reason in rejected.csv. A killed run goes on at the shard it was at.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from clip_train.fetch import FetchConfig, FetchError, fetch
from clip_train.folder import Input, Manifest, Workspace, fingerprint_json, write_file
from clip_train.pictures import decode_picture
from clip_train.sample import Sample
from clip_train.settings import Progress, UserError
from clip_train.shards import write_shard
from clip_train.sources import Columns, InTar, Row, Source, Web, is_json, open_source
from clip_train.tars import read_span

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that go into a shard as they are; others become PNG
FETCHERS = 32  # threads when pictures come from the web: they wait most of the time

Item, Made = TypeVar("Item"), TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class _Packing:
    """What happens to a picture on its way into a shard."""

    resize: int | None
    min_size: int | None
    fetch: FetchConfig | None
    stopped: threading.Event  # set when the run ends early: nothing is tried again then


def shard_source(
    source: str | Path,
    out: str | Path,
    *,
    caption_columns: Sequence[str] = (),
    image_column: str = "",
    per_shard: int = 1000,
    resize: int | None = None,
    min_size: int | None = None,
    drop_duplicates: bool = False,
    fetch_config: FetchConfig | None = None,
    prefix: str = "",
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the captioned pictures of `source` as the shards folder `out`.

    source: whatever sources.open_source reads: a folder of pictures, Hugging Face's imagefolder, tars as img2dataset
    writes them, or a table (.csv, .tsv, .jsonl, .parquet) with a path (relative to the table), the file's bytes or, if
    there is a fetch_config, a web address in `image_column`. caption_columns: columns of a table, or fields of a json
    ("txt" is KEY.txt), that hold a caption or a list of them; a sample's captions come in this order. Other columns go
    into the sample's json. resize: scale pictures so that the short side has this many pixels, if it has more.
    min_size: reject pictures whose short side has fewer. drop_duplicates: reject pictures that were there before, byte
    for byte. prefix: put before keys and tar names, so that several sources can be used together. threads: that read
    and decode, by default one per core; the shards do not depend on it.

    The manifest's result: samples, rejected, shards, and reasons: how many rows were rejected for which reason.
    UserError if nothing in the source can be used.
    """
    source = Path(source)
    for name, value in (("per_shard", per_shard), ("resize", resize), ("min_size", min_size), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} must be at least 1")
    if "." in prefix or "/" in prefix:
        raise UserError(f"the prefix {prefix!r} must hold no dot and no slash")
    columns = Columns(image=image_column, captions=tuple(caption_columns), fetch=fetch_config is not None)
    found = open_source(source, columns)
    config = {
        "per_shard": per_shard,
        "resize": resize,
        "min_size": min_size,
        "drop_duplicates": drop_duplicates,
        "prefix": prefix,
        "image_column": image_column,
        "caption_columns": list(caption_columns),
        "fetch": columns.fetch,
    }
    workspace = Workspace.open(out, "shards", config, {"source": Input(_fingerprint(found.base, found.files), source)})
    if workspace.done:
        return workspace.done

    packing = _Packing(resize=resize, min_size=min_size, fetch=fetch_config, stopped=threading.Event())
    threads = threads or (FETCHERS if columns.fetch else os.cpu_count() or 1)
    shards = _write(found, workspace.path, per_shard, prefix, packing, drop_duplicates, threads, on_progress)

    rejected = [reject for shard in shards for reject in shard["rejected"]]
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        shutil.rmtree(workspace.path, ignore_errors=True)  # or the mended source would be told of an unfinished run
        first = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3])
        raise UserError(f"none of the {found.total} pictures of {source} can be used ({first})")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "reason"), *rejected])
    write_file(workspace.path / "rejected.csv", table.getvalue().encode("utf-8", "backslashreplace"))
    reasons = dict(Counter(reason.partition(":")[0] for _, reason in rejected).most_common())
    return workspace.publish({"samples": samples, "rejected": len(rejected), "shards": len(shards), "reasons": reasons})


def _write(
    source: Source,
    folder: Path,
    per_shard: int,
    prefix: str,
    packing: _Packing,
    drop_duplicates: bool,
    threads: int,
    on_progress: Progress | None,
) -> list[dict[str, Any]]:
    """Every `per_shard` rows make one tar. The note scratch/NAME.json is written after it: that shard is done."""
    (folder / "scratch").mkdir(exist_ok=True)
    names = [f"{prefix}{n:06d}" for n in range(-(-source.total // per_shard))]
    places = [folder / "scratch" / f"{name}.json" for name in names]
    done = [place.exists() for place in places]
    rows = ((f"{prefix}{n:08d}", row) for n, row in enumerate(source.rows()) if not done[n // per_shard])
    notes: list[dict[str, Any]] = []
    seen: dict[str, str] = {}  # sha256 of a picture -> the first that had it
    pool = ThreadPoolExecutor(threads)
    try:
        made = _ahead(pool, lambda pair: (pair[1].source, _sample(*pair, packing)), rows, 4 * threads)
        for n, name in enumerate(names):
            if not done[n]:
                rejected: list[tuple[str, str]] = []
                count = min(per_shard, source.total - n * per_shard)
                some = itertools.islice(made, count)
                if on_progress:
                    before = sum(len(note["rejected"]) for note in notes)
                    some = _counted(some, n * per_shard, source.total, before, rejected, on_progress)
                fresh: dict[str, str] = {}
                kept = _kept(some, rejected, (seen, fresh) if drop_duplicates else None)
                samples = write_shard(kept, folder / f"{name}.tar")
                note = {"samples": samples, "rejected": rejected, "pictures": fresh}
                write_file(places[n], json.dumps(note).encode())
            notes.append(json.loads(places[n].read_bytes()))
            seen |= notes[n].pop("pictures")
    finally:
        packing.stopped.set()
        pool.shutdown(cancel_futures=True)
    if on_progress:
        on_progress(source.total, source.total, rejected=sum(len(note["rejected"]) for note in notes))
    return notes


def _ahead(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterator[Item], most: int) -> Iterator[Made]:
    """make(item) of every item, in order, with at most `most` of them under way: pool.map would take all at once."""
    under_way: deque[Future[Made]] = deque()
    for item in items:
        under_way.append(pool.submit(make, item))
        if len(under_way) >= most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _counted(
    made: Iterable[Made], start: int, total: int, before: int, rejected: list, on_progress: Progress
) -> Iterator[Made]:
    for n, one in enumerate(made):
        if n % 16 == 0:
            on_progress(start + n, total, rejected=before + len(rejected))
        yield one


def _kept(
    made: Iterable[tuple[str, Sample | str]],
    rejected: list[tuple[str, str]],
    pictures: tuple[dict[str, str], dict[str, str]] | None,
) -> Iterator[Sample]:
    """The samples; what is none goes to `rejected`. pictures: those of the shards before this one, and of this one."""
    for source, sample in made:
        if isinstance(sample, str):
            rejected.append((source, sample))
            continue
        if pictures:
            before, here = pictures
            sha256 = hashlib.sha256(sample.image).hexdigest()
            first = before.get(sha256) or here.get(sha256)
            if first is not None:
                rejected.append((source, f"duplicate picture: the same as {first}"))
                continue
            here[sha256] = source
        yield sample


def _sample(key: str, row: Row, packing: _Packing) -> Sample | str:
    """The row as a sample, or the reason why it is rejected. The picture is decoded, so that damage is found here.

    What stands before the first colon of a reason is the kind by which rejections are counted.
    """
    if row.problem:
        return row.problem
    if not row.captions:
        return "no caption"
    if not is_json(row.captions):
        return "its caption is not UTF-8"
    try:
        data = _bytes(row.image, packing)
        picture = decode_picture(data)
    except FileNotFoundError:
        return "no such file"
    except FetchError as error:
        return f"not fetched: {error}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # PictureError among them
        return f"not a usable picture: {error}"
    if packing.min_size and min(picture.size) < packing.min_size:
        return f"too small: {picture.width} x {picture.height}"
    data, ext = _packed(data, picture, packing.resize)
    told = row.meta.get("source") if isinstance(row.image, InTar) else None  # it was in shards before: where from
    return Sample(key=key, image=data, ext=ext, captions=row.captions, meta=row.meta | {"source": told or row.source})


def _bytes(image: Path | bytes | Web | InTar | None, packing: _Packing) -> bytes:
    if isinstance(image, Web):
        return fetch(image.url, packing.fetch or FetchConfig(), packing.stopped)
    if isinstance(image, InTar):
        return read_span(image.tar, image.span)
    return image if isinstance(image, bytes) else image.read_bytes()


def _packed(data: bytes, picture: Image.Image, resize: int | None) -> tuple[bytes, str]:
    """The bytes and suffix that go into the shard: the file as it is, unless it must be scaled or turned into PNG."""
    kind = picture_kind(data)
    scale = min(1.0, resize / min(picture.size)) if resize else 1.0
    if scale == 1.0 and kind in KEPT:
        return data, KEPT[kind]
    if scale < 1.0:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    packed = io.BytesIO()
    kind = kind if kind in KEPT else "PNG"
    picture.save(packed, kind, **({} if kind == "PNG" else {"quality": 95}))
    return packed.getvalue(), KEPT[kind]


def picture_kind(data: bytes) -> str:
    """JPEG, PNG or WEBP by a file's first bytes, whatever it is called; "" if it is none of these."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def _fingerprint(base: Path, files: Iterable[Path]) -> str:
    """Of the files' names, sizes and times: to hash what is in them, they would have to be read twice."""
    seen = []
    for file in files:
        stat = file.stat() if file.is_file() else None
        seen.append([os.path.relpath(file, base), stat.st_size, stat.st_mtime_ns] if stat else [str(file)])
    return fingerprint_json(seen)
