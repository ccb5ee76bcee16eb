"""Tar shards <-> samples: webdataset tars (KEY.jpg, KEY.txt, KEY.json), read at random, written byte for byte alike.

A tar is parsed once. Where its samples lie is kept in a sidecar index (NAME.tar.index.json, or in a cache folder when
the tars lie in a folder that is not to be written to), so every later start, and every read, needs no tar parsing.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from clip_train.folder import fingerprint_json
from clip_train.settings import Progress, UserError

PICTURES = ("jpg", "jpeg", "png", "webp")  # suffixes of pictures; the first that a sample has is its picture
INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned picture. `image` is the picture file as it is, `ext` its kind; `meta` is the sample's json."""

    key: str
    image: bytes = field(repr=False)
    ext: str
    captions: list[str]  # the first is the one that KEY.txt holds
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        return self.captions[0]


def list_shards(spec: str | Path) -> list[Path]:
    """The tar files that `spec` names, in order.

    spec: a folder (its *.tar, by name), a file, a glob, a brace range ('S/{000..010}.tar' or '{a,b}.tar'), or several
    of these joined by '::'. UserError if any part of it names nothing.
    """
    paths = [path for part in str(spec).split("::") for path in _list_part(part)]
    return paths


def _list_part(part: str) -> list[Path]:
    path = Path(part)
    if not part:
        raise UserError(
            "no shards are named: expected a folder, a .tar file, a glob or a range like 'S/{000..010}.tar'"
        )
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            below = sorted({p.parent.name for p in path.glob("*/*.tar")})
            hint = f"its folders {', '.join(below[:5])} do: name one of them" if below else "make some: unclip shard"
            raise UserError(f"{path}/ holds no .tar files; {hint}")
        return tars
    if path.is_file():
        return [path]
    found = []
    for name in _expand_braces(part):
        matches = sorted(_glob(name)) if set(name) & set("*?[") else [Path(name)] if Path(name).is_file() else []
        if not matches:
            raise UserError(f"no shards: {name} does not exist" + (f" (named by {part})" if name != part else ""))
        found += matches
    return found


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    return Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))


def _expand_braces(text: str) -> list[str]:
    """'a{08..10}{x,y}' -> a08x a08y a09x ... with the zero padding of the range's first number."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, choices = match.groups()
    middle = choices.split(",") if choices else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [text[: match.start()] + m + rest for m in middle for rest in _expand_braces(text[match.end() :])]


class ShardSet:
    """All samples of a set of shards, in tar order, each readable at random. Safe over threads, forks and pickling.

    paths: the tars. keys: one string per sample. counts: samples per tar. skipped: (key, reason) of what is in the
    tars but cannot be used. fingerprint: of the tars' contents, in order. Empty tars, gaps in the keys and other files
    beside the tars are fine (img2dataset leaves them).
    """

    def __init__(self, spec: str | Path, on_progress: Progress | None = None) -> None:
        """UserError: nothing there, a damaged or truncated tar, a key twice, or no sample with picture and caption."""
        self.paths = list_shards(spec)
        indexes = []
        for n, path in enumerate(self.paths, 1):
            indexes.append(_index_of(path))
            if on_progress:
                on_progress(n, len(self.paths))
        self.keys: list[str] = [key for index in indexes for key in index["keys"]]
        self.counts: list[int] = [len(index["keys"]) for index in indexes]
        self.skipped: list[tuple[str, str]] = [(key, reason) for index in indexes for key, reason in index["skipped"]]
        self.fingerprint: str = fingerprint_json([index["sha256"] for index in indexes])
        self._shard = np.repeat(np.arange(len(indexes), dtype=np.int32), self.counts)
        self._spans = np.array([s for index in indexes for s in index["spans"]], dtype=np.int64).reshape(-1, 7)
        self._stamps = [(index["size"], index["mtime_ns"]) for index in indexes]
        if not self.keys:
            suffixes = sum((Counter(index["suffixes"]) for index in indexes), Counter())
            raise UserError(_nothing_usable(spec, len(indexes), self.skipped, suffixes))
        if len(set(self.keys)) < len(self.keys):
            key, _ = Counter(self.keys).most_common(1)[0]
            first, second = [self.paths[self._shard[i]] for i, k in enumerate(self.keys) if k == key][:2]
            raise UserError(f"the key {key} is in {first} and again in {second}; keys must differ: leave one tar out")

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, i: int) -> int:
        """Which of `paths` holds sample i."""
        return int(self._shard[i])

    def read(self, i: int) -> Sample:
        """Sample i: the picture's bytes, all its captions and its json. The picture is not decoded here."""
        image, text, meta = self._parts(i, 0, 1, 2)
        meta = _json_object(meta)
        ext = PICTURES[self._spans[i, 6]]
        return Sample(key=self.keys[i], image=image, ext=ext, captions=_captions(text, meta), meta=meta)

    def captions(self, i: int) -> list[str]:
        """What is said about sample i: KEY.txt, then the json's "caption" and "captions"; distinct, never empty."""
        text, meta = self._parts(i, 1, 2)
        return _captions(text, _json_object(meta))

    def label(self, i: int, field: str = "label") -> str | None:
        """One field of sample i's json as text, None if it has none: equal labels mark pictures of the same thing."""
        value = _json_object(*self._parts(i, 2)).get(field)
        return None if value is None else str(value)

    def _parts(self, i: int, *which: int) -> list[bytes | None]:
        """Sample i's picture (0), txt (1), json (2): None where the sample lacks it.

        Opening the tar anew for each read costs microseconds, and leaves no handle to share between threads or forks.
        """
        shard = self._shard[i]
        try:
            fd = os.open(self.paths[shard], os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self.paths[shard]}: {error.strerror}") from error
        try:
            stat = os.fstat(fd)
            if (stat.st_size, stat.st_mtime_ns) != self._stamps[shard]:
                raise UserError(f"{self.paths[shard]} changed while it was being used; run the same command again")
            spans = [self._spans[i, 2 * w : 2 * w + 2].tolist() for w in which]
            return [None if offset < 0 else os.pread(fd, size, offset) for offset, size in spans]
        finally:
            os.close(fd)


