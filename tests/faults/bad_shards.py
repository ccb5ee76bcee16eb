"""Broken tars in the hands of what reads them: ShardSet, data check, shard, streaming."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from broken_tars import KINDS
from outcome import Outcome, Tally
from trial import Case, bounded, commanded, tried_all

from clip_train.shards import ShardSet
from clip_train.stream import BrokenShard, read_shard

READERS = ("read", "check", "pack", "stream")


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"shards {seed} {n}")
    kind = list(KINDS)[n % len(KINDS)]
    data = KINDS[kind](rng)
    reader = READERS[n // len(KINDS) % len(READERS)]
    return Case(kind, f"{kind}, {reader}", lambda folder: {
        "read": by_set, "check": by_check, "pack": by_pack, "stream": by_stream}[reader](folder, data))  # fmt: skip


def by_set(folder: Path, data: bytes) -> Outcome:
    """Every sample is read, or named in `skipped`; what is read is what the tar holds."""
    tar = folder / "0.tar"
    tar.write_bytes(data)

    def work() -> str | Outcome:
        samples = ShardSet(tar)
        read = [samples.read(i) for i in range(len(samples))]
        if missing := whole(data) - {sample.key for sample in read} - {key for key, _ in samples.skipped}:
            return Outcome("silence", f"nothing is said of {missing}")
        return Outcome("skipped") if samples.skipped else ""

    outcome = bounded(work)
    unnamed = outcome.how == "refused" and str(tar) not in outcome.line
    return Outcome("wrong", f"does not name the tar: {outcome.line}") if unnamed else outcome


def by_check(folder: Path, data: bytes) -> Outcome:
    (folder / "0.tar").write_bytes(data)

    def wrong(ended) -> Outcome | str:
        bad = json.loads((folder / "report.json").read_text())["findings"]
        return Outcome("skipped") if bad else ""

    return commanded(["data", "check", str(folder), "--out", str(folder / "report.json"), "--threads", "1"], wrong)


def by_pack(folder: Path, data: bytes) -> Outcome:
    """Every sample of the tar is in the new shards, or in rejected.csv; the new shards can be read."""
    (folder / "in").mkdir()
    (folder / "in" / "0.tar").write_bytes(data)

    def wrong(ended) -> Outcome | str:
        samples = ShardSet(folder / "out")
        sources = {samples.read(i).meta["source"].rpartition(".tar/")[2] for i in range(len(samples))}
        rejected = (folder / "out" / "rejected.csv").read_text(errors="surrogateescape")
        if "damaged tar" in rejected:  # what comes after the damage cannot be named
            return Outcome("skipped")
        if missing := {key for key in whole(data) - sources if ascii(key)[1:-1][:50] not in ascii(rejected)}:
            return Outcome("silence", f"nothing is said of {missing}")
        return Outcome("skipped") if rejected.count("\n") > 1 else ""

    return commanded(["shard", str(folder / "in"), "--out", str(folder / "out"), "--threads", "1"], wrong)


def by_stream(folder: Path, data: bytes) -> Outcome:
    """As the tar is read from afar: once through. BrokenShard is its refusal, which StreamBatches counts or tells."""
    tar = folder / "0.tar"
    tar.write_bytes(data)

    def work() -> str | Outcome:
        said = list(read_shard(str(tar)))
        names = {item[0] if isinstance(item, tuple) else item.key for item in said}
        if missing := whole(data) - names:
            return Outcome("silence", f"nothing is said of {missing}")
        return Outcome("skipped") if any(isinstance(item, tuple) for item in said) else ""

    return bounded(work, BrokenShard)


def whole(data: bytes) -> set[str]:
    """The keys of the regular files in a tar, by a reading of its own: blocks of 512, names as they stand there."""
    found = set()
    at = 0
    while at + 512 <= len(data) and data[at : at + 512].strip(b"\0"):
        head = data[at : at + 512]
        if sum(head) - sum(head[148:156]) + 256 != int(head[148:156].strip(b"\0 ") or b"0", 8) or head[124] & 0x80:
            break
        name = head[:100].split(b"\0")[0]
        try:
            size = int(head[124:136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            break
        if at + 512 + size > len(data):
            break
        if head[156:157] in (b"0", b"\0") and name.startswith(b"k") and name.count(b".") == 1 and b"/" not in name:
            found.add(name.decode(errors="surrogateescape").partition(".")[0])
        at += 512 + -(-size // 512) * 512
    return found


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
