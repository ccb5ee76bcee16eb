"""Provenance: the record of how a picture was made, inside its PNG."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from clip_train.settings import UserError

MAX_PIXELS = 64e6  # of a picture whose record is read
CHUNK = "unclip"  # name of the PNG text chunk that holds the record


def save_png(picture: Image.Image, path: Path | str, provenance: dict[str, Any]) -> None:
    """Write a PNG with its record: as json under "unclip", and as the "parameters" line that picture viewers show."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, json.dumps(provenance, ensure_ascii=False))
    chunks.add_itxt("parameters", parameters(provenance))
    try:
        picture.save(path, "PNG", pnginfo=chunks)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_provenance(path: Path | str) -> dict[str, Any]:
    """The record inside a PNG. UserError if it is no PNG or has none."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            picture.load()  # the text may stand after the pixels
            record = json.loads(picture.info[CHUNK])
    except KeyError as error:
        raise UserError(f"{path} does not say how it was made: it has no {CHUNK!r} text chunk") from error
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a PNG with a record: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: its {CHUNK!r} text chunk is not an object")
    return record


def parameters(provenance: dict[str, Any]) -> str:
    """The record in the words that Stable Diffusion web UI made common: the prompt, then a line of settings."""
    how, size = provenance["sampling"], provenance["size"]
    settings = {
        "Steps": how["steps"],
        "Sampler": how["sampler"].capitalize(),
        "CFG scale": how["guidance"],
        "Seed": provenance["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": short(provenance["fingerprints"].get("decoder", "none")),
        "Version": f"unclip {provenance['version']}",
    }
    unwanted = f"Negative prompt: {how['negative']}\n" if how.get("negative") else ""
    line = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"{provenance.get('caption', '')}\n{unwanted}{line}"


def short(fingerprint: str) -> str:
    """The first ten digits of a fingerprint, as people are told it."""
    return fingerprint.removeprefix("sha256:")[:10]
