"""An index folder that changes: add embeddings, delete rows, and make one plain folder of it again.

Nothing that is there is written over. `add` builds a segment as build_index builds an index, `delete` writes which rows
are gone, and state.json names both by one rename; `compact` builds a new folder beside the old one and exchanges the
two. A process killed anywhere leaves the folder as it was before or after, and the same command finishes the work.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.folder import Input, Manifest, Workspace, partial_of, read_manifest, write_file
from clip_train.settings import Progress, UserError
from clip_train.store import EmbeddingStore
from retrieval import seal, swap
from retrieval.index import MODALITIES, build_index, checked, choose_and_build
from retrieval.live import DELETED, SEGMENTS, STATE, LiveIndex, State
from retrieval.vectors import ROWS, sources_of

if TYPE_CHECKING:
    from retrieval.where import Where

MANY = 8  # segments that are searched one after the other
WASTE = 0.2  # share of deleted rows that still cost time and memory


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a change did, and what there is now."""

    added: int = 0
    deleted: int = 0
    missing: tuple[str, ...] = ()  # keys that were to be deleted and are not there
    live: int = 0  # rows that can be found now
    gone: int = 0  # rows that are kept but count as deleted
    segments: int = 0

    def left(self, folder: Path | str) -> str:
        """How the folder stands now, and whether it should be compacted, in a line."""
        slow = self.segments >= MANY or self.gone > WASTE * (self.live + self.gone)
        advice = f"; searching is faster after: unclip index compact --index {folder}" if slow else ""
        return f"{folder}/: {self.live} rows, {self.gone} deleted, {self.segments} segments{advice}"


