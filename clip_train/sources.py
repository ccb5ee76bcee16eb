"""What people keep captioned pictures in -> rows: folders, tables, Hugging Face's imagefolder, tars of img2dataset."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_train.settings import UserError
from clip_train.tars import Span, TarMembers, read_members, read_span

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # what imagefolder calls its tables
IMAGE_COLUMNS = ("image", "file_name")  # looked for, in this order, when none is named
WEB_COLUMNS = ("url", "image_url")


@dataclass(frozen=True)
class Web:
    """A picture that is still on the web."""

    url: str


@dataclass(frozen=True)
class InTar:
    """A picture inside a tar."""

    tar: Path
    span: Span


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of the source: where it is (or its bytes), what is said about it, or why it cannot be used."""

    source: str  # what a person would call it; goes into rejected.csv
    image: Path | bytes | Web | InTar | None = None
    captions: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that was looked through once. rows() starts over each time: they may not fit in memory."""

    rows: Callable[[], Iterator[Row]]
    total: int  # how many rows
    files: list[Path]  # all that it was read from
    base: Path  # what the files' names are relative to


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table (or fields of a json) to use; empty: the usual names."""

    image: str = ""
    captions: tuple[str, ...] = ()  # in the order that a sample's captions shall have
    fetch: bool = False  # addresses count as pictures


def open_source(path: str | Path, columns: Columns) -> Source:
    """Look through a source. UserError if there is nothing in it that could be a picture with a caption.

    A folder may hold, in this order of precedence: metadata.csv, .jsonl or .parquet (Hugging Face's imagefolder);
    pictures with KEY.txt or KEY.json beside them, or in folders named after their class; tars (img2dataset,
    webdataset), with the .parquet beside each that says what could not be downloaded; tables.
    """
    path = Path(path)
    if not path.is_dir():
        return _tar_source(path.parent, [path], columns) if _is_tar(path) else _table_source([path], columns)
    files = _files_below(path)
    metadata = [file for file in files if file.name.lower() in METADATA]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    tars = [file for file in files if file.suffix == ".tar"]
    tables = [file for file in files if file.suffix.lower() in TABLES]
    if metadata:
        return _imagefolder_source(path, pictures, metadata, columns)
    if pictures:
        return _folder_source(path, pictures, columns)
    if tars:
        return _tar_source(path, tars, columns)
    if tables:
        return _table_source(tables, columns)
    raise UserError(f"{path}/ holds no pictures ({', '.join(sorted(SUFFIXES))}), no tars and no tables")


def _files_below(folder: Path) -> list[Path]:
    """All files below the folder, hidden ones aside, by path."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _name(file: Path, folder: Path) -> str:
    return _shown(file.relative_to(folder).as_posix())


def _shown(name: str) -> str:
    """A name of any bytes as text that can be written; Python keeps bytes that are not UTF-8 as lone surrogates."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if not name.isascii() else name


# Folders


def _folder_source(folder: Path, pictures: list[Path], columns: Columns) -> Source:
    files = [path for file in pictures for path in (file, *_sidecars(file))]
    by_class = len(files) == len(pictures)
    describe = _class_row if by_class else _sidecar_row

    def rows() -> Iterator[Row]:
        for file in pictures:
            yield describe(_name(file, folder), file, folder, columns)

    return Source(rows=rows, total=len(pictures), files=files, base=folder)


def _class_row(source: str, file: Path, folder: Path, columns: Columns) -> Row:
    label = file.parent.name.replace("_", " ").replace("-", " ").strip() if file.parent != folder else ""
    return Row(source=source, image=file, captions=[label] if label else [], meta={"label": label} if label else {})


def _sidecars(file: Path) -> list[Path]:
    """KEY.txt and KEY.json beside a picture, where they exist."""
    return [path for path in (file.with_suffix(".txt"), file.with_suffix(".json")) if path.is_file()]