def _captions(text: bytes | None, meta: dict[str, Any]) -> list[str]:
    listed = meta.get("captions")
    said = [text.decode("utf-8-sig") if text else None, meta.get("caption"), *(listed if type(listed) is list else [])]
    return list(dict.fromkeys(s.strip() for s in said if isinstance(s, str) and s.strip()))


def _json_object(data: bytes | None) -> dict[str, Any]:
    meta = json.loads(data) if data is not None else {}
    if not isinstance(meta, dict):
        raise ValueError("not a json object")
    return meta


def _nothing_usable(spec: str | Path, tars: int, skipped: list[tuple[str, str]], suffixes: Counter) -> str:
    if not suffixes:
        return f"{spec}: no samples in {tars} tar file{'s' * (tars != 1)}: all are empty"
    found = ", ".join(f"{n} .{suffix}" for suffix, n in suffixes.most_common(8))
    why, n = Counter(reason for _, reason in skipped).most_common(1)[0]
    return (
        f"{spec}: none of its {len(skipped)} samples is a picture with a caption ({n} times: {why}); it holds {found}"
    )


# The sidecar index


def _index_of(path: Path) -> dict[str, Any]:
    """The tar's index: the saved one if the tar has not changed since, else a new one, saved where that is possible."""
    stat = path.stat()
    places = [path.with_name(path.name + ".index.json"), _cache_place(path)]
    for place in places:
        try:
            index = json.loads(place.read_bytes())
            if (index["version"], index["size"], index["mtime_ns"]) == (INDEX_VERSION, stat.st_size, stat.st_mtime_ns):
                return index
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or damaged: made anew below
    try:
        index = _build_index(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # root may write anywhere, but a folder without any write permission is meant to stay as it is
    if not path.parent.stat().st_mode & 0o222:
        places = places[1:]
    for place in places:
        if _save(place, json.dumps(index, separators=(",", ":")).encode()):
            break
    return index


def _cache_place(path: Path) -> Path:
    cache = os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(cache) / "indexes" / f"{name}-{path.name}.index.json"


def _save(place: Path, data: bytes) -> bool:
    """Write, then rename: several ranks may save the same index at once. False if the place cannot be written."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, place)
    except OSError:
        return False
    return True


def _build_index(path: Path) -> dict[str, Any]:
    """Parse one tar: keys and spans of its usable samples, the reasons for the others, its size, time and sha256.

    spans: per sample [picture offset, size, txt offset, size, json offset, size, which of PICTURES]; -1 where absent.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        samples = _group_members(path, file)
        keys, spans, skipped = [], [], []
        for key, parts in samples.items():
            ext = next((n for n, suffix in enumerate(PICTURES) if suffix in parts), 0)
            which = [parts.get(PICTURES[ext]), parts.get("txt"), parts.get("json")]
            data = [None if span is None else os.pread(file.fileno(), span[1], span[0]) for span in which[1:]]
            reason = "no picture" if which[0] is None else _why_no_caption(*data)
            if reason:
                skipped.append((key, reason))
            else:
                keys.append(key)
                spans.append([n for span in which for n in span or (-1, -1)] + [ext])
    suffixes = Counter(suffix for parts in samples.values() for suffix in parts)
    return {
        "version": INDEX_VERSION,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256,
        "suffixes": suffixes,
        "skipped": skipped,
        "keys": keys,
        "spans": spans,
    }


def _why_no_caption(text: bytes | None, meta: bytes | None) -> str | None:
    try:
        captions = _captions(text, _json_object(meta))
        "".join(captions).encode()  # json can hold half a surrogate pair
        return None if captions else "no caption"
    except UnicodeError:
        return "caption is not UTF-8"
    except (ValueError, RecursionError):
        return "json cannot be read"


def _group_members(path: Path, file: IO[bytes]) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {suffix: (offset, size)}} of the regular files in a tar, in tar order.

    As webdataset groups them: the key is the name up to the first dot of its last part, directories included; the
    suffix is the rest in lower case. The names stay strings: nothing is ever written to a path that a tar names.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not (member.isreg() and stem and dot) or member.issparse():
                    continue
                parts = samples.setdefault(folder + slash + stem, {})
                if suffix.lower() in parts:
                    raise UserError(f"{path} holds {member.name} twice; make it again with keys that differ")
                parts[suffix.lower()] = (member.offset_data, member.size)
            end = tar.offset
        whole = _is_end_of_tar(file, end)
    except tarfile.TarError:
        whole = False
    if not whole:
        raise UserError(
            f"{path} is cut short or damaged: only {len(samples)} samples could be read; make or download it again"
        )
    return samples


