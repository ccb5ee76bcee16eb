"""Who may come in, and with how much: the outermost layer of the server.

Host, origin, token and the number of requests are looked at before a byte of the body is read; the body's size and the
time it takes, while it comes. A server on a loopback address is for the people of that machine, but every web page they
look at can send requests to it. So it answers only to names of the loopback (a page whose host name was pointed at
127.0.0.1, DNS rebinding, has another name), and requests of pages from elsewhere are refused unless their origin is
allowed.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect

from retrieval.asked import Refused, to_json
from retrieval.batcher import busy
from retrieval.telemetry import Telemetry

Headers = dict[bytes, bytes]
SAFE = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'; sandbox",  # the page brings its own
}
log = logging.getLogger("unclip.serve")
HANG_UP = {"Connection": "close"}
GONE = 499  # nginx's status of a request whose client hung up: nobody sees it but the metrics
FORGET_AFTER = 600  # seconds that a browser may remember what is allowed


class Door:
    """ASGI middleware: host, origin, token, size, number and time of requests; what it refuses is counted.

    names: in lower case, that a server on a loopback address answers to besides those of the loopback. free: paths that
    need no token and no place in the queue. slow: paths that may take `slow_seconds`.
    route_of(path): a short name for the metrics, one of few.
    """

    def __init__(
        self,
        app: Callable,
        *,
        telemetry: Telemetry,
        loopback: bool,
        names: Collection[str],
        token: str | None,
        origins: Collection[str],
        free: Collection[str],
        slow: Collection[str],
        route_of: Callable[[str], str],
        queue: int,
        upload_bytes: int,
        all_bytes: int,
        seconds: float,
        slow_seconds: float,
    ) -> None:
        self.app, self.telemetry, self.route_of = app, telemetry, route_of
        self.loopback, self.names, self.token, self.origins = loopback, names, token, origins
        self.free, self.slow = free, slow
        self.queue, self.upload_bytes, self.all_bytes = queue, upload_bytes, all_bytes
        self.seconds, self.slow_seconds = seconds, slow_seconds
        # pages from elsewhere that may not read the answers may not show them either
        self.embedding = {b"cross-origin-resource-policy": b"cross-origin" if "*" in origins else b"same-site"}
        self.inside = 0  # requests being answered
        self.held = 0  # bytes of their bodies

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        visit = _Visit(self, scope, receive, send)
        began, route = time.perf_counter(), self.route_of(scope["path"])
        try:
            await self._admit(visit, scope)
        except Refused as refused:
            await visit.refuse(refused)
        except ClientDisconnect:
            visit.status = visit.status or GONE
        except Exception:
            log.exception("%s %s failed", scope["method"], route)
            await visit.refuse(Refused(500, "an error inside the server; its log has the details"))
        self.telemetry.requests.labels(route, str(visit.status)).inc()
        self.telemetry.seconds.labels(route).observe(time.perf_counter() - began)

    async def _admit(self, visit: "_Visit", scope: dict[str, Any]) -> None:
        path, headers = scope["path"], visit.headers
        self._check_host(headers)
        visit.answer_headers |= self._check_origin(headers)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await visit.allow()
            return
        if path in self.free:
            await self.app(scope, visit.receive, visit.send)
            return
        self._check_token(headers)
        self._check_length(headers)
        if self.inside >= self.queue:
            self._count("queue_full")
            raise busy()
        self.inside += 1
        self.telemetry.in_flight.set(self.inside)
        seconds = self.slow_seconds if path in self.slow else self.seconds
        try:
            async with asyncio.timeout(seconds):
                await self.app(scope, visit.receive, visit.send)
        except TimeoutError as error:
            self._count("timeout")
            if visit.waits:
                raise Refused(408, f"the body was not here within {seconds:g} s", headers=HANG_UP) from error
            raise Refused(504, f"no answer within {seconds:g} s", code="timeout") from error
        finally:
            self.inside -= 1
            self.held -= visit.size
            self.telemetry.in_flight.set(self.inside)

    def _check_host(self, headers: Headers) -> None:
        host = host_of(headers.get(b"host", b"").decode("latin-1")).lower()
        if self.loopback and host not in self.names and not is_loopback(host):
            self._count("host")
            known = ", ".join(dict.fromkeys(("localhost", "127.0.0.1", *self.names)))
            raise Refused(421, f"this server answers to these names only: {known}", code="wrong_host")

    def _check_origin(self, headers: Headers) -> Headers:
        """The headers that tell a browser that the page it shows may read the answer."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin:
            return {}
        try:
            name = urlsplit(origin).netloc
        except ValueError:  # http://[
            name = ""
        allowed = "*" in self.origins or origin in self.origins
        allowed = allowed or (name != "" and name == headers.get(b"host", b"").decode("latin-1"))
        if not allowed and not (self.loopback and is_loopback(host_of(name))):
            self._count("origin")
            raise Refused(403, f"pages of {origin[:200]} may not use this server", code="wrong_origin")
        said = b"*" if "*" in self.origins else headers[b"origin"]
        return {
            b"access-control-allow-origin": said,
            b"access-control-expose-headers": b"Retry-After",
            b"vary": b"Origin",
        }

    def _check_token(self, headers: Headers) -> None:
        if self.token is None:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token.encode()):
            self._count("token")
            say = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key", headers=say)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.upload_bytes:
            self.too_large()

    def too_large(self) -> None:
        """Refuse a body."""
        self._count("too_large")
        raise Refused(413, f"the body is larger than {self.upload_bytes / 1e6:g} MB")

    def too_many_bytes(self) -> None:
        """Refuse a body because of all the others."""
        self._count("too_many_bytes")
        raise busy()

    def _count(self, reason: str) -> None:
        self.telemetry.rejected.labels(reason).inc()


class _Visit:
    """One request on its way in and out."""

    def __init__(self, door: Door, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        self.door, self._receive, self._send = door, receive, send
        self.headers: Headers = dict(scope["headers"])
        self.answer_headers: Headers = {}
        self.size, self.status = 0, 0
        self.whole = False  # whether all of the body is here
        self.waits = False  # for more of it

    async def receive(self) -> dict[str, Any]:
        """As ASGI's, but a body may be no larger than is allowed."""
        self.waits = not self.whole
        message = await self._receive()
        self.waits = False
        if not self.whole and message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            self.size += size
            self.door.held += size
            if self.size > self.door.upload_bytes:
                self.door.too_large()
            if self.door.held > self.door.all_bytes:
                self.door.too_many_bytes()
        return message

    async def send(self, message: dict[str, Any]) -> None:
        """As ASGI's, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            there = {name.lower() for name, _ in headers}
            ours = SAFE | self.door.embedding | self.answer_headers
            headers += [(name, value) for name, value in ours.items() if name not in there]
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        body = to_json(refused.body)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    async def allow(self) -> None:
        """Answer a browser that asks beforehand (a CORS preflight)."""
        wanted = self.headers.get(b"access-control-request-headers", b"Content-Type")
        headers = [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", str(FORGET_AFTER).encode()),
        ]
        if self.headers.get(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


def host_of(name: str) -> str:
    """ "localhost:8000" -> "localhost", "[::1]:8000" -> "::1"."""
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0] if name.count(":") == 1 else name


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


async def unless_gone(receive: Callable[[], Awaitable[dict]], work: Awaitable[Any]) -> Any:
    """The result of `work`, which is given up when the client hangs up. Call it once the body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(GONE, "the client hung up")
    finally:
        task.cancel()
        gone.cancel()


async def _hung_up(receive: Callable[[], Awaitable[dict]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
