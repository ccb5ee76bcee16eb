"""The generator behind a server: one worker, a short queue, everything bounded."""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.batcher import Batcher, busy
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    from diffusion.generate import Generated, Generator, Sampling

FIRST_GUESS = 2.0  # seconds a picture takes, until one has been drawn


class Studio:
    """Draws for one request after another. queue: jobs that may wait, besides the one being drawn."""

    def __init__(
        self, generator: "Generator", one_thread: Executor, telemetry: Telemetry, *, queue: int, seconds: float
    ) -> None:
        from diffusion.generate import Sampling

        self.generator, self.queue, self.telemetry = generator, queue, telemetry
        self.how = Sampling()
        self.seconds_each = FIRST_GUESS
        self._jobs = Batcher(lambda jobs: [jobs[0]()], one_thread, size=1, seconds=seconds)
        self._jobs.on_batch = telemetry.watch_queue("generator", self._jobs.__len__)
        self._drawing = 0

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.generator.decoder.network.config.image_size

    @property
    def clip_fingerprint(self) -> str:
        """Of the CLIP whose embeddings are drawn."""
        return self.generator.fingerprints.get("clip", "")

    async def draw(self, job: Callable[[], Any], pictures: int) -> Any:
        """The result of job(), run in the generator's thread. Refused (429) if the queue is full."""
        if self._drawing and len(self._jobs) >= self.queue:
            self.telemetry.rejected.labels("generator_full").inc()
            raise busy(self.seconds_each * (self._drawing + pictures) / 2)
        self._drawing += pictures
        try:
            return await self._jobs(lambda: self._timed(job, pictures))
        finally:
            self._drawing -= pictures

    def sampling(self, steps: int, guidance: float) -> "Sampling":
        """How to draw."""
        return replace(self.how, steps=steps, guidance=guidance)

    def from_caption(self, caption: str, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures of a caption, with seeds seed, seed + 1, ..."""
        return self.generator.from_captions([caption] * count, range(seed, seed + count), how or self.how)

    def vary(self, row: np.ndarray, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures of an embedding (D,)."""
        from diffusion.manipulate import vary

        return vary(self.generator, row, count, seed, how or self.how)

    def interpolate(self, rows: np.ndarray, count: int, seed: int, how: "Sampling | None" = None) -> "list[Generated]":
        """count pictures on the way between two embeddings (2, D)."""
        from diffusion.manipulate import interpolate

        return interpolate(self.generator, rows, count, seed, how or self.how)

    def edit(
        self, row: np.ndarray, text: str, count: int, seed: int, how: "Sampling | None" = None
    ) -> "list[Generated]":
        """count pictures of an embedding (D,) changed towards a text."""
        from diffusion.manipulate import edit

        made = [edit(self.generator, row, text, seed + n, how or self.how) for n in range(count)]
        return [one for few in made for one in few]

    def strip(self, of: "np.ndarray | str", seed: int, how: "Sampling | None" = None) -> list[bytes]:
        """PNG files: what the decoder believes step after step."""
        from diffusion.manipulate import strip

        return [png(picture) for picture in strip(self.generator, of, seed, how or self.how)]

    def _timed(self, job: Callable[[], Any], pictures: int) -> Any:
        began = time.perf_counter()
        made = job()
        self.seconds_each += 0.3 * ((time.perf_counter() - began) / max(1, pictures) - self.seconds_each)
        self.telemetry.pictures.inc(pictures)
        return made


def open_generator(decoder: Path | str, prior: Path | str | None, clip: Path | str | None, device: str) -> "Generator":
    """Decoder and prior folders as one; see diffusion.generate. The only place where a server needs that room."""
    from diffusion.generate import Generator

    return Generator.open(decoder, prior, clip, device=device)


def png(picture: Any, provenance: dict[str, Any] | None = None) -> bytes:
    """A PNG file, with the picture's record if one is given."""
    from diffusion.generate import save_png

    file = io.BytesIO()
    if provenance is None:
        picture.save(file, "PNG")
    else:
        save_png(picture, file, provenance)
    return file.getvalue()


def files(made: "Sequence[Generated]") -> list[bytes]:
    """The pictures as PNG files with their records."""
    return [png(one.picture, one.provenance) for one in made]