def _is_end_of_tar(file: IO[bytes], offset: int) -> bool:
    """Whether the block of zeros that ends a tar is there: at a broken or missing header, tarfile stops in silence."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


# Writing


def write_shards(
    samples: Iterable[Sample], folder: str | Path, samples_per_shard: int = 1000, prefix: str = ""
) -> list[int]:
    """Write samples as PREFIX000000.tar, PREFIX000001.tar ... and return how many each holds."""
    counts, batch = [], []
    for sample in samples:
        batch.append(sample)
        if len(batch) == samples_per_shard:
            counts.append(write_shard(batch, Path(folder) / f"{prefix}{len(counts):06d}.tar"))
            batch = []
    if batch:
        counts.append(write_shard(batch, Path(folder) / f"{prefix}{len(counts):06d}.tar"))
    return counts


def write_shard(samples: Iterable[Sample], path: Path) -> int:
    """Write one tar, whole or not at all; the same samples give the same bytes. Returns the number of samples.

    KEY.json holds key, caption, captions, width and height in pixels, sha256 of the picture file, and the meta.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for sample in samples:
                    _add(tar, f"{sample.key}.{sample.ext}", sample.image)
                    _add(tar, f"{sample.key}.txt", sample.caption.encode())
                    _add(tar, f"{sample.key}.json", json.dumps(_record(sample), ensure_ascii=False).encode())
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, group and time are zero: they would make equal shards differ
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _record(sample: Sample) -> dict[str, Any]:
    if "." in sample.key.rpartition("/")[2]:
        raise ValueError(f"a key ends at the first dot, so {sample.key!r} cannot be one")
    own = {"key": sample.key, "caption": sample.caption, "captions": sample.captions}
    if "width" not in sample.meta:
        from PIL import Image

        with Image.open(io.BytesIO(sample.image)) as picture:
            own["width"], own["height"] = picture.size
    own["sha256"] = hashlib.sha256(sample.image).hexdigest()
    return own | {name: value for name, value in sample.meta.items() if name not in own}
