"""Picture files of every format and kind, broken and whole: decoded, decoded for training, packed, embedded."""

import contextlib
import csv
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiny
from outcome import Outcome, Tally
from PIL import Image
from trial import Case, bounded, commanded, tried_all

from clip_train.pictures import PictureError, decode_picture, training_pixels
from clip_train.sample import Sample
from clip_train.shards import ShardSet, write_shards

MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]
KEPT = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


def drawn(rng: random.Random, mode: str = "RGB", size: tuple[int, int] = (23, 17)) -> Image.Image:
    made = Image.fromarray(np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*size[::-1], 3), np.uint8))
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(made.convert("L"))
        return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 257)
    if mode in ("RGBa", "La", "PA"):
        made = made.convert({"RGBa": "RGBA", "La": "LA", "PA": "P"}[mode])
    if mode == "LAB":
        return Image.merge("LAB", made.split())
    return made.convert(mode)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    """The picture's file; a black one where the format cannot hold its mode, b"" where it cannot be written here."""
    for one in (picture, Image.frombytes("RGB", picture.size, bytes(3 * picture.width * picture.height))):
        file = io.BytesIO()
        with contextlib.suppress(Exception):
            one.save(file, kind, **options)
            return file.getvalue()
    return b""


def every_format(rng: random.Random) -> bytes:
    Image.init()
    return saved(drawn(rng, rng.choice(MODES)), rng.choice(sorted(Image.SAVE)))


def every_mode(rng: random.Random) -> bytes:
    return saved(drawn(rng, rng.choice(MODES)), rng.choice(["PNG", "TIFF", "WEBP", "JPEG", "GIF"]))


def cut(rng: random.Random) -> bytes:
    data = saved(drawn(rng), rng.choice(KEPT))
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random) -> bytes:
    data = bytearray(saved(drawn(rng, rng.choice(["RGB", "L", "P", "RGBA"])), rng.choice(KEPT)))
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(min(len(data), rng.choice([40, 200, len(data)])))
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def rotated(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.choice([*range(10), 255])
    exif[0x010E] = rng.choice(["words", "x" * 5000, ""])
    data = bytearray(exif.tobytes())
    if rng.random() < 0.6:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    data = bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    return saved(drawn(rng), rng.choice(["JPEG", "PNG", "WEBP", "TIFF"]), exif=data)


def animated(rng: random.Random) -> bytes:
    frames = [drawn(rng, rng.choice(["RGB", "RGBA", "P"])) for _ in range(rng.randrange(2, 6))]
    kind = rng.choice(["GIF", "PNG", "WEBP", "TIFF"])
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    return data[: rng.choice([len(data), rng.randrange(len(data))])]


def shapes(rng: random.Random) -> bytes:
    size = rng.choice([(1, 1), (1, 2), (1, 60_000), (60_000, 1), (1, 100), (101, 1), (2, 199), (3000, 31), (1, 7)])
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
    return saved(drawn(rng, "RGB", size), kind)


def bombs(rng: random.Random) -> bytes:
    """A small file that declares a huge picture."""
    width, height = rng.choice(
        [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (0, 0), (65_535, 65_535), (9000, 8000), (0, 9)]
    )
    kind = rng.choice(["PNG", "GIF", "BMP", "JPEG", "WEBP", "TIFF"])
    data = bytearray(saved(drawn(rng), kind))
    if kind == "PNG":
        head = struct.pack(">II", width, height) + bytes([rng.choice([1, 8, 16]), rng.choice([0, 2, 3, 6]), 0, 0, 0])
        body = zlib.compress(bytes(10_000_000)) if rng.random() < 0.3 else b""

        def chunk(name: bytes, inside: bytes) -> bytes:
            return struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", zlib.crc32(name + inside))

        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif kind == "BMP":
        data[18:26] = struct.pack("<II", width, height)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif kind == "WEBP":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    else:
        data = bytearray(data.replace(struct.pack("<HHI", 256, 4, 1) + struct.pack("<I", 23), b"\0\1\4\0" + b"\1\0\0\0"
                         + struct.pack("<I", width)))  # fmt: skip
    return bytes(data)


def nothing(rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"\0", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"\x89PNG\r\n\x1a\n", b"<svg></svg>", b"%PDF-1.4",
         b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"MZ\x90", b"<html>not found</html>", rng.randbytes(900),
         b"BM" + rng.randbytes(80), b"II*\0" + rng.randbytes(300), b"MM\0*" + rng.randbytes(300),
         b"P6 3 3 255 " + b"x" * 27, b"GIF89a" + rng.randbytes(500),
         b"RIFF" + struct.pack("<I", 900) + b"WEBPVP8X" + rng.randbytes(300)]
    )  # fmt: skip


