"""Embeddings -> FAISS index: choose a kind, build it, measure it, save it.

The folder is one that `clip-retrieval back` serves: image.index and text.index (plain faiss, inner product, id = row of
the embeddings), and metadata/*.parquet in the same order. What was tried and measured is in the manifest's result.

A kind is taken only if it reaches the recall that is asked for, on queries of the kind that will be asked: captions
against pictures. They lie apart from the pictures (the modality gap), so pictures as queries would flatter the index.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clip_train.folder import Input, Manifest, Workspace
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore, first_not_unit
from retrieval import exact

MODALITIES = ("image", "text")
KINDS = ("auto", "flat", "ivf", "hnsw")
K = 10  # recall is measured at 10
EXACT_UP_TO = 20_000  # rows that a flat index searches in about 2 ms on one core: no approximation pays
QUERIES = 1000  # the knob is turned on so many, then measured on as many others
BLOCK = 65_536  # rows read at a time
PATIENCE = 4  # steps of the knob, each of sqrt(2), that may pass without gain
SECONDS = 0.3  # spent on each measurement of speed


@dataclass(frozen=True)
class Candidate:
    """A kind of index to try."""

    factory: str  # for faiss.index_factory
    bytes_per_row: float
    knob: str = ""  # the run-time setting that trades speed for recall
    most: int = 1  # its largest value of use

    def build(self, store: EmbeddingStore, modality: str, on_progress: Progress | None) -> faiss.Index:
        index = faiss.index_factory(store.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        if self.knob == "nprobe":
            rng = np.random.default_rng(0)
            rows = np.sort(rng.choice(len(store), min(len(store), 64 * index.nlist), replace=False))
            index.train(_rows(store, modality, rows))
        elif self.knob == "efSearch":
            index.hnsw.efConstruction = 80
        elif not index.is_trained:
            index.train(_rows(store, modality, np.arange(min(len(store), BLOCK))))
        for first, rows in store.blocks(BLOCK, modality):
            index.add(rows)
            if on_progress:
                on_progress(first + len(rows), len(store), index=modality, kind=self.factory)
        return index

    def turn(self, index: faiss.Index, value: int) -> None:
        """Set the knob; faiss writes it into the index file."""
        if self.knob == "nprobe":
            index.nprobe = value
        elif self.knob == "efSearch":
            index.hnsw.efSearch = value

    def values(self) -> Iterator[int]:
        """Ever better settings, in steps of the square root of two."""
        value = K if self.knob == "efSearch" else 1
        while value < self.most:
            yield value
            value = max(value + 1, round(value * math.sqrt(2)))
        yield self.most


def candidates(n: int, dim: int, kind: str = "auto") -> list[Candidate]:
    """What to try for n rows, in this order: the first that reaches the recall within the memory is taken.

    Vectors are stored as float16, so SQfp16 loses nothing that they have; SQ8 reaches a recall of about 0.99.
    """
    lists = max(1, min(round(4 * math.sqrt(n)), n // 40))  # k-means wants 39 rows a list
    keys = 4 * dim * lists / n + 8  # bytes per row for the lists' centres and the ids
    flat = [Candidate("Flat", 4 * dim), Candidate("SQfp16", 2 * dim)]
    ivf = [
        Candidate(f"IVF{lists},SQ8", dim + keys, "nprobe", lists),
        Candidate(f"IVF{lists},SQfp16", 2 * dim + keys, "nprobe", lists),
    ]
    hnsw = [Candidate("HNSW32", 4 * dim + 4 * 64 * 1.1, "efSearch", min(n, 4096))]
    if kind == "auto":
        return flat + ivf if n <= EXACT_UP_TO else ivf + flat
    return {"flat": flat, "ivf": ivf + flat, "hnsw": hnsw + flat}[kind]


def build_index(
    embeddings: Path | str,
    out: Path | str,
    *,
    recall: float = 0.95,
    memory: int | str | None = None,
    kind: str = "auto",
    on_progress: Progress | None = None,
) -> Manifest:
    """Build the index folder `out` from an embeddings folder.

    recall: of the 10 true best answers, the share that must be found. memory: bytes for both indexes when loaded, also
    as "500MB" or "4G". kind: auto, flat (exact), ivf or hnsw; what does not reach the recall is replaced by flat.
    The manifest's result has, for image and text: kind, knob, value, recall (on queries that did not choose the value),
    queries_per_second, bytes_per_vector, and tried.
    UserError: rows that are not unit rows, or a recall that the memory does not allow.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} must be one of: {', '.join(KINDS)}")
    if not 0 < recall <= 1:
        raise UserError(f"recall {recall} must be above 0 and at most 1")
    room = None if memory is None else parse_bytes(memory)
    store = EmbeddingStore.open(embeddings)
    inputs = {"embeddings": Input(store.fingerprint, store.folder)}
    for name, given in store.manifest.inputs.items():  # so that the index finds them without the embeddings
        inputs[name] = Input(given["fingerprint"], os.path.normpath(store.folder / given["path"]))
    space = Workspace.open(out, "index", {"recall": recall, "memory": room, "kind": kind}, inputs)
    if space.done:
        return space.done

    result: dict[str, Any] = {"rows": len(store), "dim": store.dim, "threads": faiss.omp_get_max_threads()}
    result["shards"] = store.manifest.result.get("shards", [])
    (space.path / "metadata").mkdir(exist_ok=True)
    for path in store.table.paths:
        shutil.copyfile(path, space.path / "metadata" / path.name)
    for modality in MODALITIES:
        _refuse_broken(store, modality)
        index, result[modality] = _choose(store, modality, recall, room and room // 2, kind, on_progress)
        faiss.write_index(index, str(space.path / f"{modality}.index"))
    return space.publish(result)


def load_index(folder: Path | str, modality: str = "image") -> faiss.Index:
    """image.index or text.index of a folder, memory-mapped where the kind allows it (IVF)."""
    path = Path(folder) / f"{modality}.index"
    if not path.exists():
        raise UserError(f"{path} does not exist; make it: unclip index")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged; make it again: unclip index") from error


def parse_bytes(text: int | str) -> int:
    """500000, "500000", "500MB" or "4G" as bytes; K, M, G, T are powers of 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise UserError(f"memory {text!r} is not a number of bytes such as 500MB or 4G")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _choose(
    store: EmbeddingStore, modality: str, recall: float, room: int | None, kind: str, on_progress: Progress | None
) -> tuple[faiss.Index, dict[str, Any]]:
    """The first candidate that reaches the recall in `room` bytes, and what was measured."""
    tune, test = _questions(store, modality)
    tried: list[dict[str, Any]] = []
    options = candidates(len(store), store.dim, kind)
    for candidate in options:
        if room is not None and candidate.bytes_per_row * len(store) > room:
            continue
        began = time.monotonic()
        index = candidate.build(store, modality, on_progress)
        seconds = time.monotonic() - began
        curve: list[float] = []
        for value in candidate.values():
            candidate.turn(index, value)
            curve.append(reached := tune.recall(index))
            setting = {"kind": candidate.factory, "knob": candidate.knob, "value": value}
            tried.append({**setting, "recall": round(reached, 4), "queries_per_second": tune.speed(index)})
            if reached < recall:
                if len(curve) > PATIENCE and reached - curve[-1 - PATIENCE] < 0.001:
                    break  # its ceiling: what the compression lost cannot be searched for
                continue
            confirmed = test.recall(index)
            if confirmed < recall:  # on queries that it was not turned on: one step further
                continue
            return index, {
                **setting,
                "recall": round(confirmed, 4),
                "queries_per_second": test.speed(index),
                "queries_per_second_by_64": test.speed(index, 64),
                "queries": f"{len(test.queries)} {'text' if modality == 'image' else 'image'} embeddings",
                "bytes_per_vector": round(candidate.bytes_per_row, 1),
                "build_seconds": round(seconds, 2),
                "tried": tried,
            }
    best = max((entry["recall"] for entry in tried), default=None)
    least = min(c.bytes_per_row for c in options if c.factory in ("Flat", "SQfp16")) * len(store) * len(MODALITIES)
    found = "no index of this kind fits" if best is None else f"only a recall of {best} can be had"
    raise UserError(
        f"in memory {room * 2 if room else 'given'} {found}, but {recall} is asked for; "
        f"an exact index needs {math.ceil(least)} bytes: raise --memory or lower --recall"
    )


class Questions:
    """Queries whose true answers are known."""

    def __init__(self, store: EmbeddingStore, modality: str, queries: np.ndarray) -> None:
        parts = store.image_parts if modality == "image" else store.text_parts
        self.queries = queries
        self.best, _ = exact.search(parts, queries, K)
        self._fetch = lambda rows: _rows(store, modality, rows)

    def recall(self, index: faiss.Index) -> float:
        """Recall@10, by the exact scores of what the index finds."""
        k = self.best.shape[1]
        _, found = index.search(self.queries, k)
        rows = self._fetch(np.maximum(found, 0).ravel()).reshape(*found.shape, -1)
        return exact.recall(found, np.einsum("qd,qkd->qk", self.queries, rows), self.best)

    def speed(self, index: faiss.Index, batch: int = 1) -> float:
        """Queries a second, `batch` at a time, for about SECONDS."""
        done, began = 0, time.perf_counter()
        while True:
            low = done % len(self.queries)
            done += len(index.search(self.queries[low : low + batch], self.best.shape[1])[1])
            seconds = time.perf_counter() - began
            if seconds > SECONDS:
                return round(done / seconds, 1)


def _questions(store: EmbeddingStore, modality: str) -> tuple[Questions, Questions]:
    """Queries to turn the knob on, and others to measure on: the other modality's embeddings."""
    other = MODALITIES[1 - MODALITIES.index(modality)]
    rows = np.random.default_rng(1).permutation(len(store))[: 2 * QUERIES]
    half = (len(rows) + 1) // 2
    tune, test = rows[:half], rows[half:] if len(rows) > 1 else rows
    return tuple(Questions(store, modality, _rows(store, other, some)) for some in (tune, test))


def _rows(store: EmbeddingStore, modality: str, rows: np.ndarray) -> np.ndarray:
    return store.image(rows) if modality == "image" else store.text(rows)


def _refuse_broken(store: EmbeddingStore, modality: str) -> None:
    for first, rows in store.blocks(BLOCK, modality):
        bad = first_not_unit(rows)
        if bad is not None:
            raise UserError(
                f"{store.folder}/: the {modality} embedding of {store.where(first + bad)} has length "
                f"{np.linalg.norm(rows[bad]):.3g}, not 1; make it again: unclip embed"
            )
