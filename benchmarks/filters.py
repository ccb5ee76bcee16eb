"""Filtered search: recall@10 against exact search among the allowed rows, and queries a second of one core.

    python benchmarks/filters.py --embeddings emb --queries emb-val --rows 50000

The pictures of an embeddings folder, repeated with noise to size; questions are the captions of another one. Each kind
is turned up until it reaches a recall of 0.95 without a filter; then rows are allowed at random, or by the metadata
column --column (whole topics, as a person filters), and the same index is asked again. Prints a markdown table.
"""

import argparse
import functools
import sys
import time

sys.path.pop(0)  # this folder: a benchmark in it has the name of the package

import faiss  # noqa: E402
import numpy as np  # noqa: E402

from clip_train.store import EmbeddingStore  # noqa: E402
from retrieval import exact  # noqa: E402
from retrieval.filtered import FilteredIndex, Mask, inner_of  # noqa: E402

KINDS = ("Flat", "IVF{n},SQ8", "IVF{n},PQ256x4fs,Refine(SQ8)", "IVF{n},RaBitQfs,Refine(SQ8)", "HNSW32")
K, BATCH = 10, 64


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def grown(store, count, noise=0.3):
    """(count, D) rows of the store with noise of this length, and the row each of them was."""
    rng = np.random.default_rng(0)
    at = np.arange(count) % len(store)
    rows = store.image(at)
    rows[len(store) :] += noise / np.sqrt(store.dim) * rng.standard_normal((count - len(store), store.dim))
    return unit(rows), at


def built(kind, rows):
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if kind.startswith("HNSW"):
        index.hnsw.efConstruction = 80
    if not index.is_trained:
        index.train(rows[np.random.default_rng(1).permutation(len(rows))[:30_000]])
    index.add(rows)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = 8
    return index


def measured(search, queries, rows, best):
    """(recall@10 and queries a second one at a time, and BATCH at a time), of one core."""
    found = np.concatenate([search(query[None])[1] for query in queries])  # many at once are often compared one by one
    scores = np.einsum("qd,qkd->qk", queries, rows[np.maximum(found, 0)])
    speeds = []
    for batch in (1, BATCH):
        began, done = time.process_time(), 0
        while time.process_time() - began < 0.5 or not done:
            low = done % (len(queries) - batch + 1)
            search(queries[low : low + batch])
            done += batch
        speeds.append(done / (time.process_time() - began))
    return exact.recall(found, scores, best), *speeds, int((found < 0).sum())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--column", default="group")
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    given = parser.parse_args()
    store = EmbeddingStore.open(given.embeddings)
    rows, at = grown(store, given.rows)
    queries = EmbeddingStore.open(given.queries).text()
    queries = queries[np.random.default_rng(2).permutation(len(queries))[:512]]
    topics = np.array(store.table.column(given.column))[at]
    rng = np.random.default_rng(3)
    filters = [(f"{share:.1%} at random", rng.random(len(rows)) < share) for share in (0.5, 0.1, 0.05, 0.01, 0.001)]
    names, counts = np.unique(topics, return_counts=True)
    for name in names[np.argsort(-counts)[:5]]:
        mine = topics == name
        filters.append((f"{mine.mean():.1%}: {given.column} {name}", mine))
    gone = rng.permutation(len(rows))[: len(rows) // 50]
    filters.append((f"all but {len(gone)} deleted", np.isin(np.arange(len(rows)), gone, invert=True)))
    matrix = exact.Matrix(rows)
    print("| index | allowed | recall@10 | q/s b1 | q/s b64 | missing |\n|---|---|---|---|---|---|")
    for kind in given.kinds:
        index = built(kind.format(n=round(4 * np.sqrt(len(rows)))), rows)
        best = matrix.search(queries, K)[0]
        for value in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
            inner = inner_of(index)
            if isinstance(inner, faiss.IndexIVF):
                inner.nprobe = value
            elif isinstance(inner, faiss.IndexHNSW):
                inner.hnsw.efSearch = value
            whole = FilteredIndex(index, lambda some: rows[some])
            recall, *rest = measured(functools.partial(whole.search, k=K), queries, rows, best)
            if recall >= 0.95:
                break
        print(f"| {kind} at {value} | all | {recall:.3f} | {rest[0]:.0f} | {rest[1]:.0f} | {rest[2]} |", flush=True)
        for name, allowed in filters:
            mask, best = Mask(allowed), matrix.search(queries, K, allowed)[0]
            recall, *rest = measured(functools.partial(whole.search, k=K, mask=mask), queries, rows, best)
            print(f"| | {name} | {recall:.3f} | {rest[0]:.0f} | {rest[1]:.0f} | {rest[2]} |", flush=True)


if __name__ == "__main__":
    main()
