"""Near-duplicates of a whole set: pairs of rows by cosine, the groups they form, and which row of each group to keep.

The index proposes each row's neighbours, ever more of them until they are farther away than the threshold; the vectors
themselves decide. What hangs together by near pairs is a group (SemDeDup, Abbas et al. 2023, arXiv 2303.09540, groups
within k-means cells instead). A chain of small steps may lead far, so a row is only dropped in favour of one that is
kept and within the threshold of it: a long group keeps several.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.folder import write_file
from clip_train.settings import Progress, UserError
from retrieval.live import LiveIndex

if TYPE_CHECKING:
    from PIL import Image

THRESHOLD = 0.98
BLOCK = 1024  # rows whose neighbours are looked for together
NEIGHBOURS = (8, 32, 128, 512, 2048)  # so many are asked for, and more while the last is nearer than the threshold
PAIRS = 16_384  # pairs of vectors that are compared together
SLACK = 0.02  # the index's own scores may be off by this much
SAMPLE = 256  # rows whose neighbours are also looked for exactly
SAME = 1e-6  # rows whose cosine is as little from that of one with itself have the same neighbours
BINS = np.round(np.arange(0.7, 1.0001, 0.01), 2)  # of the histogram
ADVISED = (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
SHOWN, IN_ROW = 40, 8  # groups, and pictures of each, on a contact sheet


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The groups of near-duplicates among the rows of an index."""

    index: LiveIndex
    threshold: float
    modality: str
    rows: np.ndarray  # (M,) int64: the members of all groups, group by group, each row kept before those it stands for
    group: np.ndarray  # (M,) int64: 0 is the largest
    keeper: np.ndarray  # (M,) int64: the row that is kept for it; itself where it is kept
    cosine: np.ndarray  # (M,) float32: to its keeper
    least: np.ndarray  # (groups,) float32: the least cosine of two members; far below the threshold: a chain
    nearest: np.ndarray  # (N,) float32: each live row's cosine to its nearest other row, as far as the index found it
    found: float | None  # share of a sample's near pairs that are in one group; None: the index is exact, or no pairs

    @property
    def groups(self) -> int:
        return len(self.least)

    @property
    def dropped(self) -> np.ndarray:
        """The rows that may go: each has a near one that stays."""
        return self.rows[self.keeper != self.rows]

    @property
    def chains(self) -> int:
        """Groups of which more than one row stays: not all of it is near to one."""
        kept = self.group[self.keeper == self.rows]
        return int((np.bincount(kept, minlength=self.groups) > 1).sum())

    def figures(self) -> dict[str, Any]:
        """All that is counted, as json values."""
        return {
            "threshold": self.threshold,
            "rows": len(self.nearest),
            "groups": self.groups,
            "in_groups": len(self.rows),
            "dropped": len(self.dropped),
            "chains": self.chains,
            "found": self.found,
            "with_another_as_near": {f"{threshold:g}": rows for threshold, rows, _ in self.advice()},
            "nearest": dict(self.histogram()),
        }

    def keys(self, rows: np.ndarray) -> list[str]:
        """The keys of rows."""
        return self.index.table.keys_of(rows)

    def advice(self) -> list[tuple[float, int, float]]:
        """(threshold, rows with another row at least that near, their share), for a choice of thresholds.

        About how many rows have a duplicate at each; somewhat fewer would go, because one of each group stays.
        """
        n = max(1, len(self.nearest))
        counts = [int((self.nearest >= threshold).sum()) for threshold in ADVISED]
        return [(threshold, count, count / n) for threshold, count in zip(ADVISED, counts, strict=True)]

    def histogram(self) -> list[tuple[str, int]]:
        """How near the nearest other row is: (from .. to, rows), in steps of 0.01 from 0.7 up."""
        counts, _ = np.histogram(np.clip(self.nearest, BINS[0], 1), BINS)
        names = [f"{low:.2f} .. {high:.2f}" for low, high in zip(BINS, BINS[1:], strict=False)]
        return [(f"below {BINS[1]:.2f}", int(counts[0])), *zip(names[1:], counts[1:].tolist(), strict=True)]

    def save(self, path: Path | str) -> None:
        """A .parquet or .csv table: key, group, keeper, cosine (to the keeper), least (cosine inside the group)."""
        path = Path(path)
        columns = {
            "key": self.keys(self.rows),
            "group": self.group.tolist(),
            "keeper": self.keys(self.keeper),
            "cosine": self.cosine.tolist(),
            "least": self.least[self.group].tolist(),
        }
        write_table(path, columns)

    def save_keys(self, path: Path | str) -> None:
        """The keys that may go, one a line: what `unclip index delete --keys` reads."""
        write_file(Path(path), "".join(f"{key}\n" for key in self.keys(self.dropped)).encode())

    def sheet(self, groups: int = SHOWN) -> "Image.Image":
        """A row a group: the picture that is kept, then what it stands for with its cosine. The doubtful come first."""
        from clip_train.sheet import query_sheet
        from retrieval.album import Album

        album = Album.of(self.index)
        kept, pictures, labels = [], [], []
        goes = self.rows != self.keeper
        nearest_to_the_line = {}
        for place in np.flatnonzero(goes)[np.argsort(self.cosine[goes], kind="stable")].tolist():
            nearest_to_the_line.setdefault(int(self.keeper[place]), place)
            if len(nearest_to_the_line) == groups:
                break
        for keeper in nearest_to_the_line:
            mine = np.flatnonzero(goes & (self.keeper == keeper))
            mine = mine[np.argsort(self.cosine[mine], kind="stable")][:IN_ROW]
            key, names = self.keys(np.array([keeper]))[0], self.keys(self.rows[mine])
            kept.append(album.picture(keeper) or key)
            pictures.append([album.picture(row) for row in self.rows[mine].tolist()])
            labels.append([f"{cosine:.3f} {name}" for cosine, name in zip(self.cosine[mine], names, strict=True)])
        title = (
            f"{len(nearest_to_the_line)} of {self.groups} groups, those with the least cosine first: "
            f"left what is kept, right what may go (cosine at least {self.threshold:g})"
        )
        return query_sheet(kept, pictures, labels, title=title)


