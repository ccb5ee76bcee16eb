"""Hall: what all routes of a server share, and the config that bounds it."""

import asyncio
import math
import re
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clip_train.fetch import FetchConfig, FetchError, HostError, fetch
from clip_train.settings import UserError
from retrieval.asked import Refused
from retrieval.batcher import busy
from retrieval.door import is_loopback
from retrieval.encoder import Encoder
from retrieval.search import Searcher
from retrieval.served import ServedIndex, log
from retrieval.studio import Studio
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    from retrieval.studio import Generator

FETCHES = 4  # addresses of pictures that are fetched at once
BEGUN_BY = 0.9  # of the time for an answer: work that has waited longer would hardly be ready in time, and gets 429


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where the server listens, who may use it, and what is too much."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    token: str | None = field(default=None, repr=False)  # that requests must bring as Authorization: Bearer
    origins: tuple[str, ...] = ()  # of pages elsewhere that may use the server; "*": all. See `all_origins`
    image_urls: bool = False  # whether /knn-service fetches pictures from public addresses
    upload_bytes: int = 16_000_000  # of one request's body
    pixels: int = 32_000_000  # of a picture in a request
    seconds: float = 30.0  # for one answer, else 504; 429 if its turn came too late to be worth beginning
    draw_seconds: float = 300.0  # the same for pictures that are drawn, and for /v1/embeddings of many texts
    queue: int = 256  # requests at once; the next one gets 429
    draw_queue: int = 4  # requests for pictures that may wait for the generator
    batch: int = 64  # captions, pictures or queries worked on together
    most: int = 10_000  # rows in one answer
    max_count: int = 8  # pictures drawn for one request
    names: tuple[str, ...] = ()  # besides localhost, that a server on a loopback address answers to: a proxy's
    precision: str = "auto"  # of encoding; auto: bf16 where the hardware is fast at it and rows keep a cosine of 0.9999
    reload_seconds: float = 2.0  # between two looks at whether an index folder has changed

    def __post_init__(self) -> None:
        low = ("upload_bytes", "pixels", "seconds", "draw_seconds", "queue", "batch", "most", "max_count")
        for name in (*low, "reload_seconds"):
            if not 0 < getattr(self, name) < math.inf:  # NaN neither
                raise UserError(f"{name} {getattr(self, name)} must be a number above 0")
        if self.draw_queue < 0 or not 0 <= self.port < 65_536:
            raise UserError(f"draw_queue {self.draw_queue} must be at least 0, port {self.port} below 65536")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise UserError(f"precision {self.precision!r} must be auto, fp32, bf16 or fp16")
        if self.token is not None and not (8 <= len(self.token) and self.token.isascii() and self.token.isprintable()):
            raise UserError("a token must be at least 8 printable ASCII characters, without line breaks")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UserError(f"{origin} is not an origin such as https://example.com (no path), nor *")

    @property
    def address(self) -> tuple[socket.AddressFamily, str]:
        """The address that `host` means on this machine, IPv4 if it has one. UserError if it means none."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UserError(f"cannot listen on {self.host}: this machine knows no such host") from error
        family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        return family, address[0]

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.address[1])

    @property
    def exposed(self) -> bool:
        """Whether others can reach the server without a token."""
        return not self.loopback and self.token is None

    @property
    def all_origins(self) -> tuple[str, ...]:
        """Without a choice of one's own: all pages where a token guards the server, else none. Without a token any page
        that somebody looks at could read the whole server for its author, who cannot reach it himself."""
        return self.origins or (("*",) if self.token else ())


class Hall:
    """What the routes share: indexes by name, the generator, threads, limits."""

    def __init__(
        self,
        searchers: Mapping[str, Searcher],
        generator: "Generator | None",
        config: ServeConfig,
        telemetry: Telemetry,
    ) -> None:
        self.config, self.telemetry, self.started = config, telemetry, int(time.time())
        self._threads = ThreadPoolExecutor(8, "unclip-any")
        self._searching = ThreadPoolExecutor(1, "unclip-search")
        self._encoding = ThreadPoolExecutor(1, "unclip-encode")
        self._large = ThreadPoolExecutor(1, "unclip-decode")
        self._drawing = ThreadPoolExecutor(1, "unclip-draw")
        self._fetching = ThreadPoolExecutor(FETCHES, "unclip-fetch")
        self._fetches = 0
        self.encoders: dict[str, Encoder] = {}  # by the CLIP's fingerprint
        self.indexes = {name: self._served(name, searcher) for name, searcher in searchers.items()}
        self.studio: Studio | None = None
        if generator is not None:
            how = {"queue": config.draw_queue, "seconds": BEGUN_BY * config.draw_seconds}
            self.studio = Studio(generator, self._drawing, telemetry, **how)
            if generator.clip is not None:
                self._encoder(generator.clip, "generator")

    def index(self, name: str | None, what: str = "index") -> ServedIndex:
        """The index (or `what` else goes by its name) of this name; None: the first. Refused if there is none."""
        if name is None:
            return next(iter(self.indexes.values()))
        if name not in self.indexes:
            known = ", ".join(self.indexes)
            raise Refused(404, f"there is no {what} {name[:80]!r} here; there are: {known}", code=f"{what}_not_found")
        return self.indexes[name]

    @property
    def drawing_encoder(self) -> Encoder:
        """Of the CLIP whose embeddings the generator draws."""
        encoder = self.encoders.get(self.studio.clip_fingerprint if self.studio else "")
        if encoder is None:
            raise Refused(400, "this server's generator has no CLIP to see pictures with")
        return encoder

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """function(), awaited."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def fetched(self, url: str) -> bytes:
        """The picture file at a public address; Refused if that is not allowed or fails."""
        if not self.config.image_urls:
            raise Refused(403, "addresses of pictures are not fetched here: send the picture itself")
        if self._fetches >= 4 * FETCHES:
            raise busy()
        how = FetchConfig(timeout=min(10.0, self.config.seconds), retries=0, max_bytes=self.config.upload_bytes)
        self._fetches += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._fetching, fetch, url, how)
        except HostError as error:  # strangers need not hear which names this machine's network has
            raise Refused(400, "the picture cannot be fetched: its host is not known, or not public") from error
        except FetchError as error:
            raise Refused(400, f"the picture cannot be fetched: {error}") from error
        finally:
            self._fetches -= 1

    async def keep_fresh(self) -> None:
        """Reopen indexes whose folders change, for ever."""
        while True:
            await asyncio.sleep(self.config.reload_seconds)
            for served in self.indexes.values():
                try:
                    await served.refresh()
                except Exception:
                    log.exception("%s: reloading failed; the old state stays", served.name)

    def close(self) -> None:
        """Let the threads end; work that has not begun is dropped."""
        for threads in (self._threads, self._searching, self._encoding, self._large, self._drawing, self._fetching):
            threads.shutdown(wait=False, cancel_futures=True)

    def _served(self, name: str, searcher: Searcher) -> ServedIndex:
        if not re.fullmatch(r"[\w.-]{1,64}", name) or not name.strip("."):  # a browser takes .. for the folder above
            say = "give it one of letters, digits, '_', '-' and '.': --index NAME=FOLDER"
            raise UserError(f"{name!r} is no name for an index; {say}")
        fingerprint = searcher.manifest.inputs["clip"]["fingerprint"]
        encoder = self.encoders.get(fingerprint)
        if encoder is None:
            try:
                encoder = self._encoder(searcher.clip, name)
            except UserError as error:
                log.warning("%s: only vectors and keys can be searched for: %s", name, error)
        how = {"batch": self.config.batch, "seconds": BEGUN_BY * self.config.seconds, "telemetry": self.telemetry}
        return ServedIndex(name, searcher, encoder, threads=self._threads, one_thread=self._searching, **how)

    def _encoder(self, clip: Any, name: str) -> Encoder:
        if clip.fingerprint not in self.encoders:
            config = self.config
            clip = clip.for_inference(config.precision)
            how = {"batch": config.batch, "seconds": BEGUN_BY * config.seconds, "max_pixels": config.pixels}
            threads = {"threads": self._threads, "large_thread": self._large, "one_thread": self._encoding}
            self.encoders[clip.fingerprint] = Encoder(clip, name, telemetry=self.telemetry, **threads, **how)
        return self.encoders[clip.fingerprint]
