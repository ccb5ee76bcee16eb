"""Parts that an earlier run made of some of the same shards, which a run on more of them takes over."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_train.folder import MANIFEST, Input, partial_of, put_aside, put_aside_of
from clip_train.part import Shard
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.store import EmbeddingWriter

PARTS = "parts.json"  # of an embeddings folder: what was noted of each part, in order


@dataclass(kw_only=True)
class Earlier:
    """What earlier runs left in and beside an embeddings folder, by the fingerprints of the shards it was made of.

    A folder is taken over if it is of the same CLIP and settings, and all that it holds is wanted again: otherwise
    nothing is, and Workspace.open says what differs.
    """

    out: Path
    replaces: str = ""  # fingerprint of the finished folder that the new one is to replace
    parts: dict[str, tuple[Path, str, dict[str, Any]]] = field(default_factory=dict)  # shard: folder, part, note
    shards: dict[str, str] = field(default_factory=dict)  # tar: its fingerprint
    aside: list[Path] = field(default_factory=list)  # folders that go once all is taken over

    @classmethod
    def of(cls, out: Path, config: Mapping[str, Any], inputs: Mapping[str, Input], tars: Sequence[Path]) -> "Earlier":
        """config, inputs: of the run that begins, as for Workspace.open. tars: all its shards.

        An unfinished folder of fewer shards is put aside. UserError if a process is still at work on it.
        """
        plans = {folder: _plan(folder) for folder in (out, partial_of(out), *put_aside_of(out))}
        same = [folder for folder, plan in plans.items() if plan and _same(plan, config, inputs)]
        own = (out, partial_of(out))
        grown = [folder for folder in same if folder in own and _other_shards(plans[folder], inputs)]
        aside = [folder for folder in same if folder not in own]
        if not grown and not aside:
            return cls(out=out)
        found = cls(out=out, shards={str(tar): _fingerprint(tar) for tar in tars})
        for folder in grown:
            parts = [note.get("shard", "") for _, note in _parts(folder)]  # "": made before shards were noted
            if not set(found.shards.values()).issuperset(parts) or "" in parts or (folder == out and not parts):
                return cls(out=out)
        if out in grown:
            found.replaces = plans[out]["fingerprint"]
        if partial_of(out) in grown:
            aside.append(put_aside(out))
        found.aside = aside
        for folder in (*aside, *(folder for folder in grown if folder == out)):
            found.parts |= {note.get("shard", ""): (folder, name, note) for name, note in _parts(folder)}
        found.parts.pop("", None)
        return found

    def give(self, shard: Shard, writer: EmbeddingWriter) -> dict[str, Any] | None:
        """Put the part of this shard where it belongs now; what was noted of it, or None if there is none."""
        part = self.parts.get(self.shards.get(shard.tar, ""))
        if part is None:
            return None
        writer.adopt(shard.part, *part)
        return part[-1]

    def remove(self) -> None:
        """Remove what has been taken over, once the new folder is whole."""
        replaced = [folder for folder in put_aside_of(self.out) if _plan(folder).get("fingerprint") == self.replaces]
        for folder in (*self.aside, *(replaced if self.replaces else [])):
            shutil.rmtree(folder, ignore_errors=True)


def _plan(folder: Path) -> dict[str, Any]:
    """Of what and how an embeddings folder, finished or not, was made; empty if it is none."""
    for name in (MANIFEST, "plan.json"):
        try:
            found = json.loads((folder / name).read_text())
            return found if found["kind"] == "embeddings" else {}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or damaged: Workspace.open says so
    return {}


def _same(plan: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, Input]) -> bool:
    """Whether a folder was made by the same CLIP in the same way."""
    return plan["config"] == config and plan["inputs"]["clip"]["fingerprint"] == inputs["clip"].fingerprint


def _other_shards(plan: Mapping[str, Any], inputs: Mapping[str, Input]) -> bool:
    return plan["inputs"]["shards"]["fingerprint"] != inputs["shards"].fingerprint


def _fingerprint(tar: Path) -> str:
    try:
        return ShardSet(tar).fingerprint
    except UserError:  # holds no samples
        return ""


def _parts(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, note) of the parts of an embeddings folder, finished or not, whose shards have usable samples."""
    listed = folder / PARTS
    if listed.exists():
        notes = json.loads(listed.read_text())
        named = ((f"{part:0{len(str(len(notes)))}d}", note) for part, note in enumerate(notes))
    else:
        paths = sorted((folder / "scratch").glob("part_*.json"))
        named = ((path.stem.removeprefix("part_"), json.loads(path.read_text())) for path in paths)
    yield from ((name, note) for name, note in named if note["rows"] or note["bad"])
