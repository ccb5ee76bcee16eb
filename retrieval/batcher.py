"""Micro-batching: what concurrent requests ask for is done together.

Nothing waits for company. While one batch is being worked on, the next one gathers, so a lone request is answered at
once and a crowd is answered in few large batches: as many as the work takes, whatever the load.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from retrieval.asked import Refused


class Batcher:
    """Calls run(items) -> one answer per item (or an exception in its place) in a thread, one batch at a time.

    weigh: how much of the `size` of a batch an item takes. seconds: an item that has not been begun by then is refused
    with 429. on_batch(weight): is told of every batch.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        threads: Executor,
        *,
        size: int = 64,
        seconds: float = 30.0,
        weigh: Callable[[Any], int] = lambda item: 1,
        on_batch: Callable[[int], None] = lambda weight: None,
    ) -> None:
        self.run, self.threads, self.size, self.seconds = run, threads, size, seconds
        self.weigh, self.on_batch = weigh, on_batch
        self.waiting: deque[_Waiting] = deque()
        self.begun: list[_Waiting] = []  # what the thread works on now, even for those who have gone away
        self._working: asyncio.Task | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self.waiting)

    async def __call__(self, item: Any) -> Any:
        """The item's answer."""
        mine = _Waiting(item, asyncio.get_running_loop().create_future(), time.monotonic() + self.seconds)
        self.waiting.append(mine)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        try:
            return await mine.answer
        finally:
            if mine.answer.cancelled() and mine in self.waiting:  # nobody waits for it any more
                self.waiting.remove(mine)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                self.begun = batch
                items = [one.item for one in batch]
                self.on_batch(sum(map(self.weigh, items)))
                answers = await loop.run_in_executor(self.threads, _tried, self.run, items)
                for one, answer in zip(batch, answers, strict=True):
                    if one.answer.done():  # whoever asked has gone away
                        continue
                    if isinstance(answer, BaseException):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)
        finally:
            self.begun, self._working = [], None

    def _next_batch(self) -> list["_Waiting"]:
        batch, room = [], self.size
        while self.waiting and room > 0:
            one = self.waiting.popleft()
            if one.answer.done():
                continue
            if time.monotonic() > one.deadline:
                one.answer.set_exception(busy())
                continue
            batch.append(one)
            room -= self.weigh(one.item)
        return batch


class _Waiting:
    """An item and whoever waits for its answer."""

    __slots__ = ("answer", "deadline", "item")

    def __init__(self, item: Any, answer: asyncio.Future, deadline: float) -> None:
        self.item, self.answer, self.deadline = item, answer, deadline


def busy(seconds: float = 1) -> Refused:
    """The 429 of a full queue; seconds: when to try again."""
    wait = max(1, round(seconds))
    again = {"Retry-After": str(wait)}
    return Refused(429, f"too many requests at once; try again in {wait} s", code="rate_limit_exceeded", headers=again)


def _tried(run: Callable[[list[Any]], Sequence[Any]], items: list[Any]) -> Sequence[Any]:
    """run(items); if that fails for several, one by one, so that nobody suffers for another's item."""
    try:
        return run(items)
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [_tried(run, [item])[0] for item in items]
