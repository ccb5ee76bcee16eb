"""The OpenAPI description of a server, at /openapi.json: what each route takes, and what it answers.

It is what clients are made from and what the fault bench makes requests from (tests/faults/test_service.py), so a route
or a field that is not here is one that nobody is told of: tests/test_description.py compares it with what the routes
ask for, and its limits with theirs.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from retrieval.clip_api import MOST_SHOWN
from retrieval.index import MODALITIES
from retrieval.openai_api import MAX_SEED, MOST_INPUTS, SIZE
from retrieval.page_api import MOST_GUIDANCE, MOST_SIDE, MOST_STEPS, MOST_TERMS, MOST_WEIGHT, MOST_WHERE

if TYPE_CHECKING:
    from retrieval.hall import Hall

Schema = dict[str, Any]
TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NUMBERS = {"type": "array", "items": {"type": "number"}}
PICTURE = {"type": "string", "description": "A picture's file in base64, with or without data:image/...;base64, before"}
ANY = {"type": "object"}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": TEXT, "type": TEXT, "code": {"type": ["string", "null"]}},
        }
    },
}
# what uvicorn answers by itself is no JSON: no HTTP, too many connections
WRONG = {"content": {"application/json": {"schema": ERROR}, "text/plain": {"schema": TEXT}}}
REFUSED = {
    "4XX": {"description": "What the client can put right; 429 with Retry-After", **WRONG},
    "500": {"description": "A fault of the server; its log says more", **WRONG},
    "503": {"description": "The index is being changed, or too many connections; try again", **WRONG},
    "504": {"description": "It took too long", **WRONG},
}


def describe(hall: "Hall") -> dict[str, Any]:
    """The description of the server that works in this hall."""
    token = hall.config.token is not None
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "unclip", "version": metadata.version("unclip"), "description": "See docs/serving.md."},
        "paths": {path: _operations(methods, token) for path, methods in _routes(hall).items()},
    }
    if token:
        described["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return described


def _operations(methods: dict[str, Any], token: bool) -> dict[str, Any]:
    guarded = {"security": [{"token": []}]} if token else {}
    return {
        method: {**guarded, **about, "responses": about["responses"] | REFUSED} for method, about in methods.items()
    }


def _routes(hall: "Hall") -> dict[str, dict[str, Any]]:
    """{path: {method: what it takes and answers}}."""
    most = hall.config.most
    index = {"enum": [*hall.indexes, None], "description": "By default the first"}
    modality = {"enum": [*MODALITIES, None]}
    count = {"type": ["integer", "null"], "minimum": 1, "maximum": hall.config.max_count}
    seed = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEED}
    place = _object({"index": index, "row": WHOLE, "key": _maybe(TEXT)}, "row")
    term = _object(
        {
            "kind": {"enum": ["text", "image", "key", "vector", None]},
            "value": {"anyOf": [TEXT, NUMBERS], "description": "A text, a picture in base64, a key, or numbers"},
            "weight": {"type": ["number", "null"], "minimum": -MOST_WEIGHT, "maximum": MOST_WEIGHT},
        },
        "value",
    )
    query = {
        "text": _maybe(TEXT),
        "image": _maybe(PICTURE),
        "image_url": _maybe(TEXT),
        "embedding_input": _maybe(NUMBERS),
        "modality": modality,
        "num_images": {"type": ["integer", "null"], "minimum": 0, "maximum": min(MOST_SHOWN, most)},
        "num_result_ids": {"type": ["integer", "null"], "minimum": 0, "maximum": most},
        "indice_name": index,
        "deduplicate": _maybe(FLAG),
    }
    search = {
        "terms": {"type": "array", "items": term, "minItems": 1, "maxItems": MOST_TERMS},
        "index": index,
        "modality": modality,
        "k": {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_SHOWN},
        "where": {"type": ["string", "null"], "maxLength": MOST_WHERE},
        "distinct": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    }
    hits = {
        "hits": _list(_object({"row": WHOLE, "key": TEXT, "caption": TEXT}, "row", "key")),
        "ms": {"type": "number"},
    }
    ids = {**_list(WHOLE), "maxItems": MOST_SHOWN}
    row = {"name": "row", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
    which = {"name": "index", "in": "path", "required": True, "schema": {"enum": list(hall.indexes)}}
    key = {"name": "key", "in": "query", "schema": TEXT}
    side = {"name": "side", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": MOST_SIDE}}
    found = {"image/*": {"schema": {"type": "string", "format": "binary"}}}
    picture = {"200": {"description": "The picture", "content": found}, "304": {"description": "As before"}}
    inputs = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MOST_INPUTS}]}
    embed = {
        "model": index,
        "input": inputs,
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": _maybe(WHOLE),
    }
    routes = {
        "/healthz": {"get": _get(_object({"status": TEXT}, "status"))},
        "/openapi.json": {"get": _get(ANY)},
        "/metrics": {"get": {"responses": {"200": {"description": "For Prometheus", "content": {"text/plain": {}}}}}},
        "/indices-list": {"get": _get(_list(TEXT))},
        "/config.json": {"get": _get(ANY)},
        "/knn-service": {"post": _post(_object(query), _list(_object({"id": WHOLE, "similarity": {}}, "id")))},
        "/metadata": {"post": _post(_object({"ids": ids, "indice_name": index}), _list(_object({"id": WHOLE}, "id")))},
        "/v1/models": {"get": _get(_object({"data": _list(ANY)}, "data"))},
        "/v1/embeddings": {"post": _post(_object(embed, "input"), _object({"data": _list(ANY)}, "data"))},
        "/api/info": {"get": _get(ANY)},
        "/api/search": {"post": _post(_object(search, "terms"), _object(hits, "hits"))},
        "/api/picture/{index}/{row}": {"get": {"parameters": [which, row, side, key], "responses": picture}},
        "/api/details/{index}/{row}": {
            "get": {"parameters": [which, row, key], **_get(_object({"row": WHOLE}, "row"))}
        },
    }
    drawn = {
        "mode": {"enum": ["generate", "vary", "interpolate", "edit", None]},
        "prompt": _maybe(TEXT),
        "text": _maybe(TEXT),
        "from": _maybe({"type": "array", "items": place, "maxItems": 2}),
        "count": count,
        "seed": seed,
        "steps": {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_STEPS},
        "guidance": {"type": ["number", "null"], "minimum": 0, "maximum": MOST_GUIDANCE},
        "strip": _maybe(FLAG),
    }
    routes["/api/generate"] = {"post": _post(_object(drawn), _object({"pictures": _list(ANY)}, "pictures"))}
    if hall.studio is None:
        return routes
    made = _object({"data": _list(ANY), "created": WHOLE}, "data", "created")
    size = {"type": ["string", "null"], "pattern": f"^(auto|{SIZE})$"}
    shape = {"n": count, "seed": seed, "size": size, "response_format": {"enum": ["b64_json", "url", "", None]}}
    routes["/v1/images/generations"] = {"post": _post(_object({"prompt": TEXT, **shape}, "prompt"), made)}
    in_form = {  # has no null
        "image": {"type": "string", "format": "binary"},
        **{name: {**shape[name], "type": "integer"} for name in ("n", "seed")},
        "size": {**size, "type": "string"},
        "response_format": {"enum": ["b64_json", "url"]},
    }
    for path, asked in (("variations", in_form), ("edits", {**in_form, "prompt": TEXT})):
        about = _post(_object(asked, *({"image", "prompt"} & set(asked))), made, "multipart/form-data")
        routes[f"/v1/images/{path}"] = {"post": about}
    return routes


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _get(answer: Schema) -> dict[str, Any]:
    return {"responses": {"200": {"description": "The answer", "content": {"application/json": {"schema": answer}}}}}


def _post(asked: Schema, answer: Schema, kind: str = "application/json") -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": asked}}}, **_get(answer)}
