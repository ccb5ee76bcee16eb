import contextlib

import numpy as np
import pytest
import tiny
import torch

from clip_train.captions import CaptionedBatches, CaptionTable
from clip_train.mixture import Mixture
from clip_train.model import Clip
from clip_train.pictures import Batches, Pictures
from clip_train.settings import UserError
from clip_train.shards import ShardSet
from clip_train.stream import StreamBatches


class Counting:
    """A source whose n-th sample is the number 1000 * name + n."""

    def __init__(self, name, sequential=False):
        self.name, self.sequential = name, sequential

    def parts(self, wanted):
        for places in wanted:
            yield {"caption": torch.from_numpy(1000 * self.name + places), "tokens": torch.zeros(len(places), 3)}


def take(stream, n):
    with contextlib.closing(stream):
        return [next(stream) for _ in range(n)]


def shown(mixture, steps, start=0):
    return [batch["caption"].tolist() for batch in take(mixture(start), steps)]


def test_shares_are_exact_after_every_step():
    weights = (5, 3, 0.5)
    mixture = Mixture([Counting(n) for n in range(3)], weights, 17, seed=0)
    given = np.zeros(3, dtype=int)
    for step, batch in enumerate(shown(mixture, 60), 1):
        assert len(batch) == 17
        given += np.bincount(np.array(batch) // 1000, minlength=3)
        expected = step * 17 * np.array(weights) / 8.5
        assert given[1:].tolist() == np.floor(expected[1:] + 1e-9).astype(int).tolist()
        assert abs(given - expected).max() < 2
    assert given.tolist() == [600, 360, 60]


def test_each_source_gives_its_samples_in_its_own_order_without_a_gap():
    batches = shown(Mixture([Counting(0), Counting(1)], (2, 1), 8, seed=3), 30)
    for name in range(2):
        mine = [value - 1000 * name for batch in batches for value in batch if value // 1000 == name]
        assert mine == list(range(len(mine)))


def test_sources_are_shuffled_inside_a_batch_and_otherwise_in_the_next():
    where = [tuple(v // 1000 for v in batch) for batch in shown(Mixture([Counting(0), Counting(1)], (1, 1), 16, 0), 20)]
    assert len(set(where)) > 15 and all(sum(batch) == 8 for batch in where)
    assert where != [tuple(v // 1000 for v in b) for b in shown(Mixture([Counting(0), Counting(1)], (1, 1), 16, 1), 20)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_mixture_taken_up_again_goes_on_as_the_unbroken_one(sequential, world):
    for rank in range(world):
        mixture = Mixture([Counting(0), Counting(1, sequential), Counting(2)], (0.7, 0.2, 0.1), 10, 5, rank, world)
        unbroken = shown(mixture, 40)
        for start in (1, 7, 33):
            assert shown(mixture, 5, start) == unbroken[start : start + 5]


def test_ranks_divide_the_batch_that_one_alone_would_see():
    sources = [Counting(0), Counting(1)]
    alone = shown(Mixture(sources, (3, 1), 12, 2), 20)
    ranks = [shown(Mixture(sources, (3, 1), 4, 2, rank, 3), 20) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


def test_sequential_sources_are_asked_for_one_sample_after_the_other_on_every_rank():
    for rank in range(2):
        batches = shown(Mixture([Counting(0), Counting(1, sequential=True)], (3, 1), 4, 2, rank, 2), 50)
        mine = [value - 1000 for batch in batches for value in batch if value >= 1000]
        assert mine == list(range(len(mine)))


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -2), (1, float("nan")), (1, float("inf"))])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(UserError, match="for 2 sources: give each a weight above 0"):
        Mixture([Counting(0), Counting(1)], weights, 8, 0)


def test_a_batch_too_small_for_its_sources_is_refused():
    with pytest.raises(UserError, match="a batch of 4 is too small to mix 6 sources"):
        Mixture([Counting(n) for n in range(6)], [1] * 6, 4, 0)


def test_local_and_streamed_shards_mix_and_resume(tmp_path):
    clip = Clip.load(tiny.clip(tmp_path / "clip"))
    samples = ShardSet(tiny.shards(tmp_path / "local"))
    tiny.shards(tmp_path / "far", 8)
    table, pictures = CaptionTable(samples, clip, mix=(1,)), Pictures(samples, 16)

    def mixture(workers=0):
        local = CaptionedBatches(Batches(pictures, 1, seed=1, workers=workers), table, seed=1)
        far = StreamBatches(f"file://{tmp_path}/far/", clip, 1, seed=1, shuffle=4, work=tmp_path / "work")
        return Mixture([local, far], (2, 1), 6, seed=1)

    unbroken = take(mixture()(0), 9)
    assert unbroken[0].keys() == {"pixels", "tokens", "caption", "group"} and unbroken[0]["pixels"].shape[0] == 6
    for one, other in zip(take(mixture()(4), 5), unbroken[4:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
