"""Clients as no library makes them: slow, gone in the middle, lying about lengths, talking rubbish.

Each takes a Site and a random source, and returns what went wrong; "" if the server answered as it should.
"""

import base64
import json
import random
import socket
import struct
import time
from collections.abc import Callable

import api_cases
from sites import SEARCH, Site, rest

HEAD = b"Host: 127.0.0.1\r\nConnection: close\r\n"
BODY = json.dumps(SEARCH).encode()
PATHS = (b"/knn-service", b"/metadata", b"/api/search", b"/v1/embeddings", b"/api/generate", b"/healthz", b"/")
UPLOAD = 16_000_000


def post(path: bytes, body: bytes, kind: bytes = b"application/json", length: bytes | None = None) -> bytes:
    """The bytes of a request."""
    length = length or str(len(body)).encode()
    kind = b"Content-Type: " + kind + b"\r\n" if kind else b""
    return b"POST " + path + b" HTTP/1.1\r\n" + HEAD + kind + b"Content-Length: " + length + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    """Of an answer; 0 if there is none."""
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


def told(answer: bytes, *allowed: int) -> str:
    """ "" if the status is allowed and the body whole."""
    if status(answer) not in allowed:
        return f"{status(answer)} instead of {allowed}: {answer[-150:]!r}"
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"application/json" in head and b"chunked" not in head:
        json.loads(body)
    return ""


def drip(site: Site, data: bytes, each: float, seconds: float) -> tuple[bytes, float]:
    """Send a byte at a time until the server has had enough; what it said, and after how long."""
    began = time.monotonic()
    with site.connect(seconds) as sock:
        for place in range(len(data)):
            try:
                sock.sendall(data[place : place + 1])
            except OSError:
                break
            sock.settimeout(each)
            try:
                if sock.recv(1, socket.MSG_PEEK) is not None:  # an answer, or the end
                    break
            except TimeoutError:
                pass
            except OSError:
                break
            if time.monotonic() - began > seconds:
                return b"", seconds
        sock.settimeout(seconds)
        return rest(sock), time.monotonic() - began


def slow_head(site: Site, rng: random.Random) -> str:
    answer, took = drip(site, b"GET / HTTP/1.1\r\nX: " + b"a" * 1000, rng.choice((0.2, 0.5, 1.0)), 25)
    return "" if took < 20 and not answer else f"after {took:.0f} s it said {answer[:60]!r}"


def slow_body(site: Site, rng: random.Random) -> str:
    path, length = rng.choice(PATHS[:5]), b"5000"
    with site.connect() as sock:
        sock.sendall(post(path, b"", length=length))
        began = time.monotonic()
        sock.settimeout(0.5)
        while time.monotonic() - began < 25:
            try:
                sock.sendall(b" ")
                if sock.recv(1, socket.MSG_PEEK) is not None:
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        sock.settimeout(10)
        return told(rest(sock), 408, 0)  # 0: the answer was lost with bytes that came after it


