"""EmbeddingStore: the on-disk contract between CLIP and all that follows.

The layout is clip-retrieval's, plus captions_emb/:

    img_emb/img_emb_N.npy            (n, D) float16, unit rows: one picture each
    text_emb/text_emb_N.npy          (n, D) float16, unit rows: the picture's first caption
    metadata/metadata_N.parquet      n rows: image_path (the sample's key), caption, captions, then the sample's json
    captions_emb/captions_emb_N.npy  (m, D) float16, unit rows: every caption of every picture of the part
    captions_emb/captions_row_N.npy  (m,) int64, ascending: the row in the part that each of them belongs to

Row i of the first three is one sample. A row number of the whole store counts through the parts in the order of their
names; N is zero-padded, so that this is the order of the shards. Parts without rows have no files.
"""

import io
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.folder import Manifest, read_manifest, write_file
from clip_train.settings import UserError

NORM_TOLERANCE = 5e-3  # a unit row rounded to float16 is off by less than 1e-3
KEPT_BYTES = 512_000_000  # of metadata that stays in memory; beyond it a row costs the reading of its part
# what numpy raises of damaged .npy files, those that declare more rows than any memory holds among them
BROKEN_ARRAY = (OSError, ValueError, EOFError, ArithmeticError, MemoryError, SyntaxError)
SAMPLED_ROWS = 4096  # rows whose values open() looks at
NESTED = 8  # lists within lists in a column; deeper ones become json text
_AGAIN = "make it again: unclip embed"


