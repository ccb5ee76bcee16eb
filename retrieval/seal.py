"""The seal of an index file: what it was when it was written, noted in the manifest and compared before it is read.

faiss trusts what it reads: a file with one bit changed may crash the process, keep it busy for ever, or answer wrongly.

    "image": {"bytes": 99942445, "sha256": "9c56...", ...}     `sha256sum index/image.index` says the same
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_train.settings import UserError

WHOLE = 500_000_000  # bytes of a file that is read through to be opened: 0.3 s, 1 s without the processor's help
END = 64_000_000  # bytes at either end of a larger one, which is memory-mapped so that it need not be read through


def seal(path: Path) -> dict[str, Any]:
    """What to note of a file: bytes, sha256 and, of one larger than WHOLE, ends: the sha256 of its first and last END
    bytes."""
    size = path.stat().st_size
    noted: dict[str, Any] = {"bytes": size, "sha256": _whole(path)}
    return noted | {"ends": _ends(path, size)} if size > WHOLE else noted


def refuse_changed(path: Path, noted: Any) -> None:
    """UserError if a file is not the one that was noted; of one that was larger than WHOLE then, its length and both
    ends are looked at, so what changed between them is not noticed.

    Nothing is compared where nothing was noted, as by earlier versions.
    """
    if not isinstance(noted, Mapping) or not {"bytes", "sha256"} <= noted.keys():
        return
    if not path.is_file():
        raise UserError(f"{path} is missing; make it again: unclip index")
    size = path.stat().st_size
    same = size == noted["bytes"]
    if same:
        same = _ends(path, size) == noted["ends"] if "ends" in noted else _whole(path) == noted["sha256"]
    if not same:
        raise UserError(f"{path} is not what was written (damaged?); make it again: unclip index")


def _whole(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ends(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        total = hashlib.sha256(file.read(END))
        file.seek(size - END)
        total.update(file.read(END))
    return total.hexdigest()
