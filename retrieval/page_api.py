"""What the server's own page asks for, below /api.

GET  /api/info                  what there is
POST /api/search                words, pictures, keys and vectors, added and subtracted -> hits
GET  /api/picture/INDEX/ROW     the picture as it is in the tar; ?side=256: a small JPEG
GET  /api/details/INDEX/ROW     all that is known of a row, and where it comes from
POST /api/generate              pictures of a prompt or of rows, varied, interpolated, edited

A compaction of the index gives rows new numbers. Whoever got a row from an earlier answer sends the sample's key with
it (?key=KEY, and `key` in `from` of generate): then that sample is meant, wherever it is now; 409 says that it is gone.
"""

import asyncio
import base64
import hashlib
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request, Response

from retrieval.album import KEY
from retrieval.asked import Asked, Refused, picture_bytes, vector
from retrieval.clip_api import MOST_SHOWN, answer
from retrieval.door import unless_gone
from retrieval.index import MODALITIES
from retrieval.openai_api import MAX_SEED
from retrieval.query import Term, combine
from retrieval.served import Found, ServedIndex, thumbnail
from retrieval.studio import NO_PROMPTS, Studio, files

if TYPE_CHECKING:
    from retrieval.hall import Hall
    from retrieval.live import LiveIndex
    from retrieval.search import Hit

MOST_TERMS = 16
MOST_WEIGHT = 100.0  # of a term, on either side of 0
MOST_WHERE = 2000  # characters
MOST_SIDE = 2048  # pixels of a small JPEG
MOST_STEPS = 100
MOST_GUIDANCE = 20.0
OWN = (KEY, "caption", "captions")  # columns that have a place of their own in the answers


def router(hall: "Hall") -> APIRouter:
    """The five routes."""
    routes = APIRouter(prefix="/api")

    @routes.get("/info")
    async def info() -> Response:
        return answer(await hall.in_thread(lambda: _info(hall)))

    @routes.post("/search")
    async def search(request: Request) -> Response:
        began = time.perf_counter()
        asked = await Asked.read(request, hall.in_thread, pictures=True)
        served = hall.index(asked.get("index", str))
        modality = asked.choice("modality", *MODALITIES)
        k = asked.number("k", 40, 1, MOST_SHOWN)
        where = asked.text("where", MOST_WHERE)
        distinct = asked.number("distinct", 0.0, 0.0, 1.0) or None
        terms = await hall.in_thread(lambda: _terms(asked))
        query = await _query(terms, served, hall, modality)
        # the curve from cosines to probabilities is about one caption and one picture
        kinds = ("text",) if modality == "image" else ("image", "key")
        sure = len(terms) == 1 and terms[0].weight > 0 and terms[0].kind in kinds

        def chosen() -> Response:
            hits = served.searcher.query([Term("vector", query)], k, modality, where=where, distinct=distinct)
            return answer({"hits": _shown(served, hits, sure), "ms": _since(began)})

        def described(nearest: Found) -> Response:
            hits = nearest.view.hits(nearest.scores.tolist(), nearest.rows.tolist())
            return answer({"hits": _shown(served, hits, sure), "ms": _since(began)})

        async def found() -> Response:
            if where or distinct:
                return await hall.in_thread(chosen)
            nearest = await served.search(query, k, modality)
            return await hall.in_thread(lambda: described(nearest))

        return await served.whole(found)

    @routes.get("/picture/{index}/{row}")
    async def picture(index: str, row: str, request: Request) -> Response:
        served = hall.index(index)
        number, asked = _row(row), Asked(dict(request.query_params))
        side, key = asked.number("side", 0, 0, MOST_SIDE), asked.text("key")
        state = hashlib.sha256(f"{served.searcher.index.state}\0{number}\0{side}\0{key}".encode()).hexdigest()[:24]
        headers = {"ETag": f'"{state}"', "Cache-Control": "private, no-cache"}
        if state in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)

        async def shown() -> tuple[bytes, str]:
            return await hall.in_thread(lambda: _picture(served, number, key, side))

        data, media_type = await served.whole(shown)
        return Response(data, media_type=media_type, headers=headers)

    @routes.get("/details/{index}/{row}")
    async def details(index: str, row: str, request: Request) -> Response:
        served, number = hall.index(index), _row(row)
        key = Asked(dict(request.query_params)).text("key")

        async def described() -> dict[str, Any]:
            return await hall.in_thread(lambda: _details(served, number, key))

        return answer(await served.whole(described))

    @routes.post("/generate")
    async def generate(request: Request) -> Response:
        began = time.perf_counter()
        asked = await Asked.read(request, hall.in_thread)
        if hall.studio is None:
            raise Refused(400, "this server has no generator: start it with --prior and --decoder")
        made = await unless_gone(request.receive, _generated(asked, hall.studio, hall))
        return await hall.in_thread(lambda: answer({**made, "ms": _since(began)}))

    return routes


