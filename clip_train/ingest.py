"""Captioned pictures as people keep them -> shards: a folder, or a CSV, TSV, JSONL or Parquet table.

Row n of the source becomes the sample with key n, so keys stay what they are when a rejected picture is mended. What
cannot be used is left out and listed with its reason in rejected.csv. A killed run goes on at the shard it was at.
"""

import csv
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from clip_train.folder import Input, Manifest, Workspace, fingerprint_json, write_file
from clip_train.pictures import decode_picture
from clip_train.settings import Progress, UserError
from clip_train.shards import Sample, write_shard

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that go into a shard as they are; others become PNG


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One picture of the source: where it is (or its bytes), what is said about it, or why it cannot be used."""

    source: str
    image: Path | bytes | None = None
    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def shard_source(
    source: str | Path,
    out: str | Path,
    *,
    caption_column: str = "caption",
    image_column: str = "image",
    per_shard: int = 1000,
    resize: int | None = None,
    prefix: str = "",
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the captioned pictures of `source` as the shards folder `out`.

    source: a folder of pictures, captioned by KEY.txt or KEY.json beside them or, if no picture has these, by the name
    of the folder each lies in; or a table (.csv, .tsv, .jsonl, .parquet) with a path (relative to the table), or in
    Parquet the file's bytes, in `image_column` and a caption, or a list of captions, in `caption_column`. Other columns
    go into the sample's json. resize: scale pictures so that the short side has this many pixels, if it has more.
    prefix: put before keys and tar names, so that several sources can be used together.

    The manifest's result: samples, rejected, shards. UserError if nothing in the source can be used.
    """
    source = Path(source)
    if per_shard < 1 or (resize is not None and resize < 1):
        raise UserError(f"per_shard = {per_shard} and resize = {resize} must be at least 1")
    if "." in prefix or "/" in prefix:
        raise UserError(f"the prefix {prefix!r} must hold no dot and no slash")
    config = {"per_shard": per_shard, "resize": resize, "prefix": prefix}
    if source.is_dir():
        files = _pictures_below(source)
        rows, total = _folder_rows(source, files), len(files)
        fingerprint = _fingerprint(source, [path for file in files for path in (file, *_sidecars(file))])
    else:
        _check_table(source)
        rows = _table_rows(source, image_column, caption_column)
        files = [row.image if isinstance(row.image, Path) else None for row in rows]
        rows, total = _table_rows(source, image_column, caption_column), len(files)  # again: they may not fit in memory
        fingerprint = _fingerprint(source.parent, [source, *filter(None, files)])
        config |= {"caption_column": caption_column, "image_column": image_column}

    workspace = Workspace.open(out, "shards", config, {"source": Input(fingerprint, source)})
    if workspace.done:
        return workspace.done
    shards = _write(rows, total, workspace.path, per_shard, resize, prefix, on_progress)
    rejected = [reject for shard in shards for reject in shard["rejected"]]
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        shutil.rmtree(workspace.path, ignore_errors=True)  # or the mended source would be told of an unfinished run
        first = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3])
        raise UserError(f"none of the {total} pictures of {source} can be used ({first})")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "reason"), *rejected])
    write_file(workspace.path / "rejected.csv", table.getvalue().encode("utf-8", "backslashreplace"))
    return workspace.publish({"samples": samples, "rejected": len(rejected), "shards": len(shards)})


def _write(
    rows: Iterator[_Row],
    total: int,
    folder: Path,
    per_shard: int,
    resize: int | None,
    prefix: str,
    on_progress: Progress | None,
) -> list[dict[str, Any]]:
    """Every `per_shard` rows make one tar. The note scratch/NAME.json is written after it: that shard is done."""
    notes = []
    (folder / "scratch").mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, total, per_shard):
            some = list(itertools.islice(rows, per_shard))
            name = f"{prefix}{start // per_shard:06d}"
            note = folder / "scratch" / f"{name}.json"
            if not note.exists():
                keys = (f"{prefix}{n:08d}" for n in range(start, start + len(some)))
                made = list(pool.map(lambda pair: _sample(*pair, resize), zip(keys, some, strict=True)))
                count = write_shard((s for s in made if isinstance(s, Sample)), folder / f"{name}.tar")
                rejected = [(row.source, m) for row, m in zip(some, made, strict=True) if isinstance(m, str)]
                write_file(note, json.dumps({"samples": count, "rejected": rejected}).encode())
            notes.append(json.loads(note.read_bytes()))
            if on_progress:
                on_progress(start + len(some), total, rejected=sum(len(n["rejected"]) for n in notes))
    return notes


def _sample(key: str, row: _Row, resize: int | None) -> Sample | str:
    """The row as a sample, or the reason why it is rejected. The picture is decoded, so that damage is found here."""
    if row.problem:
        return row.problem
    if not row.captions:
        return "no caption"
    if not _is_json(row.captions):
        return "its caption is not UTF-8"
    try:
        data = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
        picture = decode_picture(data)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # PictureError among them
        return f"not a usable picture: {error}"
    data, ext = _packed(data, picture, resize)
    return Sample(key=key, image=data, ext=ext, captions=row.captions, meta=row.meta | {"source": row.source})


def _packed(data: bytes, picture: Image.Image, resize: int | None) -> tuple[bytes, str]:
    """The bytes and suffix that go into the shard: the file as it is, unless it must be scaled or turned into PNG."""
    kind = _kind(data)
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


def _kind(data: bytes) -> str:
    """The picture's format by its first bytes, whatever its file is called."""
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


# Folders


