"""Vector search beside its peers: recall@10, queries per core-second, bytes a vector, build time.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --rows 100000 --out r.jsonl [--peers VENV/bin/python]
    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --rows 100000 --out e.jsonl --embeddings emb     # real embeddings
    python benchmarks/retrieval.py --out r.jsonl --table                                              # the table again

Made vectors: 512-wide unit rows around n / 100 centres of unequal weight, 24 directions of spread, float16; queries are
fresh draws with more noise, so they lie off the vectors as captions lie off pictures. With --embeddings: the pictures
of an embeddings folder repeated with noise up to the size, and its captions with noise as queries. Our tuner has its
own queries; everything is measured on 1,000 that only this script sees. The truth is exact search.

Every contestant is one process of one thread, timed by its own CPU seconds (medians of three), so that what else the
machine does decides little. Each is turned to the least setting that reaches each recall of --recalls, by bisection.
--peers: the interpreter of an environment that has autofaiss, hnswlib and usearch; without it, these are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.pop(0)  # this folder: a benchmark in it has the name of the package
DIM, K, BATCH = 512, 10, 64
HELD_OUT, ASKED = 1000, 20_000  # queries of this script alone, and queries the tuner draws from
OURS = ("flat", "exact", "ours", "ivf-sq8", "hnsw32")
PEERS = ("autofaiss", "hnswlib", "usearch")


def main() -> None:
    """Make the vectors, run every contestant in a process of its own, print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--embeddings", type=Path, help="an embeddings folder instead of made vectors")
    parser.add_argument("--out", type=Path, required=True, help="results, one json a line; kept and added to")
    parser.add_argument("--scratch", type=Path, help="where the vectors go; by default beside --out")
    parser.add_argument("--peers", type=Path, help="python of an environment with autofaiss, hnswlib and usearch")
    parser.add_argument("--only", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--recalls", nargs="+", type=float, default=[0.95, 0.98])
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.scratch or options.out.with_suffix(".vectors")
    if options.contestant:
        contest(options.contestant, folder, options.recalls)
        return
    if not options.table:
        if not (folder / "truth.npy").exists():
            make(folder, options.rows, options.embeddings)
        for name in options.only:
            python = sys.executable if name in OURS else options.peers
            if python is None:
                print(f"{name}: left out, --peers is not given", file=sys.stderr)
                continue
            run = [python, __file__, "--contestant", name, "--scratch", folder, "--out", options.out]
            run += ["--recalls", *map(str, options.recalls)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            done = subprocess.run([str(part) for part in run], stdout=subprocess.PIPE, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            with options.out.open("a") as file:
                file.writelines(line + "\n" for line in lines)
            print(f"{name}: {len(lines)} results", file=sys.stderr)
    print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


def make(folder: Path, rows: int, embeddings: Path | None) -> None:
    """rows.npy (N, D) and asked.npy float16, held_out.npy float32, truth.npy (Q, 10); the rows also by parts."""
    from retrieval import exact

    (folder / "parts").mkdir(parents=True, exist_ok=True)
    draw, ask = real(embeddings) if embeddings else made(rows)
    mapped = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, draw(1).shape[1]))
    for low in range(0, rows, 50_000):
        some = draw(min(50_000, rows - low)).astype(np.float16)
        mapped[low : low + len(some)] = some
        np.save(folder / "parts" / f"{low:09d}.npy", some)
    queries = ask(ASKED + HELD_OUT)
    np.save(folder / "asked.npy", queries[:ASKED].astype(np.float16))
    np.save(folder / "held_out.npy", queries[ASKED:].astype(np.float32))
    mapped.flush()
    np.save(folder / "truth.npy", exact.search(mapped, queries[ASKED:], K)[1])


Draw = Callable[[int], np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def made(n: int) -> tuple[Draw, Draw]:
    """Vectors in clusters of clusters, and noisy queries."""
    rng = np.random.default_rng(0)
    count = max(200, n // 100)
    centres = 0.6 * unit(rng.standard_normal((count, DIM), dtype=np.float32))
    families = rng.standard_normal((40, DIM), dtype=np.float32) / DIM**0.5
    centres += 0.8 * families[rng.integers(0, 40, count)]
    weight = rng.pareto(1.5, count) + 0.2
    spread = 0.16 * rng.standard_normal((24, DIM), dtype=np.float32) / DIM**0.5
    noise = 0.35 / DIM**0.5

    def draw(m: int) -> np.ndarray:
        rows = centres[rng.choice(count, m, p=weight / weight.sum())]
        rows = rows + rng.standard_normal((m, 24), dtype=np.float32) @ spread
        return unit(rows + noise * rng.standard_normal((m, DIM), dtype=np.float32))

    def ask(m: int) -> np.ndarray:
        return unit(draw(m) + 0.25 / DIM**0.5 * rng.standard_normal((m, DIM), dtype=np.float32))

    return draw, ask


def real(embeddings: Path) -> tuple[Draw, Draw]:
    """Rows of an embeddings folder with noise: 0.35 long on pictures, 0.25 on captions."""
    from clip_train.store import EmbeddingStore

    rng = np.random.default_rng(0)
    store = EmbeddingStore.open(embeddings)

    def noisy(rows: np.ndarray, m: int, length: float) -> np.ndarray:
        some = rows[rng.integers(0, len(rows), m)]
        return unit(some + length / store.dim**0.5 * rng.standard_normal(some.shape, dtype=np.float32))

    image, text = store.image(), store.text()
    return lambda m: noisy(image, m, 0.35), lambda m: noisy(text, m, 0.25)


class Vectors:
    """The rows as an EmbeddingStore hands them out; its captions are the tuner's queries."""

    def __init__(self, folder: Path) -> None:
        self.rows = np.load(folder / "rows.npy", mmap_mode="r")
        self.asked = np.load(folder / "asked.npy", mmap_mode="r")
        self.dim = self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, rows: np.ndarray) -> np.ndarray:
        return self.rows[rows].astype(np.float32)

    def text(self, rows: np.ndarray) -> np.ndarray:
        return self.asked[np.asarray(rows) % len(self.asked)].astype(np.float32)

    def blocks(self, size: int = 50_000) -> Iterator[tuple[int, np.ndarray]]:
        for low in range(0, len(self), size):
            yield low, self.rows[low : low + size].astype(np.float32)


class Meter:
    """Measures a search function on the held-out queries and prints a json line."""

    def __init__(self, name: str, folder: Path, recalls: list[float]) -> None:
        self.name, self.recalls = name, recalls
        self.queries, self.truth = np.load(folder / "held_out.npy"), np.load(folder / "truth.npy")
        self.rows = len(np.load(folder / "rows.npy", mmap_mode="r"))

    def recall(self, search: Callable[[np.ndarray], np.ndarray]) -> float:
        found = search(self.queries)
        return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, self.truth, strict=True)]))

    def rate(self, search: Callable[[np.ndarray], np.ndarray], batch: int, count: int) -> float:
        seconds = []
        for _ in range(4):
            began = time.process_time()
            for low in range(0, count, batch):
                search(self.queries[low : low + batch])
            seconds.append(time.process_time() - began)
        return count / statistics.median(seconds[1:])

    def report(self, search: Callable[[np.ndarray], np.ndarray], note: str, **known: Any) -> None:
        slow = self.rate(search, 1, 4) < 400  # queries a second
        line = {"name": self.name, "rows": self.rows, "note": note, "recall": round(self.recall(search), 4)}
        line["one"] = round(self.rate(search, 1, 30 if slow else 300), 1)
        line |= {
            f"by{b}": round(self.rate(search, b, max(b, 128 if slow else 1000 // b * b)), 1) for b in (16, BATCH, 256)
        }
        print(json.dumps(line | known), flush=True)

    def turned(
        self,
        search: Callable[[np.ndarray], np.ndarray],
        turn: Callable[[int], None],
        knob: str,
        most: int,
        **known: Any,
    ) -> None:
        """Report the least setting of the knob that reaches each recall."""
        seen: dict[int, float] = {}

        def reached(value: int, asked: float) -> bool:
            turn(value)
            if value not in seen:
                seen[value] = self.recall(search)
            return seen[value] >= asked

        for asked in self.recalls:
            low, high = 0, K
            while high < most and not reached(high, asked):
                low, high = high, min(2 * high, most)
            while high - low > max(1, high // 32):
                middle = (low + high) // 2
                low, high = (low, middle) if reached(middle, asked) else (middle, high)
            reached(high, asked)
            self.report(search, f"{knob} {high}", asked=asked, **known)


def contest(name: str, folder: Path, recalls: list[float]) -> None:
    """Build and measure one contestant; prints its json lines."""
    meter, vectors = Meter(name, folder, recalls), Vectors(folder)
    began = time.process_time()

    def seconds() -> float:
        return round(time.process_time() - began, 1)

    if name == "hnswlib":
        import hnswlib

        index = hnswlib.Index("ip", vectors.dim)
        index.init_index(len(vectors), M=32, ef_construction=80)
        index.set_num_threads(1)
        for low, rows in vectors.blocks():
            index.add_items(rows, np.arange(low, low + len(rows)), num_threads=1)
        known = {"seconds": seconds(), "bytes": round(index.index_file_size() / len(vectors))}
        meter.turned(lambda q: index.knn_query(q, K, num_threads=1)[0], index.set_ef, "M32 ef", 4096, **known)
    elif name == "usearch":
        from usearch.index import Index

        graph = Index(ndim=vectors.dim, metric="ip", dtype="f32", connectivity=32, expansion_add=80)
        for low, rows in vectors.blocks():
            graph.add(np.arange(low, low + len(rows)), rows, threads=1)

        def find(queries: np.ndarray) -> np.ndarray:
            return np.asarray(graph.search(queries, K, threads=1).keys).reshape(len(queries), -1)

        known = {"seconds": seconds(), "bytes": round(graph.memory_usage / len(vectors))}
        meter.turned(find, lambda value: setattr(graph, "expansion_search", value), "M32 f32 ef", 4096, **known)
    else:
        with_faiss(name, meter, vectors, folder, seconds)


def with_faiss(name: str, meter: Meter, vectors: Vectors, folder: Path, seconds: Callable[[], float]) -> None:
    """The contestants that run on faiss, and our exact search."""
    import faiss

    faiss.omp_set_num_threads(1)
    inner = faiss.METRIC_INNER_PRODUCT
    if name == "autofaiss":
        from autofaiss import build_index

        index, infos = build_index(
            embeddings=str(folder / "parts"), file_format="npy", save_on_disk=False, metric_type="ip", nb_cores=1,
            max_index_memory_usage="8GB", current_memory_available="12GB", verbose=40,
        )  # fmt: skip
        known = {"seconds": seconds(), "bytes": size(index, folder, len(vectors))}
        faiss.omp_set_num_threads(1)
        note = f"{(infos or {}).get('index_key')} {(infos or {}).get('index_param')}"
        meter.report(lambda q: index.search(q, K)[1], note, **known)
    elif name in ("flat", "hnsw32", "ivf-sq8"):
        lists = 1024 if len(vectors) <= 200_000 else 4096
        factory = {"flat": "Flat", "hnsw32": "HNSW32", "ivf-sq8": f"IVF{lists},SQ8"}[name]
        index = faiss.index_factory(vectors.dim, factory, inner)
        if name == "hnsw32":
            index.hnsw.efConstruction = 80
        if name == "ivf-sq8":
            sample = np.sort(
                np.random.default_rng(0).choice(len(vectors), min(len(vectors), 64 * lists), replace=False)
            )
            index.cp.niter, index.cp.max_points_per_centroid = 10, 64
            index.train(vectors.image(sample))
        for _, rows in vectors.blocks():
            index.add(rows)
        known = {"seconds": seconds(), "bytes": size(index, folder, len(vectors))}
        if name == "flat":
            meter.report(lambda q: index.search(q, K)[1], factory, **known)
        elif name == "hnsw32":
            turn = lambda value: setattr(index.hnsw, "efSearch", value)  # noqa: E731
            meter.turned(lambda q: index.search(q, K)[1], turn, f"{factory} efSearch", 4096, **known)
        else:
            turn = lambda value: setattr(index, "nprobe", value)  # noqa: E731
            meter.turned(lambda q: index.search(q, K)[1], turn, f"{factory} nprobe", lists, **known)
    elif name == "exact":
        from retrieval.exact import Matrix

        rows = vectors.image(np.arange(len(vectors)))
        began = seconds()
        matrix = Matrix(rows)
        known = {"seconds": round(seconds() - began, 1), "bytes": 6 * vectors.dim}
        meter.report(lambda q: matrix.search(q, K)[1], "bfloat16, then float32", **known)
    else:
        from retrieval.index import choose_and_build

        stages, built = folder / "stages", 0.0  # of all kinds that were tried
        for asked in meter.recalls:
            began = seconds()
            path = folder / "ours.index"
            chosen = choose_and_build(vectors, "image", path, recall=asked, scratch=stages)
            spent = round(seconds() - began, 1)
            index = faiss.read_index(str(path))
            note = f"{chosen['kind']} {chosen['knob']} {chosen['value']} k_factor {chosen.get('k_factor')}"
            known = {"asked": asked, "tuned": chosen["recall"], "tried": chosen["tried"], "choosing": spent}
            built += chosen["build_seconds"]
            known |= {"seconds": round(built, 1), "bytes": round(chosen["bytes_per_vector"])}
            meter.report(lambda q, index=index: index.search(q, K)[1], note, **known)


def size(index: Any, folder: Path, rows: int) -> int:
    """Bytes of the index file for each row."""
    import faiss

    path = folder / "size.index"
    faiss.write_index(index, str(path))
    taken = path.stat().st_size
    path.unlink()
    return round(taken / rows)


def table(results: list[dict[str, Any]]) -> str:
    """A markdown table of results."""
    lines = [
        "| rows | contestant | setting | recall asked | recall@10 | q/s one by one | by 16 | by 64 | by 256 "
        "| bytes/vector | build, core-s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        rates = [f"{one[name]:,.0f}" for name in ("one", "by16", "by64", "by256")]
        row = [f"{one['rows']:,}", one["name"], one["note"], one.get("asked", ""), f"{one['recall']:.4f}", *rates]
        lines.append(f"| {' | '.join(map(str, [*row, one['bytes'], one['seconds']]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