class EmbeddingStore:
    """Embeddings on disk, memory-mapped. Rows are handed out as float32, of unit length to float16's rounding."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.table = MetadataTable(folder / "metadata")
        self.names = [path.stem.removeprefix("metadata_") for path in self.table.paths]
        self.image_parts = [_map(path) for path in self._paths("img_emb")]
        self.text_parts = [_map(path) for path in self._paths("text_emb")]
        self.starts = self.table.starts  # part p holds rows starts[p] .. starts[p + 1]

    @classmethod
    def open(cls, folder: Path | str) -> "EmbeddingStore":
        """Map the parts and check them; the values of a few thousand rows are looked at, spread over all parts.

        UserError: not an embeddings folder, a file missing or cut short, parts that disagree, rows not of length 1.
        """
        folder = Path(folder)
        store = cls(folder, read_manifest(folder, "embeddings"))
        if not len(store):
            raise UserError(f"{folder}/ holds no embeddings; {_AGAIN}")
        store._check()
        return store

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def dim(self) -> int:
        """D, the width of an embedding."""
        return self.image_parts[0].shape[1]

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def image(self, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N, D) float32 picture embeddings, of all rows or of those asked for."""
        return self._rows(self.image_parts, rows)

    def text(self, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N, D) float32 embeddings of the first captions, of all rows or of those asked for."""
        return self._rows(self.text_parts, rows)

    def blocks(self, size: int = 65536, modality: str = "image") -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (b, D) float32) with b <= size, through the whole store; never more than a block in memory."""
        parts = {"image": self.image_parts, "text": self.text_parts}[modality]
        for start, part in zip(self.starts, parts, strict=False):
            for low in range(0, len(part), size):
                yield int(start) + low, np.asarray(part[low : low + size], dtype=np.float32)

    @cached_property
    def keys(self) -> list[str]:
        """The sample key of every row."""
        return self.table.column("image_path")

    @cached_property
    def metadata(self) -> Any:
        """Everything known of every row, as a pandas DataFrame."""
        import pandas as pd

        return pd.concat([part.to_pandas() for part in self.table.parts()], ignore_index=True)

    def captions(self) -> tuple[np.ndarray, np.ndarray]:
        """(M, D) float32 embeddings of all captions, and (M,) the row of the store that each belongs to, ascending."""
        emb, row = [], []
        for start, count, name in zip(self.starts, self.table.counts, self.names, strict=False):
            emb.append(_map(self.folder / "captions_emb" / f"captions_emb_{name}.npy"))
            if emb[-1].dtype.kind == "f":  # else refused below
                emb[-1] = np.asarray(emb[-1], dtype=np.float32)
            row.append(_map(self.folder / "captions_emb" / f"captions_row_{name}.npy"))
            if row[-1].ndim != 1 or row[-1].dtype.kind not in "iu" or (row[-1][1:] < row[-1][:-1]).any():
                row[-1] = np.empty(0, dtype=np.int64)  # refused below
            wide = (len(row[-1]), self.dim)
            if emb[-1].dtype != np.float32 or emb[-1].shape != wide or set(np.unique(row[-1])) != set(range(count)):
                raise UserError(
                    f"{self.folder}/captions_emb/ part {name} is {emb[-1].shape} for {len(row[-1])} captions of "
                    f"{count} rows of width {self.dim}; {_AGAIN}"
                )
            if (bad := first_not_unit(emb[-1])) is not None:
                raise UserError(f"{self.folder}/captions_emb/ part {name}, row {bad} is not of length 1; {_AGAIN}")
            row[-1] = row[-1] + start
        return np.concatenate(emb), np.concatenate(row)

    def first_captions(self) -> list[str]:
        """The first caption of every row; "" where another writer noted none."""
        return [text or "" for text in self.table.column("caption")]

    def caption_texts(self) -> list[str]:
        """The text of every row of captions(); fewer where another writer noted none."""
        return [text or "" for texts in self.table.column("captions") for text in texts or ()]

    def where(self, row: int) -> str:
        """A row's place on disk, for error messages."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"part {self.names[part]}, row {row - int(self.starts[part])}"

    def _rows(self, parts: list[np.ndarray], rows: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if rows is None:
            return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of a store of {len(self)}")
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for p in np.unique(owner):
            mine = owner == p
            out[mine] = parts[p][rows[mine] - self.starts[p]]
        return out

    def _paths(self, *kinds: str) -> list[Path]:
        return [self.folder / kind / f"{kind}_{name}.npy" for kind in kinds for name in self.names]

    def _check(self) -> None:
        for path, rows in zip(self._paths("img_emb", "text_emb"), [*self.image_parts, *self.text_parts], strict=True):
            if rows.ndim < 1 or rows.dtype.kind != "f":
                raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}, not rows of numbers; {_AGAIN}")
        width = self.image_parts[0].shape[1:]
        share = -(-SAMPLED_ROWS // len(self.names))
        for p, name in enumerate(self.names):
            image, text = self.image_parts[p], self.text_parts[p]
            if not len(image) == len(text) == self.table.counts[p]:
                raise UserError(
                    f"{self.folder}/ part {name} has {len(image)} picture rows, {len(text)} text rows and "
                    f"{self.table.counts[p]} metadata rows; they must be equal; {_AGAIN}"
                )
            for kind, rows in (("img_emb", image), ("text_emb", text)):
                if rows.ndim != 2 or rows.shape[1:] != width:
                    raise UserError(
                        f"{self.folder}/{kind}/ part {name} is {rows.shape}, but part {self.names[0]} is "
                        f"{len(self.image_parts[0])} rows of width {width[0] if width else '?'}; {_AGAIN}"
                    )
                looked_at = np.linspace(0, len(rows) - 1, min(len(rows), share)).astype(int)
                bad = first_not_unit(rows[looked_at])
                if bad is not None:
                    raise UserError(
                        f"{self.folder}/{kind}/ part {name}, row {looked_at[bad]} has length "
                        f"{np.linalg.norm(rows[looked_at[bad]].astype(np.float64)):.3g}, not 1; {_AGAIN}"
                    )


class MetadataTable:
    """The parquet files of a metadata folder as one table, in the order of their names; read part by part."""

    def __init__(self, folder: Path, again: str = _AGAIN) -> None:
        """again: the way out where a file is damaged. UserError: a file that is."""
        import pyarrow.parquet as pq

        self.again = again
        self.paths = sorted(folder.glob("*.parquet"))
        try:
            parts = [pq.read_metadata(path) for path in self.paths]
            for path, part in zip(self.paths, parts, strict=True):
                _refuse_columns(part.schema.to_arrow_schema(), path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise UserError(f"{folder}/ cannot be read: {_line(error)}; {self.again}") from error
        self.counts = [part.num_rows for part in parts]
        self.starts = np.cumsum([0, *self.counts])
        read = weakref.WeakMethod(self._read)  # no circle: a table that goes lets go of its files at once
        self._part = _LastRead(lambda part: read()(part), KEPT_BYTES)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, row: int) -> dict[str, Any]:
        """One row as {column: value}, without the columns that are empty in it."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        values = self._part(part).slice(row - int(self.starts[part]), 1).to_pylist()[0]
        return {name: value for name, value in values.items() if value is not None}

    def column(self, name: str) -> list[Any]:
        """One column of all rows; None where a part does not have it."""
        out: list[Any] = []
        for part, count in enumerate(self.counts):
            table = self._read(part, (name,))
            out += table.column(name).to_pylist() if name in table.column_names else [None] * count
        return out

    def parts(self) -> Iterator[Any]:
        """Every part as a pyarrow Table."""
        return (self._read(part) for part in range(len(self.paths)))

    def _read(self, part: int, columns: tuple[str, ...] | None = None) -> Any:
        import pyarrow.parquet as pq

        try:
            return checked_table(pq.ParquetFile(self.paths[part], page_checksum_verification=True), columns)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.paths[part]} cannot be read: {_line(error)}; {self.again}") from error


