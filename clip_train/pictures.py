"""Picture files -> uint8 pixels -> batches whose order depends on nothing but the seed and the step.

Pixels are what open_clip's validation transform makes, before normalisation. A picture that cannot be decoded is left
out, counted and named. Small sets are decoded once and kept, large ones are decoded when they are wanted.
"""

import contextlib
import io
import itertools
import json
import math
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clip_train.arrays import new_array
from clip_train.folder import write_file
from clip_train.ranks import rank as own_rank
from clip_train.settings import Progress, UserError
from clip_train.shards import ShardSet

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: some of Pillow's readers start other programs
MAX_PIXELS = 64_000_000
THINNEST = 100  # a picture this many times longer than wide would need gigabytes when its short side is scaled up
CACHE_VERSION = 1


class PictureError(ValueError):
    """These bytes are no picture that can be used; the message says why in a few words."""


class _Quiet:
    """Silences warnings while any thread decodes. warnings.catch_warnings alone lets threads undo one another."""

    def __init__(self) -> None:
        self._lock, self._inside, self._catch = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._catch = warnings.catch_warnings()
                self._catch.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._catch.__exit__(None, None, None)


_quiet = _Quiet()


def decode_picture(data: bytes, max_pixels: float = MAX_PIXELS, least: int = 0) -> Image.Image:
    """The picture in a file's bytes as RGB: turned upright as its EXIF says, transparency put on white.

    least: a JPEG may come out at 1/2, 1/4 or 1/8 of its size, as long as both sides keep this many pixels; 0: never.

    PictureError if the bytes are damaged, of an unknown format, or of more than `max_pixels` pixels (none is decoded
    then). Of an animation, the first frame. Grey values of 16 bits are scaled to 8.
    """
    try:
        with _quiet, Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise PictureError(f"{width} x {height} is more than {max_pixels / 1e6:g} million pixels")
            if max(width, height) > THINNEST * min(width, height):
                raise PictureError(f"{width} x {height} pixels is too long and thin")
            if least:
                picture.draft("RGB", (least, least))
            picture.load()
            return _to_rgb(_upright(picture))
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"not a {', '.join(FORMATS)} picture") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"more than {max_pixels / 1e6:g} million pixels") from error
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from error


def pixel_count(data: bytes) -> int:
    """How many pixels the picture in a file's bytes has, by its header; 0 if decode_picture cannot read it."""
    try:
        with _quiet, Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # as above
        return 0


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture) if "exif" in picture.info else picture
    except Exception:  # a broken EXIF block: the picture itself is fine
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode == "F":
        raise PictureError("its pixels are floating-point numbers")
    return picture.convert("RGB")


