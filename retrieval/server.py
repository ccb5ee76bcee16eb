"""HTTP over Searchers and a Generator: clip-retrieval's API, OpenAI's, and a page of its own.

    door.py       who may come in, and with how much
    clip_api.py   openai_api.py   page_api.py      the routes, each over the Hall below
    hall.py       served.py  encoder.py  studio.py indexes, CLIPs and the generator, shared by all requests
    batcher.py    what concurrent requests ask for is done together
    connection.py how long a client may take to ask

The event loop only parses and passes on: models, indexes, tars and long bodies are worked on in threads. What Python
itself does there, such as parsing JSON, holds up everybody all the same, so bodies and answers are bounded.
"""

import asyncio
import contextlib
import gc
import logging
import math
import mimetypes
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.settings import UserError

try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise UserError(f"the server needs {error.name}, which is not installed: pip install 'unclip[serve]'") from error

from retrieval import clip_api, openai_api, page_api
from retrieval.asked import Refused
from retrieval.connection import Connection
from retrieval.description import describe
from retrieval.door import Door
from retrieval.hall import Hall, ServeConfig
from retrieval.query import QueryError
from retrieval.search import Searcher
from retrieval.studio import open_generator
from retrieval.telemetry import Telemetry

if TYPE_CHECKING:
    from retrieval.studio import Generator

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SLOW = ("/api/generate", "/v1/embeddings", "/v1/images/generations", "/v1/images/variations", "/v1/images/edits")
CONNECTIONS = 2048  # open at once; of more, those that ask for nothing are cut off, and requests get uvicorn's 503
log = logging.getLogger("unclip.serve")


