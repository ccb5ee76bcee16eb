"""clip-retrieval's HTTP API, so that its ClipClient and its clip-front work as they are.

    GET  /indices-list   the names of the indexes
    POST /knn-service    a caption, picture, picture's address or embedding -> rows, best first
    POST /metadata       ids -> their metadata
    GET  /config.json    what clip-front reads first

Bodies are read as JSON whatever their content type: ClipClient sends none, clip-front text/plain. The first num_images
rows of an answer carry metadata and the picture, the rest (up to num_result_ids) id and similarity alone. Once the
pictures of an answer are MOST_INLINE long, the rows that follow carry none.
"""

import base64
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import APIRouter, Request, Response

from retrieval.asked import Asked, Refused, picture_bytes, to_json, vector
from retrieval.door import is_loopback
from retrieval.index import MODALITIES
from retrieval.served import Found, ServedIndex, inline, without_copies

if TYPE_CHECKING:
    from retrieval.hall import Hall
    from retrieval.search import View

MOST_SHOWN = 1000  # rows with metadata in one answer
MOST_INLINE = 32_000_000  # characters of pictures in one answer; json.dumps lets no other thread run: 0.2 s for so many
# names that no public server has: reserved (RFC 2606, 6761, 6762, 8375; "internal": ICANN 2024), or usual at home (lan)
NOWHERE = ("test", "invalid", "example", "example.com", "example.net", "example.org", "localhost", "local", "internal")
NOWHERE += ("home.arpa", "lan")


def router(hall: "Hall") -> APIRouter:
    """The four routes over the indexes of a server."""
    routes = APIRouter()

    @routes.get("/indices-list")
    async def indices_list() -> Response:
        return answer(list(hall.indexes))

    @routes.get("/config.json")
    async def config(request: Request) -> Response:
        here = str(request.base_url).rstrip("/")  # clip-front puts "/knn-service" behind it
        return answer({"defaultBackend": here, "defaultIndex": next(iter(hall.indexes)), "urlColumn": "url"})

    @routes.post("/knn-service")
    async def knn(request: Request) -> Response:
        asked = await Asked.read(request, hall.in_thread, pictures=True)
        served = hall.index(asked.get("indice_name", str))
        modality = asked.choice("modality", *MODALITIES)
        shown = asked.number("num_images", 100, 0, hall.config.most)
        k = asked.number("num_result_ids", shown, 0, hall.config.most)
        distinct = asked.get("deduplicate", bool, False)
        if shown > MOST_SHOWN:
            raise Refused(400, f"num_images {shown} must be at most {MOST_SHOWN}; num_result_ids may be more")
        query = await _query(asked, served, hall)

        async def found() -> bytes:
            if not k:
                return b"[]"
            nearest = await served.search(query, k, modality)
            return await hall.in_thread(lambda: _rows(served, nearest, modality, shown, distinct))

        return Response(await served.whole(found), media_type="application/json")

    @routes.post("/metadata")
    async def metadata(request: Request) -> Response:
        asked = await Asked.read(request, hall.in_thread)
        served = hall.index(asked.get("indice_name", str))
        ids = asked.whole_numbers("ids", MOST_SHOWN)

        async def described() -> bytes:
            return await hall.in_thread(lambda: _described(served, ids))

        return Response(await served.whole(described), media_type="application/json")

    return routes


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(to_json(value), status, headers, media_type="application/json")


async def _query(asked: Asked, served: ServedIndex, hall: "Hall") -> np.ndarray:
    """(D,): of the caption, else the picture, else its address, else the embedding, as clip-retrieval ranks them."""
    if (text := asked.text("text")) is not None:
        return (await served.encoder.text([text]))[0]
    if (image := asked.get("image", str)) is not None:
        data = await hall.in_thread(lambda: picture_bytes(image, "image"))
        return await served.encoder.picture(data)
    if (url := asked.text("image_url", 4096)) is not None:
        return await served.encoder.picture(await hall.fetched(url))
    if (numbers := asked.get("embedding_input", list)) is not None:
        return vector(numbers, served.dim, "embedding_input")
    raise Refused(400, "one of text, image, image_url and embedding_input is needed")


def _rows(served: ServedIndex, found: Found, modality: str, shown: int, distinct: bool) -> bytes:
    if distinct:
        found = without_copies(found, modality)
    known = _metadata(served, found.view, found.rows[:shown].tolist())
    known += [{}] * (len(found.rows) - len(known))
    places = zip(known, found.rows.tolist(), found.scores.tolist(), strict=True)
    return to_json([{**of_row, "id": row, "similarity": score} for of_row, row, score in places])


def _described(served: ServedIndex, ids: list[int]) -> bytes:
    known = _metadata(served, served.searcher.view, ids)
    return to_json([{"id": row, "metadata": of_row} for row, of_row in zip(ids, known, strict=True)])


def _metadata(served: ServedIndex, view: "View", rows: list[int]) -> list[dict[str, Any]]:
    """Each row's columns and its picture as `image`, as long as there is room for pictures. clip-front shows `url`
    rather than `image`, so a url that cannot be reached from elsewhere is left out where there is a picture."""
    known, room = [served.row(view.index, row) for row in rows], MOST_INLINE
    for row, of_row in zip(rows, known, strict=True):
        image = inline(view, row) if room > 0 else None
        if image is not None:
            room -= len(image)
            of_row["image"] = image
            if "url" in of_row and not leads_somewhere(of_row["url"]):
                del of_row["url"]
    return known


def leads_somewhere(url: Any) -> bool:
    """Whether an address may be a public one, by its looks alone."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
    except (ValueError, TypeError, AttributeError):
        return False
    if parts.scheme not in ("http", "https") or is_loopback(host):
        return False
    try:
        return ip_address(host).is_global
    except ValueError:
        return "." in host and not any(host == name or host.endswith(f".{name}") for name in NOWHERE)


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """A file as an address that needs no server."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
