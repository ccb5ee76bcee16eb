import faiss
import numpy as np
import pytest
import tiny

from retrieval.build import build
from retrieval.kinds import NAMES, Kind, available, tiers

NEW = available(Kind("RaBitQ", 100, "SQ8"), 512)  # an older faiss has no RaBitQ, or none with fast scan


def names(n, **how):
    return [[kind.name for kind in tier] for tier in tiers(n, 512, **how)]


def test_auto_is_exact_for_small_sets_and_short_codes_with_a_second_look_for_large_ones():
    assert names(20_000)[0] == ["Flat"]
    new = ["IVF4000,RaBitQfs,Refine(SQ8)"] if NEW else []
    assert names(1_000_000)[0] == ["IVF4000,PQ128x4fsr,Refine(SQ8)", *new, "IVF4000,SQ8"]
    assert names(1_000_000)[-2:] == [["Flat"], ["SQfp16"]]
    assert "HNSW32,SQ8" in names(30_000)[0] and "HNSW32,SQ8" not in names(60_000)[0]


def test_limited_memory_brings_smaller_kinds_into_question_in_falling_size():
    loose, tight = names(1_000_000), names(1_000_000, tight=True)
    more = [tier for tier in tight if tier not in loose]
    sizes = [[k.bytes_per_row(1_000_000, 512) for k in t] for t in tiers(1_000_000, 512, tight=True) if t]
    assert len(more) >= 5 and ["OPQ128,IVF4000,PQ128x4fsr,Refine(SQ4)"] in more
    assert max(sizes[-3]) > 2000 and min(min(size) for size in sizes) < 100


@pytest.mark.parametrize("kind", [name for name in NAMES if name != "auto"])
def test_every_kind_falls_back_to_an_exact_one(kind):
    assert names(1_000_000, kind=kind)[-2:] == [["Flat"], ["SQfp16"]]


def test_codes_need_a_width_that_they_divide():
    assert available(Kind("PQ128x4", 100, "SQ8"), 512)
    assert not available(Kind("PQ7x4", 100, "SQ8"), 30)
    assert not any(kind.codes.startswith("PQ") for tier in tiers(10**6, 30) for kind in tier)


def test_knob_values_rise_to_the_largest():
    values = list(Kind("SQ8", 4000).values(10**6))
    assert values[:5] == [1, 2, 3, 4, 6] and values[-1] == 4000 and values == sorted(set(values))


class Rows:
    """Rows in memory, as build() wants them."""

    def __init__(self, rows):
        self.rows, self.dim = rows, rows.shape[1]

    def __len__(self):
        return len(self.rows)

    def image(self, rows):
        return self.rows[rows]


EVERY = [
    Kind("Flat"),
    Kind("SQfp16"),
    Kind("HNSW32"),
    Kind("HNSW32_SQ8"),
    Kind("Flat", 20),
    Kind("SQ8", 20),
    Kind("SQfp16", 20),
    Kind("PQ16x4", 20, "SQ8"),
    Kind("PQ16x4", 20, "SQ4"),
    Kind("RaBitQ", 20, "SQ8"),
    Kind("RaBitQ", 20),
    Kind("PQ16x4", 20, "SQ6", 16),
    Kind("PQ16", 20, "", 16),
]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
def test_every_kind_weighs_what_it_says_and_gives_back_rows_as_clip_retrieval_asks(kind, tmp_path):
    if not available(kind, 64):
        pytest.skip("this faiss does not make it")
    rows = tiny.unit_rows(3000, 64)
    path = build(Rows(rows), "image", kind, tmp_path)
    assert kind.bytes_per_row(3000, 64) * 3000 == pytest.approx(path.stat().st_size, rel=0.12)
    for flags in (0, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY):  # how clip-retrieval reads it
        index = faiss.read_index(str(path), flags)
        scores, found, vectors = index.search_and_reconstruct(rows[:50], 5)
        assert np.mean(found[:, 0] == np.arange(50)) > 0.9
        assert np.all(np.diff(scores, axis=1) <= 0)
        near = np.einsum("qd,qd->q", vectors[:, 0], rows[found[:, 0]])  # what it says the best row is
        assert near.min() > (0.95 if kind.refine or kind.codes in ("Flat", "SQfp16", "SQ8") else 0.5)


@pytest.mark.parametrize("kind", [Kind("PQ16x4", 525, "SQ8"), Kind("PQ16x4", 525, "SQ4"), Kind("RaBitQ", 525, "SQ4")])
def test_lists_of_packed_codes_weigh_what_fills_up_their_blocks_too(kind, tmp_path):
    if not available(kind, 64):
        pytest.skip("this faiss does not make it")
    path = build(Rows(tiny.unit_rows(10_500, 64)), "image", kind, tmp_path)
    assert kind.bytes_per_row(10_500, 64) * 10_500 == pytest.approx(path.stat().st_size, rel=0.05)


def test_codes_of_a_sub_vector_need_as_many_rows_to_be_learned_from():
    few, some = ({kind.codes for tier in tiers(n, 512, "opq") for kind in tier} for n in (15, 16))
    assert few == {"Flat", "SQfp16"} and some == few | {"PQ128x4"}
    assert "PQ128" in {kind.codes for tier in tiers(256, 512, "opq") for kind in tier}
