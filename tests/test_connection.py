import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from retrieval import connection
from retrieval.connection import Connection


async def app(scope, receive, send):
    """Answers after twice the time that a request may take to arrive."""
    await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def with_server(monkeypatch, talk):
    """talk(reader, writer) with a server that gives a request 0.1 s to arrive."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.1)
    config = uvicorn.Config(app, lifespan="off", ws="none", log_level="warning")
    config.load()

    async def run():
        make = lambda: Connection(config=config, server_state=ServerState(), app_state={})  # noqa: E731
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await asyncio.wait_for(talk(reader, writer), 5)
        finally:
            writer.close()
            server.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch, sent):
    async def talk(reader, writer):
        writer.write(sent)
        assert await reader.read() == b""

    with_server(monkeypatch, talk)


def test_a_byte_now_and_then_gives_no_more_time(monkeypatch):
    async def talk(reader, writer):
        closed = asyncio.ensure_future(reader.read())
        for _ in range(50):
            if not closed.done():
                writer.write(b"G")
                await asyncio.sleep(0.02)
        assert closed.done()
        # a byte that comes after the end is answered with a reset, if the machine is slow enough for that
        assert isinstance(closed.exception(), ConnectionResetError) or closed.result() == b""

    with_server(monkeypatch, talk)


def test_an_answer_may_take_longer_and_the_next_request_has_its_own_time(monkeypatch):
    async def talk(reader, writer):
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""

    with_server(monkeypatch, talk)


async def endless(scope, receive, send):
    """Answers with more than any buffer of the system holds."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"32000000")]})
    await send({"type": "http.response.body", "body": bytes(32_000_000)})


def served(monkeypatch, app, talk, limit=None):
    """talk(address, open connections) with a server of this app."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 5.0)
    config, state = uvicorn.Config(app, lifespan="off", ws="none", limit_concurrency=limit), ServerState()
    config.load()

    async def run():
        make = lambda: Connection(config=config, server_state=state, app_state={})  # noqa: E731
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        try:
            await asyncio.wait_for(talk(server.sockets[0].getsockname(), state.connections), 10)
        finally:
            server.close()

    asyncio.run(run())


def test_an_answer_that_nobody_takes_is_not_kept(monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)

    async def talk(address, connections):
        _, writer = await asyncio.open_connection(*address, limit=1000)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        while not connections:
            await asyncio.sleep(0.01)
        while connections:
            await asyncio.sleep(0.01)
        writer.close()

    served(monkeypatch, endless, talk)


def test_an_answer_that_is_taken_slowly_comes_whole(monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)

    async def talk(address, connections):
        reader, writer = await asyncio.open_connection(*address, limit=100_000)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        got = 0
        while piece := await reader.read(4_000_000):
            got += len(piece)
            await asyncio.sleep(0.002)
        assert got > 32_000_000
        writer.close()

    served(monkeypatch, endless, talk)


def test_a_new_connection_takes_the_place_of_the_one_that_has_asked_for_nothing_for_longest(monkeypatch):
    async def talk(address, connections):
        idle = [await asyncio.open_connection(*address) for _ in range(3)]
        while len(connections) < 3:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        assert await idle[0][0].read() == b""
        assert len(connections) == 3
        for _, one in [*idle, (reader, writer)]:
            one.close()

    served(monkeypatch, app, talk, limit=4)
