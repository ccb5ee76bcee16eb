"""OpenAI's HTTP API, as far as a CLIP and a generator go, so that its clients work with another base_url.

POST /v1/embeddings           captions (or pictures as data: addresses) -> unit rows; the model is an index's name
GET  /v1/models               the indexes whose CLIP is here, and the generator
POST /v1/images/generations   a prompt -> pictures
POST /v1/images/variations    a picture -> others that mean the same
POST /v1/images/edits         a picture and a prompt -> the picture changed towards the prompt
"""

import base64
import re
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request, Response

from retrieval.asked import Asked, Refused, picture_bytes
from retrieval.clip_api import answer, data_url
from retrieval.door import unless_gone
from retrieval.encoder import Encoder
from retrieval.studio import NO_PROMPTS, Studio, files

if TYPE_CHECKING:
    from retrieval.hall import Hall

MOST_INPUTS = 2048  # of one embeddings request, as OpenAI has it
GENERATOR = "unclip"  # its name among the models
MAX_SEED = 2**31 - 1
SIZE = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"  # WIDTHxHEIGHT


def router(hall: "Hall") -> APIRouter:
    """The routes; those of pictures only if there is a generator."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> Response:
        names = [name for name, served in hall.indexes.items() if served.has_encoder]
        names += [GENERATOR] * (hall.studio is not None)
        data = [{"id": name, "object": "model", "created": hall.started, "owned_by": "unclip"} for name in names]
        return answer({"object": "list", "data": data})

    @routes.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = await Asked.read(request, hall.in_thread, pictures=True)
        served = hall.index(asked.get("model", str), "model")
        wanted = asked.choice("encoding_format", "float", "base64")
        inputs = _inputs(asked)
        if asked.get("dimensions", int, served.dim) != served.dim:
            raise Refused(400, f"dimensions can only be {served.dim} with this model")
        rows = await _encoded(inputs, served.encoder, hall)
        tokens = await hall.in_thread(lambda: served.encoder.tokens([one for one in inputs if not _is_picture(one)]))
        return await hall.in_thread(lambda: answer(_embeddings(rows, wanted, served.name, tokens)))

    if hall.studio is None:
        return routes
    studio = hall.studio

    @routes.post("/images/generations")
    async def generations(request: Request) -> Response:
        asked = await Asked.read(request, hall.in_thread)
        prompt = _prompt(asked)
        if not studio.draws_prompts:
            raise Refused(400, NO_PROMPTS)
        return await _drawn(asked, studio, hall, request, lambda n, seed: studio.from_caption(prompt, n, seed))

    @routes.post("/images/variations")
    async def variations(request: Request) -> Response:
        asked, picture = await _form(request)
        row = await hall.drawing_encoder.picture(picture)
        return await _drawn(asked, studio, hall, request, lambda n, seed: studio.vary(row, n, seed))

    @routes.post("/images/edits")
    async def edits(request: Request) -> Response:
        asked, picture = await _form(request)
        if "mask" in asked.fields:
            raise Refused(400, "a mask is not understood yet: without one, the whole picture follows the prompt")
        prompt = _prompt(asked)
        row = await hall.drawing_encoder.picture(picture)
        return await _drawn(asked, studio, hall, request, lambda n, seed: studio.edit(row, prompt, n, seed))

    return routes


def _inputs(asked: Asked) -> list[str]:
    given = asked.fields.get("input")
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not inputs:
        raise Refused(400, "input must be a text or a list of texts")
    if len(inputs) > MOST_INPUTS:
        raise Refused(400, f"input holds {len(inputs)} texts; {MOST_INPUTS} are the most")
    if not all(isinstance(one, str) for one in inputs):
        raise Refused(400, "input must hold texts; tokens of another model mean nothing to this one")
    return [Asked({"input": one}).text("input", 10**9 if _is_picture(one) else 100_000) or "" for one in inputs]


def _is_picture(text: str) -> bool:
    return text.startswith("data:image/")


async def _encoded(inputs: list[str], encoder: Encoder, hall: "Hall") -> np.ndarray:
    """(N, D), row i of inputs[i]."""
    texts = [place for place, one in enumerate(inputs) if not _is_picture(one)]
    rows = np.empty((len(inputs), encoder.dim), dtype=np.float32)
    if texts:
        rows[texts] = await encoder.text([inputs[place] for place in texts])
    for place in sorted(set(range(len(inputs))) - set(texts)):
        data = await hall.in_thread(lambda place=place: picture_bytes(inputs[place], "input"))
        rows[place] = await encoder.picture(data)
    return rows


def _embeddings(rows: np.ndarray, wanted: str, model: str, tokens: int) -> dict[str, Any]:
    packed = wanted == "base64"  # little-endian float32, as the openai package asks for
    values = [base64.b64encode(row.astype("<f4").tobytes()).decode() if packed else row.tolist() for row in rows]
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _prompt(asked: Asked) -> str:
    prompt = asked.text("prompt")
    if prompt is None:
        raise Refused(400, "prompt is missing or empty")
    return prompt


async def _form(request: Request) -> tuple[Asked, bytes]:
    """The fields of a multipart form and its picture."""
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "the body must be multipart/form-data with a file named image")
    try:
        async with request.form(max_files=4, max_fields=32) as form:
            fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value}
            uploads = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
            pictures = [await value.read() for name, value in uploads if name in ("image", "image[]")]
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from error
    except UnicodeError as error:  # its charset is one of Python's that read nothing
        raise Refused(400, "the form cannot be read: it is not text of the charset that it names") from error
    if len(pictures) > 1:
        raise Refused(400, f"the form has {len(pictures)} pictures; one is worked on at a time")
    if not any(pictures):
        raise Refused(400, "the form has no file named image")
    if "mask" in dict(uploads):
        fields["mask"] = "given"
    return Asked(fields), pictures[0]


async def _drawn(asked: Asked, studio: Studio, hall: "Hall", request: Request, draw: Callable) -> Response:
    """The answer of all three routes. draw(n, seed) -> pictures, in the generator's thread."""
    count = asked.number("n", 1, 1, hall.config.max_count)
    seed = asked.number("seed", secrets.randbelow(MAX_SEED), 0, MAX_SEED)
    wanted = asked.choice("response_format", "", "b64_json", "url")
    asked_size = asked.get("size", str, "auto")
    if asked_size != "auto" and not re.fullmatch(SIZE, asked_size):
        raise Refused(400, f"size {asked_size[:40]!r} must be auto or WIDTHxHEIGHT")
    pictures = await unless_gone(request.receive, studio.draw(lambda: files(draw(count, seed)), count))
    data = []
    for file in pictures:
        entry = {} if wanted == "url" else {"b64_json": base64.b64encode(file).decode()}
        data.append(entry if wanted == "b64_json" else {**entry, "url": data_url(file)})
    size = f"{studio.size}x{studio.size}"
    return answer({"created": int(time.time()), "data": data, "size": size, "output_format": "png"})
