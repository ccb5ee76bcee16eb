"""An index behind a server: searches of all requests done together, and reopened when its folder has changed."""

import asyncio
import base64
import io
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clip_train.settings import UserError
from retrieval.asked import Refused
from retrieval.batcher import Batcher
from retrieval.encoder import Encoder
from retrieval.index import MODALITIES
from retrieval.query import QueryError
from retrieval.search import Searcher, apart
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    from retrieval.live import LiveIndex
    from retrieval.search import View

INLINE_BYTES = 200_000  # a picture file up to this size is sent as it is; a larger one is made smaller
INLINE_SIDE = 512  # pixels
TRIES = 3  # states of a folder that an answer is tried in
SAME = 0.94  # cosine above which clip-retrieval takes two answers for the same picture
log = logging.getLogger("unclip.serve")


class Found(NamedTuple):
    """What one query found, best first, and the state of the index it was found in: what else is said of the rows must
    be of the same one, since row numbers mean something else after the folder has been compacted."""

    view: "View"
    scores: np.ndarray  # (k,) float32
    rows: np.ndarray  # (k,) int64

    @property
    def live(self) -> "LiveIndex":
        """The index of that state."""
        return self.view.index


class ServedIndex:
    """A Searcher that many requests share.

    encoder: of the index's CLIP; None if there is none here, then only vectors and keys can be searched for.
    threads: for everything but searching itself, which one_thread does.
    """

    def __init__(
        self,
        name: str,
        searcher: Searcher,
        encoder: Encoder | None,
        *,
        threads: Executor,
        one_thread: Executor,
        telemetry: Telemetry,
        batch: int,
        seconds: float,
    ) -> None:
        self.name, self.searcher, self.telemetry = name, searcher, telemetry
        self.dim: int = searcher.dim
        self._encoder, self._threads = encoder, threads
        self._find = Batcher(self._find_all, one_thread, size=batch, seconds=seconds)
        self._find.on_batch = telemetry.watch_queue(f"index {name}", self._find.__len__)
        self._reopening = asyncio.Lock()
        self._complained = ""
        telemetry.rows.labels(name).set(len(searcher))

    @property
    def encoder(self) -> Encoder:
        """Refused if this index is served without its CLIP."""
        if self._encoder is None:
            raise Refused(400, f"the index {self.name} is served without its CLIP: search it by vector or by key")
        return self._encoder

    @property
    def has_encoder(self) -> bool:
        """Whether its CLIP is here."""
        return self._encoder is not None

    def warm(self) -> None:
        """Open what is opened when it is first needed, so that nobody waits for it. UserError if it is damaged."""
        for modality in MODALITIES:
            self.searcher.vectors(np.eye(1, self.dim), 1, modality)
        if self._encoder is not None:
            self._encoder.clip.encode_text(["warm"])
        self.searcher.columns  # noqa: B018
        self.searcher.calibration  # noqa: B018
        self.searcher.picture_bytes(0)

    async def search(self, vector: np.ndarray, k: int, modality: str = "image") -> Found:
        """The k best rows for a unit vector (D,)."""
        return await self._find((vector, k, modality))

    async def in_thread(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), awaited."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    async def whole(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of work(), which must take all that it says from one view of the searcher.

        Files of an old state may be gone that were there: work that failed in one is done again in the new one.
        """
        for _ in range(TRIES):
            view = self.searcher.view
            try:
                return await work()
            except QueryError:
                raise
            except (UserError, OSError, LookupError):
                if self.searcher.view is view and not await self.refresh():
                    raise
        raise Refused(503, f"the index {self.name} is being changed; try again", headers={"Retry-After": "1"})

    async def refresh(self) -> bool:
        """Reopen the index if its folder has changed; whether it has. One that cannot be opened changes nothing."""
        async with self._reopening:
            try:
                changed = await self.in_thread(self.searcher.refresh)
            except (UserError, OSError) as error:
                if str(error) != self._complained:
                    log.warning("%s: not reloaded: %s", self.name, error)
                self._complained = str(error)
                return False
            self._complained = ""
        if changed:
            self.telemetry.reloads.labels(self.name).inc()
            self.telemetry.rows.labels(self.name).set(len(self.searcher))
        return changed

    def row(self, live: "LiveIndex", row: int) -> dict[str, Any]:
        """The metadata of a row that is there; Refused if there is none."""
        if not (0 <= row < live.rows and live.live[row]):
            raise Refused(404, f"the index {self.name} has no row {row}")
        return live.table.row(row)

    def provenance(self, view: "View", row: int) -> dict[str, Any]:
        """Where a row comes from: fingerprints of the index, of its CLIP and embeddings, and the name of the tar."""
        live = view.index
        part = int(np.searchsorted(live.starts, row, side="right")) - 1
        manifest = live.parts[part].manifest
        inputs = {name: given["fingerprint"] for name, given in manifest.inputs.items()}
        made = {"index": manifest.fingerprint, "created": manifest.created, "version": manifest.version}
        return {**made, **inputs, "shard": view.tar_of(row)}

    def _find_all(self, asked: list[tuple[np.ndarray, int, str]]) -> list[Found]:
        """Queries for about as many answers of the same modality are one call."""
        view, out = self.searcher.view, [None] * len(asked)
        groups: dict[tuple[str, int], list[int]] = {}
        for place, (_, k, modality) in enumerate(asked):
            groups.setdefault((modality, len(str(k))), []).append(place)
        for (modality, _), places in groups.items():
            queries, most = np.stack([asked[p][0] for p in places]), max(asked[p][1] for p in places)
            scores, rows = view.index.search(queries, min(most, len(view.index)), modality)
            for place, some_scores, some_rows in zip(places, scores, rows, strict=True):
                there = np.flatnonzero(some_rows >= 0)[: asked[place][1]]
                out[place] = Found(view, some_scores[there], some_rows[there])
        return out


def without_copies(found: Found, modality: str, same: float = SAME) -> Found:
    """The answers without those that are copies of a better one, by the cosine of their embeddings."""
    kept = apart(found.live.vectors(found.rows, modality), same, len(found.rows))
    return Found(found.view, found.scores[kept], found.rows[kept])


def inline(view: "View", row: int) -> str | None:
    """The row's picture in base64: its file if that is small, else made smaller; None if there is none."""
    found = view.picture_bytes(row)
    if found is None:
        return None
    data, _ = found
    if len(data) > INLINE_BYTES:
        small = thumbnail(data, INLINE_SIDE)
        if small is None:
            return None
        data, _ = small
    return base64.b64encode(data).decode()


def thumbnail(data: bytes, side: int) -> tuple[bytes, str] | None:
    """A picture file as a JPEG at most `side` pixels wide and high, and its media type; None if it is damaged."""
    from clip_train.pictures import PictureError, decode_picture

    try:
        picture = decode_picture(data, least=side)
    except PictureError:
        return None
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue(), "image/jpeg"
