"""LiveIndex: an index folder as it stands now: what was built, what was added since, without what was deleted.

    index/           manifest.json, image.index, text.index, metadata/: the base, built at one go
    index/segments/  NAME/: such a folder each, for embeddings that were added
    index/deleted/   NAME.npy: the numbers of the rows that count as gone
    index/state.json names the segments in their order and the file of deleted rows; without it, there are none

A row number counts the base's rows, then segment after segment, deleted rows included; it stays as it is until
`unclip index compact`. Files are never changed once state.json names them, and state.json changes by one rename, so a
reader sees all of a change or nothing of it.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clip_train.folder import Manifest, read_manifest
from clip_train.settings import UserError
from clip_train.store import MetadataTable, checked_table
from retrieval import swap
from retrieval.filtered import Answer, FilteredIndex, Mask, best_of, nothing_found
from retrieval.index import MODALITIES, load_index
from retrieval.vectors import Vectors, sources_of

STATE = "state.json"
SEGMENTS, DELETED = "segments", "deleted"
KEY = "image_path"  # the metadata's column of keys
TRIES = 20  # to read a folder that is changed meanwhile
HELD = 500  # files of metadata that are kept open, so that they stay readable when the folder is compacted
KEPT = 64  # columns of keys that stay in memory
BLOCK = 16_384  # rows that are scored again at a time
AGAIN = "make it again: unclip index"


@dataclass(frozen=True)
class State:
    """state.json."""

    segments: list[dict[str, Any]] = field(default_factory=list)  # name, rows, fingerprint, embeddings
    deleted: dict[str, Any] | None = None  # file, rows, fingerprint

    @classmethod
    def read(cls, folder: Path) -> "State":
        """What state.json says; a folder without it is only the base."""
        try:
            state = cls(**json.loads((folder / STATE).read_text()))
            state.refuse_malformed()
            return state
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / STATE} is damaged ({error}); {AGAIN}") from error

    def refuse_malformed(self) -> None:
        """ValueError if it names no files, or files elsewhere."""
        deleted = [] if self.deleted is None else [self.deleted]
        if not isinstance(self.segments, list) or not all(isinstance(one, dict) for one in [*self.segments, *deleted]):
            raise ValueError("its segments or its deleted rows are no objects")
        names = [*(segment.get("name") for segment in self.segments), *(one.get("file") for one in deleted)]
        if not all(isinstance(name, str) and Path(name).name == name and name.strip(".") for name in names):
            raise ValueError("a segment or the deleted rows have no name of a file")


class LiveIndex:
    """An index folder, ready to be searched; it keeps seeing the folder as it was when it was opened."""

    def __init__(self, folder: Path, state: str, parts: list["Part"], deleted: np.ndarray) -> None:
        self.folder = folder
        self.state = state  # changes with every add, delete and compact
        self.parts = parts
        self.manifest = parts[0].manifest
        self.dim: int = self.manifest.result["dim"]
        self.table = LiveTable([part.folder / "metadata" for part in parts])
        self.starts = np.cumsum([0, *(part.rows for part in parts)])  # part p holds rows starts[p] .. starts[p + 1]
        self.rows = int(self.starts[-1])  # of all numbers, the deleted included
        if len(self.table) != self.rows:
            raise UserError(f"{folder}/metadata/ has {len(self.table)} rows, but the index has {self.rows}; {AGAIN}")
        self.live = np.ones(self.rows, dtype=bool)
        self.live[deleted] = False
        self.live.flags.writeable = False
        self._masks = [Mask(self.live[low:high]) for low, high in self._spans()]

    @classmethod
    def open(cls, folder: Path | str) -> "LiveIndex":
        """UserError: not an index folder, or one that is damaged."""
        return cls._open(Path(folder), {})

    def reopened(self) -> "LiveIndex":
        """The folder as it is now; what did not change is not read again."""
        return self._open(self.folder, {part.manifest.fingerprint: part for part in self.parts})

    @classmethod
    def _open(cls, folder: Path, known: dict[str, "Part"]) -> "LiveIndex":
        for _ in range(TRIES):  # another process may be changing the folder: then what was read may not fit together
            before = cls.state_of(folder)
            try:
                made = cls._read(folder, before, known)
            except (UserError, OSError):
                if cls.state_of(folder) == before:
                    raise
                continue
            if cls.state_of(folder) == before:
                return made
            time.sleep(0.01)
        raise UserError(f"{folder}/ is being changed all the time; try again")

    @classmethod
    def _read(cls, folder: Path, state: str, known: dict[str, "Part"]) -> "LiveIndex":
        said = State.read(folder)
        parts = []
        for part in [folder, *(folder / SEGMENTS / segment["name"] for segment in said.segments)]:
            manifest = read_manifest(part, "index")
            parts.append(known.get(manifest.fingerprint) or Part(manifest))
        for part in parts[1:]:
            if part.manifest.result["dim"] != parts[0].manifest.result["dim"]:
                raise UserError(f"{part.folder}/ is not as wide as {folder}/; {AGAIN}")
        deleted = np.empty(0, dtype=np.int64)
        if said.deleted:
            path = folder / DELETED / said.deleted["file"]
            try:
                deleted = np.load(path, allow_pickle=False)
                rows = sum(part.rows for part in parts)
                if deleted.dtype.kind not in "iu" or deleted.ndim != 1 or not ((0 <= deleted) & (deleted < rows)).all():
                    raise ValueError("not numbers of rows")
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                if said.deleted.get("fingerprint", sha256).removeprefix("sha256:") != sha256:
                    raise ValueError("not the rows that were deleted")
            except (OSError, ValueError, EOFError, AttributeError) as error:
                raise UserError(f"{path} is missing or damaged; {AGAIN}") from error
        return cls(folder, state, parts, deleted)

    @staticmethod
    def state_of(folder: Path | str) -> str:
        """A fingerprint of the folder as it is now, cheap enough to ask for again and again.

        It is made of the base's fingerprint (its indexes and metadata) and of state.json, which holds the segments'
        fingerprints and that of the deleted rows: equal states answer equally.
        """
        folder = Path(folder)
        swap.wait_for(folder)
        manifest = read_manifest(folder, "index")
        try:
            changes = (folder / STATE).read_bytes()
        except FileNotFoundError:
            changes = b""
        return "sha256:" + hashlib.sha256(manifest.fingerprint.encode() + b"\0" + changes).hexdigest()

    def __len__(self) -> int:
        """Rows that are not deleted."""
        return sum(mask.count for mask in self._masks)

    def search(self, queries: np.ndarray, k: int, modality: str = "image", allowed: np.ndarray | None = None) -> Answer:
        """The k best rows for each query: scores (Q, k) float32 and rows (Q, k) int64, best first.

        queries (Q, D) float32 unit rows. allowed (rows,) bool: the rows that may be answers. A deleted row never is
        one. Where fewer than k rows may be, -inf and -1 fill the end.
        """
        queries = np.ascontiguousarray(np.array(queries, dtype=np.float32, ndmin=2))
        if allowed is not None and np.shape(allowed) != (self.rows,):
            raise ValueError(f"allowed is {np.shape(allowed)}, but the index has {self.rows} rows")
        masks = self._masks
        if allowed is not None:
            masks = [
                Mask(mask.allowed & allowed[low:high]) for mask, (low, high) in zip(masks, self._spans(), strict=True)
            ]
        several = sum(mask.count > 0 for mask in masks) > 1
        scores, rows = nothing_found(len(queries), 0)
        for part, mask, low in zip(self.parts, masks, self.starts.tolist(), strict=False):
            if mask.count:
                more, found = part.filtered(modality).search(queries, k, mask)
                if several:
                    more = part.rescored(queries, more, found, modality)
                scores, rows = np.hstack([scores, more]), np.hstack([rows, np.where(found < 0, -1, found + low)])
        return best_of(scores, rows, k)

    def vectors(self, rows: Sequence[int] | np.ndarray, modality: str = "image") -> np.ndarray:
        """(N, D) float32 unit rows: the embeddings while they are there, else what the index remembers of them."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of an index of {self.rows}")
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for p in np.unique(owner).tolist():
            mine = owner == p
            out[mine] = self.parts[p].vectors(rows[mine] - self.starts[p], modality)
        return out

    def rows_of(self, keys: Sequence[str], deleted: bool = False) -> np.ndarray:
        """(N,) int64: the row of each key; -1 where there is none, or (without `deleted`) where it is deleted."""
        return self._keys.rows_of(keys, np.ones_like(self.live) if deleted else self.live)

    def sources(self) -> list[Manifest]:
        """What base and segments were made from: manifests with inputs (embeddings, clip, shards) and result
        (rows, shards), in the order of the rows."""
        return [source for part in self.parts for source in sources_of(part.manifest)]

    def _spans(self) -> list[tuple[int, int]]:
        return list(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))

    @cached_property
    def _keys(self) -> "Keys":
        return Keys(self.table)


