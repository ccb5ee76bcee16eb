"""The vectors behind an index folder: out of the embeddings it was built from, or else out of the index itself."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np

from clip_train.folder import Manifest, read_manifest
from clip_train.settings import UserError
from clip_train.store import BROKEN_ARRAY, EmbeddingStore
from retrieval import seal

ROWS = "rows.npy"  # of a compacted folder: the row of its sources, counted through them, that each of its rows was
BLOCK = 16_384  # vectors that are made at a time

_lock = threading.Lock()  # faiss makes its map from rows to vectors on demand


class Vectors:
    """The unit rows of an index folder by number; exact where the embeddings are still there, else as the index
    remembers them."""

    def __init__(self, manifest: Manifest, index: Callable[[str], faiss.Index]) -> None:
        """manifest: of an index folder. index: modality -> its faiss index, asked only when the embeddings are gone."""
        self.manifest = manifest
        self._index = index
        self.dim: int = manifest.result["dim"]
        rows = manifest.folder / ROWS
        seal.refuse_changed(rows, manifest.result.get(ROWS))
        self._ends = np.cumsum([source.result["rows"] for source in sources_of(manifest)])
        self._source_row = _numbers_in(rows, manifest.result["rows"], self._ends[-1]) if rows.exists() else None

    @cached_property
    def stores(self) -> list[EmbeddingStore | None]:
        """The embeddings of each source, in order; None where they are gone or are no longer the same."""
        return self.find()

    def find(self, looked: Sequence[Path | str] = ()) -> list[EmbeddingStore | None]:
        """The same, when they may also be in one of the folders `looked`; from now on they are read from there."""
        self.stores = [store_of(source, looked) for source in sources_of(self.manifest)]
        return self.stores

    @property
    def exact(self) -> bool:
        """Whether all the embeddings are there."""
        return None not in self.stores

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the source that each row came from, and (N,) its row there."""
        at = np.asarray(rows, dtype=np.int64)
        at = at if self._source_row is None else np.asarray(self._source_row)[at]
        owner = np.searchsorted(self._ends, at, side="right")
        return owner, at - np.concatenate([[0], self._ends])[owner]

    def __call__(self, rows: np.ndarray, modality: str = "image") -> np.ndarray:
        """(N, D) float32 unit rows; UserError if they can be had neither way."""
        rows = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        owner, place = self.places(rows)
        for s in np.unique(owner).tolist():
            mine, store = owner == s, self.stores[s]
            if store is None:
                out[mine] = reconstruct(self._index(modality), rows[mine])
            else:
                out[mine] = store.image(place[mine]) if modality == "image" else store.text(place[mine])
        return out


def _numbers_in(path: Path, count: int, below: int) -> np.ndarray:
    """(count,) the numbers in a file, all of them 0 .. below - 1."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.shape == (count,) and rows.dtype.kind in "iu" and 0 <= rows.min() and rows.max() < below:
            return rows
    except (*BROKEN_ARRAY, AttributeError):
        pass
    raise UserError(f"{path} is damaged; make the index again: unclip index")


def sources_of(manifest: Manifest) -> list[Manifest]:
    """A manifest for each embeddings folder that an index folder was built from: its inputs, rows and shards.

    A folder built at one go is its own source; the result of a compacted one names which of its inputs belong together.
    """
    return [
        replace(
            manifest,
            inputs={name: manifest.inputs[recorded] for name, recorded in source["inputs"].items()},
            result={**manifest.result, "rows": source["rows"], "shards": source["shards"]},
        )
        for source in manifest.result.get("sources", [])
    ] or [manifest]


def store_of(source: Manifest, looked: Sequence[Path | str] = ()) -> EmbeddingStore | None:
    """The embeddings a source names: where they were, or in one of the folders `looked`; None if in none of them."""
    recorded = source.input_path("embeddings")
    for folder in [*([] if recorded is None else [recorded]), *looked]:
        try:
            if read_manifest(folder, "embeddings").fingerprint == source.inputs["embeddings"]["fingerprint"]:
                return EmbeddingStore.open(folder)
        except UserError:  # another folder stands there now
            continue
    return None


def reconstruct(index: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """(N, D) float32 unit rows as the index remembers them: SQ8 is off by a cosine of about 0.001."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    with _lock:
        inner = faiss.try_extract_index_ivf(index)
        if inner is not None and inner.direct_map.type == faiss.DirectMap.NoMap:
            inner.make_direct_map()
    out = np.empty((len(rows), index.d), dtype=np.float32)
    for low in range(0, len(rows), BLOCK):
        out[low : low + BLOCK] = index.reconstruct_batch(rows[low : low + BLOCK])
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
