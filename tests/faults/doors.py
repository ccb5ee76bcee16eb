"""One picture through every door, whatever its file is like: the same vector, and itself as the best hit.

The doors: the CLIP itself, `unclip shard` and `unclip embed`, `unclip search --image`, image:FILE in a query, its bytes
in Python, and the server's /v1/embeddings, /knn-service and /api/search. The page uploads to /api/search.
"""

import base64
import functools
import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import tiny
import torch
from batch_sizes import picture
from PIL import Image, ImageOps
from trial import run_command

from clip_train.model import Clip
from clip_train.pictures import decode_picture
from clip_train.store import EmbeddingStore
from retrieval.query import Term, questions
from retrieval.search import Searcher
from retrieval.server import ServeConfig, create_app

COUNT = 6  # pictures
HERE = "http://127.0.0.1"


def file(rng: random.Random) -> tuple[bytes, str, str]:
    """A picture's file, its suffix, and what is special about it."""
    made, out = picture(rng), io.BytesIO()
    how = rng.choice(list(KINDS))
    suffix, mode, options = KINDS[how]
    if mode in ("RGBA", "LA", "PA"):
        alpha = Image.linear_gradient("L").resize(made.size)
        made = made.convert("L" if mode == "LA" else "RGB")
        made.putalpha(alpha)
    elif mode == "P, see-through":
        made = made.quantize(16)
        options = {**options, "transparency": 3}
    else:
        made = made.convert(mode)
    if "turned" in how:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(2, 9)
        options = {**options, "exif": exif.tobytes()}
    made.save(out, **options)
    return out.getvalue(), suffix, f"{how} {made.width} x {made.height}"


KINDS = {  # suffix, mode, how it is saved
    "JPEG": ("jpg", "RGB", {"format": "JPEG", "quality": 90}),
    "progressive JPEG": ("jpg", "RGB", {"format": "JPEG", "progressive": True}),
    "turned JPEG": ("jpg", "RGB", {"format": "JPEG"}),
    "grey JPEG": ("jpg", "L", {"format": "JPEG"}),
    "CMYK JPEG": ("jpg", "CMYK", {"format": "JPEG"}),
    "PNG": ("png", "RGB", {"format": "PNG"}),
    "turned PNG": ("png", "RGB", {"format": "PNG"}),
    "PNG with transparency": ("png", "RGBA", {"format": "PNG"}),
    "grey PNG with transparency": ("png", "LA", {"format": "PNG"}),
    "PNG with a palette": ("png", "P", {"format": "PNG"}),
    "PNG with a see-through colour": ("png", "P, see-through", {"format": "PNG"}),
    "black and white PNG": ("png", "1", {"format": "PNG"}),
    "WebP": ("webp", "RGB", {"format": "WEBP"}),
    "lossless WebP": ("webp", "RGB", {"format": "WEBP", "lossless": True}),
    "turned WebP": ("webp", "RGB", {"format": "WEBP"}),
    "WebP with transparency": ("webp", "RGBA", {"format": "WEBP", "lossless": True}),
    "GIF": ("gif", "P", {"format": "GIF"}),
    "BMP": ("bmp", "RGB", {"format": "BMP"}),
    "TIFF": ("tiff", "RGB", {"format": "TIFF", "compression": "tiff_lzw"}),
}


@functools.cache
def world() -> tuple[Path, torch.nn.Module, object]:
    """A CLIP folder, and what open_clip itself makes of it: model and preprocessing."""
    import open_clip

    place = tempfile.TemporaryDirectory(prefix="doors-")
    world.place = place  # removed when the process ends
    folder = tiny.clip(Path(place.name) / "clip")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return folder, model.eval(), preprocess


def truth(data: bytes) -> np.ndarray:
    """(D,) by Pillow and open_clip: upright, on white."""
    _, model, preprocess = world()
    made = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if made.mode in ("RGBA", "LA") or "transparency" in made.info:
        made = made.convert("RGBA")
        made = Image.alpha_composite(Image.new("RGBA", made.size, "white"), made)
    with torch.no_grad():
        return model.encode_image(preprocess(made.convert("RGB"))[None], normalize=True)[0].numpy()


