"""Folders with a manifest: what one command writes and the next one reads.

A command works in OUT.partial and renames it to OUT when it is whole, so OUT is either absent or complete. The manifest
names the command, its config, and the fingerprints (sha256) of its inputs and of what it made.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from clip_train.address import ADDRESS, without_secrets
from clip_train.settings import UserError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two writers of one folder are not noticed there
    fcntl = None

MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"checkpoint(-before)?\.safetensors|checkpoint-\d{9,}")  # those that training writes
LOCKS = (".lock", ".plan.lock")  # held as long as a process writes the folder; while it opens it
# settings that may differ between a run and its resume
HOW_TO_RUN = {"save_every", "log_every", "validate_every", "watch_every", "workers", "parallel"}
# kind of folder -> the command that makes it, for error messages
MAKERS = {
    "shards": "unclip shard",
    "demo": "unclip quickstart",
    "clip": "unclip train clip",
    "hf": "unclip export hf",
    "onnx": "unclip export onnx",
    "embeddings": "unclip embed",
    "index": "unclip index",
    "clusters": "unclip cluster",
    "prior": "unclip train prior",
    "decoder": "unclip train decoder",
    "upsampler": "unclip train upsampler",
}


@dataclass(frozen=True)
class Input:
    """Something a command read: its fingerprint, and where it was."""

    fingerprint: str
    path: Path | str


@dataclass(frozen=True)
class Manifest:
    """manifest.json of `folder`."""

    kind: str
    command: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # name -> {"fingerprint", "path" relative to the folder}
    fingerprint: str  # of the files that the folder is for
    version: str
    created: str
    result: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def input_path(self, name: str) -> Path | None:
        """Where the input was when the command ran, if it is still there; None if it was an address or a command."""
        recorded = self.inputs.get(name, {}).get("path")
        if not recorded:
            return None
        if ADDRESS.search(recorded):  # nothing that a file holds is fetched or run
            return None
        path = Path(os.path.normpath(self.folder / recorded))
        return path if path.exists() or "::" in recorded or set("*?{") & set(recorded) else None


def read_manifest(folder: Path | str, kind: str | None = None) -> Manifest:
    """The manifest of a finished folder; UserError if there is none, or if it is of another kind."""
    folder = Path(folder)
    maker = f"; make it: {MAKERS[kind]}" if kind in MAKERS else ""
    if not folder.is_dir():
        partial = partial_of(folder)
        if partial.is_dir():
            raise UserError(f"{folder}/ is not finished ({partial}/ is there): run its command again to resume it")
        raise UserError(f"{folder}/ does not exist{maker}")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}/ has no {MANIFEST}, so unclip did not make it{maker}")
    try:
        data = json.loads(path.read_text())
        manifest = Manifest(**data, folder=folder)
        _refuse_malformed(manifest)
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}){maker}") from error
    if kind and manifest.kind != kind:
        raise UserError(f"{folder}/ is of kind {manifest.kind}, but {kind} is needed here{maker}")
    return manifest


def _refuse_malformed(manifest: Manifest) -> None:
    """ValueError if a field is not of the type that it is read as, or an input or a result is missing."""
    for name in ("kind", "command", "fingerprint", "version", "created"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"its {name} is not a text")
        getattr(manifest, name).encode()  # json can hold half a surrogate pair
    for name in ("config", "inputs", "result"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"its {name} is not an object")
    inputs, result = manifest.inputs, manifest.result
    for name, recorded in inputs.items():
        texts = isinstance(recorded, dict) and all(isinstance(recorded.get(n), str) for n in ("fingerprint", "path"))
        if not texts or "\0" in recorded["path"]:
            raise ValueError(f"its input {name} has no fingerprint or no path")
    of_clip = ("embeddings", "index", "prior", "decoder", "upsampler")
    if manifest.kind in of_clip and "clip" not in inputs:
        raise ValueError("it names no clip among its inputs")
    if manifest.kind == "index":
        for name in ("rows", "dim"):
            if type(result.get(name)) is not int or result[name] < 1:
                raise ValueError(f"its result has no number of {name}")
        _refuse_sources(inputs, result)
    shards = result.get("shards", [])  # their names; shards folders have their number
    if manifest.kind in ("embeddings", "index") and not _are_texts(shards):
        raise ValueError("its shards are not a list of names")


def _refuse_sources(inputs: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """ValueError unless the sources of a compacted index name inputs, and are as many rows as it is made of."""
    sources = result.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ValueError("its sources are not a list of objects")
    for source in sources:
        named = source.get("inputs")
        if not isinstance(named, dict) or not {"embeddings", "clip"} <= named.keys():
            raise ValueError("a source names no embeddings or no clip")
        if not all(isinstance(name, str) and name in inputs for name in named.values()):
            raise ValueError("a source names inputs that are not there")
        if type(source.get("rows")) is not int or not _are_texts(source.get("shards")):
            raise ValueError("a source has no number of rows or no shards")
    if not sources and "embeddings" not in inputs:
        raise ValueError("it names no embeddings among its inputs")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and "\0" not in one for one in value)


def partial_of(out: Path | str) -> Path:
    """The folder a command works in until `out` is whole."""
    out = Path(out)
    return out.with_name(out.name + ".partial")


def put_aside(out: Path) -> Path:
    """Rename the unfinished folder of `out`, for another to take its place; UserError if a process is at work on it.

    Returns its new name.
    """
    lock, place = _lock(partial_of(out), out, shared=False), _free_name(out)
    os.rename(partial_of(out), place)
    if lock is not None:
        os.close(lock)
    return place


def put_aside_of(out: Path) -> list[Path]:
    """What has been put aside for `out`, by put_aside() or because a new one took its place."""
    beside = out.absolute().parent
    found = [path for path in beside.iterdir() if path.name.startswith(out.name + _ASIDE)] if beside.is_dir() else []
    return sorted(path for path in found if (path / MANIFEST).exists() or (path / "plan.json").exists())


def _free_name(out: Path) -> Path:
    return next(path for n in itertools.count() if not (path := out.with_name(f"{out.name}{_ASIDE}{n}")).exists())


_ASIDE = ".replaced-"


class Workspace:
    """The folder a command is writing.

    `done` is the manifest when an earlier run finished with the same config and inputs: then there is nothing to do.
    Otherwise write into `path` (which keeps what a killed run left there) and call publish().
    """

    def __init__(self, out: Path, path: Path, plan: dict[str, Any], done: Manifest | None, lock: int | None) -> None:
        self.out = out
        self.path = path
        self.done = done
        self._plan = plan
        self.lock = lock  # descriptor; who has a copy of it holds the folder, too
        self._replaces = False

    @classmethod
    def open(
        cls,
        out: Path | str,
        kind: str,
        config: dict[str, Any],
        inputs: Mapping[str, Input],
        command: str = "",
        shared: bool = False,
        replaces: str = "",
    ) -> "Workspace":
        """Start or resume. UserError if `out` or its unfinished part was made with other settings or inputs.

        shared: several processes, all of which say so, may have the folder open at once to write files of different
        names; before one of them publishes, it waits until it is alone(). replaces: the fingerprint of a finished `out`
        that publish() may put aside for the new one.
        """
        out = Path(out)
        config = json.loads(json.dumps(config))
        base = Path(os.path.abspath(out))
        plan = {
            "kind": kind,
            "command": command or MAKERS.get(kind, ""),
            "config": config,
            "inputs": {
                name: {"fingerprint": i.fingerprint, "path": _relative(i.path, base)} for name, i in inputs.items()
            },
        }
        partial = partial_of(base)
        if out.exists():
            if not out.is_dir():
                raise UserError(f"{out} is a file; choose another --out")
            if not (out / MANIFEST).exists() and any(out.iterdir()):
                raise UserError(f"{out}/ exists and unclip did not make it; choose another --out")
            if (out / MANIFEST).exists():
                done = read_manifest(out)
                if done.fingerprint != replaces:
                    _refuse_other(f"{out}/", plan, dataclasses.asdict(done), "choose another --out or remove it", base)
                    if (out / "plan.json").exists():  # killed between the last rename and the end of publish()
                        _sweep(out)
                    return cls(out, out, plan, done, None)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(partial):
                work = cls(out, partial, plan, None, _lock(partial, out, shared))
                if not replaces and (out / MANIFEST).exists():  # published while we were about to open it
                    return cls._too_late(work, kind, config, inputs, command)
                work._replaces = bool(replaces)
                work._start(plan, shared)
        except FileNotFoundError:  # likewise, and renamed under our hands
            if (out / MANIFEST).exists():
                return cls.open(out, kind, config, inputs, command, shared)
            raise
        except OSError as error:
            raise UserError(f"cannot write {out}/: {error.strerror}") from error
        return work

    @classmethod
    def _too_late(cls, work: "Workspace", *arguments: Any) -> "Workspace":
        """The finished folder instead of `work`, whose empty folder goes."""
        if not any(path.name not in LOCKS for path in work.path.iterdir()):
            shutil.rmtree(work.path)
        work.release()
        return cls.open(work.out, *arguments)

    def _start(self, plan: dict[str, Any], shared: bool) -> None:
        """Compare the plan of what is there with ours, or note ours; nobody else is opening the folder meanwhile."""
        if not shared or self._shut():
            for path in self.path.rglob(".*"):  # what a killed run was in the middle of writing
                if path.name not in LOCKS and path.is_file():
                    path.unlink()
        if shared and self.lock is not None:
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            os.stat(self.path)  # another process may have published it just now
        started = self.path / "plan.json"
        if started.exists():
            try:
                before = json.loads(started.read_text())
                before.pop("leftovers", None)  # of a publish() that was killed
                inputs = before["inputs"].values() if isinstance(before["config"], dict) else ()
                if before.keys() != plan.keys() or not all(isinstance(one.get("path"), str) for one in inputs):
                    raise ValueError("not a plan")
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{started} is damaged; remove {self.path}/ to start again") from error
            if any(path.name not in (*LOCKS, "plan.json") for path in self.path.iterdir()):
                here = Path(os.path.relpath(self.path))
                _refuse_other(f"{here}/ (an unfinished run)", plan, before, f"remove {here}/ to start again", self.path)
                return
        write_file(started, json.dumps(plan, indent=1).encode())

    def _shut(self) -> bool:
        """Whether this process is the only one that holds the shared folder; then it holds it alone."""
        try:
            return self.lock is None or fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
        except OSError:
            return False

    def alone(self) -> bool:
        """Wait until no other process holds the shared folder; False if one of them has published it meanwhile."""
        if self.lock is not None:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        return self.path.is_dir() and not (self.out / MANIFEST).exists()

    def release(self) -> None:
        """Let another process write here; what is in `path` stays for it to go on from."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    __del__ = release

    def publish(self, result: dict[str, Any] | None = None) -> Manifest:
        """Write the manifest, then give the folder its final name; checkpoints, scratch/ and unfinished files go last.

        So a process killed anywhere in here leaves either all that it needs to go on, or a whole folder.
        """
        skip = {"metrics.jsonl", "curves.png", "plan.json", MANIFEST, *LOCKS}
        leftovers = _leftovers(self.path)
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name not in skip)
        # what trackers and post-hoc averages are made of stays, and is not what the folder is for
        aside = {*leftovers, self.path / "logs", self.path / "snapshots"}
        files = [p for p in files if aside.isdisjoint((p, *p.parents))]
        for path in files:
            _flush(path)
        manifest = Manifest(
            **self._plan,
            fingerprint=fingerprint_files(files, self.path),
            version=metadata.version("unclip"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            result=json.loads(json.dumps(result or {})),
            folder=self.out,
        )
        data = {k: v for k, v in vars(manifest).items() if k != "folder"}
        names = [path.relative_to(self.path).as_posix() for path in leftovers]
        write_file(self.path / "plan.json", json.dumps(self._plan | {"leftovers": names}, indent=1).encode())
        write_file(self.path / MANIFEST, json.dumps(data, indent=1).encode())
        if self._replaces and (self.out / MANIFEST).exists():
            os.rename(self.out, _free_name(self.out))
        elif self.out.exists():  # an empty folder the user made beforehand
            self.out.rmdir()
        os.rename(self.path, self.out)
        _sweep(self.out)
        self.release()
        return manifest


def _leftovers(folder: Path) -> list[Path]:
    """What only an unfinished folder needs, beside plan.json: files, and after them the folders they are in."""
    tops = [folder / "scratch", *folder.rglob(".*"), *(p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name))]
    found = {path for top in tops for path in (top, *(() if top.is_symlink() else top.rglob("*")))}
    return sorted(found, reverse=True)