def find_duplicates(
    index: Path | str,
    *,
    threshold: float = THRESHOLD,
    modality: str = "image",
    prefer: str | None = None,
    on_progress: Progress | None = None,
) -> Duplicates:
    """The groups of rows whose cosine is at least `threshold`, among all rows of an index folder.

    modality: compare pictures ("image") or captions ("text"). prefer: the metadata column of numbers whose largest is
    kept, such as width; otherwise, and among equals, the first row is. Vectors are read in blocks; what stays in memory
    is about 40 bytes a row, and the pairs of 1,024 rows (2,048 each, 16 bytes a pair). Of a group all members are
    compared with each other, 1,024 lines at a time: a group of 100,000 takes 400 MB and 10^10 comparisons.
    UserError: a threshold that is none, or a column that is not there.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold} must be above 0 and at most 1: a cosine")
    live = LiveIndex.open(index)
    rank = _rank(live, prefer)
    parent = np.arange(live.rows)
    nearest = np.full(live.rows, -1, dtype=np.float32)
    rows = np.flatnonzero(live.live)
    for low in range(0, len(rows), BLOCK):
        some = rows[low : low + BLOCK]
        i, j = _pairs(live, some, threshold, modality, nearest)
        _join(parent, i, j)
        if on_progress:
            on_progress(low + len(some), len(rows), step="neighbours")
    members = _members(parent, rows)
    found = _share_found(live, rows, threshold, modality, parent)
    return _settled(live, members, rank, threshold, modality, nearest[rows], found, on_progress)


def refuse_suffix(path: Path) -> None:
    """UserError unless write_table can write such a file."""
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"{path}: the table is written as .parquet or .csv; give one of these endings")


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """A .parquet or .csv file of columns of one length."""
    refuse_suffix(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = io.BytesIO()
        pq.write_table(pa.table(columns), data)
        write_file(path, data.getvalue())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_file(path, text.getvalue().encode())


def _pairs(
    live: LiveIndex, rows: np.ndarray, threshold: float, modality: str, nearest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(i, j): the near pairs that these rows are in. Writes down how near the nearest of each is.

    Of many copies of a row only the first is asked for ever more neighbours, which are those of the others, too.
    """
    own = live.vectors(rows, modality)
    itself = np.minimum(np.einsum("nd,nd->n", own, own), 1)
    left, right = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    open_ = np.arange(len(rows))  # those whose neighbours did not end yet
    for k in NEIGHBOURS:
        k = min(k, live.rows)
        scores, found = live.search(own[open_], k, modality)
        scores[found == rows[open_, None]] = -np.inf
        if k == min(NEIGHBOURS[0], live.rows):
            nearest[rows] = scores.max(axis=1)
        last = scores.min(axis=1, initial=np.inf, where=np.isfinite(scores))
        at, place = np.nonzero(scores >= threshold - SLACK)
        i, j = open_[at], found[at, place]
        cosine = _cosines(live, own, i, j, modality)
        left.append(rows[i[cosine >= threshold]])
        right.append(j[cosine >= threshold])
        copies = i[(cosine >= itself[i] - SAME) & (j < rows[i])]
        open_ = np.setdiff1d(open_[last >= threshold - SLACK], copies)
        if not len(open_) or k == live.rows:
            break
    return np.concatenate(left), np.concatenate(right)


def _cosines(live: LiveIndex, own: np.ndarray, i: np.ndarray, j: np.ndarray, modality: str) -> np.ndarray:
    """(P,) float32: the cosines of own[i] and the rows j, some pairs at a time."""
    out = np.empty(len(i), dtype=np.float32)
    for low in range(0, len(i), PAIRS):
        now = slice(low, low + PAIRS)
        rows, which = np.unique(j[now], return_inverse=True)
        out[now] = np.einsum("pd,pd->p", own[i[now]], live.vectors(rows, modality)[which])
    return np.minimum(out, 1)


