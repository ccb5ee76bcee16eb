"""Folders of every kind with a damaged file, opened by the commands that read them."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

from broken_files import SPOILERS
from outcome import Outcome, Tally
from tiny_world import DECODER, PRIOR, copy_of, put, sets, world
from trial import Case, commanded, tried_all

QUICK = ["--steps", "1", "--batch-size", "4", "--device", "cpu"]
DRAW = ["--set", "steps=2", "--set", "prior_steps=2", "--device", "cpu"]
COMMANDS = {  # folder -> commands that open it; its files are named relative to the case's folder
    "shards": [
        ["data", "check", "shards", "--threads", "1"],
        ["embed", "--shards", "shards", "--clip", "clip", "--out", "new", "--device", "cpu"],
        ["train", "decoder", "--shards", "shards", "--clip", "clip", "--out", "new", *QUICK, *sets(DECODER)],
    ],
    "clip": [
        ["embed", "--shards", "shards", "--clip", "clip", "--out", "new", "--device", "cpu"],
        ["search", "a fox", "--index", "index", "--clip", "clip", "--device", "cpu"],
        ["evaluate", "clip", "--shards", "shards", "--clip", "clip", "--device", "cpu"],
        ["train", "clip", "--init", "clip", "--shards", "shards", "--out", "new", *QUICK],
        ["export", "hf", "clip", "--out", "new"],
    ],
    "emb": [
        ["index", "--embeddings", "emb", "--out", "new"],
        ["train", "prior", "--embeddings", "emb", "--out", "new", *QUICK, *sets(PRIOR)],
        ["evaluate", "prior", "--embeddings", "emb", "--prior", "prior", "--device", "cpu"],
        ["generate", "--key", "s003", "--embeddings", "emb", "--decoder", "decoder", "--out", "new.png", *DRAW],
        ["classify", "fox", "cat", "--embeddings", "emb", "--out", "new.parquet", "--device", "cpu"],
    ],
    "index": [
        ["search", "a fox", "--index", "index", "--device", "cpu", "--sheet", "new.png"],
        ["search", "--vector", "rows.npy", "--index", "index", "--where", "width > 3", "--distinct", "0.9"],
        ["search", "--key", "s003", "--index", "index", "--json", "--modality", "text"],
        ["dedup", "--index", "index", "--drop", "drop.txt", "--sheet", "new.png"],
        ["cluster", "--index", "index", "--out", "new", "--count", "2"],
        ["index", "delete", "s002", "--index", "index"],
        ["index", "compact", "--index", "index"],
        ["classify", "fox", "cat", "--index", "index", "--out", "new.parquet", "--device", "cpu"],
    ],
    "prior": [
        ["generate", "a fox", "--prior", "prior", "--decoder", "decoder", "--out", "new.png", *DRAW],
        ["evaluate", "prior", "--embeddings", "emb", "--prior", "prior", "--device", "cpu"],
    ],
    "decoder": [
        ["generate", "--embedding", "rows.npy", "--decoder", "decoder", "--out", "new", *DRAW],
        ["reconstruct", "fox.png", "--decoder", "decoder", "--out", "new.png", *DRAW],
        ["train", "distilled", "--decoder", "decoder", "--shards", "shards", "--out", "new", "--steps", "1",
         "--set", "train_steps=1", "--device", "cpu"],
    ],
    "made.png": [
        ["generate", "--again", "made.png", "--prior", "prior", "--decoder", "decoder", "--out", "new.png", "--device",
         "cpu"],
    ],
}  # fmt: skip
AVERAGED = ["ema", "decoder", "--shards", "others", "--out", "new", "--count", "4", "--device", "cpu"]  # snapshots
EVERYTHING = ["shards", "others", "clip", "emb", "index", "prior", "decoder", "made.png", "fox.png", "rows.npy"]


def files_of(name: str) -> list[Path]:
    """What the case may spoil, by path."""
    root = world()
    found = [root / name] if name.endswith(".png") else sorted((root / name).rglob("*"))
    return [path.relative_to(root) for path in found if path.suffix in SPOILERS and path.name != "curves.png"]


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"folders {seed} {n}")
    name = list(COMMANDS)[n % len(COMMANDS)]
    turn = n // len(COMMANDS)
    path = files_of(name)[turn % len(files_of(name))]
    commands = [AVERAGED] if "snapshots" in path.parts else COMMANDS[name]
    words = commands[turn // len(files_of(name)) % len(commands)]
    if rng.random() < 0.04:
        spoilt, what = None, rng.choice(["gone", "a folder"])
    else:
        spoilt, what = SPOILERS[path.suffix](rng, (world() / path).read_bytes(), rng.randrange(10_000))
    return Case(f"{name}: {path.suffix[1:]}", f"{path}: {what}; {' '.join(words[:3])}",
                lambda folder: attempt(folder, path, spoilt, what, words))  # fmt: skip


def attempt(folder: Path, path: Path, spoilt: bytes | None, what: str, words: list[str]) -> Outcome:
    copy_of(EVERYTHING, folder)
    if spoilt is None:
        (folder / path).unlink()
        if what == "a folder":
            (folder / path).mkdir()
    else:
        put(folder / path, spoilt)
    with contextlib.chdir(folder):
        outcome = commanded(words)
    if outcome.how == "done" and path.suffix in (".index", ".safetensors") and not may_differ(path, what):
        return Outcome("silence", "a file that is not what was written was used")
    return outcome


def may_differ(path: Path, what: str) -> bool:
    """Whether it may be taken all the same: weights in another precision, as tools write them that know no digests; a
    snapshot that somebody removed."""
    return " as torch." in what or "snapshots" in path.parts and what == "gone"


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