def _sidecar_row(source: str, file: Path, folder: Path, columns: Columns) -> Row:
    try:
        beside = {path.suffix: path.read_bytes() for path in _sidecars(file)}
    except OSError as error:
        return Row(source=source, problem=f"its caption cannot be read: {error.strerror}")
    return _described(source, file, beside.get(".txt"), beside.get(".json"), columns)


def _described(source: str, image: Path | InTar, text: bytes | None, meta: bytes | None, columns: Columns) -> Row:
    """A row out of a picture, the KEY.txt and the KEY.json that belong to it."""
    try:
        said = (text or b"").decode("utf-8-sig")
        record = json.loads(meta) if meta is not None else {}
    except UnicodeDecodeError:
        return Row(source=source, problem="its caption is not UTF-8")
    except (ValueError, RecursionError):
        return Row(source=source, problem="its .json cannot be read")
    if isinstance(record, list):
        record = {"captions": record}  # a bare list of captions
    if not isinstance(record, dict):
        return Row(source=source, problem="its .json is neither an object nor a list of captions")
    if columns.captions:
        captions = _texts(*(_maybe_list((record | {"txt": said}).get(name)) for name in columns.captions))
    else:
        captions = _texts(said, record.get("caption"), record.get("captions"))
    return Row(source=source, image=image, captions=captions, meta=_kept_meta(record, columns.captions))


def _texts(*said: Any) -> list[str]:
    """The distinct captions in strings and lists of strings, stripped, in order."""
    texts = [text for one in said for text in (one if isinstance(one, list) else [one]) if isinstance(text, str)]
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _kept_meta(meta: dict[str, Any], used: Iterable[str] = ()) -> dict[str, Any]:
    """What of a source's json or row goes on into the sample's json, beside what the shard says itself."""
    own = {"key", "caption", "captions", "width", "height", "sha256", *used}
    return {name: v for name, v in meta.items() if name not in own and v is not None and v != "" and is_json(v)}


def is_json(value: Any) -> bool:
    """Whether a value can be written as json in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair cannot be encoded
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# Hugging Face's imagefolder: metadata.csv, .jsonl or .parquet, whose column file_name is relative to where it lies


def _imagefolder_source(folder: Path, pictures: list[Path], metadata: list[Path], columns: Columns) -> Source:
    columns = Columns(image=columns.image or "file_name", captions=columns.captions)
    if len({file.parent for file in metadata}) < len(metadata):
        raise UserError(f"{folder}/ has metadata files of several kinds side by side; keep one of them in each folder")
    named = [file and os.path.abspath(file) for table in metadata for file in _table_files(table, columns)]
    known = set(named)
    unnamed = [file for file in pictures if os.path.abspath(file) not in known]

    def rows() -> Iterator[Row]:
        for table in metadata:
            yield from _table_rows(table, columns, folder)
        for file in unnamed:
            yield Row(source=_name(file, folder), problem="no row in a metadata file")

    return Source(rows=rows, total=len(named) + len(unnamed), files=[*metadata, *pictures], base=folder)


# Tars of img2dataset, or of anybody who writes webdataset's KEY.jpg, KEY.txt, KEY.json


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and path.is_file()


def _tar_source(folder: Path, tars: list[Path], columns: Columns) -> Source:
    total, files = 0, []
    for tar in tars:
        members, failed = _in_tar(tar)
        total += len(members.samples) + len(members.twice) + bool(members.damage) + len(failed)
        files += [tar, *([tar.with_suffix(".parquet")] if tar.with_suffix(".parquet").is_file() else [])]

    def rows() -> Iterator[Row]:
        for tar in tars:
            yield from _tar_rows(tar, _name(tar, folder), columns)

    return Source(rows=rows, total=total, files=files, base=folder)


def _in_tar(tar: Path) -> tuple[TarMembers, dict[str, str]]:
    """A tar's members, and of the .parquet that img2dataset puts beside it {key: why it is not in the tar}."""
    members = read_members(tar)
    table = tar.with_suffix(".parquet")
    failed = {}
    if table.is_file():
        for record in _read_parquet(table, ["key", "url", "status", "error_message"]):
            if isinstance(record, str):
                continue
            key, status = str(record.get("key")), record.get("status", "success")
            if status != "success" and key not in members.samples:
                why = " ".join(str(record.get("error_message") or "").split())
                failed[key] = f"{str(status).replace('_', ' ')}: {why or 'no reason given'}"
    return members, failed


