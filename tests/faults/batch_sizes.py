"""The same pictures and captions in batches of 1, 7 and 64: the same embeddings."""

import random
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image
from trainings import TOWERS, captions, clip

from clip_train.embed import embed, encode_texts
from clip_train.store import EmbeddingStore

SIZES = (1, 7, 64)
COUNT = 70  # pictures, and captions


def picture(rng: random.Random) -> Image.Image:
    """Of any size and shape: a few colours, with grain."""
    width, height = (int(2 ** rng.uniform(3, 8)) for _ in range(2))
    draw = np.random.default_rng(rng.randrange(1 << 30))
    small = Image.fromarray(draw.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)).astype(np.int64)
    return Image.fromarray((soft + draw.integers(-20, 21, soft.shape)).clip(0, 255).astype(np.uint8))


def errors(rng: random.Random, folder: Path) -> tuple[dict[str, float], str]:
    """Largest differences of a coordinate between the batch sizes, and what was embedded how."""
    tower, ready = rng.choice(list(TOWERS)), rng.random() < 0.5
    made = clip(rng, tower).eval().requires_grad_(False)
    made = made.for_inference("fp32") if ready else made
    pixels = torch.stack([made.to_pixels(picture(rng)) for _ in range(COUNT)])
    texts = captions(COUNT, rng)
    rows = {size: torch.cat([made.encode_image(some) for some in pixels.split(size)]) for size in SIZES}
    plain = {
        size: torch.cat([made.encode_text(texts[low : low + size]) for low in range(0, COUNT, size)]) for size in SIZES
    }
    sorted_ = {size: torch.from_numpy(encode_texts(made, texts, batch_size=size)) for size in SIZES}
    found = {"embeddings of pictures, by batch size": spread(rows)}
    found["embeddings of captions, by batch size"] = max(spread(plain), spread(sorted_ | {0: plain[1]}))
    if rng.random() < 0.25:
        found["rows that embed writes, by --batch-size"] = _written(folder)
    return found, f"{tower}{', for inference' * ready}"


def spread(rows: dict[int, torch.Tensor]) -> float:
    """The largest difference between any two of them."""
    every = torch.stack(list(rows.values()))
    return float((every.amax(0) - every.amin(0)).max())


def _written(folder: Path) -> float:
    """Of the rows in embeddings folders (float16), shards of 30 samples."""
    tiny.shards(folder / "shards", n=COUNT, per_shard=30)
    tiny.clip(folder / "clip")
    rows = {}
    for size in SIZES:
        embed(folder / "shards", folder / "clip", folder / f"emb{size}", batch_size=size, precision="fp32")
        store = EmbeddingStore.open(folder / f"emb{size}")
        rows[size] = torch.from_numpy(np.hstack([store.image(), store.text()]).astype(np.float32))
    return spread(rows)