def errors(rng: random.Random, folder: Path) -> tuple[dict[str, float], str]:
    """Largest differences of a coordinate from the truth, and of scores from the products of the vectors; 9 where a
    picture does not find itself first."""
    from starlette.testclient import TestClient

    clip_folder = world()[0]
    (folder / "in").mkdir()
    files = {}
    for n in range(COUNT):
        data, suffix, what = file(rng)
        path = folder / "in" / f"{n}.{suffix}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"picture {n}")
        files[path] = (data, truth(data), what)
    what = "; ".join(what for _, _, what in files.values())
    place = {name: str(folder / name) for name in ("in", "shards", "emb", "index")}
    for words in (
        ["shard", place["in"], "--out", place["shards"], "--per-shard", "4"],
        ["embed", "--shards", place["shards"], "--clip", str(clip_folder), "--out", place["emb"], "--device", "cpu",
         "--precision", "fp32"],
        ["index", "--embeddings", place["emb"], "--out", place["index"], "--kind", "flat"],
    ):  # fmt: skip
        ended = run_command(words)
        if ended.code:
            raise AssertionError(f"{words}: {ended.err[-300:]}")
    store, clip, searcher = EmbeddingStore.open(place["emb"]), Clip.load(clip_folder), Searcher.open(place["index"])
    if len(store) != COUNT:
        raise AssertionError(f"{len(store)} of {COUNT} pictures were embedded")
    order = {store.metadata["source"][row].rpartition("/")[2]: row for row in range(COUNT)}
    found: dict[str, float] = {}

    def note(door: str, *differences: float) -> None:
        found[door] = max(found.get(door, 0.0), *map(float, differences))

    config = ServeConfig(precision="fp32")
    with TestClient(create_app({"tiny": searcher}, config=config), base_url=HERE) as client:
        for path, (data, wanted, _) in files.items():
            row, key = order[path.name], store.keys[order[path.name]]
            vectors = {
                "clip": clip.encode_image(clip.to_pixels(decode_picture(data))[None]).numpy()[0],
                "search of a file": searcher.encode([Term("image", path)]),
                "search of bytes": searcher.encode([Term("image", data)]),
                "image:FILE in a query": searcher.encode(questions([f'image:"{path}"'])[0][1]),
                "/v1/embeddings": _embedding(client, data),
            }
            for vector in vectors.values():
                note("one picture, every door: vectors", np.abs(vector - wanted).max())
            note("one picture, every door: rows that embed wrote", np.abs(store.image([row])[0] - wanted).max())
            scores = store.image() @ wanted
            for best, score in (_asked(client, data, store.keys), _page(client, data), _command(path, place["index"])):
                alike = np.isclose(scores[store.keys.index(best)], scores.max(), atol=2e-4)
                note("one picture, every door: scores", abs(score - scores[store.keys.index(best)]))
                note("one picture, every door: not itself first", 0.0 if best == key or alike else 9.0)
    return found, what


def _in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _embedding(client: object, data: bytes) -> np.ndarray:
    asked = {"model": "tiny", "input": f"data:image/png;base64,{_in_base64(data)}"}
    return np.array(client.post("/v1/embeddings", json=asked).json()["data"][0]["embedding"])


def _asked(client: object, data: bytes, keys: list[str]) -> tuple[str, float]:
    asked = {"image": _in_base64(data), "num_images": 1, "indice_name": "tiny", "modality": "image"}
    (hit,) = client.post("/knn-service", json=asked).json()
    return keys[hit["id"]], hit["similarity"]


def _page(client: object, data: bytes) -> tuple[str, float]:
    terms = [{"kind": "image", "value": _in_base64(data)}]
    hit = client.post("/api/search", json={"terms": terms, "k": 1}).json()["hits"][0]
    return hit["key"], hit["score"]


def _command(path: Path, index: str) -> tuple[str, float]:
    ended = run_command(["search", "--image", str(path), "--index", index, "-k", "1", "--json", "--device", "cpu"])
    said = json.loads(ended.out)
    hit = said[0]["hits"][0] if "hits" in said[0] else said[0]
    return hit["key"], hit["score"]
