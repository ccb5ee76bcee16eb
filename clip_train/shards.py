"""Tar shards <-> samples: webdataset tars (KEY.jpg, KEY.txt, KEY.json), read at random, written byte for byte alike.

A tar is parsed once. Where its samples lie is kept in a sidecar index (NAME.tar.index.json, or in a cache folder when
the tars lie in a folder that is not to be written to), so every later start, and every read, needs no tar parsing.
"""

import base64
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.folder import fingerprint_json
from clip_train.sample import NO_CAPTION, PICTURES, Sample, captions_of, json_object, label_of, why_no_caption
from clip_train.settings import Progress, UserError
from clip_train.tars import Span, read_members

if TYPE_CHECKING:
    from PIL import Image

INDEX_VERSION = 3
VERSIONS = (2, 3)  # that are read; 2 had no crc32
# a sample's numbers in the index: where its files lie in the tar (-1: it has none), and what its picture is
PICTURE, TXT, JSON, CLS, EXT, CRC32 = 0, 2, 4, 6, 8, 9  # offset and size, four times; which of PICTURES; its crc32
NUMBERS = 10
OPEN_TARS = 128  # that a process keeps open at once


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
    if part.startswith("pipe:") or "://" in part:
        raise UserError(f"{part} is not on this machine; only training reads such shards: copy them here first")
    found = []
    for name in expand_braces(part):
        matches = sorted(_glob(name)) if set(name) & set("*?[") else [Path(name)] if Path(name).is_file() else []
        if not matches:
            raise UserError(f"no shards: {name} does not exist" + (f" (named by {part})" if name != part else ""))
        found += matches
    return found


def _glob(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    return Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))


