"""Vectors that are none, in memory and in .npy files: into the index, the search, the trainers, the generator."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny
import torch
from outcome import Outcome, Tally
from tiny_world import PRIOR, copy_of, put, sets, world
from trial import Case, bounded, commanded, run_command, tried_all

from retrieval.search import Searcher

DIM = 32


def rows_of(rng: random.Random, n: int = 6) -> np.ndarray:
    return tiny.unit_rows(n, DIM, rng.randrange(10**6))


def marked(rng: random.Random, value: float, whole: bool = False) -> np.ndarray:
    rows = rows_of(rng)
    rows[rng.randrange(len(rows)), slice(None) if whole else rng.randrange(DIM)] = value
    return rows


# each gives an array, and whether it is one that may well be used as it is
KINDS: dict[str, Callable[[random.Random], np.ndarray]] = {
    "NaN": lambda rng: marked(rng, float("nan"), rng.random() < 0.5),
    "inf": lambda rng: marked(rng, rng.choice([float("inf"), -float("inf")])),
    "zero rows": lambda rng: marked(rng, rng.choice([0.0, 1e-30, -0.0, 1e-42]), True),
    "other lengths": lambda rng: rows_of(rng) * rng.choice([7, 0.5, -1, 1e30, 1e38, 1e-20]),
    "float64, float16, ints": lambda rng: (rows_of(rng) * rng.choice([1, 9])).astype(
        rng.choice([np.float64, np.float16, np.int32, np.int8, np.uint8, np.int64, np.longdouble])),
    "other types": lambda rng: rng.choice([
        rows_of(rng).astype(complex), rows_of(rng) > 0, rows_of(rng).astype(str), rows_of(rng).astype(bytes),
        rows_of(rng).astype(object), np.zeros(6, "datetime64[s]"), np.zeros(6, [("a", "f4"), ("b", "i8")])]),
    "another width": lambda rng: tiny.unit_rows(6, rng.choice([1, 31, 33, 64, 4096])),
    "other shapes": lambda rng: rng.choice([
        np.empty((0, DIM), np.float32), np.empty((6, 0), np.float32), np.float32(1), np.ones(DIM, np.float32),
        np.ones((2, 3, DIM), np.float32), np.ones((DIM, 6), np.float32), np.empty((0,), np.float32)]),
    "not contiguous": lambda rng: rng.choice([
        np.asfortranarray(rows_of(rng)), rows_of(rng, 12)[::2], rows_of(rng)[::-1], rows_of(rng).astype(">f4"),
        np.repeat(rows_of(rng), 2, axis=1)[:, ::2]]),
    "many": lambda rng: tiny.unit_rows(rng.choice([1, 2, 3000]), DIM),
}  # fmt: skip
FILES = ("whole", "whole", "truncated", "a pickle", "no .npy", "a header that lies")


def npy(rng: random.Random, array: np.ndarray, how: str) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    data = file.getvalue()
    if how == "truncated":
        return data[: rng.randrange(len(data))]
    if how == "a pickle":
        return array.dumps()
    if how == "no .npy":
        return rng.choice([b"", b"PK\3\4" + bytes(50), b"\x93NUMPY", b"[1, 2, 3]", rng.randbytes(300)])
    if how == "a header that lies":
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rng.choice([10**12, -1, 2**63, 7])}, {DIM}), }}"
        head = head.ljust(117).encode() + b"\n"
        return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + bytes(6 * DIM * 4)
    return data


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"numbers {seed} {n}")
    kind = list(KINDS)[n % len(KINDS)]
    way = list(WAYS)[n // len(KINDS) % len(WAYS)]
    array = KINDS[kind](rng)
    return Case(kind, f"{kind} {array.dtype} {array.shape}, {way}", lambda folder: WAYS[way](folder, rng, array))


def by_searcher(folder: Path, rng: random.Random, array: np.ndarray) -> Outcome:
    def work() -> str:
        try:
            found = Searcher.open(world() / "index").vectors(array, 3)
        except (TypeError, ValueError) as error:  # a caller's types are the caller's business; values are ours
            return "" if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) else f"{error!r}"
        good = all(np.isfinite(hit.score) and abs(hit.score) < 1.01 for hits in found for hit in hits)
        return "" if good and all(len(hits) == 3 for hits in found) else f"found {found}"

    return bounded(work)


def by_generator(folder: Path, rng: random.Random, array: np.ndarray) -> Outcome:
    from diffusion.generate import Generator
    from diffusion.sampling import Sampling

    generator = Generator.open(world() / "decoder")

    def work() -> str:
        try:
            made = generator.from_embeddings(array[:6], how=Sampling(steps=1, sampler="euler"))
        except (TypeError, ValueError, IndexError) as error:
            return "" if array.dtype.kind not in "fiu" or array.ndim != 2 else f"{error!r}"
        return "" if len(made) == len(array[:6]) else f"{len(made)} pictures of {len(array)}"

    return bounded(work)


def by_query_file(folder: Path, rng: random.Random, array: np.ndarray) -> Outcome:
    (folder / "rows.npy").write_bytes(npy(rng, array, rng.choice(FILES)))
    words = rng.choice([["--vector", f"{folder}/rows.npy"], ["a fox", "--plus", f"vector:{folder}/rows.npy"]])

    def wrong(ended) -> str:
        scores = [hit["score"] for one in json.loads(ended.out) for hit in one["hits"]]
        return "" if scores and all(score is not None and abs(score) < 1.01 for score in scores) else f"{scores}"

    return commanded(["search", *words, "--index", str(world() / "index"), "--json", "--device", "cpu"], wrong)


def by_embedding_file(folder: Path, rng: random.Random, array: np.ndarray) -> Outcome:
    (folder / "rows.npy").write_bytes(npy(rng, array[:9] if array.ndim else array, rng.choice(FILES)))
    return commanded(["generate", "--embedding", f"{folder}/rows.npy", "--decoder", str(world() / "decoder"), "--out",
                      f"{folder}/made", "--set", "steps=1", "--set", "sampler=euler", "--device", "cpu"])  # fmt: skip


def spoilt_store(folder: Path, rng: random.Random, array: np.ndarray) -> str:
    """The world with a part of its embeddings replaced by the array, of as many rows where that is possible."""
    copy_of(["shards", "clip", "emb", "index", "prior", "decoder"], folder)
    kind = rng.choice(["img_emb", "img_emb", "text_emb", "captions_emb"])
    parts = sorted((folder / "emb" / kind).glob(f"{kind}_*.npy"))
    part = rng.choice(parts)
    count = len(np.load(part))
    fits = array.ndim and 0 < len(array) and rng.random() < 0.8
    put(part, npy(rng, np.resize(array, (count, *array.shape[1:])) if fits else array, rng.choice(FILES)))
    return str(folder / "emb")


def command_on(*words: str) -> Callable[[Path, random.Random, np.ndarray], Outcome]:
    """A command on a folder of embeddings of which a file is spoilt. What it makes must be finite."""

    def way(folder: Path, rng: random.Random, array: np.ndarray) -> Outcome:
        spoilt_store(folder, rng, array)
        return commanded([word.replace("HERE", str(folder)) for word in words], lambda ended: finite(folder))

    return way


def finite(folder: Path) -> str:
    """What is wrong with the index, or the prior, that was made."""
    from clip_train.tensors import load_tensors

    for path in folder.glob("new*/model.safetensors"):
        for name, tensor in load_tensors(path)[0].items():
            if not torch.isfinite(tensor).all():
                return f"{name} is not finite"
    if (folder / "new" / "image.index").exists():
        for modality in ("image", "text"):
            found = run_command(["search", "--vector", str(world() / "rows.npy"), "--index", f"{folder}/new", "--json",
                                 "--modality", modality, "-k", "50", "--device", "cpu"])  # fmt: skip
            scores = [hit["score"] for one in json.loads(found.out) for hit in one["hits"]]
            if len(scores) != 88 or not all(score is not None and abs(score) < 1.01 for score in scores):
                return f"{modality}: {scores}"
    return ""


WAYS: dict[str, Callable[[Path, random.Random, np.ndarray], Outcome]] = {
    "Searcher": by_searcher,
    "search --vector": by_query_file,
    "Generator": by_generator,
    "generate --embedding": by_embedding_file,
    "index": command_on("index", "--embeddings", "HERE/emb", "--out", "HERE/new"),
    "index add": command_on("index", "add", "--embeddings", "HERE/emb", "--index", "HERE/index", "--replace"),
    "train prior": command_on("train", "prior", "--embeddings", "HERE/emb", "--out", "HERE/new", "--steps", "1",
                              "--batch-size", "4", "--device", "cpu", *sets(PRIOR)),
    "dedup": command_on("dedup", "--index", "HERE/index"),
    "cluster": command_on("cluster", "--index", "HERE/index", "--out", "HERE/clusters", "--count", "2", "--no-sheets"),
    "evaluate prior": command_on("evaluate", "prior", "--embeddings", "HERE/emb", "--prior", "HERE/prior",
                                 "--device", "cpu"),
}  # fmt: skip


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    world()  # outside of the first case's time
    return tried_all(case, numbers, seed, folder, tell)
