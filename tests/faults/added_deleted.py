"""Random additions and deletions: an index answers as one does that holds the same rows and was never changed.

A flat index is held against one built of the rows that are left. An approximate one against a copy of its base to which
nothing was added: at the end all is deleted again that ever was.
"""

import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import tiny

from clip_train.store import EmbeddingStore
from retrieval import changes, tune
from retrieval.index import build_index
from retrieval.live import LiveIndex

DIM = 32
KINDS = {"flat": (20, 200), "ivf": (400, 1200), "hnsw": (100, 400), "pq": (600, 1200)}  # rows of the base
MORE = 3  # embeddings folders to add
Answers = list[list[tuple[list[str], np.ndarray]]]


def errors(rng: random.Random, folder: Path) -> tuple[dict[str, float], str]:
    """Largest difference of a score; 9 where other rows were found."""
    kind = rng.choice(("flat", "flat", *KINDS))
    count = rng.randint(*KINDS[kind])
    with mock.patch.object(tune, "SECONDS", 0.001):
        said = _worked(rng, folder, kind, count)
        changed = LiveIndex.open(folder / "index")
        if kind == "flat":
            _build_left(changed, folder)
        queries = tiny.unit_rows(20, DIM, rng.randrange(1 << 30))
        pair = [answers(LiveIndex.open(folder / name), queries) for name in ("index", "never")]
    return {f"index after changes, {kind}: scores": difference(*pair)}, f"{kind}, {count} rows: {'; '.join(said)}"


def _worked(rng: random.Random, folder: Path, kind: str, count: int) -> list[str]:
    """Make index/ and change it; make never/, the base without what was added. Returns what was done."""
    tiny.store(folder / "emb", *(tiny.unit_rows(count, DIM, rng.randrange(1 << 30)) for _ in range(2)), parts=2)
    build_index(folder / "emb", folder / "index", kind=kind)
    shutil.copytree(folder / "index", folder / "never")
    for n in range(MORE):  # some of the keys are taken already
        first, size = rng.randint(count // 2, count + 60), rng.randint(1, 60)
        tiny.store(
            folder / f"more{n}", *(tiny.unit_rows(size, DIM, rng.randrange(1 << 30)) for _ in range(2)), first=first
        )
    said = []
    for _ in range(rng.randint(2, 8)):
        live = LiveIndex.open(folder / "index")
        here = live.table.keys_of(np.flatnonzero(live.live))
        what = rng.choice(("add", "add", "delete", "delete", "compact" if kind == "flat" else "delete"))
        if what == "add":
            more = folder / f"more{rng.randrange(MORE)}"
            changes.add(folder / "index", more, replace=True)
            said.append(f"add {more.name}")
        elif what == "delete" and len(here) > 1:
            gone = rng.sample(here, rng.randint(1, min(len(here) - 1, 40)))
            changes.delete(folder / "index", gone)
            said.append(f"delete {len(gone)}")
        elif what == "compact":
            changes.compact(folder / "index")
            said.append("compact")
    if kind != "flat":
        live = LiveIndex.open(folder / "index")
        late = np.flatnonzero(live.live & (np.arange(live.rows) >= count))
        _delete(folder / "index", live.table.keys_of(late))
        _delete(folder / "never", live.table.keys_of(np.flatnonzero(~live.live[:count])))
    return said


def _delete(index: Path, keys: Iterable[str]) -> None:
    if keys := list(keys):
        changes.delete(index, keys)


def _build_left(live: LiveIndex, folder: Path) -> None:
    """never/: a new index of the rows that are left, out of embeddings of their own."""
    rows = np.flatnonzero(live.live)
    keys = live.table.keys_of(rows)
    stores = [EmbeddingStore.open(folder / name) for name in ("emb", *(f"more{n}" for n in range(MORE)))]
    vectors = {modality: live.vectors(rows, modality) for modality in ("image", "text")}
    for n, key in enumerate(keys):
        known = [(s.image([s.keys.index(key)])[0], s.text([s.keys.index(key)])[0]) for s in stores if key in s.keys]
        if not any(np.array_equal(vectors["image"][n], i) and np.array_equal(vectors["text"][n], t) for i, t in known):
            raise AssertionError(f"{key} has vectors that no embeddings folder holds")
    shutil.rmtree(folder / "never")
    order = np.argsort(keys)
    made = tiny.store(folder / "left", *(vectors[modality][order] for modality in ("image", "text")))
    assert made.result["rows"] == len(keys)
    (folder / "left" / "keys.txt").write_text("\n".join(keys[n] for n in order))
    build_index(folder / "left", folder / "never", kind="flat")


def answers(live: LiveIndex, queries: np.ndarray) -> Answers:
    """Keys and scores for both modalities, k of 1, 10 and all rows."""
    names = live.folder.parent / "left" / "keys.txt"
    own = names.read_text().split("\n") if live.folder.name == "never" and names.exists() else None
    found = []
    for modality in ("image", "text"):
        for k in sorted({1, min(10, len(live)), len(live)}):
            scores, rows = live.search(queries, k, modality)
            keys = [[own[row] for row in line] if own else live.table.keys_of(line) for line in rows]
            found.append(list(zip(keys, scores, strict=True)))
    return found


def difference(one: Answers, other: Answers) -> float:
    """Of the scores; rows whose scores agree to 1e-6 may change places."""
    worst = 0.0
    for answer, wanted in zip(one, other, strict=True):
        for (keys, scores), (theirs, truth) in zip(answer, wanted, strict=True):
            if scores.shape != truth.shape:
                return 9.0
            worst = max(worst, float(np.abs(scores - truth).max(initial=0)))
            for n, (key, other) in enumerate(zip(keys, theirs, strict=True)):
                if key != other and np.abs(np.delete(scores, n) - scores[n]).min(initial=9) > 1e-6:
                    return 9.0
    return worst
