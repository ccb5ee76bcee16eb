"""One CLIP behind a server: the captions and pictures of all requests encoded together."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from retrieval.asked import Refused
from retrieval.batcher import Batcher
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    import torch

    from clip_train.model import Clip


WORDS = 100_000  # whose tokens the tokenizer remembers
LONG_WORD = 64  # characters; a longer one is not remembered
LARGE = 1 / 8  # of the pixels that a picture may have at most


class Encoder:
    """Captions and picture files -> unit rows (D,), in batches of at most `batch`, in one thread.

    threads: where pictures are decoded. large_thread: where large ones are, one after the other: one of 32 million
    pixels takes up to 640 MB, which the C library keeps for the thread. one_thread: where the model runs.
    max_pixels: of a picture that is decoded.
    """

    def __init__(
        self,
        clip: "Clip",
        name: str,
        *,
        threads: Executor,
        large_thread: Executor,
        one_thread: Executor,
        telemetry: Telemetry,
        batch: int,
        seconds: float,
        max_pixels: float,
    ) -> None:
        self.clip, self.fingerprint, self.dim = clip, clip.fingerprint, clip.embed_dim
        self.batch, self.max_pixels = batch, max_pixels
        self._threads, self._large_thread = threads, large_thread
        how = {"size": batch, "seconds": seconds}
        self._texts = Batcher(self._encode_texts, one_thread, weigh=len, **how)
        self._pictures = Batcher(self._encode_pictures, one_thread, **how)
        if isinstance(cache := getattr(clip.tokenizer, "cache", None), dict):  # open_clip's own grows for ever
            clip.tokenizer.cache = _FewWords(cache)
        self._texts.on_batch = telemetry.watch_queue(f"text {name}", self._texts.__len__)
        self._pictures.on_batch = telemetry.watch_queue(f"picture {name}", self._pictures.__len__)

    async def text(self, captions: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit rows. Many captions go piece by piece, so that others' come in between."""
        pieces = [list(captions[low : low + self.batch]) for low in range(0, len(captions), self.batch)]
        return np.concatenate([await self._texts(piece) for piece in pieces])

    async def picture(self, data: bytes) -> np.ndarray:
        """(D,) float32 unit row of a picture file. Refused if it cannot be decoded."""
        from clip_train.pictures import pixel_count

        loop = asyncio.get_running_loop()
        size = await loop.run_in_executor(self._threads, pixel_count, data)
        thread = self._large_thread if LARGE * self.max_pixels < size <= self.max_pixels else self._threads
        pixels = await loop.run_in_executor(thread, partial(self._decoded, data))
        return await self._pictures(pixels)

    def tokens(self, captions: Sequence[str]) -> int:
        """How many tokens the model reads of these captions, start and end included."""
        return int((self.clip.tokenize(captions).argmax(-1) + 1).sum())

    def _decoded(self, data: bytes) -> "torch.Tensor":
        from clip_train.pictures import PictureError, decode_picture

        try:
            return self.clip.to_pixels(decode_picture(data, self.max_pixels))
        except PictureError as error:
            raise Refused(400, f"the picture cannot be read: {error}") from error

    def _encode_texts(self, pieces: list[list[str]]) -> list[np.ndarray]:
        captions = [caption for piece in pieces for caption in piece]
        rows = [
            self.clip.encode_text(captions[low : low + self.batch]).numpy()
            for low in range(0, len(captions), self.batch)
        ]
        ends = np.cumsum([len(piece) for piece in pieces])
        return np.split(np.concatenate(rows), ends[:-1])

    def _encode_pictures(self, pixels: list["torch.Tensor"]) -> list[np.ndarray]:
        import torch

        return list(self.clip.encode_image(torch.stack(pixels)).numpy())


class _FewWords(dict):
    """A tokenizer's memory that is full some time. Nothing is taken out of it, since other threads read it."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < WORDS and len(word) <= LONG_WORD:
            super().__setitem__(word, tokens)
