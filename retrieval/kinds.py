"""The kinds of index to choose from: what each keeps of a row, what it weighs, and which come into question."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

EXACT_UP_TO = 20_000  # rows that a flat index searches in about 2 ms on one core: no approximation pays
GRAPH_UP_TO = 50_000  # rows up to which auto tries a graph too; beyond, it takes longer to build than all the others
K_FACTORS = (4, 8, 12, 16, 32, 64)  # of a refined kind: how many times k rows are scored a second time
HEAD = 100  # bytes of a file that are no rows', at least
NAMES = ("auto", "flat", "ivf", "pq", "rabitq", "opq", "hnsw")


@dataclass(frozen=True)
class Kind:
    """How rows are kept and found, in the words of faiss's index_factory.

    With lists, the rows lie in that many lists around centres found by k-means, and a query looks into the `nprobe`
    lists whose centres are nearest. With refine, k * k_factor rows that do well by their short codes are scored again
    by longer ones.
    """

    codes: str  # Flat, SQfp16, SQ8, PQ128 (8 bits each), PQ128x4 (4 bits), RaBitQ, HNSW32, HNSW32_SQ8
    lists: int = 0  # 0: none
    refine: str = ""  # SQ8, SQ6, SQ4, SQfp16
    rotate: int = 0  # > 0: a rotation (OPQ) for so many sub-vectors comes first

    @property
    def name(self) -> str:
        """As index_factory has it."""
        codes = self.codes + ("" if not self.packed else "fs" if self.codes == "RaBitQ" else "fsr")
        lists = f"IVF{self.lists}," if self.lists else ""
        return f"{f'OPQ{self.rotate},' if self.rotate else ''}{lists}{codes.replace('_', ',')}" + (
            f",Refine({self.refine})" if self.refine else ""
        )

    @property
    def packed(self) -> bool:
        """Whether 32 rows are scanned at a time (fast scan): 4-bit PQ of residuals, and RaBitQ below a refinement.

        faiss cannot reconstruct what it finds in packed codes alone, which `clip-retrieval back` asks for.
        """
        return bool(self.refine) and (self.codes.endswith("x4") or self.codes == "RaBitQ")

    @property
    def knob(self) -> str:
        """The run-time setting that trades speed for recall; "" where there is none."""
        return "nprobe" if self.lists else "efSearch" if self.codes.startswith("HNSW") else ""

    @property
    def codewords(self) -> int:
        """Of each sub-vector, to be learned from at least as many rows; 0 where there are none."""
        return 0 if not self.codes.startswith("PQ") else 16 if self.codes.endswith("x4") else 256

    @property
    def k_factors(self) -> tuple[int, ...]:
        return K_FACTORS if self.refine else (1,)

    @property
    def last(self) -> str:
        """The scalar codes that have the last word on a score; "" where there are none, or none that lose anything."""
        codes = self.refine or self.codes.split("_")[-1]
        return codes if codes in ("SQ8", "SQ6", "SQ4") else ""

    def bytes_per_row(self, n: int, dim: int) -> float:
        """Memory for each of n rows: codes, ids, and its share of centres, rotation, codebooks and a file's head.

        Batches asked of an exact kind (filtered.FilteredIndex) cost 2 dim more.
        """
        name, _, inner = self.codes.partition("_")
        if name.startswith("HNSW"):
            row = _bytes(inner or "Flat", dim) + 4 * 2 * int(name[4:]) * 1.1
        else:
            row = _bytes(name, dim)
        row += 15.5 * row * self.lists / n if self.packed else 0  # each list is filled up to blocks of 32
        row += HEAD / n
        row += 8 + 4 * dim * self.lists / n if self.lists else 0
        row += 4 * dim * dim / n if self.rotate else 0
        row += 4 * dim * self.codewords / n
        return row + (_bytes(self.refine, dim) if self.refine else 0)

    def values(self, n: int) -> Iterator[int]:
        """Ever better settings of the knob, in steps of the square root of two."""
        value, most = (10, min(n, 4096)) if self.knob == "efSearch" else (1, max(self.lists, 1))
        while value < most:
            yield value
            value = max(value + 1, round(value * math.sqrt(2)))
        yield most


def tiers(n: int, dim: int, kind: str = "auto", tight: bool = False) -> list[list[Kind]]:
    """What to try for n rows of width dim: of the first tier in which a kind reaches the recall, the fastest is taken.

    tight: memory is limited, so smaller kinds are worth a try. Embeddings are float16: SQfp16 loses nothing of them,
    SQ8 reaches a recall of about 0.99. Codes of 4 bits for each 4 dimensions, refined by SQ8, are scanned fastest.
    Kinds that the installed faiss cannot make, or that have more codes than there are rows to learn them from, are left
    out.
    """
    lists = max(1, min(round(4 * math.sqrt(n)), n // 40))  # k-means wants 39 rows a list
    short = f"PQ{dim // 4}x4"
    pieces = dim // 4

    def refined(by: str) -> list[Kind]:
        return [Kind(short, lists, by), Kind("RaBitQ", lists, by)]

    flat = [[Kind("Flat")], [Kind("SQfp16")]]
    plain = [[Kind("SQ8", lists)], [Kind("SQfp16", lists), Kind("Flat", lists)]]
    graph = [[Kind("HNSW32_SQ8")], [Kind("HNSW32")]]
    turned = [[Kind(short, lists, by, pieces)] for by in ("SQ8", "SQ4")]
    turned += [[Kind(f"PQ{count}", lists, "", count)] for count in (pieces, pieces // 2)]
    if kind == "auto":
        first = [*refined("SQ8"), *plain[0], *(graph[0] if n <= GRAPH_UP_TO else [])]
        small = [refined("SQ6"), refined("SQ4"), *turned[1:], [Kind("RaBitQ", lists)]] if tight else []
        near = [first, *small, [*refined("SQfp16"), *plain[1]]]
        all_tiers = flat + near if n <= EXACT_UP_TO else near + flat
    else:
        all_tiers = {
            "flat": flat,
            "ivf": plain + flat,
            "pq": [[Kind(short, lists, by)] for by in ("SQ8", "SQ6", "SQ4", "SQfp16")] + flat,
            "rabitq": [[Kind("RaBitQ", lists, by)] for by in ("SQ8", "SQ6", "SQ4", "SQfp16")] + flat,
            "opq": turned + [[Kind(short, lists, "SQfp16", pieces)]] + flat,
            "hnsw": graph + flat,
        }[kind]
    possible = [[one for one in tier if available(one, dim) and one.codewords <= n] for tier in all_tiers]
    return [tier for tier in possible if tier]


@functools.cache
def available(kind: Kind, dim: int) -> bool:
    """Whether the installed faiss makes this kind. PQ needs a width divisible by 4."""
    import faiss

    if kind.codes.startswith("PQ") and dim % 4:
        return False
    try:
        faiss.index_factory(dim, kind.name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        return False
    return True


def _bytes(codes: str, dim: int) -> float:
    """Bytes that the codes of one row take."""
    if codes.startswith("PQ"):
        count, _, bits = codes[2:].partition("x")
        return int(count) * int(bits or 8) / 8
    if codes == "RaBitQ":
        return dim / 8 + 8
    return {"Flat": 4, "SQfp16": 2, "SQ8": 1, "SQ6": 0.75, "SQ4": 0.5}[codes] * dim
