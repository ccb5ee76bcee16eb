"""The generator behind a server: one worker, a short queue, everything bounded."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_train.settings import UserError
from retrieval.batcher import Batcher, busy
from retrieval.query import QueryError
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    from diffusion.generate import Generated, Generator, Sampling

NO_PROMPTS = "this server's generator draws pictures of rows only: for prompts, start it with --prior"
FIRST_GUESS = 2.0  # seconds a picture takes, until one has been drawn


class GivenUp(Exception):
    """Nobody waits for the picture any more: the drawing ends."""


@dataclass(eq=False)
class Job:
    """What is to be drawn for one request."""

    draw: Callable[[], Any]
    pictures: int
    given_up: threading.Event = field(default_factory=threading.Event)


class Studio:
    """Draws for one request after another. queue: jobs that may wait, besides the one being drawn.

    What is being drawn for somebody who has gone away, or whose time is over, ends after the decoder's next step.
    """

    def __init__(
        self, generator: "Generator", one_thread: Executor, telemetry: Telemetry, *, queue: int, seconds: float
    ) -> None:
        self.generator, self.queue, self.telemetry = generator, queue, telemetry
        self.how = generator.how
        self.seconds_each = FIRST_GUESS
        self._jobs = Batcher(lambda jobs: [self._drawn(jobs[0])], one_thread, size=1, seconds=seconds)
        self._jobs.on_batch = telemetry.watch_queue("generator", self._jobs.__len__)
        self._job: Job | None = None  # that the generator's thread draws

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.generator.decoder.network.config.image_size

    @property
    def draws_prompts(self) -> bool:
        """Whether it has a prior, which pictures of captions need."""
        return self.generator.prior is not None

    @property
    def clip_fingerprint(self) -> str:
        """Of the CLIP whose embeddings are drawn."""
        return self.generator.fingerprints.get("clip", "")

    async def draw(self, job: Callable[[], Any], pictures: int) -> Any:
        """The result of job(), run in the generator's thread. Refused (429) if the queue is full.

        job calls the methods below; pictures: about how many it draws.
        """
        ahead = [one.item.pictures for one in (*self._jobs.begun, *self._jobs.waiting)]
        if len(ahead) > self.queue:
            self.telemetry.rejected.labels("generator_full").inc()
            raise busy(self.seconds_each * (sum(ahead) + pictures) / 2)
        mine = Job(job, pictures)
        try:
            return await self._jobs(mine)
        finally:
            mine.given_up.set()

    def sampling(self, steps: int, guidance: float) -> "Sampling":
        """How to draw; a decoder that was distilled to a few steps draws in these, whatever is asked for."""
        distilled = self.generator.decoder.network.config.few_steps
        return self.how if distilled else replace(self.how, steps=steps, guidance=guidance)

    def from_caption(self, caption: str, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures of a caption, with seeds seed, seed + 1, ..."""
        seeds = range(seed, seed + count)
        made = self.generator.from_captions([caption] * count, seeds, how or self.how, on_step=self._go_on)
        return self._counted(made)

    def vary(self, row: np.ndarray, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures of an embedding (D,)."""
        from diffusion.manipulate import vary

        return self._counted(vary(self.generator, row, count, seed, how or self.how, on_step=self._go_on))

    def interpolate(self, rows: np.ndarray, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures on the way between two embeddings (2, D)."""
        from diffusion.manipulate import interpolate

        try:
            made = interpolate(self.generator, rows, count, seed, how or self.how, on_step=self._go_on)
        except UserError as error:  # opposite embeddings
            raise QueryError(str(error)) from error
        return self._counted(made)

    def edit(
        self, row: np.ndarray, text: str, count: int, seed: int, how: "Sampling | None" = None
    ) -> "list[Generated]":
        """count pictures of an embedding (D,) changed towards a text."""
        from diffusion.manipulate import edit

        how = how or self.how
        try:
            made = [edit(self.generator, row, text, seed + n, how, on_step=self._go_on) for n in range(count)]
        except UserError as error:  # a text that changes nothing
            raise QueryError(str(error)) from error
        return self._counted([one for few in made for one in few])

    def strip(self, of: "np.ndarray | str", seed: int, how: "Sampling | None" = None) -> list[bytes]:
        """PNG files: what the decoder believes step after step."""
        from diffusion.manipulate import strip

        return [png(picture) for picture in strip(self.generator, of, seed, how or self.how, on_step=self._go_on)]

    def _drawn(self, job: Job) -> Any:
        self._job, began = job, time.perf_counter()
        made = job.draw()
        self.seconds_each += 0.3 * ((time.perf_counter() - began) / max(1, job.pictures) - self.seconds_each)
        return made

    def _go_on(self, step: int, denoised: Any) -> None:
        """After each step of the decoder."""
        if self._job is not None and self._job.given_up.is_set():
            raise GivenUp

    def _counted(self, made: "list[Generated]") -> "list[Generated]":
        self.telemetry.pictures.inc(len(made))
        return made


def open_generator(decoder: Path | str, prior: Path | str | None, clip: Path | str | None, device: str) -> "Generator":
    """Decoder and prior folders as one; see diffusion.generate. The only place where a server needs that room."""
    from diffusion.generate import Generator

    return Generator.open(decoder, prior, clip, device=device)


def png(picture: Any, provenance: dict[str, Any] | None = None) -> bytes:
    """A PNG file, with the picture's record if one is given."""
    from diffusion.provenance import save_png

    file = io.BytesIO()
    if provenance is None:
        picture.save(file, "PNG")
    else:
        save_png(picture, file, provenance)
    return file.getvalue()


def files(made: "Sequence[Generated]") -> list[bytes]:
    """The pictures as PNG files with their records."""
    return [png(one.picture, one.provenance) for one in made]
