"""Look at shards before training on them: every tar, member, caption and picture; what is wrong, and what to do.

Nothing stops at the first damage, and nothing is written. `quick_check` is the part that costs no decoding: training
runs it first.
"""

import hashlib
import io
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_train.byte_pairs import simple_tokenizer
from clip_train.captions import text_id
from clip_train.duplicates import PLAIN, colour_grid, group_pictures, perceptual_hashes, small_grey
from clip_train.folder import write_file
from clip_train.ingest import picture_kind
from clip_train.pictures import PictureError, decode_picture
from clip_train.sample import PICTURES, captions_of, json_object, why_no_caption
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet, list_shards
from clip_train.stream import count_urls, is_remote
from clip_train.tars import Span, read_members, read_span

SEVERITIES = ("error", "warning", "note")
EXAMPLES = 3  # of a finding in the table; the report holds more
REPORTED = 100  # examples of a finding, and groups of duplicates, in the report
TOKENISED = 50_000  # captions, evenly spread, whose tokens are counted
SMALL = 32  # pixels of the short side, below which there is little to see
LARGE = 1024  # pixels of the short side, above which decoding costs more than training needs
SHAPES = {"below 1:2": 0.5, "1:2 to 3:4": 0.75, "3:4 to 4:3": 4 / 3, "4:3 to 2:1": 2.0, "above 2:1": float("inf")}
NO_WORDS = re.compile(r"(https?://\S+|\S+\.(jpe?g|png|webp|gif|bmp|tiff?)|(img|dsc|image|photo)?[-_ ]?\d+)", re.I)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found, how often, where, and what to do."""

    severity: str  # "error": training cannot work; "warning": it suffers; "note": good to know
    what: str
    count: int
    examples: list[str]
    advice: str


@dataclass(kw_only=True)
class Report:
    """What check_shards found."""

    shards: list[str]
    samples: int  # that have a picture and a caption
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    exact: list[list[str]] = field(default_factory=list)  # keys of pictures that are the same, byte for byte
    near: list[list[str]] = field(default_factory=list)  # keys of pictures that look alike, largest groups first
    source: "_Samples | None" = field(default=None, repr=False)
    near_rows: list[list[int]] = field(default_factory=list, repr=False)  # of the source

    @property
    def errors(self) -> list[Finding]:
        """The findings that training cannot work with."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def table(self) -> list[tuple[str, str, int, str, str]]:
        """(severity, finding, count, examples, what to do), the worst first."""
        return [
            (
                f.severity,
                f.what,
                f.count,
                "; ".join(f.examples[:EXAMPLES]) + "; ..." * (len(f.examples) > EXAMPLES),
                f.advice,
            )
            for f in self.findings
        ]

    def save(self, path: str | Path) -> None:
        """Write the report as json."""
        data = {
            "shards": self.shards,
            "samples": self.samples,
            "findings": [asdict(finding) for finding in self.findings],
            "statistics": self.statistics,
            "exact": self.exact[:REPORTED],
            "near": self.near[:REPORTED],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(path), json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


@dataclass(kw_only=True)
class _Samples:
    """The usable samples of all tars, row by row, and what was wrong with the others. About 150 bytes a sample."""

    paths: list[Path]
    keys: list[str] = field(default_factory=list)
    tar: array = field(default_factory=lambda: array("q"))  # which of `paths`
    spans: array = field(default_factory=lambda: array("q"))  # six a row: offset, size of picture, txt, json; or -1, -1
    texts: array = field(default_factory=lambda: array("q"))  # text_id of every caption
    speaker: array = field(default_factory=lambda: array("q"))  # the row that each of `texts` belongs to
    length: array = field(default_factory=lambda: array("q"))  # characters of each
    counts: list[int] = field(default_factory=list)  # usable samples of each tar
    problems: dict[str, list[str]] = field(default_factory=dict)
    suffixes: Counter = field(default_factory=Counter)

    def note(self, problem: str, where: str) -> None:
        self.problems.setdefault(problem, []).append(where)

    def captions(self, row: int) -> list[str]:
        return captions_of(self._part(row, 1), json_object(self._part(row, 2)))

    def picture(self, row: int) -> bytes:
        return self._part(row, 0) or b""

    def _part(self, row: int, which: int) -> bytes | None:
        offset, size = self.spans[6 * row + 2 * which : 6 * row + 2 * which + 2]
        return None if offset < 0 else read_span(self.paths[self.tar[row]], (offset, size))


def check_shards(
    spec: str | Path,
    *,
    batch_size: int | None = None,
    ranks: int = 1,
    workers: int = 0,
    context_length: int = 77,
    distance: int = 4,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Everything that is wrong with local shards, and what they are like.

    batch_size (all ranks together), ranks and workers (processes that read, per rank): what training is meant to use,
    if it is known. context_length: tokens of a caption that the model reads. distance: bits of 64 in which the hashes
    of near duplicates may differ, see duplicates.py. UserError only if `spec` names nothing.
    """
    if is_remote(spec):
        raise UserError(f"{spec}: only tars on this machine are checked; copy some of these here")
    samples = _read_tars(list_shards(spec), on_progress)
    report = Report(shards=[str(path) for path in samples.paths], samples=len(samples.keys), source=samples)
    report.findings += _of_tars(samples, batch_size, ranks, workers)
    if samples.keys:
        report.findings += _of_captions(samples, context_length, report.statistics)
        report.findings += _of_pictures(samples, distance, threads or os.cpu_count() or 1, report, on_progress)
    report.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return report


# Tars and members


def _read_tars(paths: list[Path], on_progress: Progress | None) -> _Samples:
    samples = _Samples(paths=paths)
    first_tar: dict[str, int] = {}
    for n, path in enumerate(paths):
        members = read_members(path)
        before = len(samples.keys)
        if members.damage:
            samples.note("damaged tars", f"{path.name}: {members.damage}")
        for problem, names in (
            ("a member twice in one tar", members.twice),
            ("samples whose members lie apart", members.apart),
            ("members without a suffix", members.other),
        ):
            for name in names:
                samples.note(problem, f"{path.name}/{name}")
        for key, parts in members.samples.items():
            samples.suffixes.update(parts.keys())
            earlier = first_tar.setdefault(key, n)
            if earlier != n:
                samples.note("keys that are in two tars", f"{key} in {paths[earlier].name} and {path.name}")
            _add(samples, n, key, parts)
        samples.counts.append(len(samples.keys) - before)
        if on_progress:
            on_progress(n + 1, len(paths), stage="tars")
    return samples


def _add(samples: _Samples, tar: int, key: str, parts: dict[str, Span]) -> None:
    """Sort one sample into the usable ones or the problems, by the rules by which ShardSet does it."""
    where = f"{samples.paths[tar].name}/{key}"
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    if picture is None:
        samples.note("samples without a picture", f"{where}: {' '.join(f'.{suffix}' for suffix in parts)}")
        return
    text, meta = (read_span(samples.paths[tar], parts[s]) if s in parts else None for s in ("txt", "json"))
    why = why_no_caption(text, meta)
    if why == "no caption" and not {"txt", "json"} & parts.keys():
        where += f": {' '.join(f'.{suffix}' for suffix in parts)}"
    if why:
        samples.note({"no caption": "samples without a caption"}.get(why, f"samples whose {why}"), where)
        return
    row = len(samples.keys)
    samples.keys.append(key)
    samples.tar.append(tar)
    for span in (picture, parts.get("txt"), parts.get("json")):
        samples.spans.extend(span or (-1, -1))
    for caption in captions_of(text, json_object(meta)):
        samples.texts.append(text_id(caption))
        samples.speaker.append(row)
        samples.length.append(len(caption))


ADVICE = {
    "damaged tars": "download or make them again; unclip shard FOLDER --out new keeps what can be read",
    "a member twice in one tar": "keys must differ: make the tar again",
    "keys that are in two tars": "leave one tar out, or give each source its --prefix",
    "samples whose members lie apart": "fine here, but webdataset splits them: sort the tar by name",
    "members without a suffix": "they are left out; a sample is KEY.jpg, KEY.txt, KEY.json",
    "samples without a picture": f"expected KEY.{', KEY.'.join(PICTURES)}; unclip shard FOLDER --out new converts",
    "samples without a caption": 'expected KEY.txt, or "caption" or "captions" in KEY.json; they are left out',
    "samples whose caption is not UTF-8": "convert the captions; they are left out",
    "samples whose json cannot be read": "KEY.json must hold an object; they are left out",
}
FATAL = {"damaged tars", "a member twice in one tar", "keys that are in two tars"}  # ShardSet refuses these


def _of_tars(samples: _Samples, batch_size: int | None, ranks: int, workers: int) -> Iterator[Finding]:
    for problem, where in samples.problems.items():
        severity = "error" if problem in FATAL else "warning"
        advice = ADVICE[problem]
        if problem == "samples without a picture" and _dotted(samples.suffixes):
            advice = "keys hold dots, and a key ends at its first dot: put other characters for them"
        yield _finding(severity, problem, where, advice)
    usable, tars = len(samples.keys), len(samples.paths)
    found = ", ".join(f"{n} .{suffix}" for suffix, n in samples.suffixes.most_common(6)) or "nothing"
    if not usable:
        yield _finding("error", "no sample with picture and caption", [f"found: {found}"], ADVICE_SAMPLE, 1)
    elif batch_size and usable < batch_size:
        advice = f"lower --batch-size to {usable} or less"
        yield _finding("error", "fewer samples than one batch", [f"{usable} of {batch_size}"], advice, usable)
    filled = [n for n in samples.counts if n]
    readers = ranks * max(1, workers)
    if len(filled) < readers:
        advice = f"fine for local shards; to stream them, make at least {readers}: unclip shard --per-shard"
        examples = [f"{len(filled)} shards for {ranks} ranks x {max(1, workers)} workers"]
        yield _finding("warning", "fewer shards than processes that read", examples, advice, len(filled))
    empty = [path.name for path, n in zip(samples.paths, samples.counts, strict=True) if not n]
    if empty and filled:
        yield _finding(
            "note",
            "tars without a usable sample",
            empty,
            "nothing; img2dataset and unclip shard leave them where all rows failed",
        )
    middle = float(np.median(filled)) if filled else 0
    sizes = zip(samples.paths, samples.counts, strict=True)
    uneven = [f"{path.name}: {n}" for path, n in sizes if n and not middle / 2 <= n <= 2 * middle]
    if uneven and tars > 2:
        advice = "fine for local shards; streamed ones read unevenly: unclip shard FOLDER --out even"
        yield _finding("note", f"tars far from the usual {middle:g} samples", uneven, advice)


ADVICE_SAMPLE = "a sample is KEY.jpg (.png, .webp) with KEY.txt or KEY.json; make some: unclip shard"


def _dotted(suffixes: Counter) -> bool:
    """Whether most pictures' keys hold a dot: then the picture's suffix is "0001.jpg", say."""
    dotted = sum(n for suffix, n in suffixes.items() if "." in suffix and suffix.rpartition(".")[2] in PICTURES)
    return dotted > sum(suffixes[suffix] for suffix in PICTURES)


def _finding(severity: str, what: str, where: Sequence[str], advice: str, count: int | None = None) -> Finding:
    count = len(where) if count is None else count
    return Finding(severity=severity, what=what, count=count, examples=list(where[:REPORTED]), advice=advice)


# Captions


def _of_captions(samples: _Samples, context_length: int, statistics: dict[str, Any]) -> Iterator[Finding]:
    texts, speaker = np.array(samples.texts), np.array(samples.speaker)
    ids, first, times = np.unique(texts, return_index=True, return_counts=True)
    tokens, longest, no_words = _tokens(samples, first, context_length)
    most = [n for n in np.argsort(-times, kind="stable")[:10] if times[n] > 1]
    frequent = [(_caption_of(samples, texts, speaker, first[n]), int(times[n])) for n in most]
    per_sample = np.bincount(speaker, minlength=len(samples.keys))
    too_long = float(np.mean(tokens > context_length))
    statistics["captions"] = {
        "captions": len(texts),
        "different": len(ids),
        "per sample": _quantiles(per_sample),
        "characters": _quantiles(np.array(samples.length)),
        "tokens": _quantiles(tokens),
        "context length": context_length,
        "share longer than the context": round(too_long, 4),
        "share that another sample has too": round(1 - np.count_nonzero(times == 1) / len(texts), 4),
        "most frequent": frequent,
    }
    if too_long > 0.001:
        count = round(too_long * len(texts))
        advice = "the rest of them is not read; raise --set context_length, or shorten them"
        severity = "warning" if too_long > 0.05 else "note"
        yield _finding(severity, f"captions beyond {context_length} tokens", longest, advice, count)
    if len(ids) == 1 and len(samples.keys) > 1:
        advice = "there is nothing to tell apart; name the right column: unclip shard --caption-column"
        yield _finding("error", "all captions are equal", [_short(frequent[0][0])], advice, len(texts))
    elif frequent and frequent[0][1] > max(3, 0.02 * len(texts)):
        examples = [f"{_short(text)!r} {n} times" for text, n in frequent if n > max(3, 0.02 * len(texts))]
        what = f"captions that {100 * frequent[0][1] / len(texts):.0f} % share"
        advice = "equal captions count as right answers for each other, but teach little: drop or reword them"
        yield _finding("warning", what, examples, advice, frequent[0][1])
    if len(no_words) > 0.005 * len(tokens):
        advice = "names of files and addresses describe nothing: name the right column, or drop these rows"
        yield _finding("warning", "captions that are no words", [_short(text) for text in no_words], advice)


def _tokens(samples: _Samples, first: np.ndarray, context_length: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Of different captions, evenly spread: how many tokens each has, which are too long, which are no words."""
    tokenizer = simple_tokenizer()
    speaker, texts = samples.speaker, samples.texts
    tokens, long, no_words = [], [], []
    for place in np.sort(first)[:: -(-len(first) // TOKENISED)].tolist():
        text = _caption_of(samples, texts, speaker, place)
        n = len(tokenizer.encode(text[: 32 * context_length])) + 2  # start and end
        tokens.append(n)
        if n > context_length:
            long.append(f"{samples.keys[speaker[place]]}: {n} tokens")
        if NO_WORDS.fullmatch(text):
            no_words.append(text)
    return np.array(tokens), long, no_words


def _caption_of(samples: _Samples, texts: Sequence[int], speaker: Sequence[int], place: int) -> str:
    """The caption with number `place` among all, read again from its tar: they may not fit in memory."""
    row = int(speaker[place])
    return next(text for text in samples.captions(row) if text_id(text) == texts[place])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = ("least", "5 %", "median", "95 %", "most")
    return dict(zip(names, np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).round(1).tolist(), strict=True))


# Pictures


class _Looks:
    """What decoding tells about each row's picture: about 100 bytes a sample."""

    def __init__(self, rows: int) -> None:
        self.digests = np.zeros(rows, dtype="V16")  # the first half of the sha256
        self.hashes = np.zeros(rows, dtype=np.uint64)
        self.colours = np.zeros((rows, 48), dtype=np.uint8)
        self.sizes = np.zeros((rows, 2), dtype=np.int32)  # width and height; 0 if it cannot be decoded
        self.bytes = np.zeros(rows, dtype=np.int64)
        self.plain = np.zeros(rows, dtype=bool)  # of one colour
        self.kinds = np.full(rows, "other", dtype="U5")
        self.bad: dict[int, str] = {}  # row -> why it cannot be decoded


def _of_pictures(
    samples: _Samples, distance: int, threads: int, report: Report, on_progress: Progress | None
) -> Iterator[Finding]:
    looks = _look_at_all(samples, threads, on_progress)
    total = len(samples.keys)
    if looks.bad:
        where = (f"{samples.paths[samples.tar[row]].name}/{samples.keys[row]}: {why}" for row, why in looks.bad.items())
        advice = "training leaves them out; make their tars again: unclip shard FOLDER --out new drops them"
        severity = "error" if 2 * len(looks.bad) > total else "warning"
        yield _finding(severity, "pictures that cannot be decoded", list(where), advice)
    good = np.flatnonzero(looks.sizes[:, 0])
    if not len(good):
        return
    yield from _of_sizes(samples, looks, good, report.statistics)
    if looks.plain.any():
        advice = "placeholders and failed downloads, usually: drop them"
        where = [samples.keys[row] for row in np.flatnonzero(looks.plain)]
        yield _finding("warning", "pictures of one colour", where, advice)
    yield from _of_duplicates(samples, looks, good, distance, report, on_progress)


def _look_at_all(samples: _Samples, threads: int, on_progress: Progress | None) -> _Looks:
    total = len(samples.keys)
    looks = _Looks(total)
    pieces = [range(start, min(start + 32, total)) for start in range(0, total, 32)]
    pool = ThreadPoolExecutor(threads)
    try:
        found = pool.map(lambda rows: [_look(samples, looks, row) for row in rows], pieces)
        for rows, grey in zip(pieces, found, strict=True):
            looks.hashes[rows.start : rows.stop] = perceptual_hashes(np.stack(grey))
            if on_progress:
                on_progress(rows.stop, total, bad=len(looks.bad), stage="pictures")
    finally:
        pool.shutdown(cancel_futures=True)
    looks.bad = dict(sorted(looks.bad.items()))
    return looks


def _look(samples: _Samples, looks: _Looks, row: int) -> np.ndarray:
    """Fill in one row; what is left to do is the hash, of the small grey picture that is returned."""
    data = samples.picture(row)
    looks.digests[row] = hashlib.sha256(data).digest()[:16]
    looks.bytes[row] = len(data)
    try:
        picture = decode_picture(data, least=128)
    except PictureError as error:
        looks.bad[row] = str(error)
        return np.zeros((32, 32), dtype=np.uint8)
    size = picture.size
    looks.kinds[row] = kind = picture_kind(data) or "other"
    if kind == "JPEG":  # it was decoded at a fraction of its size
        with Image.open(io.BytesIO(data)) as header:
            size = header.size if (header.width < header.height) == (size[0] < size[1]) else header.size[::-1]
    grey = small_grey(picture)
    looks.sizes[row], looks.colours[row], looks.plain[row] = size, colour_grid(picture), grey.std() < PLAIN
    return grey


def _of_sizes(samples: _Samples, looks: _Looks, good: np.ndarray, statistics: dict[str, Any]) -> Iterator[Finding]:
    sizes = looks.sizes[good]
    short = sizes.min(axis=1)
    shapes = np.searchsorted(list(SHAPES.values()), sizes[:, 0] / sizes[:, 1], side="right")
    statistics["pictures"] = {
        "pictures": len(good),
        "formats": dict(Counter(looks.kinds[good].tolist()).most_common()),
        "short side in pixels": _quantiles(short),
        "width to height": {name: int(np.count_nonzero(shapes == n)) for n, name in enumerate(SHAPES)},
        "kilobytes": _quantiles(looks.bytes[good] / 1000),
    }
    statistics["shards"] = {"tars": len(samples.paths), "samples per tar": _quantiles(np.array(samples.counts))}
    small = good[short < SMALL]
    if len(small):
        where = [f"{samples.keys[row]}: {looks.sizes[row, 0]} x {looks.sizes[row, 1]}" for row in small]
        advice = f"there is little to see in them: unclip shard FOLDER --out new --min-size {SMALL}"
        yield _finding("note", f"pictures below {SMALL} pixels", where, advice)
    if np.median(short) > LARGE:
        advice = "reading and decoding them will hold training up: unclip shard FOLDER --out new --resize 256"
        where = [samples.keys[row] for row in good[short > LARGE]]
        yield _finding("note", f"pictures above {LARGE} pixels", where, advice)


def _of_duplicates(
    samples: _Samples, looks: _Looks, good: np.ndarray, distance: int, report: Report, on_progress: Progress | None
) -> Iterator[Finding]:
    _, same = np.unique(looks.digests[good], return_inverse=True)
    exact = _groups(good, same)
    report.exact = [[samples.keys[row] for row in rows] for rows in exact]
    if copies := sum(len(rows) - 1 for rows in exact):
        severity = "warning" if copies > 0.01 * len(good) else "note"
        advice = "unclip shard FOLDER --out new --drop-duplicates keeps the first of each"
        what = f"exact copies of other pictures ({100 * copies / len(good):.1f} %)"
        yield _finding(severity, what, _named(report.exact), advice, copies)

    if on_progress:
        on_progress(0, 1, stage="near duplicates")
    textured = good[~looks.plain[good]]
    group = group_pictures(looks.hashes[textured], looks.colours[textured], distance)
    near = [_one_of_each(rows, looks.digests) for rows in _groups(textured, group)]
    near = sorted((rows for rows in near if len(rows) > 1), key=len, reverse=True)
    report.near_rows, report.near = near, [[samples.keys[row] for row in rows] for rows in near]
    if on_progress:
        on_progress(1, 1, stage="near duplicates")
    inside = sum(map(len, near))
    report.statistics["duplicates"] = {"exact copies": copies, "near groups": len(near), "in near groups": inside}
    if near:
        severity = "warning" if inside > 0.1 * len(good) else "note"
        what = f"pictures in {len(near)} groups that look alike ({100 * inside / len(good):.1f} %)"
        advice = "look at them with --sheet; they teach the same thing again"
        yield _finding(severity, what, _named(report.near), advice, inside)

    names = [re.sub(r"[-_.]*\d*$", "", path.stem) for path in samples.paths]  # train-000001.tar -> train
    parts = [{names[samples.tar[row]] for row in rows} for rows in exact + near]
    if shared := Counter(" and ".join(sorted(part)) for part in parts if len(part) > 1):
        examples = [f"{n} x {names}" for names, n in shared.most_common()]
        what = "groups of copies and look-alikes across tars of other names"
        advice = "if one of them is for testing, leave these pictures out of it: they flatter the scores"
        yield _finding("note", what, examples, advice, shared.total())


def _groups(rows: np.ndarray, group: np.ndarray) -> list[list[int]]:
    """The rows of each group of two and more, the largest groups first."""
    order = np.argsort(group, kind="stable")
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    found = [rows[some].tolist() for some in np.split(order, cuts) if len(some) > 1]
    return sorted(found, key=lambda some: (-len(some), some[0]))


def _one_of_each(rows: list[int], digests: np.ndarray) -> list[int]:
    """The rows without those whose picture is an exact copy of an earlier one's."""
    return sorted({digests[row].tobytes(): row for row in reversed(rows)}.values())


def _named(groups: list[list[str]]) -> list[str]:
    return [f"{len(keys)} x {keys[0]}" for keys in groups]


def duplicate_sheet(report: Report, groups: int = 24, columns: int = 10) -> Image.Image:
    """A contact sheet of groups that look alike, one a row, spread from the largest to the smallest."""
    from clip_train.sheet import query_sheet

    samples, found = report.source, report.near_rows
    if not found or samples is None:
        raise UserError("no pictures look alike, so there is no sheet to draw")
    places = sorted({round(place) for place in np.linspace(0, len(found) - 1, min(groups, len(found)))})
    chosen = [found[place][:columns] for place in places]
    titles = [f"group {place + 1}: {len(found[place])} pictures" for place in places]
    pictures = [[decode_picture(samples.picture(row)) for row in rows] for rows in chosen]
    labels = [[f"{samples.keys[row]} {samples.captions(row)[0]}" for row in rows] for rows in chosen]
    return query_sheet(titles, pictures, labels, title=f"{len(found)} groups of pictures that look alike")


# The part that costs nothing


def quick_check(spec: str | Path | ShardSet, *, batch_size: int, ranks: int = 1) -> list[str]:
    """What training wants to know before it starts: a line for each thing to warn of, none if all is well.

    batch_size: of all ranks together. No picture is decoded; a ShardSet that is open already is used as it is.
    UserError in one line if training could not work: no sample to use, fewer than a batch, captions all equal. Of
    remote shards only their number is looked at, and not even that if they are a glob: no server is asked.
    """
    if not isinstance(spec, ShardSet) and is_remote(spec):
        shards = count_urls(str(spec))
        return [] if shards is None else _too_few(shards, ranks)
    samples = spec if isinstance(spec, ShardSet) else ShardSet(spec)
    what = samples.paths[0].parent if isinstance(spec, ShardSet) else spec
    if len(samples) < batch_size:
        raise UserError(f"{what}: {len(samples)} samples are fewer than one batch of {batch_size}; lower --batch-size")
    rows = np.unique(np.linspace(0, len(samples) - 1, 2000).astype(int)).tolist()
    said = Counter(text for row in rows for text in samples.captions(row)[:1])
    if not said:
        raise UserError(f"{what}: no sample has a caption; {ADVICE_SAMPLE}")
    caption, times = said.most_common(1)[0]
    if len(said) == 1 and len(rows) > 1:
        raise UserError(
            f"{what}: all captions are equal ({_short(caption)!r}), so there is nothing to tell apart; name the column "
            "that describes the pictures: unclip shard --caption-column"
        )
    warnings = []
    if times > max(3, 0.1 * len(rows)):
        warnings.append(f"{100 * times / len(rows):.0f} % of the captions are {_short(caption)!r}: they teach little")
    for reason, n in Counter(reason for _, reason in samples.skipped).most_common():
        first = next(key for key, why in samples.skipped if why == reason)
        warnings.append(f"{n} samples cannot be used, {reason}: {first}" + " and others" * (n > 1))
    copies = len(samples) - len(np.unique(samples.picture_crc32()))
    by_chance = len(samples) ** 2 / 2**33  # pairs of different files with one crc32
    if copies > 0.01 * len(samples) + 2 * by_chance:
        warnings.append(f"{copies} pictures are copies of others: unclip shard FOLDER --out new --drop-duplicates")
    if warnings:
        warnings.append(f"more: unclip data check {what}")
    return warnings


def _too_few(shards: int, ranks: int) -> list[str]:
    what = f"{shards} shard{'s' * (shards != 1)} for {ranks} ranks"
    return [f"{what}: several read the same one at a time; make at least {ranks}"] * (shards < ranks)
