import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("prometheus_client")

from retrieval.asked import Refused
from retrieval.query import QueryError
from retrieval.studio import Studio
from retrieval.telemetry import Telemetry


class SlowGenerator:
    """Draws grey pictures in a hundred steps; waits at a gate after the first one."""

    clip = how = None

    def __init__(self):
        self.begun, self.gate, self.steps = threading.Event(), threading.Event(), 0

    def from_captions(self, captions, seeds, how=None, *, on_step=None):
        for step in range(100):
            self.steps += 1
            on_step(step, np.zeros((1, 3, 2, 2)))
            self.begun.set()
            assert self.gate.wait(10)
        return [SimpleNamespace(picture=Image.new("RGB", (2, 2)), provenance={"seed": seed}) for seed in seeds]


def studio(generator, queue, seconds=30.0):
    return Studio(generator, ThreadPoolExecutor(1), Telemetry(), queue=queue, seconds=seconds)


def asked(drawer, pictures=1):
    return asyncio.create_task(drawer.draw(lambda: drawer.from_caption("a", pictures, 0), pictures))


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_what_is_drawn_for_somebody_who_has_gone_away_ends_after_the_next_step():
    generator = SlowGenerator()
    drawer = studio(generator, queue=1)

    async def ask():
        gone = asked(drawer)
        await until(generator.begun.is_set)
        stays = asked(drawer)
        gone.cancel()
        await asyncio.sleep(0.02)
        assert len(drawer._jobs.begun) == 1  # it counts as long as the thread is at it
        generator.gate.set()
        assert len(await stays) == 1
        assert generator.steps == 2 + 100

    asyncio.run(ask())
    assert "unclip_pictures_generated_total 1.0" in drawer.telemetry.text()[0].decode()


def test_those_who_wait_and_go_away_leave_room_for_others():
    generator = SlowGenerator()
    drawer = studio(generator, queue=2)

    async def ask():
        first = asked(drawer)
        await until(generator.begun.is_set)
        for _ in range(3):
            gone = [asked(drawer) for _ in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(Refused, match="too many requests"):
                await asked(drawer)
            for one in gone:
                one.cancel()
            await asyncio.sleep(0.01)
        assert drawer.telemetry.registry.get_sample_value("unclip_queue_length", {"queue": "generator"}) == 0
        last = asked(drawer)
        generator.gate.set()
        assert [len(await one) for one in (first, last)] == [1, 1]

    asyncio.run(ask())


def test_the_queue_holds_as_many_as_it_should_even_if_all_come_in_the_same_moment():
    generator = SlowGenerator()
    drawer = studio(generator, queue=2)

    async def ask():
        jobs = [asked(drawer, 4) for _ in range(5)]
        await until(generator.begun.is_set)
        generator.gate.set()
        return await asyncio.gather(*jobs, return_exceptions=True)

    made = asyncio.run(ask())
    assert [len(one) for one in made[:3]] == [4] * 3 and [one.status for one in made[3:]] == [429] * 2
    assert made[3].headers["Retry-After"] == "16"  # (3 * 4 + 4) pictures of two seconds, half of it


def test_only_pictures_that_were_drawn_are_counted():
    generator = SlowGenerator()
    generator.gate.set()
    drawer = studio(generator, queue=1)
    asyncio.run(drawer.draw(lambda: drawer.from_caption("a", 3, 0), 4))  # four: a strip besides
    assert "unclip_pictures_generated_total 3.0" in drawer.telemetry.text()[0].decode()


def test_embeddings_between_which_there_is_no_way_are_the_askers_matter():
    row = np.eye(1, 8, dtype=np.float32)[0]
    with pytest.raises(QueryError, match="opposite"):
        studio(SlowGenerator(), queue=1).interpolate(np.stack([row, -row]), 3, 0)
