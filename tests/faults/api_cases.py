"""Requests made from a server's OpenAPI description: some as it asks for, some wrong in one place or many."""

import base64
import io
import json
import random
import zlib
from typing import Any

from PIL import Image

WORDS = (
    "a red fox",
    "picture number 3",
    "s003",
    "tiny",
    "",
    " ",
    "\0",
    "🦊",
    "\u202e",
    "../../etc/passwd",
    "a" * 9_000,
)
WORDS += (
    "width > 1",
    "label == 'x'",
    "__import__('os')",
    "<script>alert(1)</script>",
    "http://127.0.0.1/",
    "NaN",
    "-1",
)
NUMBERS = (0, 1, 2, -1, 7, 0.5, 1e308, -1e-308, 2**31, 2**63, 10**90, 1000)


def value(schema: dict[str, Any], rng: random.Random, wrong: float) -> Any:
    """A value that the schema allows, or with the probability `wrong` another, in each place of it."""
    if rng.random() < wrong:
        other = [None, True, [], {}, rng.choice(WORDS), rng.choice(NUMBERS), [[]] * 3, {"a": {"b": []}}, "\ud800"]
        return rng.choice(other)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return value(rng.choice(schema["anyOf"]), rng, wrong)
    kind = schema.get("type", "null")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        needed = schema.get("required", ())
        fields = {n: s for n, s in schema.get("properties", {}).items() if n in needed or rng.random() < 0.4}
        return {name: value(one, rng, wrong) for name, one in fields.items()}
    if kind == "array":
        length = rng.choice((schema.get("minItems", 0), 1, 2, 32))
        return [value(schema["items"], rng, wrong) for _ in range(min(length, schema.get("maxItems", 32)))]
    if kind == "string":
        pictured = "base64" in schema.get("description", "")
        return base64.b64encode(picture(rng)).decode() if pictured and rng.random() < 0.7 else rng.choice(WORDS)
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -3), min(schema.get("maximum", 12), 12)
        return rng.randint(low, high) if kind == "integer" else rng.uniform(low, high)
    return rng.random() < 0.5 if kind == "boolean" else None


def request(description: dict[str, Any], rng: random.Random) -> tuple[str, str, bytes, str]:
    """(method, path with query, body, content type) of one request."""
    path = rng.choice(sorted(description["paths"]))
    method = rng.choice(sorted(description["paths"][path]))
    about, wrong = description["paths"][path][method], rng.choice((0.0, 0.0, 0.1, 0.5))
    query = []
    for one in about.get("parameters", ()):
        text = str(value(one["schema"], rng, wrong)).encode("utf-8", "replace")
        quoted = "".join(f"%{byte:02x}" for byte in text[:300])
        if one["in"] == "path":
            path = path.replace("{" + one["name"] + "}", quoted or "%20")
        elif rng.random() < 0.5:
            query.append(f"{one['name']}={quoted}")
    target = path + ("?" + "&".join(query) if query else "")
    if "requestBody" not in about:
        return method.upper(), target, b"", ""
    ((kind, asked),) = about["requestBody"]["content"].items()
    fields = value(asked["schema"], rng, wrong)
    if kind == "multipart/form-data":
        return method.upper(), target, form(fields if isinstance(fields, dict) else {}, rng), f"{kind}; boundary=part"
    return method.upper(), target, json.dumps(fields).encode(), rng.choice((kind, "text/plain", "", "image/png"))


def form(fields: dict[str, Any], rng: random.Random) -> bytes:
    """A multipart form; `image` is a file."""
    parts = []
    for name, one in fields.items():
        named = f'form-data; name="{name}"' + ('; filename="../../x.png"' if name == "image" else "")
        data = picture(rng) if name == "image" else str(one).encode("utf-8", "replace")
        parts.append(f"--part\r\nContent-Disposition: {named}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + b"--part--\r\n"


def picture(rng: random.Random) -> bytes:
    """A small picture, whole or damaged."""
    file = io.BytesIO()
    size = (rng.randint(1, 40), rng.randint(1, 40))
    Image.new("RGB", size, rng.choice(("red", "blue"))).save(file, rng.choice(("PNG", "JPEG", "WEBP")))
    data = file.getvalue()
    return data if rng.random() < 0.7 else data[: rng.randint(0, len(data))]


def bomb(rng: random.Random) -> bytes:
    """A file of a few kB that says it is a picture of billions of pixels, or holds much more than it shows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    wide, high = rng.choice(((60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (6000, 6000), (100_000, 100_000)))
    head = chunk(
        b"IHDR", wide.to_bytes(4, "big") + high.to_bytes(4, "big") + bytes([8, rng.choice((0, 2, 6)), 0, 0, 0])
    )
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30_000_000), 9))
    png = b"\x89PNG\r\n\x1a\n" + head + rng.choice((b"", text)) + chunk(b"IDAT", zlib.compress(bytes(5_000_000), 9))
    gif = b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    bmp = b"BM" + bytes(12) + (40).to_bytes(4, "little") + (50_000).to_bytes(4, "little") * 2 + bytes(28)
    return rng.choice((png, png + chunk(b"IEND", b""), gif, bmp))