def checked_table(file: Any, columns: Sequence[str] | None) -> Any:
    """The table in a file, or those of the columns that it has; pandas' categories come out as what they stand for.
    ValueError for texts that are not UTF-8, and for rows without a key."""
    import pyarrow as pa

    table = file.read(columns=None if columns is None else [c for c in columns if c in file.schema_arrow.names])
    for n, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(n, field.name, table.column(n).cast(field.type.value_type))
    table.validate(full=True)
    if "image_path" in table.column_names and table.column("image_path").null_count:
        raise ValueError("a row has no image_path, its key")
    return table


def _refuse_columns(schema: Any, path: Path) -> None:
    """ValueError unless there are keys, and each column once."""
    import pyarrow as pa

    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{path.name} has a column twice")
    kinds = {field.name: field.type for field in schema}
    kinds = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    texts = (pa.string(), pa.large_string())
    if kinds.get("image_path", texts[0]) not in texts:
        raise ValueError(f"the column image_path of {path.name} does not hold texts")
    if kinds.get("caption", pa.null()) not in (*texts, pa.null()):
        raise ValueError(f"the column caption of {path.name} does not hold texts")
    if not pa.types.is_nested(kind := kinds.get("captions", pa.null())) and kind != pa.null():
        raise ValueError(f"the column captions of {path.name} does not hold lists")
    if "image_path" not in schema.names:
        raise ValueError(f"{path.name} has no column image_path")


class _LastRead:
    """read(part), kept: the parts that were asked for last, as many as fit into `most` bytes. Thread-safe."""

    def __init__(self, read: Callable[[int], Any], most: int) -> None:
        self._read, self._most = read, most
        self._kept: dict[int, Any] = {}  # the one asked for last at the end
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, part: int) -> Any:
        with self._lock:
            if (table := self._kept.pop(part, None)) is not None:
                self._kept[part] = table
                return table
        table = self._read(part)
        with self._lock:
            if part not in self._kept:
                self._kept[part] = table
                self._bytes += table.nbytes
            while self._bytes > self._most and len(self._kept) > 1:
                self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return table