def palettes(rng: random.Random) -> bytes:
    picture = drawn(rng, rng.choice(["P", "P", "1", "L", "RGB"]))
    colour = rng.choice([0, 7, 255, bytes(range(256)), b"\0", bytes(20), (1, 2, 3), 70_000])
    return saved(picture, rng.choice(["PNG", "GIF"]), transparency=colour)


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "formats that Pillow writes": every_format,
    "CMYK, 16-bit, 1-bit, LA, ...": every_mode,
    "truncated": cut,
    "bit flips": flipped,
    "EXIF rotations, broken EXIF": rotated,
    "animated": animated,
    "1x1, 1x60000": shapes,
    "bombs": bombs,
    "no pictures at all": nothing,
    "palettes with transparency": palettes,
}
READERS = ("decode", "decode", "train", "pack", "embed")


def case(seed: int, n: int) -> Case:
    rng = random.Random(f"pictures {seed} {n}")
    kind = list(KINDS)[n % len(KINDS)]
    data, reader = KINDS[kind](rng), READERS[n // len(KINDS) % len(READERS)]
    how = {"decode": by_decoding, "train": by_training, "pack": by_pack, "embed": by_embedding}[reader]
    return Case(kind, f"{kind}, {reader}", lambda folder: how(folder, data))


def by_decoding(folder: Path, data: bytes) -> Outcome:
    def work() -> str:
        picture = decode_picture(data)
        low, high = np.asarray(picture).min(), np.asarray(picture).max()
        return "" if picture.mode == "RGB" and 0 <= low <= high else f"made {picture}"

    return bounded(work, PictureError)


def by_training(folder: Path, data: bytes) -> Outcome:
    """The pixels of training; a file is a picture here if, and only if, it is one when it is embedded."""

    def work() -> str:
        try:
            pixels = training_pixels(data, 16)
        finally:
            with contextlib.suppress(PictureError):
                decode_picture(data)
        return "" if tuple(pixels.shape) == (3, 16, 16) else f"made {tuple(pixels.shape)}"

    return bounded(work, PictureError)


def by_pack(folder: Path, data: bytes) -> Outcome:
    """Packed with a good one beside it: in the shard, and to be read again, or in rejected.csv."""
    (folder / "in").mkdir()
    for name, file in (("bad.png", data), ("good.png", tiny.picture(0))):
        (folder / "in" / name).write_bytes(file)
        (folder / "in" / name).with_suffix(".txt").write_text("a caption")

    def wrong(ended) -> Outcome | str:
        samples = ShardSet(folder / "out")
        rejected = list(csv.reader((folder / "out" / "rejected.csv").read_text().splitlines()))[1:]
        for i in range(len(samples)):
            decode_picture(samples.picture(i))
            if not {"width", "height"} <= samples.read(i).meta.keys():
                return "width and height are missing"
        if len(samples) + len(rejected) != 2:
            return Outcome("silence", f"{len(samples)} samples and {len(rejected)} rejected of 2")
        return Outcome("skipped") if rejected else ""

    resize = ["--resize", "8"] if len(data) % 2 else []
    return commanded(["shard", str(folder / "in"), "--out", str(folder / "out"), "--threads", "1", *resize], wrong)


def by_embedding(folder: Path, data: bytes) -> Outcome:
    samples = tiny.samples(3)
    bad = [Sample(key="bad", image=data, ext="png", captions=["words"], meta={"width": 1, "height": 1})]
    write_shards(samples[:1] + bad + samples[1:], folder / "shards")
    clip = tiny.clip(folder / "clip")

    def wrong(ended) -> Outcome | str:
        result = json.loads((folder / "emb" / "manifest.json").read_text())["result"]
        rows = pq.read_table(folder / "emb" / "metadata").num_rows
        if rows + result["bad"] != 4:
            return Outcome("silence", f"{rows} rows, {result}")
        return Outcome("skipped") if rows < 4 else ""

    return commanded(["embed", "--shards", str(folder / "shards"), "--clip", str(clip), "--out", str(folder / "emb"),
                      "--device", "cpu"], wrong)  # fmt: skip


def run(numbers, seed: int, folder: Path, tell: Callable) -> Tally:
    return tried_all(case, numbers, seed, folder, tell)