def _info(hall: "Hall") -> dict[str, Any]:
    indexes = [
        {
            "name": served.name,
            "rows": len(served.searcher),
            "numbers": served.searcher.index.rows,  # that rows have, deleted ones too
            "dim": served.dim,
            "columns": served.searcher.columns,
            "calibrated": served.searcher.calibration is not None,
            "modalities": list(MODALITIES),
        }
        for served in hall.indexes.values()
    ]
    generator = None
    if hall.studio is not None:
        how = hall.studio.how
        generator = {"size": hall.studio.size, "steps": how.steps, "guidance": how.guidance}
        generator |= {"max_count": hall.config.max_count, "prompts": hall.studio.draws_prompts}
    return {
        "name": "unclip",
        "version": metadata.version("unclip"),
        "indexes": indexes,
        "generator": generator,
        "image_urls": hall.config.image_urls,
        "limits": {"upload_bytes": hall.config.upload_bytes},
    }


def _terms(asked: Asked) -> list[Term]:
    given = asked.get("terms", list, [])
    if not given:
        raise Refused(400, "terms is missing or empty: nothing to search for")
    if len(given) > MOST_TERMS:
        raise Refused(400, f"{len(given)} terms; {MOST_TERMS} are the most")
    terms = []
    for one in given:
        if not isinstance(one, dict):
            raise Refused(400, "each of the terms must be an object with kind and value")
        term = Asked(one)
        kind = term.choice("kind", "text", "image", "key", "vector")
        value = (
            term.get("value", list) if kind == "vector" else term.text("value", 10**9 if kind == "image" else 10_000)
        )
        if value is None:
            raise Refused(400, f"a term of kind {kind} has no value")
        value = picture_bytes(value, "value") if kind == "image" else value
        terms.append(Term(kind, value, term.number("weight", 1.0, -MOST_WEIGHT, MOST_WEIGHT)))
    return terms


async def _query(terms: list[Term], served: ServedIndex, hall: "Hall", modality: str) -> np.ndarray:
    """The unit row (D,) that the terms add up to; captions and pictures of all requests are encoded together."""

    async def encoded(term: Term) -> np.ndarray:
        if term.kind == "text":
            return (await served.encoder.text([term.value]))[0]
        if term.kind == "image":
            return await served.encoder.picture(term.value)
        if term.kind == "vector":
            return vector(term.value, served.dim, "value")
        return await hall.in_thread(lambda: served.searcher.encode([Term("key", term.value, 1.0)], modality))

    return combine(terms, np.stack(await asyncio.gather(*map(encoded, terms))))


def _shown(served: ServedIndex, hits: "list[Hit]", sure: bool) -> list[dict[str, Any]]:
    """The hits as the page has them; sure: with probabilities where the CLIP is calibrated."""
    curve = served.searcher.calibration if sure else None
    return [
        {
            "row": hit.row,
            "key": hit.key,
            "caption": hit.caption,
            "score": round(hit.score, 6),
            "probability": None if curve is None else round(float(curve.probability(hit.score)), 4),
            "picture": f"/api/picture/{served.name}/{hit.row}",
            "meta": hit.meta,
        }
        for hit in hits
    ]


def _place(served: ServedIndex, live: "LiveIndex", row: int, key: str | None) -> tuple[int, dict[str, Any]]:
    """The row that is meant, and its metadata: with a key, the row that this sample has now."""
    there = 0 <= row < live.rows and live.live[row]
    if key is None or (there and live.table.row(row)[KEY] == key):
        return row, served.row(live, row)
    (now,) = live.rows_of([key]).tolist()
    if now < 0:
        raise Refused(409, f"the index {served.name} has been changed: {key[:80]!r} is gone", code="index_changed")
    return now, served.row(live, now)


