"""Embeddings -> FAISS index: choose a kind, build it, measure it, save it.

The folder is one that `clip-retrieval back` serves: image.index and text.index (plain faiss, inner product, id = row of
the embeddings), and metadata/*.parquet in the same order. What was tried and measured is in the manifest's result.

A kind is taken only if it reaches the recall that is asked for, on held-out queries of the kind that will be asked.
"""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clip_train.folder import MANIFEST, Input, Manifest, Workspace, read_manifest, write_file
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore, first_not_unit
from retrieval import build, seal, tune
from retrieval.kinds import NAMES, Kind, tiers
from retrieval.tune import MODALITIES

BLOCK = 65_536  # rows looked at at a time
SLACK = 0.005  # codes whose estimated ceiling is further below the recall are not built


@dataclass(frozen=True)
class Built:
    """An index that reaches the recall."""

    setting: tune.Setting
    recall: float  # on other queries than those that the setting was found on; tune.confirm may have raised it by them
    speed: float  # queries a second and core on these
    file: Path


def build_index(
    embeddings: Path | str,
    out: Path | str,
    *,
    recall: float = 0.95,
    memory: int | str | None = None,
    kind: str = "auto",
    workers: int = 1,
    engine: str = "local",
    on_progress: Progress | None = None,
) -> Manifest:
    """Build the index folder `out` from an embeddings folder.

    recall: of the 10 true best answers, the share that must be found. memory: bytes for both indexes when loaded, also
    as "500MB" or "4G". kind: auto, flat (exact), ivf, pq, rabitq, opq or hnsw; what does not reach the recall is
    replaced by flat. workers: processes that add rows; engine: local, or ray (a cluster that sees the folders).
    The manifest's result has, for image and text: kind, knob, value, k_factor (of refined kinds), recall (on other
    queries than those that the value was found on; where it was below the recall on these, it was raised a little),
    queries_per_second (of one core), bytes_per_vector, tried, and bytes and sha256 of the file.
    A killed build goes on from its finished stages when it is run again.
    UserError: rows that are not unit rows, or a recall that the memory does not allow.
    """
    room = checked(recall, memory, kind)
    if engine not in build.ENGINES:
        raise UserError(f"engine {engine!r} must be one of: {', '.join(build.ENGINES)}")
    if engine == "ray":
        build.ray_or_refuse()
    if workers < 1:
        raise UserError(f"workers {workers} must be at least 1")
    store = EmbeddingStore.open(embeddings)
    inputs = {"embeddings": Input(store.fingerprint, store.folder)}
    for name, given in store.manifest.inputs.items():  # so that the index finds them without the embeddings
        inputs[name] = Input(given["fingerprint"], os.path.normpath(store.folder / given["path"]))
    space = Workspace.open(out, "index", {"recall": recall, "memory": room, "kind": kind}, inputs)
    if space.done:
        return space.done

    result: dict[str, Any] = {"rows": len(store), "dim": store.dim, "threads": 1}  # that speed was measured on
    result["shards"] = store.manifest.result.get("shards", [])
    (space.path / "metadata").mkdir(exist_ok=True)
    (space.path / "scratch").mkdir(exist_ok=True)
    for path, _ in zip(store.table.paths, store.table.parts(), strict=True):  # read, as what is damaged is refused
        shutil.copyfile(path, space.path / "metadata" / path.name)
    notes = {modality: space.path / "scratch" / f"{modality}.json" for modality in MODALITIES}
    for modality, note in notes.items():
        if not note.exists():
            _refuse_broken(store, modality)
    how = {"recall": recall, "memory": room and room // 2, "kind": kind, "workers": workers, "engine": engine}
    for modality, note in notes.items():
        if not note.exists():  # it is written when the index is there
            path, scratch = space.path / f"{modality}.index", space.path / "scratch" / modality
            chosen = choose_and_build(store, modality, path, **how, scratch=scratch, on_progress=on_progress)
            write_file(note, json.dumps(chosen).encode())
            shutil.rmtree(scratch)
        result[modality] = json.loads(note.read_text())
    return space.publish(result)


def checked(recall: float, memory: int | str | None, kind: str) -> int | None:
    """The memory in bytes; UserError where one of the three is not what build_index takes."""
    if kind not in NAMES:
        raise UserError(f"kind {kind!r} must be one of: {', '.join(NAMES)}")
    if not 0 < recall <= 1:
        raise UserError(f"recall {recall} must be above 0 and at most 1")
    return None if memory is None else parse_bytes(memory)


def choose_and_build(
    store: build.Rows,
    modality: str,
    path: Path | str,
    *,
    recall: float = 0.95,
    memory: int | None = None,
    kind: str = "auto",
    workers: int = 1,
    engine: str = "local",
    scratch: Path | str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Choose a kind for the image or text rows of a store, build and measure it, and write it to the file `path`.

    memory: bytes for this index alone. scratch: a folder for finished stages, which a killed run goes on from; it must
    be of the same vectors. By default a new one beside `path`, removed at the end.
    Returns: kind, knob, value, recall, queries_per_second, bytes_per_vector, tried, ... as build_index describes.
    store: len(), dim, image(rows) and text(rows) as an EmbeddingStore has them; with workers it must be one.
    UserError: a recall that the memory does not allow.
    """
    path = Path(path)
    if scratch is None:
        how = {"recall": recall, "memory": memory, "kind": kind, "workers": workers, "engine": engine}
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as new:
            return choose_and_build(store, modality, path, **how, scratch=new, on_progress=on_progress)
    stages = Path(scratch)
    stages.mkdir(parents=True, exist_ok=True)
    if not isinstance(store, EmbeddingStore):  # other processes could not open it
        workers, engine = 1, "local"
    how = {"workers": workers, "engine": engine, "on_progress": on_progress}
    asked, others = tune.questions(store, modality)
    ceilings: dict[str, float] = {}
    seconds = 0.0
    tried: list[tune.Setting] = []
    n = len(store)
    for tier in tiers(n, store.dim, kind, tight=memory is not None):
        reached: list[Built] = []
        for one in tier:
            if memory is not None and round(one.bytes_per_row(n, store.dim) * n) > memory:
                continue
            if one.last and one.last not in ceilings:
                ceilings[one.last] = asked.ceiling(one.last)
            if one.last and ceilings[one.last] < recall - SLACK:
                continue
            began = _core_seconds()
            file = build.build(store, modality, one, stages, **how)
            seconds += _core_seconds() - began
            if memory is not None and file.stat().st_size > memory:
                file.unlink()
                continue
            index = build.read_stage(file)
            setting, seen = tune.tune(index, one, asked, recall)
            tried += seen
            confirmed = setting and tune.confirm(index, setting, others, recall)
            if confirmed:
                reached.append(Built(*confirmed, others.speed(index), file))
            else:
                file.unlink()
            del index  # or it stays in memory while the next is built
        if reached:
            chosen = _finish(max(reached, key=lambda built: built.speed), others, path, n)
            chosen["build_seconds"] = round(seconds, 2)  # of one core, for all that was built; tuning not counted
            chosen["queries"] = f"{len(others.queries)} {'text' if modality == 'image' else 'image'} embeddings"
            ceilings = {codes: round(value, 4) for codes, value in ceilings.items()}
            return chosen | {"ceilings": ceilings, "tried": [one.table_row() for one in tried]}
    seen = [one.recall for one in tried] + list(ceilings.values())
    possible = max((value for value in seen if value < recall), default=None)
    raise UserError(_too_little(recall, memory, possible, store))


def load_index(folder: Path | str, modality: str = "image") -> faiss.Index:
    """image.index or text.index of a folder, memory-mapped as far as the installed faiss can.

    UserError: no such file, or one that is not what the folder's manifest says (seal.py), which faiss never sees.
    Since faiss 1.11 all but the packed codes of fast-scan kinds is read from the file when it is needed; before, only
    the lists of IVF,SQ and IVF,Flat. (What searches Flat and SQfp16 for unclip makes a copy of half the width of a
    float32 at the first batch: filtered.FilteredIndex.)
    """
    path = Path(folder) / f"{modality}.index"
    if not path.exists():
        raise UserError(f"{path} does not exist; make it: unclip index")
    if (path.parent / MANIFEST).exists():  # a file of faiss alone has nothing to be compared with
        seal.refuse_changed(path, read_manifest(path.parent, "index").result.get(modality))
    mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    try:
        index = faiss.read_index(str(path), mapped | faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged; make it again: unclip index") from error
    if index is not None and index.metric_type == faiss.METRIC_L2:
        raise UserError(f"{path} ranks by L2 distance, and unclip's indexes by inner product; make one: unclip index")
    if index is None or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"{path} is damaged; make it again: unclip index")
    return index


def parse_bytes(text: int | str) -> int:
    """500000, "500000", "500MB" or "4G" as bytes; K, M, G, T are powers of 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise UserError(f"memory {text!r} is not a number of bytes such as 500MB or 4G")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _finish(best: Built, others: tune.Questions, path: Path, n: int) -> dict[str, Any]:
    """Write the index with its knobs set to `path`; what is known of it."""
    index = build.read_stage(best.file)
    best.setting.apply(index)
    by_64 = others.speed(index, 64)
    build.write_index(index, path)
    return best.setting.table_row() | {
        "recall": round(best.recall, 4),
        "queries_per_second": best.speed,
        "queries_per_second_by_64": by_64,
        "bytes_per_vector": round(path.stat().st_size / n, 1),
        **seal.seal(path),
    }


def _core_seconds() -> float:
    """CPU time of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def _too_little(recall: float, memory: int | None, best: float | None, store: build.Rows) -> str:
    if memory is None:
        return f"only a recall of {round(best or 0, 4)} can be had, but {recall} is asked for: lower --recall"
    least = min(Kind(codes).bytes_per_row(len(store), store.dim) for codes in ("Flat", "SQfp16"))
    found = "no index of this kind fits" if best is None else f"only a recall of {round(best, 4)} can be had"
    return (
        f"in memory {memory * 2} {found}, but {recall} is asked for; "
        f"an exact index needs {round(least * len(store)) * len(MODALITIES)} bytes: "
        "raise --memory or lower --recall"
    )


def _refuse_broken(store: EmbeddingStore, modality: str) -> None:
    for first, rows in store.blocks(BLOCK, modality):
        bad = first_not_unit(rows)
        if bad is not None:
            raise UserError(
                f"{store.folder}/: the {modality} embedding of {store.where(first + bad)} has length "
                f"{np.linalg.norm(rows[bad]):.3g}, not 1; make it again: unclip embed"
            )
