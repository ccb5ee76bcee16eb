"""The server among clients that misbehave, in this process, a few of each kind: benchmarks/faults.py has all."""

import os
import threading

import pytest

pytest.importorskip("fastapi")
import rough_clients
import service
import sites
import uvicorn

from retrieval import connection
from retrieval.connection import Connection
from retrieval.search import Searcher
from retrieval.server import ServeConfig, create_app, listen

PLACES = 60  # connections


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server that waits two seconds for a body, and one for a head."""
    folder = sites.world(tmp_path_factory.mktemp("site"))
    config = ServeConfig(port=0, seconds=2, precision="fp32")
    app, sock = create_app({"tiny": Searcher.open(folder / "index")}, config=config), listen(config)
    how = {"http": Connection, "ws": "none", "log_level": "critical", "limit_concurrency": PLACES}
    server = uvicorn.Server(uvicorn.Config(app, **how))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connection, "REQUEST_SECONDS", 1.0)
        thread.start()
        yield sites.Site(sock.getsockname()[1], os.getpid())
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("kind", rough_clients.KINDS)
def test_rough_clients_are_refused_and_harm_nobody(site, kind):
    few = {"a byte a second, head": 1, "a byte a second, body": 1, "requests from the OpenAPI description": 60}
    for number in range(few.get(kind, 8)):
        outcome = service.attempt(site, kind, 1, number)
        assert outcome.how == "done", (number, outcome)


def test_connections_that_ask_for_nothing_give_way_to_those_that_ask(site):
    idle = [site.connect() for _ in range(2 * PLACES)]
    try:
        assert site.ails() == ""
    finally:
        for one in idle:
            one.close()
    assert site.ails() == ""