def _sweep(folder: Path) -> None:
    """Remove what publish() noted, and only that, from a folder that is finished; plan.json last, if no file stays.

    Whatever cannot be removed now is left to the next process that opens the folder; another may be at it already.
    """
    plan = folder / "plan.json"
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
        noted = set(json.loads(plan.read_text()).get("leftovers", []))
        left = [path for path in _leftovers(folder) if path.relative_to(folder).as_posix() in noted]
        for path in left:
            with contextlib.suppress(OSError):  # a folder that holds what somebody put there since, for one
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if not any(path.is_symlink() or path.is_file() for path in left):
            plan.unlink()


def _flush(path: Path) -> None:
    """Wait until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint_files(paths: Iterable[Path], root: Path) -> str:
    """sha256 over the names (relative to `root`) and contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"


def fingerprint_json(value: Any) -> str:
    """sha256 of a json value, whatever the order of its keys."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, whole, even if the machine stops in between."""
    if path.is_dir():  # "." and "" too, which have no name of their own
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _relative(path: Path | str, base: Path) -> str:
    if ADDRESS.search(str(path)):  # an address stands for itself, without its passwords
        return without_secrets(str(path))
    if ":" in str(path) and "::" not in str(path) and not os.path.exists(path):  # a name such as ViT-B-32:openai
        return str(path)
    return os.path.relpath(os.path.abspath(path), base)