def add(
    index: Path | str,
    embeddings: Path | str,
    *,
    replace: bool = False,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Change:
    """Add the rows of an embeddings folder to an index folder, without building it again.

    The segment is of the kind and for the recall that the base was asked for. The base's memory does not limit it: the
    next compact keeps to that again.
    replace: a key that is there already moves: its old row is deleted. Embeddings that were added before are left
    alone, so that the same call may be made again; with replace, those of their rows that were deleted come back.
    UserError: embeddings of another CLIP, or a key that is there already.
    """
    with _changing(index) as folder:
        live = LiveIndex.open(folder)
        store = EmbeddingStore.open(embeddings)
        _refuse_other_clip(live, store)
        if len(set(store.keys)) < len(store):
            raise UserError(f"{store.folder}/ has a key twice; keys must differ: make it again: unclip embed")
        taken = live.rows_of(store.keys)
        taken = taken[taken >= 0]
        before = _rows_from(live, store)
        whole = len(before) == len(store)
        if len(before) and (not replace or (whole and live.live[before].all())):
            return _change(live)
        if len(taken) and not replace:
            raise UserError(
                f"{len(taken)} keys of {store.folder}/ are in {index}/ already, such as "
                f"{live.table.keys_of(taken[:1])[0]}; if they are other pictures, pack them again under "
                f"other keys: unclip shard SOURCE --prefix NAME-; if newer ones of the same: --replace"
            )
        said, gone = State.read(folder), ~live.live
        gone[taken] = True
        if whole:  # they are still there, some of them as deleted
            gone[before] = False
            back = int((live.live[before] == gone[before]).sum())
            _write(folder, said.segments, np.flatnonzero(gone))
            return _change(live.reopened(), added=back, deleted=int((live.live & gone).sum()))
        segment = store.fingerprint.partition(":")[2][:16]
        _clear_segments(folder, said, keep=segment)
        made = build_index(
            store.folder,
            folder / SEGMENTS / segment,
            recall=live.manifest.config["recall"],
            kind=live.manifest.config.get("kind", "auto"),
            workers=workers,
            on_progress=on_progress,
        )
        entry = {"name": segment, "rows": made.result["rows"], "fingerprint": made.fingerprint}
        _write(folder, [*said.segments, entry], np.flatnonzero(gone))
        return _change(live.reopened(), added=len(store), deleted=len(taken))


def delete(
    index: Path | str, keys: Sequence[str] = (), where: "Where | str | None" = None, *, dry_run: bool = False
) -> Change:
    """Delete the rows with these keys and those that fulfil `where`; from then on no search finds them.

    dry_run: only count them. Deleting again what is deleted already changes nothing.
    UserError: none of the keys was ever there.
    """
    with _changing(index) as folder:
        live = LiveIndex.open(folder)
        gone = ~live.live
        keys = list(dict.fromkeys(keys))
        rows = live.rows_of(keys)
        gone[rows[rows >= 0]] = True
        missing = [key for key, row in zip(keys, rows.tolist(), strict=True) if row < 0]
        if keys and len(missing) == len(keys) and not _ever(live, keys):
            raise UserError(f"{index}/ has no row with the key {keys[0]}" + ", nor with the others" * (len(keys) > 1))
        if where is not None:
            gone |= _parsed(where).mask(live.table)
        count = int(gone.sum() - (live.rows - len(live)))
        if count and not dry_run:
            _write(folder, State.read(folder).segments, np.flatnonzero(gone))
            live = live.reopened()
        return _change(live, deleted=count, missing=tuple(missing))


def compact(
    index: Path | str,
    *,
    embeddings: Sequence[Path | str] = (),
    recall: float | None = None,
    memory: int | str | None = None,
    kind: str | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Make one plain folder again of base, segments and what is left of their rows; row numbers change.

    The index is chosen, built and measured anew out of the embeddings, with the settings of the base unless others are
    given. embeddings: where to look for embeddings that are no longer where they were.
    UserError: embeddings that are not found, or no row left. Nothing is done where nothing changed since.
    """
    with _changing(index) as folder, contextlib.ExitStack() as undo:
        live = LiveIndex.open(folder)
        config = dict(live.manifest.config)
        asked = {"recall": recall, "memory": memory, "kind": kind}
        config |= {name: value for name, value in asked.items() if value is not None}
        config["memory"] = checked(config["recall"], config.get("memory"), config.get("kind", "auto"))
        if len(live.parts) == 1 and live.live.all() and config == live.manifest.config:
            return live.manifest
        if not len(live):
            raise UserError(f"{index}/ has no row left; remove the folder, or add rows: unclip index add")
        _find_embeddings(live, index, embeddings)
        rows = np.flatnonzero(live.live)
        inputs, sources, source_row = _sources(live, rows)
        space = Workspace.open(swap.successor_of(folder), "index", config, inputs, live.manifest.command)
        undo.callback(shutil.rmtree, space.path, ignore_errors=True)  # it has another name when it is whole
        result: dict[str, Any] = {"rows": len(rows), "dim": live.dim, "threads": 1}
        result["shards"] = sources[0]["shards"]
        if len(sources) > 1 or not np.array_equal(source_row, np.arange(sources[0]["rows"])):
            result["sources"] = sources
            np.save(space.path / ROWS, source_row)
            result[ROWS] = seal.seal(space.path / ROWS)
        _write_metadata(live, space.path / "metadata")
        store = LiveRows(live, rows)
        for modality in MODALITIES:
            result[modality] = choose_and_build(
                store,
                modality,
                space.path / f"{modality}.index",
                recall=config["recall"],
                memory=config.get("memory") and config["memory"] // len(MODALITIES),
                kind=config.get("kind", "auto"),
                scratch=space.path / "scratch" / modality,
                on_progress=on_progress,
            )
        result["compacted"] = {"deleted": live.rows - len(live), "segments": len(live.parts) - 1, "of": live.state}
        space.publish(result)
        with swap.locked(swap.successor_of(folder)):  # nobody may change it before it is in its place
            swap.replace(folder)
            return read_manifest(folder, "index")


class LiveRows:
    """Some rows of a LiveIndex as a store of embeddings, for choose_and_build."""

    def __init__(self, live: LiveIndex, rows: np.ndarray) -> None:
        self.dim = live.dim
        self._live, self._rows = live, rows

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N, D) float32 picture embeddings."""
        return self._live.vectors(self._rows if rows is None else self._rows[rows], "image")

    def text(self, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N, D) float32 embeddings of the first captions."""
        return self._live.vectors(self._rows if rows is None else self._rows[rows], "text")


@contextlib.contextmanager
def _changing(index: Path | str) -> Iterator[Path]:
    """The index folder, under its lock, without what a killed change left."""
    folder = Path(os.path.realpath(index))
    swap.wait_for(folder)
    read_manifest(index, "index")
    try:
        with swap.locked(folder):
            swap.clear(folder)
            for path in [*folder.glob(".*.tmp"), *(folder / DELETED).glob(".*.tmp")]:
                path.unlink()
            yield folder
    except PermissionError as error:
        raise UserError(f"{error.filename or index}: {error.strerror}") from error


def _write(folder: Path, segments: list[dict[str, Any]], gone: np.ndarray) -> None:
    """The change itself: the file of deleted rows, then state.json; then what neither names any more is removed."""
    said = State.read(folder)
    deleted = None
    if len(gone):
        file = io.BytesIO()
        np.save(file, gone.astype(np.int64))
        sha256 = hashlib.sha256(file.getvalue()).hexdigest()
        deleted = {"file": f"{sha256[:16]}.npy", "rows": len(gone), "fingerprint": f"sha256:{sha256}"}
        (folder / DELETED).mkdir(exist_ok=True)
        write_file(folder / DELETED / deleted["file"], file.getvalue())
    state = State(segments, deleted)
    if state == said:
        return
    write_file(folder / STATE, json.dumps(asdict(state), indent=1).encode())
    for path in (folder / DELETED).glob("*.npy"):
        if deleted is None or path.name != deleted["file"]:
            path.unlink()


def _change(live: LiveIndex, **what: Any) -> Change:
    return Change(**what, live=len(live), gone=live.rows - len(live), segments=len(live.parts) - 1)


def _refuse_other_clip(live: LiveIndex, store: EmbeddingStore) -> None:
    mine, theirs = (m.inputs.get("clip", {}).get("fingerprint", "none") for m in (live.manifest, store.manifest))
    if store.dim != live.dim or mine != theirs:
        raise UserError(
            f"{live.folder}/ holds {live.dim}-wide rows of the CLIP {mine[:15]}, but {store.folder}/ {store.dim}-wide "
            f"ones of {theirs[:15]}; embed with the same CLIP: unclip embed"
        )


def _rows_from(live: LiveIndex, store: EmbeddingStore) -> np.ndarray:
    """(N,) the rows of the index that came out of these very embeddings, the last time they were added."""
    for part, start in reversed(list(zip(live.parts, live.starts.tolist(), strict=False))):
        for s, source in enumerate(sources_of(part.manifest)):
            if source.inputs["embeddings"]["fingerprint"] == store.fingerprint:
                owner, _ = part.vectors.places(np.arange(part.rows))
                return start + np.flatnonzero(owner == s)
    return np.empty(0, dtype=np.int64)


def _clear_segments(folder: Path, said: State, keep: str) -> None:
    """Remove the segments that were begun and never named; that of the same embeddings is gone on with."""
    named = {segment["name"] for segment in said.segments} | {keep}
    (folder / SEGMENTS).mkdir(exist_ok=True)
    for path in (folder / SEGMENTS).iterdir():
        if path.name not in named | {partial_of(path.with_name(keep)).name}:
            shutil.rmtree(path)


def _ever(live: LiveIndex, keys: Sequence[str]) -> bool:
    """Whether one of the keys belongs to a row, be it deleted."""
    return bool((live.rows_of(keys, deleted=True) >= 0).any())


def _parsed(where: "Where | str") -> "Where":
    from retrieval.where import parse

    return parse(where) if isinstance(where, str) else where


def _find_embeddings(live: LiveIndex, index: Path | str, looked: Sequence[Path | str]) -> None:
    for part in live.parts:
        for store, source in zip(part.vectors.find(looked), sources_of(part.manifest), strict=True):
            if store is None:
                given = source.inputs["embeddings"]
                raise UserError(
                    f"{index}/ was made from the embeddings {given['fingerprint'][:15]}, which are no longer at "
                    f"{os.path.normpath(source.folder / given['path'])}; say where: --embeddings "
                    f"FOLDER; if they have grown or changed, build a new index: unclip index"
                )


def _sources(live: LiveIndex, rows: np.ndarray) -> tuple[dict[str, Input], list[dict[str, Any]], np.ndarray]:
    """What these rows came from: all inputs, which of them belong to each source, and (N,) the row of the sources,
    counted through them, of each."""
    inputs: dict[str, Input] = {}
    sources: list[dict[str, Any]] = []
    source_row = np.empty(len(rows), dtype=np.int64)
    total = 0
    for part, (low, high) in zip(live.parts, zip(live.starts, live.starts[1:], strict=False), strict=True):
        mine = (rows >= low) & (rows < high)
        owner, place = part.vectors.places(rows[mine] - low)
        at = np.empty(len(owner), dtype=np.int64)
        for s in np.unique(owner).tolist():
            store = part.vectors.stores[s]
            given = {"embeddings": Input(store.fingerprint, store.folder)}
            for name, recorded in store.manifest.inputs.items():
                given[name] = Input(recorded["fingerprint"], os.path.normpath(store.folder / recorded["path"]))
            names = {name: f"{name} {len(sources) + 1}" if sources else name for name in given}
            inputs |= {names[name]: value for name, value in given.items()}
            shards = store.manifest.result.get("shards", [])
            sources.append({"inputs": names, "rows": len(store), "shards": shards})
            at[owner == s] = total + place[owner == s]
            total += len(store)
        source_row[mine] = at
    return inputs, sources, source_row


def _write_metadata(live: LiveIndex, folder: Path) -> None:
    """The parquet files again, without the rows that are deleted; those that lost none are copied."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    table = live.table
    digits = len(str(len(table.paths)))
    for part, (low, high) in enumerate(zip(table.starts.tolist(), table.starts[1:].tolist(), strict=False)):
        keep, path = live.live[low:high], folder / f"metadata_{part:0{digits}d}.parquet"
        if keep.all():
            shutil.copyfile(table.paths[part], path)
        elif keep.any():
            pq.write_table(table.part(part).filter(pa.array(keep)), path, write_page_checksum=True)
