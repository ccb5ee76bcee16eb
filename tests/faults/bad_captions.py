"""Captions of every kind: in .txt, in json, in tables, in tars; as a query, as a file of queries and of captions."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from outcome import Outcome, Tally
from tiny_world import world
from trial import Case, commanded, tried_all

from clip_train.shards import ShardSet

KINDS: dict[str, list[bytes]] = {  # as they stand in a file
    "empty, spaces": [b"", b" ", b"\n", b"\t \r\n", "\u3000\u00a0".encode(), "\u200b".encode(), b"''", b'""'],
    "emoji": ["🦊".encode(), "👨‍👩‍👧‍👦 🏳️‍🌈".encode(), "🦊".encode() * 500,
              "e\u0301 é Å".encode(), "ﬁ Ⅷ ẞ ı İ".encode()],
    "right-to-left": ["ثعلب أحمر".encode(), "שועל \u202eabc\u202c".encode(), "\u202e\u2066x\u2069".encode()],
    "NUL, control characters": [b"a\0b", b"\0", b"\x1b[31mred\x1b[0m", b"a\x07\x08\x7f", bytes(range(1, 32)),
                                b"a\rb\x0bc\x0cd"],
    "surrogates": [b"\xed\xa0\x80", b"a\xed\xbf\xbfb", b"\\ud800", b"\xed\xa0\xbd\xed\xb8\x80"],
    "1 MB": [b"word " * 200_000, b"x" * 1_000_000, "狐".encode() * 300_000, b"a\n" * 300_000, b"(" * 1_000_000],
    "invalid UTF-8": [b"\xff\xfe", b"caf\xe9", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"ok\x80", "fox".encode("utf-16")],
    "BOM, CR, LF": [b"\xef\xbb\xbfa fox", b"\xef\xbb\xbf", b"a\r\nb", b"a\rb", b"a\n\nb\n", "a\u2028b\u0085c".encode()],
    "quotes, commas, signs": [b'"', b"'", b'a,"b', b'a "quoted" fox', b"-a + -b * 2", b"=1+1", b"0.5*", b"- - -",
                              b"{}%s%n", b"image:", b"key:nowhere", b"vector:/etc/passwd", b"--help", b"; rm -rf",
                              b"<script>", b"[1,2"],
}  # fmt: skip


def beside(folder: Path, data: bytes) -> list[str]:
    """A folder of pictures with KEY.txt."""
    picture(folder, "bad").with_suffix(".txt").write_bytes(data)
    return [str(folder / "in")]


def in_json(folder: Path, data: bytes) -> list[str]:
    """KEY.json with "captions", as json writes them: half surrogate pairs included."""
    text = data.decode("utf-8", "surrogateescape")
    ascii_ = json.dumps({"captions": [text, text + "!"], "caption": text}, ensure_ascii=len(data) % 2 == 0)
    picture(folder, "bad").with_suffix(".json").write_bytes(ascii_.encode("utf-8", "surrogateescape"))
    return [str(folder / "in")]


def in_csv(folder: Path, data: bytes) -> list[str]:
    file = io.StringIO()
    csv.writer(file).writerows([("image", "caption"), ("good.png", "a good one"),
                                ("bad.png", data.decode("utf-8", "surrogateescape"))])  # fmt: skip
    picture(folder, "bad")
    (folder / "in.csv").write_bytes(file.getvalue().replace("good.png", "in/good.png").replace("bad.png", "in/bad.png")
                                    .encode("utf-8", "surrogateescape"))  # fmt: skip
    return [str(folder / "in.csv")]


def raw_csv(folder: Path, data: bytes) -> list[str]:
    """Without any quoting."""
    picture(folder, "bad")
    (folder / "in.csv").write_bytes(b"image,caption\nin/good.png,a good one\nin/bad.png," + data + b"\n")
    return [str(folder / "in.csv")]


def in_jsonl(folder: Path, data: bytes) -> list[str]:
    picture(folder, "bad")
    rows = [{"image": "in/good.png", "caption": "a good one"},
            {"image": "in/bad.png", "caption": data.decode("utf-8", "surrogateescape")}]  # fmt: skip
    text = "\n".join(json.dumps(row, ensure_ascii=len(data) % 2 == 0) for row in rows)
    (folder / "in.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    return [str(folder / "in.jsonl")]


def in_parquet(folder: Path, data: bytes) -> list[str]:
    """Strings that are checked by nobody: pyarrow takes the buffers as they are."""
    picture(folder, "bad")
    texts = pa.array([b"a good one", data], pa.binary())
    table = pa.table({"image": ["in/good.png", "in/bad.png"], "caption": texts.view(pa.string())})
    pq.write_table(table, folder / "in.parquet")
    return [str(folder / "in.parquet")]


def picture(folder: Path, name: str) -> Path:
    """in/NAME.png, and a good sample beside it."""
    (folder / "in").mkdir()
    (folder / "in" / "good.png").write_bytes(tiny.picture(0))
    (folder / "in" / "good.txt").write_text("a good one")
    (folder / "in" / f"{name}.png").write_bytes(tiny.picture(1))
    return folder / "in" / f"{name}.png"


def packed(source: Callable[[Path, bytes], list[str]], embed: bool = False) -> Callable[[Path, bytes], Outcome]:
    """Both pictures are in the shards with captions, or listed in rejected.csv; embed: and the shards embedded."""

    def way(folder: Path, data: bytes) -> Outcome:
        def wrong(ended) -> Outcome | str:
            samples = ShardSet(folder / "out")
            rejected = json.loads((folder / "out" / "manifest.json").read_text())["result"]["rejected"]
            if len(samples) + rejected < 2:
                return Outcome("silence", f"{len(samples)} samples, {rejected} rejected of 2")
            for i in range(len(samples)):
                "".join(samples.captions(i)).encode()
            if embed:
                how = commanded(["embed", "--shards", f"{folder}/out", "--clip", str(world() / "clip"), "--out",
                                 f"{folder}/emb", "--device", "cpu"])  # fmt: skip
                if how.how != "done":
                    return how
            return Outcome("skipped") if rejected else ""

        return commanded(["shard", *source(folder, data), "--out", f"{folder}/out", "--threads", "1"], wrong)

    return way


def as_query(folder: Path, data: bytes) -> Outcome:
    """An argument cannot hold a NUL; what is not UTF-8 comes as the system gives it."""
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")[:100_000]
    literal = ["--literal"] * (len(data) % 2)
    return commanded(
        ["search", "--index", str(world() / "index"), "--json", "--device", "cpu", *literal, "--", text], hits
    )


def as_queries(folder: Path, data: bytes) -> Outcome:
    (folder / "queries.txt").write_bytes(data[:3000])
    words = ["search", "--index", str(world() / "index"), "--device", "cpu", "-k", "2"]
    return commanded([*words, "--file", f"{folder}/queries.txt", "--csv", "--literal"])


def as_captions(folder: Path, data: bytes) -> Outcome:
    (folder / "captions.txt").write_bytes(data[:300])
    models = ["--prior", str(world() / "prior"), "--decoder", str(world() / "decoder"), "--device", "cpu"]
    few = ["--set", "steps=1", "--set", "prior_steps=1", "--set", "sampler=euler"]
    return commanded(["generate", "--file", f"{folder}/captions.txt", *models, *few, "--out", f"{folder}/made"])


def as_classes(folder: Path, data: bytes) -> Outcome:
    (folder / "classes.txt").write_bytes(b"a fox\n" + data[:2000])
    words = ["classify", "--index", str(world() / "index"), "--classnames", f"{folder}/classes.txt", "--device", "cpu"]
    return commanded([*words, "--out", f"{folder}/labels.parquet", "--sheet", f"{folder}/sheets"])


def as_filter(folder: Path, data: bytes) -> Outcome:
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")[:20_000]
    where = [f"'{text}' in caption", f"caption == {text}", text][len(data) % 3]
    return commanded(
        ["search", "--vector", str(world() / "rows.npy"), "--index", str(world() / "index"), "--where", where]
    )


def hits(ended) -> str:
    found = json.loads(ended.out)
    return "" if found and all(len(one["hits"]) == 10 for one in found) else f"{ended.out[:200]}"


WAYS: dict[str, Callable[[Path, bytes], Outcome]] = {
    ".txt": packed(beside, embed=True),
    ".json": packed(in_json),
    ".csv": packed(in_csv),
    ".csv, raw": packed(raw_csv),
    ".jsonl": packed(in_jsonl, embed=True),
    ".parquet": packed(in_parquet),
    "a query": as_query,
    "a file of queries": as_queries,
    "captions to draw": as_captions,
    "classes": as_classes,
    "a filter": as_filter,
}


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"captions {seed} {n}")
    kind = list(KINDS)[n % len(KINDS)]
    data = rng.choice(KINDS[kind])
    if rng.random() < 0.3:
        data = (
            rng.choice([b"a fox ", b"\n", b"\xef\xbb\xbf", b'"', b"\t"]) + data + rng.choice([b"", b" ", b"\r\n", b'"'])
        )
    way = list(WAYS)[n // len(KINDS) % len(WAYS)]
    return Case(kind, f"{data[:30]!r}, {way}", lambda folder: WAYS[way](folder, data))


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    world()  # outside of the first case's time
    return tried_all(case, numbers, seed, folder, tell)