class Part:
    """The base or a segment: a folder as build_index makes it. Its files are opened at once, so that they stay readable
    when the folder is compacted; most of an index is read from its file when it is needed."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.folder = manifest.folder
        self.rows: int = manifest.result["rows"]
        self._indexes = {modality: self._load(modality) for modality in MODALITIES}
        self.vectors = Vectors(manifest, self._indexes.__getitem__)
        self._filtered: dict[str, FilteredIndex] = {}

    def index(self, modality: str) -> faiss.Index:
        """The faiss index of the pictures or the captions."""
        return self._indexes[modality]

    def filtered(self, modality: str) -> FilteredIndex:
        """The same, to be asked for some of its rows."""
        if modality not in self._filtered:
            vectors = self.vectors
            self._filtered[modality] = FilteredIndex(self._indexes[modality], lambda rows: vectors(rows, modality))
        return self._filtered[modality]

    def rescored(self, queries: np.ndarray, scores: np.ndarray, rows: np.ndarray, modality: str) -> np.ndarray:
        """(Q, k) the scores of an answer by the embeddings, while they are there: short codes, whose scores are off by
        more than those of another part, are not comparable with them."""
        if self.filtered(modality).exact or not self.vectors.exact:
            return scores
        scores = scores.copy()
        query, place = np.nonzero(rows >= 0)
        for low in range(0, len(query), BLOCK):
            q, at = query[low : low + BLOCK], place[low : low + BLOCK]
            some, which = np.unique(rows[q, at], return_inverse=True)
            scores[q, at] = np.einsum("pd,pd->p", queries[q], self.vectors(some, modality)[which])
        return scores

    def _load(self, modality: str) -> faiss.Index:
        index = load_index(self.folder, modality)
        if index.ntotal != self.rows or index.d != self.manifest.result["dim"]:
            raise UserError(
                f"{self.folder}/{modality}.index holds {index.ntotal} rows of width {index.d}, but the folder has "
                f"{self.rows} rows of width {self.manifest.result['dim']}; {AGAIN}"
            )
        return index


class LiveTable(MetadataTable):
    """The metadata of several folders as one table. Its files are kept open: what a change removes stays readable."""

    def __init__(self, folders: Sequence[Path]) -> None:
        import pyarrow as pa

        tables = [MetadataTable(folder, AGAIN) for folder in folders]
        super().__init__(folders[0], AGAIN)
        self.paths = [path for table in tables for path in table.paths]
        self.counts = [count for table in tables for count in table.counts]
        self.starts = np.cumsum([0, *self.counts])
        self._key_columns: dict[int, Any] = {}
        self._held = [pa.memory_map(str(path)) for path in self.paths] if len(self.paths) <= HELD else self.paths

    def _read(self, part: int, columns: tuple[str, ...] | None = None) -> Any:
        import pyarrow.parquet as pq

        try:
            return checked_table(pq.ParquetFile(self._held[part], page_checksum_verification=True), columns)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.paths[part]} cannot be read ({' '.join(str(error).split())}); {AGAIN}") from error

    def part(self, part: int, columns: tuple[str, ...] | None = None) -> Any:
        """One file as a pyarrow Table; of `columns`, those that it has."""
        return self._read(part, columns)

    def keys_of(self, rows: np.ndarray) -> list[str]:
        """The keys of these rows."""
        out = np.empty(len(rows), dtype=object)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(owner).tolist():
            mine = owner == part
            out[mine] = self._key_column(part).take(rows[mine] - int(self.starts[part])).to_pylist()
        return out.tolist()

    def _key_column(self, part: int) -> Any:
        if part not in self._key_columns:
            if len(self._key_columns) >= KEPT:
                self._key_columns.clear()
            self._key_columns[part] = self._read(part, (KEY,)).column(KEY)
        return self._key_columns[part]


class Keys:
    """key -> rows by sorted hashes: 16 bytes a row."""

    def __init__(self, table: LiveTable) -> None:
        self._table = table
        hashes = [np.empty(0, dtype=np.int64)]
        for part, count in enumerate(table.counts):
            keys = table._read(part, (KEY,)).column(KEY).to_pylist()
            hashes.append(np.fromiter(map(hash, keys), dtype=np.int64, count=count))
        hashes = np.concatenate(hashes)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def rows_of(self, keys: Sequence[str], live: np.ndarray) -> np.ndarray:
        """(N,) int64: the live row of each key, -1 where there is none."""
        wanted = np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
        low, high = np.searchsorted(self._hashes, wanted, "left"), np.searchsorted(self._hashes, wanted, "right")
        out = np.full(len(keys), -1, dtype=np.int64)
        asker = np.repeat(np.arange(len(keys)), high - low)
        place = np.arange(len(asker)) - np.repeat(np.cumsum(high - low) - high, high - low)
        rows = self._order[place]
        asker, rows = asker[live[rows]], rows[live[rows]]
        same = [keys[who] == key for who, key in zip(asker.tolist(), self._table.keys_of(rows), strict=True)]
        out[asker[same]] = rows[same]
        return out