class EmbeddingWriter:
    """Writes the parts of an embeddings folder, whole or not at all; a killed run's finished parts are kept."""

    def __init__(self, folder: Path, parts: int) -> None:
        """folder: the workspace. parts: how many parts there will be, empty ones included."""
        self.folder = folder
        self.digits = len(str(parts))
        for name in ("img_emb", "text_emb", "captions_emb", "metadata", "scratch"):
            (folder / name).mkdir(exist_ok=True)

    def finished(self, part: int) -> dict[str, Any] | None:
        """What write() noted about the part, if it is whole."""
        try:
            return json.loads(self._note(part).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write(
        self,
        part: int,
        image: np.ndarray,
        captions: np.ndarray,
        captions_row: np.ndarray,
        metadata: Sequence[Mapping[str, Any]],
        note: Mapping[str, Any],
    ) -> None:
        """Write one part. image (n, D); captions (m, D); captions_row (m,) ascending, every row 0 .. n-1 in it.

        metadata: n dicts that hold image_path, caption and captions first. note: kept until publish, for finished().
        A part is whole when its note is there; the note comes last, the metadata before it.
        """
        n = len(image)
        if n:
            first = np.searchsorted(captions_row, np.arange(n))
            assert len(metadata) == n and np.array_equal(captions_row[first], np.arange(n)), "a row without a caption"
            name = f"{part:0{self.digits}d}"
            self._save(f"img_emb/img_emb_{name}.npy", image.astype(np.float16))
            self._save(f"text_emb/text_emb_{name}.npy", captions[first].astype(np.float16))
            self._save(f"captions_emb/captions_emb_{name}.npy", captions.astype(np.float16))
            self._save(f"captions_emb/captions_row_{name}.npy", captions_row.astype(np.int64))
            write_file(self.folder / "metadata" / f"metadata_{name}.parquet", _parquet(metadata))
        write_file(self._note(part), json.dumps(dict(note)).encode())

    def adopt(self, part: int, folder: Path, name: str, note: Mapping[str, Any]) -> None:
        """Make the part out of the finished one called `name` in another folder, which keeps it."""
        if note["rows"]:
            own = f"{part:0{self.digits}d}"
            for kind in (
                "img_emb/img_emb",
                "text_emb/text_emb",
                "captions_emb/captions_emb",
                "captions_emb/captions_row",
            ):
                _link(folder / f"{kind}_{name}.npy", self.folder / f"{kind}_{own}.npy")
            _link(folder / f"metadata/metadata_{name}.parquet", self.folder / f"metadata/metadata_{own}.parquet")
        write_file(self._note(part), json.dumps(dict(note)).encode())

    def _note(self, part: int) -> Path:
        return self.folder / "scratch" / f"part_{part:0{self.digits}d}.json"

    def _save(self, name: str, array: np.ndarray) -> None:
        file = io.BytesIO()
        np.save(file, array)
        write_file(self.folder / name, file.getvalue())


def _link(old: Path, new: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    new.unlink(missing_ok=True)  # of a run that was killed in here
    try:
        os.link(old, new)
    except OSError:
        write_file(new, old.read_bytes())


def first_not_unit(rows: np.ndarray) -> int | None:
    """The first of (N, D) rows that is not finite or not of length 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(np.asarray(rows, dtype=np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # not (..) also catches NaN
    return int(bad[0]) if len(bad) else None


def _map(path: Path) -> np.ndarray:
    try:
        return _load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {_AGAIN}") from error
    except BROKEN_ARRAY as error:
        raise UserError(f"{path} is damaged: {_line(error)}; {_AGAIN}") from error


def _load(path: Path | str, mmap_mode: str | None = None) -> np.ndarray:
    """The array in a .npy file; neither a pickle nor an .npz of several, which numpy would look into."""
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("not a .npy file")
    with np.errstate(all="ignore"):  # a header may declare more rows than can be counted
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Nested json becomes a.b columns, as clip-retrieval flattens it; a column of several types becomes json text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    file = io.BytesIO()
    table = pa.table({_written(name): _column([row.get(name) for row in flat]) for name in names})
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        out.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return out


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        column = pa.array(values)
        kind = str(column.type)
        # a struct may be empty, which parquet cannot hold; nor does it read again what it has nested 100 deep
        if "struct" not in kind and kind.count("list<") <= NESTED:
            return column
    except (pa.ArrowException, OverflowError, UnicodeError):
        pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array([v if v is None else _written(v) for v in texts])


def _written(text: str) -> str:
    r"""A text that came out of bytes that are no UTF-8, or out of half a pair of surrogates, with these as \udcff: so
    two keys that differ still do."""
    return text.encode(errors="backslashreplace").decode()


def read_vectors(path: Path | str) -> np.ndarray:
    """The rows of a .npy file, (Q, D) float32; one vector (D,) is one row. UserError if it holds anything else."""
    try:
        rows = _load(path)
    except BROKEN_ARRAY as error:
        raise UserError(f"{path} cannot be read as a .npy file of vectors ({_line(error)})") from error
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or not rows.size:
        raise UserError(f"{path} holds {rows.shape} of {rows.dtype}, not vectors (Q, D)")
    return np.ascontiguousarray(rows, dtype=np.float32)