def _tar_rows(tar: Path, name: str, columns: Columns) -> Iterator[Row]:
    members, failed = _in_tar(tar)
    for key, parts in members.samples.items():
        source = f"{name}/{_shown(key)}"
        suffix = next((s for s in parts if f".{s}" in SUFFIXES), None)
        if suffix is None:
            yield Row(source=source, problem="no picture: " + ", ".join(f".{s}" for s in parts))
            continue
        try:
            text, meta = (read_span(tar, parts[s]) if s in parts else None for s in ("txt", "json"))
        except OSError as error:
            yield Row(source=source, problem=f"cannot be read: {error.strerror}")
            continue
        yield _described(source, InTar(tar, parts[suffix]), text, meta, columns)
    for member in members.twice:
        yield Row(source=f"{name}/{_shown(member)}", problem="twice in its tar")
    if members.damage:
        yield Row(source=name, problem=f"damaged tar: {members.damage}")
    for key, why in failed.items():
        yield Row(source=f"{name}/{key}", problem=why)


# Tables


def _table_source(tables: list[Path], columns: Columns) -> Source:
    for table in tables:
        _check_table(table)
    several = os.path.commonpath([table.parent for table in tables]) if len(tables) > 1 else None
    total, files = 0, [*tables]
    for table in tables:
        for file in _table_files(table, columns):
            total += 1
            files += [file] if file else []

    def rows() -> Iterator[Row]:
        for table in tables:
            yield from _table_rows(table, columns, Path(several) if several else None)

    return Source(rows=rows, total=total, files=files, base=tables[0].parent)


def _check_table(source: Path) -> None:
    kinds = ", ".join(sorted(TABLES))
    if not source.is_file():
        raise UserError(f"{source} does not exist; expected a folder of pictures or tars, or a table ({kinds})")
    if source.suffix.lower() not in TABLES:
        raise UserError(f"{source} is neither a folder, nor a tar, nor a table ({kinds})")


def _table_files(table: Path, columns: Columns) -> Iterator[Path | None]:
    """The picture's file, if it is one, of every row; of a Parquet table nothing else is read for this."""
    image, _ = _used_columns(table, columns)
    for record in _read_parquet(table, [image], True) if _is_parquet(table) else _records(table):
        cell = record.get(image) if isinstance(record, dict) else None
        yield table.parent / cell.strip() if isinstance(cell, str) and cell.strip() and "://" not in cell else None


def _table_rows(table: Path, columns: Columns, folder: Path | None) -> Iterator[Row]:
    """folder: when there are several tables, what the rows' names are relative to."""
    image, captions = _used_columns(table, columns)
    where = f"{_name(table, folder)} row" if folder else "row"
    for n, record in enumerate(_records(table)):
        if isinstance(record, str):
            yield Row(source=f"{where} {n}", problem=record)
        else:
            yield _record_row(table, f"{where} {n}", record, image, captions, columns.fetch)


