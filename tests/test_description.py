"""What /openapi.json says of a server, beside what the server is."""

import pytest
import tiny

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from retrieval.index import build_index
from retrieval.search import Searcher
from retrieval.server import ServeConfig, create_app


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.store(root / "emb", tiny.unit_rows(6, 32))
    build_index(root / "emb", root / "index")
    return create_app({"tiny": Searcher.open(root / "index")}, config=ServeConfig(token="12345678"))


def routes_of(app):
    """{path: methods} of what is no file of the page."""
    found = {}
    stack = list(app.routes)
    while stack:
        route = stack.pop()
        stack += getattr(getattr(route, "original_router", None), "routes", [])
        if hasattr(route, "methods") and getattr(route, "name", "") != "page_file":
            found.setdefault(route.path, set()).update(m.lower() for m in route.methods - {"HEAD"})
    return found


def test_every_route_is_described_and_every_description_is_of_a_route(app):
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/openapi.json").status_code == 401
        described = client.get("/openapi.json", headers={"Authorization": "Bearer 12345678"}).json()
    assert {path: set(methods) for path, methods in described["paths"].items()} == routes_of(app)
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