def expand_braces(text: str, choices: bool = True) -> list[str]:
    """'a{08..10}{x,y}' -> a08x a08y a09x ... with the zero padding of the range's first number.

    choices: whether {x,y} is expanded too, not only ranges.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}" + choices * r"|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, *listed = match.groups()
    middle = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if first else listed[0].split(",")
    return [text[: match.start()] + m + rest for m in middle for rest in expand_braces(text[match.end() :], choices)]


class ShardSet:
    """All samples of a set of shards, in tar order, each readable at random. Safe over threads, forks and pickling.

    paths: the tars. keys: one string per sample. counts: samples per tar. skipped: (key, reason) of what is in the
    tars but cannot be used. fingerprint: of the tars' contents, in order. Empty tars, gaps in the keys and other files
    beside the tars are fine (img2dataset leaves them).
    """

    def __init__(self, spec: str | Path, on_progress: Progress | None = None, captions: bool = True) -> None:
        """captions: whether a sample needs one; False takes pictures without too, such as CLIP_benchmark's KEY.cls.

        UserError: nothing there, a damaged or truncated tar, a key twice, or no sample with picture and caption.
        """
        self.paths = list_shards(spec)
        self.keys: list[str] = []
        self.counts: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self._stamps: list[tuple[int, int]] = []
        self._sha256: list[str] = []
        spans, suffixes = [], Counter()
        for n, path in enumerate(self.paths, 1):
            index = _index_of(path)
            numbers, mute = _numbers(index), dict(index["mute"])
            if not captions:
                mute = {row: reason for row, reason in mute.items() if reason != NO_CAPTION}
            if mute:
                use = [row for row in range(len(numbers)) if row not in mute]
                self.skipped += [(index["keys"][row], reason) for row, reason in mute.items()]
                numbers, index["keys"] = numbers[use], [index["keys"][row] for row in use]
            self.skipped += [(key, "no picture") for key in index["blind"]]
            self.keys += index["keys"]
            self.counts.append(len(numbers))
            self._stamps.append((index["size"], index["mtime_ns"]))
            spans.append(numbers)
            self._sha256.append(index["sha256"])
            suffixes.update(index["suffixes"])
            if on_progress:
                on_progress(n, len(self.paths))
        self.fingerprint: str = fingerprint_json(self._sha256)
        self._shard = np.repeat(np.arange(len(self.paths), dtype=np.int32), self.counts)
        self._spans = np.concatenate(spans)
        self._open: dict[int, _OpenTar] = {}
        if not self.keys:
            raise UserError(_nothing_usable(spec, len(self.paths), self.skipped, suffixes))
        self._places = _Places(self.keys)
        if twice := self._places.twice(self.keys):
            key, (first, second) = twice[0], [self.paths[self._shard[i]] for i in twice[1:]]
            raise UserError(
                f"the key {key} is in {first} and again in {second}; keys must differ: leave one tar out, or pack its "
                f"pictures again under other keys: unclip shard SOURCE --prefix NAME-"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_places": None}  # another process has its own files and hash seed

    def shard_of(self, i: int) -> int:
        """Which of `paths` holds sample i."""
        return int(self._shard[i])

    def row_of(self, key: str) -> int | None:
        """The row of the sample with this key; None if there is none."""
        if self._places is None:
            self._places = _Places(self.keys)
        return self._places.row_of(key, self.keys)

    def read(self, i: int) -> Sample:
        """Sample i: the picture's bytes, all its captions and its json. The picture is not decoded here."""
        image, text, meta, cls = self._parts(i, PICTURE, TXT, JSON, CLS)
        meta = json_object(meta)
        ext = PICTURES[self._spans[i, EXT]]
        return Sample(key=self.keys[i], image=image, ext=ext, captions=captions_of(text, meta), meta=meta, cls=cls)

    def picture(self, i: int) -> bytes:
        """Sample i's picture file."""
        return self._parts(i, PICTURE)[0]

    def thumbnail(self, i: int, side: int) -> "Image.Image":
        """Sample i's picture as RGB, at most `side` pixels wide and high, straight from the tar.

        PictureError if it cannot be decoded.
        """
        from clip_train.pictures import decode_picture

        picture = decode_picture(self.picture(i), least=side)
        picture.thumbnail((side, side))
        return picture

    def captions(self, i: int) -> list[str]:
        """What is said about sample i: KEY.txt, then the json's "caption" and "captions"; distinct.

        Never empty, unless samples without captions were asked for.
        """
        return self.about(i)[0]

    def about(self, i: int, field: str = "label") -> tuple[list[str], str | None]:
        """Sample i's captions and its label, in one reading."""
        text, meta, cls = self._parts(i, TXT, JSON, CLS)
        meta = json_object(meta)
        return captions_of(text, meta), label_of(meta, cls, field)

    def label(self, i: int, field: str = "label") -> str | None:
        """Sample i's label; see label_of()."""
        meta, cls = self._parts(i, JSON, CLS)
        return label_of(json_object(meta), cls, field)

    def damaged(self, on_progress: Progress | None = None) -> list[tuple[str, str]]:
        """(key, reason) of the samples whose bytes are not those that were indexed, though the tar looks unchanged.

        Reads every tar once (sha256), and where it differs, compares the crc32 of each picture; a difference elsewhere
        is named by the tar. on_progress counts tars. A tar of another size or time is noticed without this.
        """
        found: list[tuple[str, str]] = []
        reason = "changed after the tar was indexed, without a trace in its size and time"
        for shard, path in enumerate(self.paths):
            with open(path, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == self._sha256[shard]
            if not whole:
                rows = np.flatnonzero(self._shard == shard).tolist()
                bad = [row for row in rows if zlib.crc32(self.picture(row)) != self._spans[row, CRC32]]
                found += [(self.keys[row], f"its picture {reason}") for row in bad]
                found += [] if bad else [(path.name, f"captions or names {reason}")]
            if on_progress:
                on_progress(shard + 1, len(self.paths), bad=len(found))
        return found

    def picture_crc32(self) -> np.ndarray:
        """int64 (N,): crc32 of each sample's picture file, from the index. Equal files have equal ones."""
        return self._spans[:, CRC32].copy()

    def _parts(self, i: int, *which: int) -> list[bytes | None]:
        """Sample i's PICTURE, TXT, JSON or CLS file: None where the sample lacks it.

        Tars stay open between reads, which a read at an offset of its own (pread) makes safe for threads and forks. A
        tar is looked at again before each read: it costs a microsecond, and a tar that changed would give noise.
        """
        shard = int(self._shard[i])
        try:
            tar = self._open.get(shard) or self._opened(shard)
            stat = os.fstat(tar.fd)
            if (stat.st_size, stat.st_mtime_ns) != self._stamps[shard]:
                raise UserError(f"{self.paths[shard]} changed while it was being used; run the same command again")
            spans = [self._spans[i, w : w + 2].tolist() for w in which]
            return [None if offset < 0 else os.pread(tar.fd, size, offset) for offset, size in spans]
        except OSError as error:
            raise UserError(f"cannot read {self.paths[shard]}: {error.strerror}") from error

    def _opened(self, shard: int) -> "_OpenTar":
        if len(self._open) >= OPEN_TARS:
            self._open.pop(list(self._open)[0], None)  # whoever still reads from it holds it open
        tar = self._open[shard] = _OpenTar(self.paths[shard])
        return tar


class _OpenTar:
    """A tar's file descriptor, closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _Places:
    """key -> row by sorted hashes: 16 bytes a key, where a dict of ten million keys would take a gigabyte."""

    def __init__(self, keys: list[str]) -> None:
        hashes = np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def row_of(self, key: str, keys: list[str]) -> int | None:
        low, high = np.searchsorted(self.hashes, hash(key), "left"), np.searchsorted(self.hashes, hash(key), "right")
        return next((row for row in self.order[low:high].tolist() if keys[row] == key), None)

    def twice(self, keys: list[str]) -> tuple[str, int, int] | None:
        """A key that occurs twice, and its first two rows."""
        for place in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]).tolist():
            first, second = self.order[place : place + 2].tolist()
            if keys[first] == keys[second]:
                return keys[first], first, second
        return None


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
            if (index["size"], index["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                _refuse_malformed(index)
                return index
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not there, or damaged: made anew below
    try:
        index = _build_index(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # root may write anywhere, but a folder without any write permission is meant to stay as it is
    if not path.parent.stat().st_mode & 0o222:
        places = places[1:]
    data = json.dumps(index | {"crc32": _crc32(index)}, separators=(",", ":")).encode()
    for place in places:
        if _save(place, data):
            break
    return index


def _refuse_malformed(index: dict[str, Any]) -> None:
    """ValueError (or what comes of a value of another type) if an index is not what _build_index makes."""
    if index["version"] not in VERSIONS:
        raise ValueError("of another version")
    if ("crc32" in index or index["version"] > 2) and index["crc32"] != _crc32(index):
        raise ValueError("its contents have changed since they were written")
    rows = len(_numbers(index))
    mute = [row for row, reason in index["mute"] if isinstance(reason, str)]
    texts = isinstance(index["keys"], list) and isinstance(index["blind"], list)
    texts = texts and all(isinstance(text, str) for text in (index["sha256"], *index["keys"], *index["blind"]))
    if not texts or len(mute) < len(index["mute"]) or not all(type(row) is int and 0 <= row < rows for row in mute):
        raise ValueError("its samples are none")
    if not all(type(count) is int for count in index["suffixes"].values()):
        raise ValueError("its suffixes are none")


def _crc32(index: dict[str, Any]) -> int:
    """Of all that an index says, so that damage is noticed. It is no signature: who changes the file can write one."""
    small = [index[name] for name in ("version", "size", "mtime_ns", "sha256", "suffixes", "blind", "mute")]
    crc = zlib.crc32(json.dumps(small, sort_keys=True).encode())
    crc = zlib.crc32("\0".join(index["keys"]).encode("utf-8", "surrogatepass"), crc)
    return zlib.crc32(index["numbers"].encode(), crc)


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
    """Parse one tar: where its samples lie, the reasons for those that cannot be used, its size, time and sha256.

    keys: of the samples with a picture. numbers: int64 (N, NUMBERS), little-endian, in base64 (json numbers take
    minutes to parse at ten million samples). mute: [row, reason] of those whose captions are no use. blind: the keys
    of samples without a picture.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        samples = _members(path)
        keys, rows, mute, blind = [], [], [], []
        for key, parts in samples.items():
            ext = next((n for n, suffix in enumerate(PICTURES) if suffix in parts), 0)
            which = [parts.get(suffix) for suffix in (PICTURES[ext], "txt", "json", "cls")]
            if which[0] is None:
                blind.append(key)
                continue
            image, *said = [None if span is None else os.pread(file.fileno(), span[1], span[0]) for span in which[:3]]
            if reason := why_no_caption(*said):
                mute.append((len(keys), reason))
            keys.append(key)
            rows.append([n for span in which for n in span or (-1, -1)] + [ext, zlib.crc32(image)])
    numbers = np.array(rows, dtype="<i8").reshape(-1, NUMBERS)
    suffixes = Counter(suffix for parts in samples.values() for suffix in parts)
    return {
        "version": INDEX_VERSION,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256,
        "suffixes": suffixes,
        "blind": blind,
        "mute": mute,
        "keys": keys,
        "numbers": base64.b64encode(numbers.tobytes()).decode(),
    }


def _numbers(index: dict[str, Any]) -> np.ndarray:
    """The index's numbers as int64 (N, NUMBERS); ValueError if they are not those of its N keys."""
    numbers = np.frombuffer(base64.b64decode(index["numbers"], validate=True), dtype="<i8")
    return numbers.astype(np.int64).reshape(len(index["keys"]), NUMBERS)


def _members(path: Path) -> dict[str, dict[str, Span]]:
    """{key: {suffix: span}} of a tar; UserError if it is damaged or holds a name twice."""
    found = read_members(path)
    if found.twice:
        raise UserError(f"{path} holds {found.twice[0]} twice; make it again with keys that differ")
    if found.damage:
        samples = len(found.samples)
        raise UserError(
            f"{path} is cut short or damaged: only {samples} samples could be read; make or download it again"
        )
    return found.samples


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