def _picture(served: ServedIndex, row: int, key: str | None, side: int) -> tuple[bytes, str]:
    view = served.searcher.view
    row, _ = _place(served, view.index, row, key)
    found = view.picture_bytes(row)
    if found is not None and side:
        found = thumbnail(found[0], max(side, 16))
    if found is None:
        raise Refused(404, f"the picture of row {row} is not here any more")
    return found


def _details(served: ServedIndex, row: int, key: str | None) -> dict[str, Any]:
    view = served.searcher.view
    row, meta = _place(served, view.index, row, key)
    key, caption = meta.pop(KEY), meta.pop("caption", "")
    captions = meta.pop("captions", [caption])
    return {
        "row": row,
        "key": key,
        "caption": caption,
        "captions": captions,
        "meta": meta,
        "provenance": served.provenance(view, row),
    }


async def _generated(asked: Asked, studio: Studio, hall: "Hall") -> dict[str, Any]:
    mode = asked.choice("mode", "generate", "vary", "interpolate", "edit")
    most = hall.config.max_count
    count = asked.number("count", min(4, most), 2 if mode == "interpolate" else 1, most)
    seed = asked.number("seed", 0, 0, MAX_SEED)
    how = studio.sampling(
        asked.number("steps", studio.how.steps, 1, MOST_STEPS),
        asked.number("guidance", studio.how.guidance, 0.0, MOST_GUIDANCE),
    )
    with_strip = asked.get("strip", bool, False)
    prompt, text = asked.text("prompt"), asked.text("text")
    rows = await _rows(asked, studio, hall)
    if mode == "generate" and prompt is not None and not studio.draws_prompts:
        raise Refused(400, NO_PROMPTS)
    if mode == "edit" and studio.generator.clip is None:
        raise Refused(400, "this server's generator has no CLIP to read the text with")
    needed = {"generate": None, "vary": 1, "interpolate": 2, "edit": 1}[mode]
    if mode == "generate" and prompt is None and len(rows) != 1:
        raise Refused(400, "generate needs a prompt, or one row in from")
    if needed and len(rows) != needed:
        raise Refused(400, f"{mode} needs {needed} row{'s' * (needed > 1)} in from, not {len(rows)}")
    if mode == "edit" and text is None:
        raise Refused(400, "edit needs text: what the picture should be changed towards")

    def draw() -> dict[str, Any]:
        if mode == "interpolate":
            made = studio.interpolate(rows, count, seed, how)
        elif mode == "edit":
            made = studio.edit(rows[0], text, count, seed, how)
        elif mode == "vary" or prompt is None:
            made = studio.vary(rows[0], count, seed, how)
        else:
            made = studio.from_caption(prompt, count, seed, how)
        pictures = [
            {"png": base64.b64encode(file).decode(), "seed": one.provenance["seed"], "provenance": one.provenance}
            for one, file in zip(made, files(made), strict=True)
        ]
        steps = studio.strip(prompt if mode == "generate" and prompt else rows[0], seed, how) if with_strip else None
        return {"pictures": pictures, "strip": steps and [base64.b64encode(step).decode() for step in steps]}

    return await studio.draw(draw, count + with_strip)


async def _rows(asked: Asked, studio: Studio, hall: "Hall") -> np.ndarray:
    """(N, D) embeddings of the rows named in `from`; (0,) of none."""
    given = asked.get("from", list, [])
    if len(given) > 2:
        raise Refused(400, f"from holds {len(given)} rows; 2 are the most")
    rows = []
    for one in given:
        place = Asked(one if isinstance(one, dict) else {})
        served, row = hall.index(place.get("index", str)), place.get("row", int)
        if row is None:
            raise Refused(400, "each of from must be an object with index and row")
        if served.searcher.manifest.inputs["clip"]["fingerprint"] != studio.clip_fingerprint:
            raise Refused(400, f"the generator was trained with another CLIP than the index {served.name}")
        key = place.text("key")
        rows.append(await hall.in_thread(lambda served=served, row=row, key=key: _embedding(served, row, key)))
    return np.array(rows)


def _embedding(served: ServedIndex, row: int, key: str | None) -> np.ndarray:
    live = served.searcher.index
    row, _ = _place(served, live, row, key)
    return live.vectors(np.array([row]), "image")[0]


def _row(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise Refused(404, f"{text[:40]!r} is not a row")
    return int(text)


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 1)
