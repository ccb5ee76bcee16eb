"""Where drawn pictures go: one file, or a folder that is filled; each file with the record of how it was made.

A folder is added to, never overwritten. A picture whose record is there already is not drawn again, so a run that was
killed goes on where it stopped, and a run with another seed or setting puts its pictures after those of the last.
"""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clip_train.folder import write_file
from clip_train.settings import UserError
from diffusion.generate import Generated, Generator
from diffusion.provenance import MAX_PIXELS, read_provenance, save_png

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two that draw into one folder are not noticed there
    fcntl = None

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
EXIF, COMMENT = 0x8769, 0x9286  # where JPEG and WebP files keep what a user says of them
UNICODE = b"UNICODE\x00"  # the encoding of that, in front of it
IDENTITY = ("caption", "embedding", "seed", "sampling", "task")  # what makes a picture what it is


class Gallery:
    """A picture file, or a folder of them."""

    def __init__(self, out: Path | str, form: str | None = None, generator: Generator | None = None) -> None:
        """out: a file if its name has the suffix of a picture, else a folder. form: png, jpg or webp.

        generator: whose pictures are not to be drawn again.
        """
        self.out = Path(out)
        own = SUFFIXES.get(self.out.suffix.lower())
        self.one = own is not None and not self.out.is_dir()
        if self.one and form and form != own:
            raise UserError(f"--out {self.out} and --format {form} contradict each other; leave one of them out")
        self.form = own if self.one else form or "png"
        self.there: dict[str, Path] = {}
        self.next = 0
        self._generator, self._held, self._lock = generator, False, None
        if not self.one and self.out.is_dir():
            if generator is not None:
                self._hold()
            self._look()

    def find(self, wanted: dict[str, Any]) -> Path | None:
        """The file with a picture made like this, if it is there; wanted: a record."""
        return None if self.one else self.there.get(_identity(wanted))

    def recall(self, wanted: dict[str, Any]) -> Generated | None:
        """The picture made like this, with its record, if it is there."""
        path = self.find(wanted)
        if path is None:
            return None
        with Image.open(path) as picture:
            return Generated(picture.convert("RGB"), read_record(path))

    def add(self, made: Generated) -> Path:
        """Write a picture, whole or not at all. Returns its file."""
        if self.one:
            path = self.out
        else:
            if not self._held:
                self.out.mkdir(parents=True, exist_ok=True)
                self._hold()
                self._look()  # what another process put there since
            path = self.out / f"{self.next:05d}.{self.form}"
            self.next += 1
            self.there[_identity(made.provenance)] = path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, picture_bytes(made, self.form))
        return path

    def room_for(self, count: int) -> None:
        """UserError if there are more pictures than files."""
        if self.one and count > 1:
            raise UserError(f"{self.out} is the name of one picture, but {count} are to be drawn; give a folder")

    def _hold(self) -> None:
        """Keep other processes from numbering pictures here, until close()."""
        self._held = True
        if fcntl is None:
            return
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = f"another process is drawing into {self.out}/; wait for it, or choose another --out"
            raise UserError(said) from error
        except OSError:  # a file system without locks
            return

    def close(self) -> None:
        """Let other processes draw here."""
        self._held = False
        if getattr(self, "_lock", None) is not None:
            os.close(self._lock)
            self._lock = None

    __del__ = close

    def _look(self) -> None:
        for path in sorted(self.out.iterdir()):
            match = re.fullmatch(r"(\d{5,})\.(png|jpe?g|webp)", path.name, re.ASCII)
            if not match:
                continue
            self.next = max(self.next, int(match[1]) + 1)
            if self._generator is not None and SUFFIXES[path.suffix] == self.form:
                try:
                    record = read_record(path)
                except UserError:  # somebody else's picture
                    continue
                if _drawn_by(self._generator, record):
                    self.there[_identity(record)] = path


def _drawn_by(generator: Generator, record: dict[str, Any]) -> bool:
    made_with = record.get("fingerprints")
    if not isinstance(made_with, dict) or ("upsampler" in made_with) != (generator.upsampler is not None):
        return False
    if generator.copies is not None and "nearest" not in record:
        return False  # it was not looked at for copies
    return all(generator.fingerprints.get(name) == fingerprint for name, fingerprint in made_with.items())


def _identity(record: dict[str, Any]) -> str:
    return json.dumps({name: record.get(name) for name in IDENTITY}, sort_keys=True)


def picture_bytes(made: Generated, form: str = "png") -> bytes:
    """The picture file with its record: PNG, WebP (both without loss), or JPEG at quality 95."""
    file = io.BytesIO()
    if form == "png":
        save_png(made.picture, file, made.provenance)
        return file.getvalue()
    exif = Image.Exif()
    said = json.dumps(made.provenance, ensure_ascii=False)
    exif.get_ifd(EXIF)[COMMENT] = UNICODE + said.encode("utf-16-be")
    how = {"lossless": True} if form == "webp" else {"quality": 95, "subsampling": 0}
    try:
        made.picture.save(file, FORMATS[form], exif=exif, **how)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write a {form} file: {error}; take --format png") from error
    return file.getvalue()


def read_record(path: Path | str) -> dict[str, Any]:
    """The record inside a PNG, JPEG or WebP file. UserError if it has none."""
    try:
        with Image.open(path, formats=tuple(FORMATS.values())) as picture:
            if picture.format == "PNG":
                return read_provenance(path)
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            said = picture.getexif().get_ifd(EXIF).get(COMMENT)
            if not isinstance(said, bytes) or not said.startswith(UNICODE):
                raise UserError(f"{path} does not say how it was made: it has no record of unclip")
            record = json.loads(said[len(UNICODE) :].decode("utf-16-be"))
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture with a record: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} does not say how it was made: it has no record of unclip")
    return record


def refuse_overwriting(out: Path | None, given: Sequence[Path | str]) -> None:
    """UserError if a picture would be written over one that it is made from."""
    for path in given:
        if out and os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise UserError(f"{out} is what is to be changed; give the new picture another name with --out")