def half_closed(site: Site, rng: random.Random) -> str:
    data = rng.choice((post(b"/knn-service", BODY), b"GET /healthz HTTP/1.1\r\n" + HEAD + b"\r\n", b"GET / HT", b""))
    with site.connect(20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return told(rest(sock), 200, 0)  # it may take a client that says no more for one that is gone


def vanishing(site: Site, rng: random.Random) -> str:
    data = post(rng.choice(PATHS), BODY * rng.choice((1, 3000)))
    with site.connect() as sock:
        sock.sendall(data[: rng.randint(0, len(data))])
        time.sleep(rng.choice((0, 0, 0.01)))
        if rng.random() < 0.5:  # a reset instead of an end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return ""


def too_long(site: Site, rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return told(
            site.exchange(post(rng.choice(PATHS[:5]), b"", length=str(UPLOAD + rng.randint(1, 9**9)).encode())), 413
        )
    if kind == 1:
        return told(site.exchange(post(rng.choice((b"/metadata", b"/api/generate")), b" " * 300_000)), 413)
    return told(site.exchange(post(b"/knn-service", b"[" + b"0," * 300_000 + b"0]")), 413)


def endless(site: Site, rng: random.Random) -> str:
    """A body in chunks that never ends."""
    piece = b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n"
    with site.connect() as sock:
        sock.sendall(b"POST " + rng.choice(PATHS) + b" HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sock.settimeout(20)
        sent = 0
        try:
            while sent < 3 * UPLOAD:
                sock.sendall(piece)
                sent += 65536
        except OSError:  # it reads no further
            pass
        return "" if sent < 2 * UPLOAD else f"it took {sent} bytes"


def bomb(site: Site, rng: random.Random) -> str:
    data = api_cases.bomb(rng)
    if rng.random() < 0.3:
        path = rng.choice((b"/v1/images/variations", b"/v1/images/edits"))
        head = b'--part\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        text = b'\r\n--part\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nfox\r\n--part--\r\n'
        return told(site.exchange(post(path, head + data + text, b"multipart/form-data; boundary=part")), 400, 404)
    fields = {"image": base64.b64encode(data).decode(), "indice_name": "tiny"}
    return told(site.exchange(post(b"/knn-service", json.dumps(fields).encode())), 400)


def deep(site: Site, rng: random.Random) -> str:
    depth = rng.choice((50, 900, 5000, 90_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opened * depth + b"1" + closed * depth
    body = rng.choice((inner, b'{"terms":' + inner + b"}", b'{"text":' + inner + b"}", opened * depth))
    return told(site.exchange(post(rng.choice(PATHS[:4]), body)), 200, 400, 413)  # 200: in a field that nobody reads


def wrong_type(site: Site, rng: random.Random) -> str:
    kinds = [
        b"",
        b"image/png",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"application/x-www-form-urlencoded",
    ]
    kinds += [
        b"multipart/form-data; boundary=part; charset=" + one for one in (b"undefined", b"idna", b"hex", b"utf-7")
    ]
    kinds += [b"text/html; charset=utf-16", b"a" * 5000, b";;;", b"multipart/form-data; boundary=" + b"p" * 300]
    form = b'--part\r\nContent-Disposition: form-data; name="image"\r\n\r\n\xff+2AA-\r\n--part--\r\n'
    path = rng.choice((*PATHS[:5], b"/v1/images/variations", b"/v1/images/edits", b"/v1/images/generations"))
    return told(site.exchange(post(path, rng.choice((form, BODY, b"\xff\xfe", b"")), rng.choice(kinds))), 200, 400, 404)


def rubbish(site: Site, rng: random.Random) -> str:
    data = bytearray(post(rng.choice(PATHS), BODY))
    if rng.random() < 0.3:
        data = bytearray(rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n")
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
    with site.connect(20) as sock:
        try:
            sock.sendall(bytes(data))
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = rest(sock)
    return "" if status(answer) < 500 else f"{answer[-200:]!r}"


def pipelined(site: Site, rng: random.Random) -> str:
    many = rng.randint(2, 30)
    one = post(b"/knn-service", BODY).replace(b"Connection: close\r\n", b"")
    answer = site.exchange(one * (many - 1) + post(b"/knn-service", BODY))
    return "" if answer.count(b"HTTP/1.1 200 OK") == many else f"{answer.count(b'HTTP/1.1 200')} answers of {many}"


def described(site: Site, rng: random.Random) -> str:
    """A request made from the description, right or wrong."""
    if not hasattr(site, "description"):
        site.description = site.ask("/openapi.json")
    method, target, body, kind = api_cases.request(site.description, rng)
    head = f"{method} {target} HTTP/1.1\r\n".encode() + HEAD + (f"Content-Type: {kind}\r\n".encode() if kind else b"")
    answer = site.exchange(head + b"Content-Length: %d\r\n\r\n" % len(body) + body, 60)
    return told(answer, 200, 304, 400, 404, 409, 413, 429) and f"{method} {target}: {told(answer, 200)}"


KINDS: dict[str, Callable[[Site, random.Random], str]] = {
    "requests from the OpenAPI description": described,
    "a byte a second, head": slow_head,
    "a byte a second, body": slow_body,
    "half-closed": half_closed,
    "gone in the middle": vanishing,
    "over the limit": too_long,
    "chunks without end": endless,
    "picture bombs": bomb,
    "deep JSON": deep,
    "wrong content types": wrong_type,
    "no HTTP": rubbish,
    "pipelined": pipelined,
}
