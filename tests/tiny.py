"""The smallest real things for tests: a random CLIP, pictures, shards, and embeddings folders."""

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_train.folder import Input, Manifest, Workspace
from clip_train.model import Clip, preprocess_config
from clip_train.sample import Sample
from clip_train.shards import write_shards
from clip_train.store import EmbeddingWriter


def clip(folder: Path, dim: int = 32, seed: int = 0) -> Path:
    """A CLIP folder with random weights: one layer, 16-pixel pictures."""
    folder.mkdir(parents=True)
    _random_clip(dim, seed).save(folder)
    return folder


@functools.cache
def _random_clip(dim: int, seed: int) -> Clip:
    torch.manual_seed(seed)
    config = {
        "embed_dim": dim,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    made = Clip(config, preprocess_config(16))
    with torch.no_grad():  # so that different pictures and captions lie well apart without training
        for weight in made.model.visual.transformer.parameters():
            weight.mul_(5)
        made.model.token_embedding.weight.mul_(20)
    return made


def picture(seed: int, size: int = 20) -> bytes:
    """A PNG file of four random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def samples(n: int, prefix: str = "s") -> list[Sample]:
    """n captioned pictures: two captions each, and json of several kinds."""
    return [
        Sample(
            key=f"{prefix}{i:03d}",
            image=picture(i),
            ext="png",
            captions=[f"picture number {i}", "one of many"],
            meta={"label": f"label {i // 2}", "width": 20, "height": 20, "source": {"name": "test", "page": i}},
        )
        for i in range(n)
    ]


def shards(folder: Path, n: int = 10, per_shard: int = 4) -> Path:
    write_shards(samples(n), folder, samples_per_shard=per_shard)
    return folder


def with_cls(folder: Path) -> Path:
    """A tar of five samples whose label "cls" is 7, 7 (in KEY.cls), 3 (there, and another in the json), a field of the
    json, and none at all."""
    folder.mkdir()
    metas = [b'{"label": "x"}', b"{}", b'{"cls": "other"}', b'{"cls": "in the json"}', b"{}"]
    classes = [b"7", b" 7\n", b"3", None, None]
    with tarfile.open(folder / "0.tar", "w") as tar:
        for n, (meta, cls) in enumerate(zip(metas, classes, strict=True)):
            parts = {"cls": cls, "json": meta, "png": picture(n), "txt": f"caption {n}".encode()}
            for suffix, data in parts.items():
                if data is not None:
                    member = tarfile.TarInfo(f"{n}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def unit_rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def store(folder: Path, image: np.ndarray, text: np.ndarray | None = None, parts: int = 1, first: int = 0) -> Manifest:
    """An embeddings folder of these rows, with two captions a row: text[i] and its mirror image.

    first: the number in the first row's key and captions."""
    text = image if text is None else text
    where = folder.parent
    inputs = {name: Input(f"sha256:{name}", where / name) for name in ("shards", "clip")}
    space = Workspace.open(folder, "embeddings", {}, inputs)
    writer = EmbeddingWriter(space.path, parts)
    for part, rows in enumerate(np.array_split(np.arange(len(image)), parts)):
        captions = np.repeat(text[rows], 2, axis=0)
        captions[1::2] *= -1
        metadata = [
            {"image_path": f"k{row:05d}", "caption": f"row {row}", "captions": [f"row {row}", f"not row {row}"]}
            for row in (rows + first).tolist()
        ]
        writer.write(part, image[rows], captions, np.repeat(np.arange(len(rows)), 2), metadata, {"rows": len(rows)})
    return space.publish({"rows": len(image), "shards": []})
