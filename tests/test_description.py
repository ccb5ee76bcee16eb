"""What /openapi.json says of a server, beside what the server is."""

import pytest
import tiny

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from clip_train.embed import embed
from clip_train.fit import FitConfig
from diffusion.decoder import DecoderConfig
from diffusion.generate import Generator
from diffusion.prior import PriorConfig
from diffusion.train_decoder import train_decoder
from diffusion.train_prior import train_prior
from retrieval.asked import Asked
from retrieval.index import build_index
from retrieval.search import Searcher
from retrieval.server import ServeConfig, create_app

TOKEN = {"Authorization": "Bearer 12345678"}
FEW = FitConfig(steps=1, batch_size=4, precision="fp32")
PRIOR = PriorConfig(width=32, depth=1, heads=2)
DECODER = DecoderConfig(image_size=8, widths=(16, 32), blocks=(1, 1), attention=(2,), head_width=16, cond_width=32)
TERM, PLACE = {"kind": "text", "value": "a fox"}, {"row": 0}
ONE = {"terms": TERM, "from": PLACE, "ids": 0, "input": "a fox"}  # of the lists in requests
BODIES = {  # requests that are answered; together they hold or are asked for every field that there is
    "/knn-service": [{"text": "a fox"}, {"embedding_input": [1.0] * 32}],
    "/metadata": [{"ids": [0]}],
    "/v1/embeddings": [{"input": "a fox"}],
    "/api/search": [{"terms": [TERM]}],
    "/api/generate": [
        {"prompt": "a fox", "steps": 1},
        {"mode": "vary", "from": [PLACE], "steps": 1},
        {"mode": "interpolate", "from": [PLACE, {"row": 1}], "count": 2, "steps": 1},
        {"mode": "edit", "text": "a dog", "from": [PLACE], "steps": 1},
    ],
    "/v1/images/generations": [{"prompt": "a fox"}],
    "/v1/images/variations": [{}],
    "/v1/images/edits": [{"prompt": "a fox"}],
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A server that does all that servers do."""
    root = tmp_path_factory.mktemp("world")
    tiny.shards(root / "shards", n=10, per_shard=4)
    tiny.clip(root / "clip")
    embed(root / "shards", root / "clip", root / "emb")
    build_index(root / "emb", root / "index")
    train_prior(root / "emb", root / "prior", PRIOR, FEW, device="cpu")
    train_decoder(root / "shards", root / "clip", root / "decoder", DECODER, FEW, device="cpu")
    generator = Generator.open(root / "decoder", root / "prior")
    config = ServeConfig(token="12345678", precision="fp32", max_count=2, most=1200)
    app = create_app({"tiny": Searcher.open(root / "index")}, generator=generator, config=config)
    with TestClient(app, base_url="http://127.0.0.1") as made:
        yield made


@pytest.fixture(scope="module")
def described(client):
    return client.get("/openapi.json", headers=TOKEN).json()


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


def body_of(described, path):
    """(media type, schema) of what a route takes; ("", {}) if it takes nothing."""
    content = described["paths"][path].get("post", {}).get("requestBody", {}).get("content", {"": {"schema": {}}})
    ((kind, about),) = content.items()
    return kind, about["schema"]


def ask(client, described, path, fields):
    if body_of(described, path)[0] == "application/json":
        return client.post(path, json=fields, headers=TOKEN)
    return client.post(path, data=fields, files={"image": ("a.png", tiny.picture(0))}, headers=TOKEN)


def test_every_route_is_described_and_every_description_is_of_a_route(client, described):
    assert client.get("/openapi.json").status_code == 401
    assert {path: set(methods) for path, methods in described["paths"].items()} == routes_of(client.app)
    assert {path for path in described["paths"] if body_of(described, path)[0]} == set(BODIES)
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def names_in(schema):
    """The fields of an object, and of the objects in its lists."""
    for name, field in schema.get("properties", {}).items():
        yield name
        yield from names_in(field.get("items", {}))


@pytest.mark.parametrize("path", BODIES)
def test_a_route_asks_for_the_fields_that_are_described_and_for_no_others(client, described, path, monkeypatch):
    seen = set()

    class Noted(dict):
        def get(self, name, default=None):
            seen.add(name)
            return super().get(name, default)

    begin = Asked.__init__
    monkeypatch.setattr(Asked, "__init__", lambda asked, fields: begin(asked, Noted(fields)))
    for body in BODIES[path]:
        answer = ask(client, described, path, body)
        assert answer.status_code == 200, answer.text
    kind, schema = body_of(described, path)
    assert seen == set(names_in(schema)) - ({"image"} if kind == "multipart/form-data" else set())


def limits(field, one):
    """(a value that is just within what is said of a field, one that is just beyond). one: of its list."""
    for said in field.get("anyOf", [field]):
        yield from ((value, "no such") for value in said.get("enum", []))
        for name, step in (("minimum", -1), ("maximum", 1)):
            if name in said:
                yield said[name], said[name] + step
        for name, step in (("minItems", -1), ("maxItems", 1)):
            if name in said:
                yield [one] * said[name], [one] * (said[name] + step)
        if "maxLength" in said:
            yield "width > 1".ljust(said["maxLength"]), "width > 1".ljust(said["maxLength"] + 1)
        if "pattern" in said:
            yield from (("auto", "0x8"), ("99999x1", "100000x1"))


@pytest.mark.parametrize("path", BODIES)
def test_the_limits_that_are_described_are_those_that_are_kept(client, described, path):
    body, schema = BODIES[path][0], body_of(described, path)[1]
    for name, field in schema["properties"].items():
        for within, beyond in limits(field, ONE.get(name)):
            assert ask(client, described, path, {**body, name: beyond}).status_code in (400, 404), (name, beyond)
            if name not in ("mode", "from"):  # which ask for other fields as well
                assert ask(client, described, path, {**body, name: within}).status_code == 200, (name, within)


def test_the_limits_of_terms_and_of_a_pictures_side_are_those_that_are_kept(client, described):
    terms = body_of(described, "/api/search")[1]["properties"]["terms"]["items"]["properties"]
    for within, beyond in limits(terms["weight"], None):
        for weight, status in ((within, 200), (beyond, 400)):
            body = {"terms": [{**TERM, "weight": weight}]}
            assert ask(client, described, "/api/search", body).status_code == status, weight
    picture = described["paths"]["/api/picture/{index}/{row}"]["get"]["parameters"]
    for within, beyond in limits(next(one["schema"] for one in picture if one["name"] == "side"), None):
        for side, status in ((within, 200), (beyond, 400)):
            assert client.get(f"/api/picture/tiny/0?side={side}", headers=TOKEN).status_code == status, side
