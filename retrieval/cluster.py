"""The whole set in clusters, to look at: k-means on the sphere, the words and the pictures each cluster stands for."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clip_train.folder import Input, Manifest, Workspace, write_file
from clip_train.settings import Progress, UserError
from clip_train.sheet import contact_sheet, query_sheet, save_sheet
from retrieval.dedup import write_table
from retrieval.live import LiveIndex

BLOCK = 16_384  # rows read at a time
PER_CLUSTER = 256  # rows for each centre that k-means sees
ROUNDS = 25  # of k-means
STARTS = 10  # of k-means with few centres; the best end counts
COUNTS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # that are tried
HALF = 8192  # rows of each half that must agree, at most
SPLITS = 3  # into halves
AS_GOOD = 0.02  # agreement that may be given up for more clusters
WORDS = 6  # that describe a cluster
PICTURES, IN_ROW = 48, 8  # on a cluster's sheet; of each cluster on the overview


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What decides the clusters of an index."""

    count: int | None = None  # of clusters; None: the one of COUNTS on which halves of the set agree best
    modality: str = "image"  # cluster the pictures, or (text) the captions
    seed: int = 0  # of everything random
    sheets: bool = True  # a contact sheet per cluster, beside the overview

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UserError(f"--count {self.count} must be at least 1")


def cluster(
    index: Path | str, out: Path | str, config: ClusterConfig | None = None, on_progress: Progress | None = None
) -> Manifest:
    """Write the folder `out`: clusters.parquet (key, cluster, cosine), clusters.json, overview.png, sheets/.

    cosine: of the row and its cluster's centre. Cluster 0 is the largest. The manifest's result has count, rows,
    clusters (rows, words, cosine: the mean, key: of the row nearest the centre) and, if the count was chosen, agreement
    (count -> adjusted Rand index of two halves). Vectors are read in blocks; what stays in memory
    is about 300 bytes a row, most of it the table before it is written.
    UserError: more clusters than rows.
    """
    config = config or ClusterConfig()
    live = LiveIndex.open(index)
    rows = np.flatnonzero(live.live)
    if not len(rows) or len(rows) < (config.count or 1):
        raise UserError(f"{index}/ has {len(rows)} rows, which do not make {config.count or 1} clusters")
    settings = {"count": config.count, "modality": config.modality, "seed": config.seed, "sheets": config.sheets}
    space = Workspace.open(out, "clusters", settings, {"index": Input(live.state, index)}, "unclip cluster")
    if space.done:
        return space.done

    agreement = {} if config.count else choose_count(live, rows, config, on_progress)
    count = config.count or best_count(agreement)
    centres = _centres(_sample(live, rows, PER_CLUSTER * count, config), count, config.seed)
    owner, cosine = _owners(live, rows, centres, config.modality, on_progress)
    order = np.argsort(-np.bincount(owner, minlength=count), kind="stable")  # the largest becomes 0
    owner = np.argsort(order)[owner]
    words = typical_words(_captions(live, rows, owner), count)

    keys = live.table.keys_of(rows)
    table = {"key": keys, "cluster": owner.tolist(), "cosine": cosine.tolist()}
    write_table(space.path / "clusters.parquet", table)
    about, nearest = [], []
    for c in range(count):
        mine = np.flatnonzero(owner == c)
        nearest.append(mine[np.argsort(-cosine[mine], kind="stable")][:PICTURES])
        about.append(
            {
                "cluster": c,
                "rows": len(mine),
                "words": words[c],
                "cosine": round(float(cosine[mine].mean()), 4) if len(mine) else None,
                "key": keys[nearest[c][0]] if len(mine) else None,
            }
        )
    write_file(space.path / "clusters.json", json.dumps(about, indent=1, ensure_ascii=False).encode())
    _draw(live, rows, about, nearest, space.path, config.sheets, on_progress)
    chosen = {"agreement": {str(k): round(v, 4) for k, v in agreement.items()}} if agreement else {}
    return space.publish({"count": count, "rows": len(rows), "clusters": about, **chosen})


