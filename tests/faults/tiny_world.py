"""A folder of every kind that unclip makes, as small as they get, made once by the commands themselves."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tiny
from PIL import Image
from trial import run_command

CLIP = [
    'vision={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}', "image_size=16", "text_width=32",
    "text_heads=2", "text_layers=1", "context_length=16", "embed_dim=32",
]  # fmt: skip
PRIOR = ["width=32", "depth=1", "heads=2"]
DECODER = ["image_size=8", "widths=[16, 32]", "blocks=[1, 1]", "attention=[2]", "head_width=16", "cond_width=32"]
UPSAMPLER = ["factor=2", "crop=16", "widths=[16]", "blocks=[1]", "cond_width=16"]


def sets(pairs: list[str]) -> list[str]:
    return [word for pair in [*pairs, "precision=fp32"] for word in ("--set", pair)]


@functools.cache
def world() -> Path:
    """A folder of each kind, and some files: captions.txt, table.csv, rows.npy, fox.png, mask.png, made.png."""
    place = tempfile.TemporaryDirectory(prefix="tiny-world-")
    world.place = place  # removed when the process ends
    root = Path(place.name)
    tiny.shards(root / "shards", 44, 15)
    tiny.shards(root / "others", 8)
    (root / "fox.png").write_bytes(tiny.picture(7))
    Image.linear_gradient("L").resize((20, 20)).point(lambda grey: 255 * (grey > 99)).save(root / "mask.png")
    (root / "captions.txt").write_text("one of many\npicture number 1\n")
    (root / "table.csv").write_text("image,caption\nfox.png,a fox\n")
    np.save(root / "rows.npy", tiny.unit_rows(2, 32))
    quick = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    made = [root / name for name in ("shards", "clip", "emb", "index", "prior", "decoder")]
    shards, clip, emb, index, prior, decoder = map(str, made)
    draw = ["train", "decoder", "--shards", shards, "--clip", clip]
    upsampler = ["train", "upsampler", "--shards", shards, "--clip", clip, "--out", f"{root}/upsampler"]
    for words in (
        ["train", "clip", "--shards", shards, "--out", clip, *quick, *sets(CLIP)],
        ["embed", "--shards", shards, "--clip", clip, "--out", emb, "--device", "cpu"],
        ["index", "--embeddings", emb, "--out", index],
        ["train", "prior", "--embeddings", emb, "--out", prior, *quick, *sets(PRIOR)],
        [*draw, "--out", decoder, *quick, *sets([*DECODER, "ema_snapshots=2"])],
        [*upsampler, *quick, *sets(UPSAMPLER)],
        ["cluster", "--index", index, "--out", str(root / "clusters"), "--no-sheets"],
        ["generate", "a fox", "--prior", prior, "--decoder", decoder, "--set", "steps=2", "--out", f"{root}/made.png"],
    ):
        ended = run_command(words)
        assert ended.code == 0, (words, ended.err)
    return root


def copy_of(names: list[str], folder: Path) -> Path:
    """Some of the world's folders and files in another folder; a file is replaced there, never changed in place."""
    for name in names:
        source = world() / name
        if source.is_dir():
            shutil.copytree(source, folder / name, copy_function=os.link)
        else:
            shutil.copyfile(source, folder / name)
    return folder


def put(path: Path, data: bytes) -> None:
    """Other contents for a file that may be a link to the world's own."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