def _lock(partial: Path, out: Path, shared: bool) -> int | None:
    """A descriptor that holds the folder's lock; the system lets go of it when the process ends, however it ends."""
    if fcntl is None:
        return None
    lock = os.open(partial / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"another process is writing {out}/; wait for it, or choose another --out") from error
    return lock


@contextlib.contextmanager
def _one_at_a_time(partial: Path) -> Iterator[None]:
    """Of several processes that open the same folder at once, one after the other."""
    if fcntl is None:
        yield
        return
    lock = os.open(partial / ".plan.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _refuse_other(what: str, asked: dict[str, Any], found: dict[str, Any], way_out: str, base: Path) -> None:
    """UserError naming the first setting or input in which `found` differs from what is asked for now.

    base: the folder that the paths in both are relative to.
    """
    if asked["kind"] != found.get("kind"):
        raise UserError(f"{what} holds a {found.get('kind')}, not a {asked['kind']}; {way_out}")
    for name in asked["inputs"] | found.get("inputs", {}):
        now, before = asked["inputs"].get(name, {}), found.get("inputs", {}).get(name, {})
        if now.get("fingerprint") != before.get("fingerprint"):
            one, other = (_from_here(input.get("path"), base) for input in (now, before))
            if one == other:
                raise UserError(
                    f"{what} was made from other {name}, though from the same place ({one}): "
                    f"what is there changed since, or other parts of it are asked for now; {way_out}"
                )
            raise UserError(f"{what} was made from other {name} ({other}) than asked for now ({one}); {way_out}")
    mine, theirs = _flat(asked["config"]), _flat(found.get("config", {}))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise UserError(
                f"{what} was made with {name} = {theirs.get(name)}, but {mine.get(name)} is asked for now; {way_out}"
            )


def _from_here(recorded: str | None, base: Path) -> str | None:
    """A path relative to `base` as one would write it here; names and addresses are what they are."""
    return recorded if recorded is None or ":" in recorded else os.path.relpath(os.path.join(base, recorded))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"fit": {"lr": 1}} -> {"fit.lr": 1}, without the settings that say how to run, not what to make."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = _flat(value) if isinstance(value, dict) and name != "vision" else {"": value}
        flat |= {f"{name}.{k}".rstrip("."): v for k, v in inner.items() if name not in HOW_TO_RUN}
    return flat