def choose_count(
    live: LiveIndex, rows: np.ndarray, config: ClusterConfig, on_progress: Progress | None = None
) -> dict[int, float]:
    """How well two halves of the set agree on each count of clusters, {count: adjusted Rand index}; 1 is perfect.

    Each half is clustered on its own, and both clusterings are put to rows of the second (Tibshirani and Walther,
    Cluster Validation by Prediction Strength, 2005, with the index of Hubert and Arabie, 1985). Too few clusters or too
    many are drawn by chance, each time otherwise.
    """
    sample = _sample(live, rows, 2 * HALF, config)
    counts = [count for count in COUNTS if count <= len(sample) // 20]
    agreement: dict[int, list[float]] = {count: [] for count in counts}
    rng = np.random.default_rng(config.seed)
    for split in range(SPLITS):
        one, other = np.array_split(rng.permutation(sample), 2)
        for n, count in enumerate(counts):
            mine, theirs = (
                (other @ _centres(half, count, config.seed + split).T).argmax(axis=1) for half in (one, other)
            )
            agreement[count].append(adjusted_rand(mine, theirs))
            if on_progress:
                on_progress(split * len(counts) + n + 1, SPLITS * len(counts), step="count")
    return {count: float(np.mean(values)) for count, values in agreement.items()}


def best_count(agreement: dict[int, float]) -> int:
    """The largest count that is as good as the best; 1 where there is nothing to choose from."""
    best = max(agreement.values(), default=0)
    return max((count for count, value in agreement.items() if value >= best - AS_GOOD), default=1)


def adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    """The adjusted Rand index of two clusterings (N,) of the same rows: 1 if they are the same, 0 by chance.

    L. Hubert and P. Arabie, Comparing Partitions, 1985, equation 5.
    """
    both = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(both, (one, other), 1)
    pairs, left, right, all_ = (
        float((v * (v - 1) / 2).sum()) for v in (both, both.sum(axis=1), both.sum(axis=0), both.sum())
    )
    expected, most = left * right / max(all_, 1), (left + right) / 2
    return 1.0 if most == expected else (pairs - expected) / (most - expected)


def typical_words(captions: Iterator[tuple[int, set[str]]], count: int, most: int = WORDS) -> list[list[str]]:
    """The words that a cluster's captions have more often than those of the others, the most telling first.

    captions: (cluster, words) of every row. By the log-odds ratio with an informative Dirichlet prior, in standard
    deviations (Monroe, Colaresi and Quinn, Fightin' Words, 2008, equations 16 and 22); at least 2 of them, so words
    that are common everywhere, such as "the", fall out by themselves.
    """
    inside: list[Counter[str]] = [Counter() for _ in range(count)]
    for c, words in captions:
        inside[c].update(words)
    total: Counter[str] = Counter()
    for words in inside:
        total.update(words)
    all_ = sum(total.values())
    out = []
    for words in inside:
        mine, scores = sum(words.values()), {}
        for word, n in words.items():
            prior, rest = total[word], total[word] - n
            if n < 2 and mine > 20 or len(word) < 2:
                continue
            here = (n + 0.1 * prior) / max(mine + 0.1 * all_ - n - 0.1 * prior, 1e-9)
            there = (rest + 0.1 * prior) / max(all_ - mine + 0.1 * all_ - rest - 0.1 * prior, 1e-9)
            deviation = np.sqrt(1 / (n + 0.1 * prior) + 1 / (rest + 0.1 * prior))
            scores[word] = float(np.log(here / there) / deviation)
        best = sorted((word for word in scores if scores[word] > 2), key=lambda word: (-scores[word], word))
        out.append(best[:most])
    return out


def words_of(captions: Sequence[str]) -> set[str]:
    """The words of a row's captions, in lower case, each once."""
    return {word for caption in captions for word in re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", caption.lower())}


def _sample(live: LiveIndex, rows: np.ndarray, most: int, config: ClusterConfig) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    return live.vectors(np.sort(rng.choice(rows, min(most, len(rows)), replace=False)), config.modality)


def _centres(sample: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, D) unit rows: spherical k-means. Few centres may be stuck in a bad place, so these start more often."""
    means = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=ROUNDS,
        nredo=max(1, min(STARTS, 128 // count)),
        seed=seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max(PER_CLUSTER, -(-len(sample) // count)),
    )
    means.train(np.ascontiguousarray(sample))
    return means.centroids


def _owners(
    live: LiveIndex, rows: np.ndarray, centres: np.ndarray, modality: str, on_progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the nearest centre of each row, and (N,) float32 its cosine."""
    owner, cosine = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    for low in range(0, len(rows), BLOCK):
        now = slice(low, low + BLOCK)
        near = live.vectors(rows[now], modality) @ centres.T
        owner[now], cosine[now] = near.argmax(axis=1), np.minimum(near.max(axis=1), 1)
        if on_progress:
            on_progress(min(low + BLOCK, len(rows)), len(rows), step="rows")
    return owner, cosine


def _captions(live: LiveIndex, rows: np.ndarray, owner: np.ndarray) -> Iterator[tuple[int, set[str]]]:
    """(cluster, words) of every row, file of metadata by file."""
    cluster_of = np.full(live.rows, -1, dtype=np.int64)
    cluster_of[rows] = owner
    for n, start in enumerate(live.table.starts[:-1].tolist()):
        part = live.table.part(n, ("caption", "captions"))
        columns: list[list[Any]] = [column.to_pylist() for column in part.columns]
        for row in range(live.table.counts[n]):
            if cluster_of[start + row] >= 0:
                texts = [column[row] for column in columns]
                texts = [text for t in texts if t for text in ([t] if isinstance(t, str) else t)]
                yield int(cluster_of[start + row]), words_of([text for text in texts if isinstance(text, str)])


def _draw(
    live: LiveIndex,
    rows: np.ndarray,
    about: list[dict[str, Any]],
    nearest: list[np.ndarray],
    folder: Path,
    sheets: bool,
    on_progress: Progress | None,
) -> None:
    from retrieval.album import Album

    album = Album.of(live)
    heads, shown = [], []
    digits = len(str(len(about) - 1))
    for entry, mine in zip(about, nearest, strict=True):
        title = f"{entry['cluster']}: {', '.join(entry['words'])} ({entry['rows']})"
        pictures = [album.picture(row) for row in rows[mine if sheets else mine[:IN_ROW]].tolist()]
        heads.append(title)
        shown.append(pictures[:IN_ROW])
        if sheets and pictures:
            captions = [live.table.row(row).get("caption", "") for row in rows[mine].tolist()]
            drawn = contact_sheet(pictures, captions, title=f"{title}, nearest the centre first")
            save_sheet(drawn, folder / "sheets" / f"cluster_{entry['cluster']:0{digits}d}.png")
        if on_progress:
            on_progress(entry["cluster"] + 1, len(about), step="sheets")
    save_sheet(query_sheet(heads, shown, title=f"{len(rows)} rows in {len(about)} clusters"), folder / "overview.png")