def _used_columns(table: Path, columns: Columns) -> tuple[str, tuple[str, ...]]:
    """The columns of the pictures and of the captions; UserError if the table has none such, or no rows."""
    if _is_parquet(table):
        names = _parquet_columns(table)
    else:
        names = [str(name) for name in next((record for record in _records(table) if isinstance(record, dict)), {})]
    if not names:
        raise UserError(f"{table} has no rows that can be read")
    has = f"{table} has the columns {', '.join(names)}"
    by_name = {name.lower(): name for name in reversed(names)}
    usual = (*IMAGE_COLUMNS, *WEB_COLUMNS) if columns.fetch else IMAGE_COLUMNS
    image = columns.image or next((by_name[name] for name in usual if name in by_name), IMAGE_COLUMNS[0])
    if image not in names:
        web = [by_name[name] for name in WEB_COLUMNS if name in by_name]
        if web and not columns.image:
            raise UserError(
                f"{has}: addresses in {web[0]!r}, but no column {image!r} of files; add --fetch to download them, "
                "or use img2dataset, whose tars can be used as they are"
            )
        raise UserError(f"{has}, but not {image!r}; name the one with the picture files: --image-column")
    captions = columns.captions or tuple(by_name[name] for name in ("caption", "captions") if name in by_name)
    captions = captions or (by_name.get("text", "caption"),)
    # each line of a .jsonl may have fields of its own, so that there the first line can lack some
    missing = [name for name in captions if name not in names]
    if missing and (table.suffix.lower() != ".jsonl" or len(missing) == len(captions)):
        raise UserError(f"{has}, but not {missing[0]!r}; name the one with the captions: --caption-column")
    return image, captions


def _record_row(
    table: Path, row: str, record: dict[str, Any], image_column: str, caption_columns: Sequence[str], fetch: bool
) -> Row:
    image = record.get(image_column)
    if isinstance(image, dict):  # Hugging Face's Image column: {"bytes", "path"}
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        source = row
    elif isinstance(image, str) and image.strip():
        source, image = image.strip(), table.parent / image.strip()
        if "://" in source:
            if not fetch:
                return Row(source=source, problem="an address, not a file: --fetch downloads, or img2dataset")
            image = Web(source)
    else:
        return Row(source=row, problem=f"nothing in column {image_column}")
    captions = _texts(*(_maybe_list(record.get(name)) for name in caption_columns))
    kept = _kept_meta(record, (*caption_columns, *([] if isinstance(image, Web) else [image_column])))
    return Row(source=source, image=image, captions=captions, meta=kept)


def _maybe_list(value: Any) -> Any:
    """A cell that holds a json list of captions, as the list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        return listed if isinstance(listed, list) and all(isinstance(v, str) for v in listed) else value
    return value


def _records(table: Path) -> Iterator[dict[str, Any] | str]:
    """Rows as dicts; of a row that is none, what is wrong with it."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return readers.get(table.suffix.lower(), _read_csv)(table)


def _read_csv(table: Path) -> Iterator[dict[str, Any] | str]:
    csv.field_size_limit(10_000_000)
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            header = next(rows, [])
            for row in filter(None, rows):
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                else:
                    yield f"wrong number of fields: {len(row)} where the header has {len(header)}"
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


def _is_parquet(table: Path) -> bool:
    return table.suffix.lower() == ".parquet"


def _read_parquet(
    table: Path, columns: Sequence[str] | None = None, strings_only: bool = False
) -> Iterator[dict[str, Any] | str]:
    """Rows as _records() gives them. columns: read no others. strings_only: and of these only the ones that hold text
    (pictures are large)."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            wanted = [
                column.name
                for column in file.schema_arrow
                if (columns is None or column.name in columns) and (not strings_only or _is_text(column.type))
            ]
            if not wanted:
                yield from ({} for _ in range(file.metadata.num_rows))
                return
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                yield from _rows_of(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table} cannot be read as Parquet: {error}") from error


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch of Parquet, whose texts nobody has checked."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "its text is not UTF-8"


def _parquet_columns(table: Path) -> list[str]:
    """The names of the columns; [] if there are no rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            return list(file.schema_arrow.names) if file.metadata.num_rows else []
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table} cannot be read as Parquet: {error}") from error


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