def _pictures_below(folder: Path) -> list[Path]:
    """All picture files below the folder, hidden ones aside, by path."""
    found, tars = [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        tars += sum(name.endswith(".tar") for name in names)
        found += [Path(parent) / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    if not found and tars:
        raise UserError(f"{folder}/ holds {tars} tar files already: use them as they are: --shards {folder}")
    if not found:
        raise UserError(f"{folder}/ holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _folder_rows(folder: Path, files: list[Path]) -> Iterator[_Row]:
    by_folder_name = not any(_sidecars(file) for file in files)
    for file in files:
        source = os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "replace")
        if by_folder_name:
            label = file.parent.name.replace("_", " ").replace("-", " ").strip() if file.parent != folder else ""
            meta = {"label": label} if label else {}
            yield _Row(source=source, image=file, captions=[label] if label else [], meta=meta)
        else:
            yield _sidecar_row(source, file)


def _sidecars(file: Path) -> list[Path]:
    """KEY.txt and KEY.json beside a picture, where they exist."""
    return [path for path in (file.with_suffix(".txt"), file.with_suffix(".json")) if path.is_file()]


def _sidecar_row(source: str, file: Path) -> _Row:
    text, meta = "", {}
    try:
        for path in _sidecars(file):
            if path.suffix == ".txt":
                text = path.read_text("utf-8-sig")
            else:
                meta = json.loads(path.read_bytes())
    except UnicodeDecodeError:
        return _Row(source=source, problem="its caption is not UTF-8")
    except (ValueError, RecursionError):
        return _Row(source=source, problem="its .json cannot be read")
    except OSError as error:
        return _Row(source=source, problem=f"its caption cannot be read: {error.strerror}")
    if isinstance(meta, list):
        meta = {"captions": meta}  # a bare list of captions
    if not isinstance(meta, dict):
        return _Row(source=source, problem="its .json is neither an object nor a list of captions")
    captions = _texts(text, meta.get("caption"), meta.get("captions"))
    return _Row(source=source, image=file, captions=captions, meta=_kept_meta(meta))


def _texts(*said: Any) -> list[str]:
    """The distinct captions in strings and lists of strings, stripped, in order."""
    texts = [text for one in said for text in (one if isinstance(one, list) else [one]) if isinstance(text, str)]
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _kept_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What of a source's json or row goes on into the sample's json, beside what the shard says itself."""
    own = {"key", "caption", "captions", "width", "height", "sha256", "source"}
    return {name: v for name, v in meta.items() if name not in own and v is not None and v != "" and _is_json(v)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair cannot be encoded
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# Tables


def _check_table(source: Path) -> None:
    kinds = ", ".join(sorted(TABLES))
    if not source.is_file():
        raise UserError(f"{source} does not exist; expected a folder of pictures or a table ({kinds})")
    if source.suffix == ".tar":
        raise UserError(f"{source} is a tar already: use it as it is: --shards {source}")
    if source.suffix.lower() not in TABLES:
        raise UserError(f"{source} is neither a folder nor a table ({kinds})")


def _table_rows(table: Path, image_column: str, caption_column: str) -> Iterator[_Row]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    checked = False
    for n, record in enumerate(readers[table.suffix.lower()](table)):
        if isinstance(record, str):
            yield _Row(source=f"row {n}", problem=record)
            continue
        if not checked:
            _check_columns(table, record, image_column, caption_column)
            checked = True
        yield _record_row(table, n, record, image_column, caption_column)
    if not checked:
        raise UserError(f"{table} has no rows that can be read")


def _check_columns(table: Path, record: dict[str, Any], image_column: str, caption_column: str) -> None:
    has = f"{table} has the columns {', '.join(map(str, record))}"
    if image_column not in record:
        if {name.lower() for name in map(str, record)} & {"url", "urls", "image_url"}:
            raise UserError(
                f"{has}: addresses, but no column {image_column!r} of files; unclip fetches nothing: "
                "download them with img2dataset, whose tars can be used as they are"
            )
        raise UserError(f"{has}, but not {image_column!r}; name the one with the picture files: --image-column")
    if caption_column not in record and "captions" not in record:
        raise UserError(f"{has}, but not {caption_column!r}; name the one with the captions: --caption-column")


def _record_row(table: Path, n: int, record: dict[str, Any], image_column: str, caption_column: str) -> _Row:
    image = record.get(image_column)
    if isinstance(image, dict):  # Hugging Face's Image column: {"bytes", "path"}
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        source = f"row {n}"
    elif isinstance(image, str) and image.strip():
        source, image = image.strip(), table.parent / image.strip()
        if "://" in source:
            return _Row(source=source, problem="an address, not a file: unclip fetches nothing, img2dataset does")
    else:
        return _Row(source=f"row {n}", problem=f"nothing in column {image_column}")
    captions = _texts(_maybe_list(record.get(caption_column)), _maybe_list(record.get("captions")))
    others = {k: v for k, v in record.items() if k not in (image_column, caption_column)}
    return _Row(source=source, image=image, captions=captions, meta=_kept_meta(others))


def _maybe_list(value: Any) -> Any:
    """A cell that holds a json list of captions, as the list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        return listed if isinstance(listed, list) and all(isinstance(v, str) for v in listed) else value
    return value


def _read_csv(table: Path) -> Iterator[dict[str, Any] | str]:
    """Rows as dicts; of a row that is none, what is wrong with it."""
    csv.field_size_limit(10_000_000)
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            header = next(rows, [])
            for row in filter(None, rows):
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                else:
                    yield f"{len(row)} fields where the header has {len(header)}"
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as {table.suffix[1:].upper()} in UTF-8: {error}") from error


def _read_jsonl(table: Path) -> Iterator[dict[str, Any] | str]:
    with open(table, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else "not a json object"


def _read_parquet(table: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table} cannot be read as Parquet: {error}") from error