def create_app(
    indexes: Mapping[str, Searcher], *, generator: "Generator | None" = None, config: ServeConfig | None = None
) -> FastAPI:
    """The application; app.state.hall is what it works with. UserError if there is no index."""
    if not indexes:
        raise UserError("there is nothing to serve; name an index: unclip serve --index index")
    config = config or ServeConfig()
    telemetry = Telemetry()
    hall = Hall(indexes, generator, config, telemetry)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keeping = asyncio.create_task(hall.keep_fresh())
        yield
        keeping.cancel()
        hall.close()

    app = FastAPI(
        title="unclip", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.hall = hall
    routers = [api.router(hall) for api in (clip_api, openai_api, page_api)]
    for router in routers:
        app.include_router(router)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        return clip_api.answer({"status": "ok", "indexes": list(hall.indexes), "generator": hall.studio is not None})

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = telemetry.text()
        return Response(text, media_type=kind)

    @app.get("/openapi.json")
    async def description() -> Response:
        return clip_api.answer(describe(hall))

    page = _add_page(app)
    paths = [
        "/healthz",
        "/metrics",
        "/openapi.json",
        *page,
        *(route.path for router in routers for route in router.routes),
    ]

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return clip_api.answer(error.body, error.status, error.headers)

    @app.exception_handler(QueryError)
    async def wrong(request: Request, error: QueryError) -> Response:
        return clip_api.answer(Refused(400, " ".join(str(error).split())).body, 400)

    @app.exception_handler(UserError)
    async def broken(request: Request, error: UserError) -> Response:  # about our folders, which clients need not know
        log.error("a request was not answered: %s", error)
        return clip_api.answer(Refused(500, "the server cannot answer this; its log says why").body, 500)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = {404: "there is nothing here", 405: f"{request.method} is not understood here"}
        told = Refused(error.status_code, what.get(error.status_code, str(error.detail)))
        return clip_api.answer(told.body, error.status_code, dict(error.headers or {}))

    app.add_middleware(
        Door,
        telemetry=telemetry,
        loopback=config.loopback,
        names=[name.lower() for name in (*config.names, config.host)],
        token=config.token,
        origins=config.all_origins,
        free={"/healthz", *page},
        slow=SLOW,
        route_of=_route_names(paths),
        queue=config.queue,
        upload_bytes=config.upload_bytes,
        all_bytes=max(256_000_000, 4 * config.upload_bytes),
        seconds=config.seconds,
        slow_seconds=config.draw_seconds,
    )
    return app


def open_app(
    indexes: Mapping[str, Path | str],
    *,
    clip: Path | str | None = None,
    decoder: Path | str | None = None,
    prior: Path | str | None = None,
    device: str = "cpu",
    config: ServeConfig | None = None,
) -> FastAPI:
    """create_app() of folders: index folders by name, and with `decoder` a generator; ready to answer at once.

    clip: of indexes and generator; None: where they say it was. UserError if anything does not fit.
    """
    searchers = {name: Searcher.open(folder, clip, device) for name, folder in indexes.items()}
    generator = None if decoder is None else open_generator(decoder, prior, clip, device)
    app = create_app(searchers, generator=generator, config=config)
    for served in app.state.hall.indexes.values():
        served.warm()
        if (
            generator is not None
            and served.has_encoder
            and served.encoder.fingerprint == generator.fingerprints["clip"]
        ):
            generator.clip = served.searcher.clip  # once in memory is enough
    return app


def listen(config: ServeConfig) -> socket.socket:
    """A socket that already listens, so that its port is known. UserError if the address cannot be had."""
    family, host = config.address
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY on these only
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, config.port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return sock


def run(app: FastAPI, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C: no new connections then, but requests that were begun are answered."""
    stop = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    config = app.state.hall.config
    seconds = math.ceil(max(config.seconds, config.draw_seconds))
    gc.collect()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what is wrong with a form, its sender is told
    gc.freeze()  # half a million objects of torch and its kin stay for ever; looking through them takes half a second
    how = {"log_level": "warning", "access_log": False, "server_header": False, "limit_concurrency": connections()}
    how |= {"http": Connection, "ws": "none"}  # without WebSockets, a request for one is answered as any other
    try:  # uvicorn raises the signal again once it has stopped; the one that does nothing makes that exit code 0
        uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=seconds, **how)).run(sockets=[sock])
    finally:
        gc.unfreeze()
        for number, handler in stop.items():
            signal.signal(number, handler)


def connections() -> int:
    """How many may be open: CONNECTIONS, if the system lets this process have a quarter more files than that.

    Without the room, connections that ask for nothing would take the files that indexes and tars are read through.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS
    wanted = CONNECTIONS * 5 // 4
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # below 0: no limit
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS if soft < 0 else min(CONNECTIONS, soft * 4 // 5)


def address(sock: socket.socket) -> str:
    """Where a browser on this machine finds the server that listens on this socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def named(folders: Iterable[str]) -> dict[str, Path]:
    """{"photos": Path("a/index")} of "photos=a/index"; a folder alone goes by its own name."""
    found: dict[str, Path] = {}
    for text in folders:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = Path(os.path.abspath(text)).name, text
        if name in found:
            raise UserError(f"two indexes are called {name}; give them names: --index one=FOLDER --index two=FOLDER")
        found[name] = Path(folder)
    return found


def read_token(path: Path | str) -> str:
    """The token in a file. UserError if there is none, or if others may read the file."""
    path = Path(path)
    try:
        token = path.read_text(encoding="ascii").strip()
        loose = path.stat().st_mode & 0o077
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a token: {getattr(error, 'strerror', None) or error}") from error
    if not token:
        raise UserError(f"{path} is empty; make a token: python -c 'import secrets; print(secrets.token_urlsafe())'")
    if loose:
        raise UserError(f"{path} can be read by other users of this machine: chmod 600 {path}")
    return token


def _add_page(app: FastAPI) -> list[str]:
    """Serve the files of page/ from memory; the paths."""
    paths = []
    for file in sorted(PAGE.rglob("*")) if PAGE.is_dir() else []:
        name = file.relative_to(PAGE).as_posix()
        kind = mimetypes.guess_type(name)[0]
        if not file.is_file() or name.startswith((".", "__")) or kind is None:
            continue
        kind = "text/javascript" if name.endswith(".js") else kind
        for path in ("/", f"/{name}") if name == "index.html" else (f"/{name}",):
            app.add_api_route(path, _page_file(file.read_bytes(), kind), methods=["GET", "HEAD"])
            paths.append(path)
    return paths


def _page_file(data: bytes, kind: str) -> Callable:
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}

    async def page_file() -> Response:
        return Response(data, media_type=kind, headers=headers)

    return page_file


def _route_names(paths: Iterable[str]) -> Callable[[str], str]:
    """Path -> the route's own name with its parameters left out, "other" where there is none: few, whatever comes."""
    names = {path.partition("/{")[0] for path in paths}

    def name(path: str) -> str:
        if path in names:
            return path
        start = "/".join(path.split("/", 3)[:3])  # /api/picture/INDEX/ROW
        return start if start in names else "other"

    return name