def to_pixels(picture: Image.Image, size: int) -> torch.Tensor:
    """RGB picture -> uint8 (3, size, size): the short side scaled to `size` (bicubic), then the middle.

    Bit-equal to open_clip's validation transform (open_clip.transform.image_transform, is_train=False) before it
    divides by 255 and normalises, its roundings included.
    """
    scaled = _scaled(picture.size, size)
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = int(round((scaled[0] - size) / 2.0)), int(round((scaled[1] - size) / 2.0))
    array = np.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _scaled(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of a picture of this shape when its short side is scaled to `size`, as open_clip rounds them."""
    long_side = int(size * max(shape) / min(shape))
    return (size, long_side) if shape[0] <= shape[1] else (long_side, size)


def training_pixels(data: bytes, size: int) -> torch.Tensor:
    """A picture file's bytes -> uint8 (3, size, size): to_pixels(decode_picture(data), size), nearly, in less time.

    For training, where every picture is moved about at random anyway; evaluation and embedding keep to the exact one.
    JPEG and WebP files without transparency, rotation or animation are decoded by torchvision, bit-equal to Pillow and
    2 to 3 times as fast; a JPEG of at least twice the size wanted by Pillow at 1/2, 1/4 or 1/8 of its size; PNG files
    by Pillow (torchvision 0.29 crashes the process on a damaged PNG). Pixels are resized by torch's bicubic, 5 times as
    fast as Pillow's. Mean difference from the exact pixels, measured on drawings (benchmarks/loader.py): below 0.01
    grey levels, and 0.7 where a JPEG was scaled as it was decoded. PictureError as decode_picture.
    """
    kind, width, height = _plain_header(data)
    pixels = None
    if kind and width * height <= MAX_PIXELS and max(width, height) <= THINNEST * min(width, height):
        if kind == "webp" or min(width, height) < 2 * size:
            pixels = _decode_plain(data, kind)
    if pixels is None:  # also for all that is damaged: Pillow's reasons are the ones that are reported
        picture = decode_picture(data, least=size)
        factors = (2, 4, 8) if picture.size != (width, height) else ()
        factor = next((f for f in factors if picture.size == (-(-width // f), -(-height // f))), 1)
        if width % factor or height % factor:  # the last column or row stands for less than a whole one
            box = (0, 0, width / factor, height / factor)
            picture = picture.resize(_scaled((width, height), size), Image.Resampling.BICUBIC, box)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return _resized(pixels, size)


def pixels_of(data: bytes, size: int, fast: bool) -> torch.Tensor:
    """A picture file's bytes -> uint8 (3, size, size): training_pixels() if `fast`, else the exact ones."""
    return training_pixels(data, size) if fast else to_pixels(decode_picture(data), size)


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (3, H, W), stored row by row of RGB -> (3, size, size), with the geometry of to_pixels()."""
    height, width = pixels.shape[1:]
    scaled = _scaled((width, height), size)
    if scaled != (width, height):
        pixels = F.interpolate(pixels[None], scaled[::-1], mode="bicubic", antialias=True)[0]
    left, top = int(round((scaled[0] - size) / 2.0)), int(round((scaled[1] - size) / 2.0))
    return pixels[:, top : top + size, left : left + size]


def _decode_plain(data: bytes, kind: str) -> torch.Tensor | None:
    """uint8 (3, H, W) by torchvision; None if it cannot, whatever the reason."""
    from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

    try:
        bytes_ = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return (decode_jpeg if kind == "jpeg" else decode_webp)(bytes_, mode=ImageReadMode.RGB)
    except Exception:  # damaged, or this torchvision was built without the format
        return None


def _plain_header(data: bytes) -> tuple[str, int, int]:
    """("jpeg" or "webp", width, height) of a file that needs no more than decoding: no transparency, rotation, CMYK,
    more bits or frames. ("", 0, 0) of every other one.
    """
    if data[:2] == b"\xff\xd8":
        place = 2
        while place + 10 <= len(data) and data[place] == 0xFF:
            marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
            if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
                bits, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
                return ("jpeg", width, height) if bits == 8 and channels in (1, 3) and width and height else _NOT_PLAIN
            exif = marker == 0xE1 and data[place + 4 : place + 8] == b"Exif"
            if exif or not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
                break
            place += 2 + length
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        chunk = data[12:16]
        if chunk == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return "webp", width & 0x3FFF, height & 0x3FFF
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            if not bits >> 28 & 1:  # no transparency
                return "webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8X" and not data[20] & 0b0001_1010:  # transparency, EXIF, animation
            return "webp", int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return _NOT_PLAIN


_NOT_PLAIN = ("", 0, 0)


class Pictures:
    """The pictures of a ShardSet as pixels (3, size, size).

    rows: int64, the rows of the shards that can be used. bad: (key, reason) of pictures that cannot be decoded.
    A set of at most `cache_bytes` is decoded once, into a file in the folder `cache` (named by the shards' fingerprint
    and the size, so several may share a folder, and the next start finds it) or into memory if there is no folder. Of a
    larger set only a sample is looked at here; what turns out bad later is left out by load().
    """

    def __init__(
        self,
        shards: ShardSet,
        size: int,
        cache: Path | str | None = None,
        cache_bytes: float = 2e9,
        on_progress: Progress | None = None,
        fast: bool = False,
    ) -> None:
        """fast: training_pixels() instead of the exact ones. on_progress counts pictures.

        UserError if more than half cannot be decoded.
        """
        self.shards, self.size, self.fast = shards, size, fast
        self.bad_rows: list[tuple[int, str]] = []
        self.cached = math.prod(self._shape) <= cache_bytes
        self._usable = np.ones(len(shards), dtype=bool)
        if self.cached:
            self._array, bad = self._kept(Path(cache), on_progress) if cache else self._in_memory(on_progress)
            looked_at = len(shards)
        else:
            some = np.unique(np.linspace(0, len(shards) - 1, num=64).astype(np.int64))
            bad, looked_at = self._decode(some, lambda place, pixels: None, on_progress), len(some)
        for row, reason in bad:
            self.note_bad(row, reason)
        self.rows = np.flatnonzero(self._usable)
        if 2 * len(bad) > looked_at:
            first = "; ".join(f"{key}: {reason}" for key, reason in self.bad[:3])
            raise UserError(f"{len(bad)} of {looked_at} pictures cannot be decoded ({first}); make these shards again")

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, size, size) of these rows of the shards. PictureError if one of them cannot be decoded."""
        pixels, found = self.load(rows)
        if len(found) < len(rows):
            key, reason = next(b for b in self.bad if b[0] in {self.shards.keys[r] for r in rows if r not in found})
            raise PictureError(f"{key}: {reason}")
        return pixels

    def load(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """(pixels, rows) as pixels(rows), without those that cannot be decoded: they are noted in `bad`."""
        rows = np.asarray(rows, dtype=np.int64)
        if self.cached:
            rows = rows[self._usable[rows]]
            return torch.from_numpy(self._array[rows]), rows
        pixels = torch.empty((len(rows), *self._shape[1:]), dtype=torch.uint8)
        bad = self._decode(rows, lambda place, one: pixels[place].copy_(one))
        if not bad:
            return pixels, rows
        for row, reason in bad:
            self.note_bad(row, reason)
        good = ~np.isin(rows, [row for row, _ in bad])
        return pixels[torch.from_numpy(good)], rows[good]

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(key, reason) of the pictures that could not be decoded, as far as they were looked at."""
        return [(self.shards.keys[row], reason) for row, reason in self.bad_rows]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (len(self.shards), 3, self.size, self.size)

    def note_bad(self, row: int, reason: str) -> None:
        """Leave this row out from now on, and name it."""
        if self._usable[row]:
            self._usable[row] = False
            self.bad_rows.append((row, reason))

    def _in_memory(self, on_progress: Progress | None) -> tuple[np.ndarray, list[tuple[int, str]]]:
        array = np.zeros(self._shape, dtype=np.uint8)
        return array, self._decode(range(len(array)), lambda row, pixels: _put(array, row, pixels), on_progress)

    def _kept(self, folder: Path, on_progress: Progress | None) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """The cache file of these shards at this size, decoded if it is not there. NAME.json is written last: it says
        that NAME.npy is whole, and lists what was bad."""
        shards = self.shards.fingerprint.removeprefix("sha256:")[:16]
        name = f"pixels-{self.size}{'-fast' * self.fast}-v{CACHE_VERSION}-{shards}"
        file, notes = folder / f"{name}.npy", folder / f"{name}.json"
        try:
            array = np.load(file, mmap_mode="r")
            bad = [(int(row), str(reason)) for row, reason in json.loads(notes.read_bytes())["bad"]]
            if array.shape == self._shape:
                return array, bad
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or damaged: made anew
        temporary = folder / f".{name}.{own_rank()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            array = new_array(temporary, np.uint8, self._shape)
            bad = self._decode(range(len(array)), lambda row, pixels: _put(array, row, pixels), on_progress)
            array.flush()
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        write_file(notes, json.dumps({"bad": bad}).encode())
        return np.load(file, mmap_mode="r"), bad

    def _decode(
        self,
        rows: Sequence[int] | np.ndarray,
        put: Callable[[int, torch.Tensor], object],
        on_progress: Progress | None = None,
    ) -> list[tuple[int, str]]:
        """put(n, pixels) for the n-th of the rows if it can be decoded; (row, reason) of the others, in order."""

        def decode(places: range) -> list[tuple[int, str]]:
            bad = []
            for place in places:
                data = self.shards.picture(int(rows[place]))
                try:
                    put(place, pixels_of(data, self.size, self.fast))
                except PictureError as error:
                    bad.append((int(rows[place]), str(error)))
            return bad

        bad = []
        pieces = [range(low, min(low + 32, len(rows))) for low in range(0, len(rows), 32)]
        threads = torch.get_num_threads()  # 1 in a DataLoader's workers
        with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
            for places, found in zip(pieces, (pool.map if pool else map)(decode, pieces), strict=True):
                bad += found
                if on_progress:
                    on_progress(places.stop, len(rows), bad=len(bad))
        return bad


def _put(array: np.ndarray, row: int, pixels: torch.Tensor) -> None:
    array[row] = pixels.numpy()


class Batches:
    """An endless stream of batches. Called with a step, it gives the batches from that step on.

    Every epoch is a permutation of the usable rows, drawn from (seed, epoch); the epochs are joined to one sequence;
    step k takes the next batch_size * world items of it, rank r the r-th slice of them. So the batch of a step depends
    on nothing that happened before, and training resumes exactly. A batch may span two epochs.
    """

    def __init__(
        self, pictures: Pictures, batch_size: int, seed: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        """batch_size is one rank's. workers: processes that decode ahead, for pictures that are not cached."""
        self.pictures, self.batch_size, self.seed = pictures, batch_size, seed
        self.rank, self.world, self.workers = rank, world, workers
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yields {"pixels": uint8 (B, 3, S, S), "row": int64 (B,), the rows of the shards}, step after step."""
        return self.parts(self.places(step) for step in itertools.count(start_step))

    def parts(self, wanted: Iterator[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """Batches as above, one for each array of places (int64) in the endless order of training."""
        if not self.workers or self.pictures.cached:
            yield from map(self.at, wanted)
            return
        for batch, bad in made_ahead(_Parts(self), wanted, self.workers):
            for row, reason in bad:
                self.pictures.note_bad(row, reason)
            yield batch

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of one step."""
        return self.at(self.places(step))

    def places(self, step: int) -> np.ndarray:
        """int64 (B,): the places in the endless order of training that `step` takes on this rank."""
        start = (step * self.world + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def at(self, places: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of these places. A picture that turns out bad is replaced by the next one in the shards."""
        wanted = self._rows_at(places)
        pixels, rows = self.pictures.load(wanted)
        if len(rows) < len(wanted):
            whole, good = iter(pixels), set(rows.tolist())
            shown = [(row, next(whole)) if row in good else self._stand_in(row) for row in wanted.tolist()]
            rows, pixels = np.array([row for row, _ in shown]), torch.stack([one for _, one in shown])
        return {"pixels": pixels, "row": torch.from_numpy(rows)}

    def rows(self, step: int) -> np.ndarray:
        """int64 (B,): the rows of the shards that `step` asks for on this rank."""
        return self._rows_at(self.places(step))

    def _rows_at(self, places: np.ndarray) -> np.ndarray:
        if not len(places):
            return np.empty(0, dtype=np.int64)
        epochs, places = np.divmod(places, len(self.pictures))
        return np.concatenate([self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}  # keep no more than two
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.pictures.rows)
        return self._orders[epoch]

    def _stand_in(self, row: int) -> tuple[int, torch.Tensor]:
        """The first row after `row`, round to the beginning, that can be decoded, and its pixels."""
        rows = self.pictures.rows
        place = int(np.searchsorted(rows, row))
        for further in range(1, len(rows)):
            other = int(rows[(place + further) % len(rows)])
            pixels, found = self.pictures.load([other])
            if len(found):
                return other, pixels[0]
        raise UserError("no picture can be decoded any more; make these shards again")


class _Parts(torch.utils.data.Dataset):
    """Batches as DataLoader wants them: item `places` is their batch, and what this worker found bad on the way."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, places: np.ndarray) -> tuple[dict[str, torch.Tensor], list[tuple[int, str]]]:
        known = len(self.batches.pictures.bad_rows)
        batch = self.batches.at(places)
        return batch, self.batches.pictures.bad_rows[known:]


def made_ahead(items: torch.utils.data.Dataset, wanted: Iterable[Any], workers: int) -> Iterator[Any]:
    """The wanted items, in order, made ahead by `workers` processes (0: when they are asked for).

    A UserError keeps its own words: torch would put the worker's whole traceback into them.
    """
    loader = torch.utils.data.DataLoader(
        _Tried(items), batch_size=None, sampler=wanted, num_workers=workers, collate_fn=_as_it_is
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


class _Tried(torch.utils.data.Dataset):
    """The items of another, or the UserError that came in the place of one."""

    def __init__(self, items: torch.utils.data.Dataset) -> None:
        self.items = items

    def __getitem__(self, n: Any) -> Any:
        try:
            return self.items[n]
        except UserError as error:
            return error


def _as_it_is(item: object) -> object:
    return item
