"""Picture files -> uint8 pixels -> batches whose order depends on nothing but the seed and the step.

Pixels are what open_clip's validation transform makes, before normalisation. A picture that cannot be decoded is left
out, counted and named. Small sets are decoded once and kept, large ones are decoded when they are wanted.
"""

import io
import itertools
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

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


def decode_picture(data: bytes, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """The picture in a file's bytes as RGB: turned upright as its EXIF says, transparency put on white.

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
    width, height = picture.size
    long_side = int(size * max(width, height) / min(width, height))
    scaled = (size, long_side) if width <= height else (long_side, size)
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = int(round((scaled[0] - size) / 2.0)), int(round((scaled[1] - size) / 2.0))
    array = np.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


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
    ) -> None:
        """on_progress counts pictures. UserError if more than half cannot be decoded."""
        self.shards, self.size = shards, size
        self.bad: list[tuple[str, str]] = []
        self.cached = math.prod(self._shape) <= cache_bytes
        self._usable = np.ones(len(shards), dtype=bool)
        if self.cached:
            self._array, bad = self._kept(Path(cache), on_progress) if cache else self._in_memory(on_progress)
            looked_at = len(shards)
        else:
            some = np.unique(np.linspace(0, len(shards) - 1, num=64).astype(np.int64))
            bad, looked_at = self._decode(some, lambda row, pixels: None, on_progress), len(some)
        for row, reason in bad:
            self._note_bad(row, reason)
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
        found: dict[int, torch.Tensor] = {}
        for row, reason in self._decode(rows, found.__setitem__):
            self._note_bad(row, reason)
        rows = np.array([row for row in rows.tolist() if row in found], dtype=np.int64)
        pixels = [found[row] for row in rows.tolist()]
        return torch.stack(pixels) if pixels else torch.empty((0, *self._shape[1:]), dtype=torch.uint8), rows

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (len(self.shards), 3, self.size, self.size)

    def _note_bad(self, row: int, reason: str) -> None:
        if self._usable[row]:
            self._usable[row] = False
            self.bad.append((self.shards.keys[row], reason))

    def _in_memory(self, on_progress: Progress | None) -> tuple[np.ndarray, list[tuple[int, str]]]:
        array = np.zeros(self._shape, dtype=np.uint8)
        return array, self._decode(range(len(array)), lambda row, pixels: _put(array, row, pixels), on_progress)

    def _kept(self, folder: Path, on_progress: Progress | None) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """The cache file of these shards at this size, decoded if it is not there. NAME.json is written last: it says
        that NAME.npy is whole, and lists what was bad."""
        name = f"pixels-{self.size}-v{CACHE_VERSION}-{self.shards.fingerprint.removeprefix('sha256:')[:16]}"
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
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=self._shape)
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
        put: Callable[[int, torch.Tensor], None],
        on_progress: Progress | None = None,
    ) -> list[tuple[int, str]]:
        """put(row, pixels) for every row that can be decoded; (row, reason) of the others, in order."""

        def decode(some: Sequence[int]) -> list[tuple[int, str]]:
            bad = []
            for row in some:
                try:
                    put(int(row), to_pixels(decode_picture(self.shards.read(int(row)).image), self.size))
                except PictureError as error:
                    bad.append((int(row), str(error)))
            return bad

        bad: list[tuple[int, str]] = []
        pieces = [rows[i : i + 32] for i in range(0, len(rows), 32)]
        threads = 1 if torch.utils.data.get_worker_info() else os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            for done, some in enumerate(pool.map(decode, pieces), 1):
                bad += some
                if on_progress:
                    on_progress(min(32 * done, len(rows)), len(rows), bad=len(bad))
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
        if self.workers and not self.pictures.cached:
            loader = torch.utils.data.DataLoader(
                _Steps(self), batch_size=None, sampler=itertools.count(start_step), num_workers=self.workers
            )
            yield from loader
        for step in itertools.count(start_step):
            yield self.batch(step)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of one step. A picture that turns out bad is replaced by the next one in the shards."""
        wanted = self.rows(step)
        pixels, rows = self.pictures.load(wanted)
        if len(rows) < len(wanted):
            rows = np.array([row if row in rows else self._stand_in(row) for row in wanted.tolist()])
            pixels = self.pictures.pixels(rows)
        return {"pixels": pixels, "row": torch.from_numpy(rows)}

    def rows(self, step: int) -> np.ndarray:
        """int64 (B,): the rows of the shards that `step` asks for on this rank."""
        start = (step * self.world + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(start, start + self.batch_size), len(self.pictures))
        return np.concatenate([self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}  # keep no more than two
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.pictures.rows)
        return self._orders[epoch]

    def _stand_in(self, row: int) -> int:
        """The first row after `row`, round to the beginning, that can be decoded."""
        place = int(np.searchsorted(self.pictures.rows, row))
        for other in np.roll(self.pictures.rows, -place - 1).tolist():
            if len(self.pictures.load([other])[1]):
                return other
        raise UserError("no picture can be decoded any more; make these shards again")


class _Steps(torch.utils.data.Dataset):
    """Batches as DataLoader wants them: item k is the batch of step k."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.batches.batch(step)