def _join(parent: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Union-find over pairs: afterwards i and j hang on one root, the lowest row of their group."""
    for low in range(0, len(i), PAIRS):
        roots = np.stack([_roots(parent, i[low : low + PAIRS]), _roots(parent, j[low : low + PAIRS])], axis=1)
        for a, b in np.unique(roots[roots[:, 0] != roots[:, 1]], axis=0).tolist():  # most hang together already
            a, b = _root(parent, a), _root(parent, b)
            if a != b:
                parent[max(a, b)] = min(a, b)


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The roots of many rows, which hang on them directly from now on."""
    roots = parent[rows]
    while not np.array_equal(roots, above := parent[roots]):
        roots = above
    parent[rows] = roots
    return roots


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _members(parent: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of every group of at least two, the largest group first."""
    while not np.array_equal(parent, above := parent[parent]):
        parent[:] = above
    root, counts = np.unique(parent[rows], return_counts=True)
    root, counts = root[counts > 1], counts[counts > 1]
    mine = rows[np.isin(parent[rows], root)]
    ordered = mine[np.argsort(parent[mine], kind="stable")]
    groups = np.split(ordered, np.cumsum(counts)[:-1]) if len(counts) else []
    return [groups[g] for g in np.argsort(-counts, kind="stable").tolist()]


def _settled(
    live: LiveIndex,
    members: list[np.ndarray],
    rank: np.ndarray,
    threshold: float,
    modality: str,
    nearest: np.ndarray,
    found: float | None,
    on_progress: Progress | None,
) -> Duplicates:
    """Choose what is kept of each group: the best row, then the best of those that are not near it, and so on."""
    rows, keepers, cosines, least = [], [], [], np.empty(len(members), dtype=np.float32)
    for g, group in enumerate(members):
        group = group[np.argsort(rank[group], kind="stable")]
        keeper = np.full(len(group), -1)
        cosine = np.zeros(len(group), dtype=np.float32)
        lowest = 1.0
        for start, near in _similar(live, group, modality):  # the cosines of a few members to all
            lowest = min(lowest, float(near.min()))
            for at, line in enumerate(near, start):
                if keeper[at] < 0:
                    mine = (keeper < 0) & (line >= threshold)
                    mine[at] = True
                    keeper[mine], cosine[mine] = at, line[mine]
                    cosine[at] = 1
        least[g] = lowest
        order = np.argsort(keeper, kind="stable")
        rows.append(group[order])
        keepers.append(group[keeper[order]])
        cosines.append(cosine[order])
        if on_progress:
            on_progress(g + 1, len(members), step="groups")
    sizes = [len(group) for group in members]
    return Duplicates(
        index=live,
        threshold=threshold,
        modality=modality,
        rows=np.concatenate([np.empty(0, dtype=np.int64), *rows]),
        group=np.repeat(np.arange(len(members)), sizes),
        keeper=np.concatenate([np.empty(0, dtype=np.int64), *keepers]),
        cosine=np.concatenate([np.empty(0, dtype=np.float32), *cosines]),
        least=least,
        nearest=nearest,
        found=found,
    )


def _similar(live: LiveIndex, group: np.ndarray, modality: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first, (b, M) cosines of b members of a group with all M of them), block by block."""
    for low in range(0, len(group), BLOCK):
        some = live.vectors(group[low : low + BLOCK], modality)
        line = np.empty((len(some), len(group)), dtype=np.float32)
        for at in range(0, len(group), BLOCK):
            others = some if at == low else live.vectors(group[at : at + BLOCK], modality)
            line[:, at : at + len(others)] = some @ others.T
        yield low, np.minimum(line, 1)


def _share_found(
    live: LiveIndex, rows: np.ndarray, threshold: float, modality: str, parent: np.ndarray
) -> float | None:
    """Of the near pairs that rows of a sample are in, known by comparing these with all, the share in one group, be
    it by way of other pairs."""
    if all(part.filtered(modality).exact for part in live.parts):
        return None
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    own = live.vectors(sample, modality)
    there = together = 0
    for low in range(0, len(rows), 16 * BLOCK):
        some = rows[low : low + 16 * BLOCK]
        i, j = np.nonzero(own @ live.vectors(some, modality).T >= threshold)
        i, j = i[sample[i] != some[j]], j[sample[i] != some[j]]
        there += len(i)
        together += int((parent[sample[i]] == parent[some[j]]).sum())
    return together / there if there else None


def _rank(live: LiveIndex, prefer: str | None) -> np.ndarray:
    """(rows,): the lower, the rather a row is kept; rows without a number come last."""
    if prefer is None:
        return np.arange(live.rows)
    values = live.table.column(prefer)
    numbers = [v if isinstance(v, int | float) and not isinstance(v, bool) and v == v else None for v in values]
    if all(number is None for number in numbers):
        raise UserError(f"--keep {prefer}: no row of {live.folder}/ has a number in such a column of its metadata")
    worth = np.array([-np.inf if number is None else number for number in numbers], dtype=np.float64)
    rank = np.empty(live.rows, dtype=np.int64)
    rank[np.argsort(-worth, kind="stable")] = np.arange(live.rows)
    return rank
