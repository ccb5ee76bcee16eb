import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from retrieval.asked import Refused
from retrieval.batcher import Batcher, busy


class Work:
    """Squares numbers; remembers its batches; waits at a gate if there is one."""

    def __init__(self, gate=None):
        self.batches, self.gate = [], gate

    def __call__(self, items):
        self.batches.append(list(items))
        if self.gate:
            assert self.gate.wait(10)
        if "bad" in items:
            raise ValueError("a bad item")
        return [item * item for item in items]


def batcher(work, **how):
    return Batcher(work, ThreadPoolExecutor(1), **how)


def test_each_of_many_concurrent_requests_gets_its_own_answer():
    async def ask():
        square = batcher(Work(), size=8)
        return await asyncio.gather(*(square(n) for n in range(100)))

    assert asyncio.run(ask()) == [n * n for n in range(100)]


def test_what_comes_while_a_batch_is_worked_on_is_the_next_batch():
    gate = threading.Event()
    work = Work(gate)
    sizes = []

    async def ask():
        square = batcher(work, size=8, on_batch=sizes.append)
        first = asyncio.create_task(square(0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(square(n)) for n in range(1, 12)]
        await asyncio.sleep(0.05)
        assert len(square) == 11 and work.batches == [[0]]  # the first did not wait for the others
        gate.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(ask()) == [n * n for n in range(12)]
    assert work.batches == [[0], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]] and sizes == [1, 8, 3]


def test_heavy_items_fill_a_batch_sooner():
    gate = threading.Event()
    work = Work(gate)

    async def ask():
        square = batcher(work, size=10, weigh=lambda item: item)
        asked = [asyncio.create_task(square(n)) for n in (1, 6, 6, 6)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert work.batches == [[1, 6, 6], [6]]


def test_one_bad_item_does_not_spoil_its_batch():
    gate = threading.Event()

    async def ask():
        square = batcher(Work(gate))
        asked = [asyncio.create_task(square(item)) for item in (1, 2, "bad", 4)]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    one, four, bad, sixteen = asyncio.run(ask())
    assert (one, four, sixteen) == (1, 4, 16) and isinstance(bad, ValueError)


def test_an_item_whose_time_passed_while_it_waited_is_refused_and_not_worked_on():
    gate = threading.Event()
    work = Work(gate)

    async def ask():
        square = batcher(work, seconds=0.05)
        first = asyncio.create_task(square(3))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(square(4))
        await asyncio.sleep(0.1)
        gate.set()
        return await asyncio.gather(first, late, return_exceptions=True)

    first, late = asyncio.run(ask())
    assert first == 9 and isinstance(late, Refused) and late.status == 429
    assert work.batches == [[3]]


def test_an_item_whose_asker_went_away_is_not_worked_on():
    gate = threading.Event()
    work = Work(gate)

    async def ask():
        square = batcher(work)
        first = asyncio.create_task(square(1))
        await asyncio.sleep(0.02)
        gone, stays = asyncio.create_task(square(2)), asyncio.create_task(square(3))
        await asyncio.sleep(0.02)
        gone.cancel()
        gate.set()
        return await asyncio.gather(first, stays)

    assert asyncio.run(ask()) == [1, 9] and work.batches == [[1], [3]]


def test_an_item_whose_asker_went_away_leaves_the_queue_at_once():
    gate = threading.Event()

    async def ask():
        square = batcher(Work(gate))
        first = asyncio.create_task(square(1))
        await asyncio.sleep(0.02)
        gone, stays = asyncio.create_task(square(2)), asyncio.create_task(square(3))
        await asyncio.sleep(0.02)
        assert len(square) == 2 and [one.item for one in square.begun] == [1]
        gone.cancel()
        first.cancel()
        await asyncio.sleep(0.02)
        assert len(square) == 1 and [one.item for one in square.begun] == [1]  # the thread is still at it
        gate.set()
        assert await stays == 9
        await asyncio.sleep(0.02)
        assert len(square) == 0 and square.begun == []

    asyncio.run(ask())


def test_work_happens_outside_the_event_loop():
    def slow(items):
        time.sleep(0.2)
        return items

    async def ask():
        asked = asyncio.create_task(batcher(slow)(1))
        ticks = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(ask()) >= 5


def test_a_full_queue_says_when_to_try_again():
    with pytest.raises(Refused, match="try again in 7 s") as caught:
        raise busy(7.2)
    assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "7"}
    assert busy(0.01).headers == {"Retry-After": "1"}
