"""A folder takes the place of another one in a single moment, or in two that can be finished after a crash.

index/            the folder that everybody reads
.index.compact/   what is to take its place; after the exchange, what was replaced
.index.replaced/  what was replaced, where the system cannot exchange two names at once
"""

import contextlib
import ctypes
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from clip_train.folder import MANIFEST, partial_of
from clip_train.settings import UserError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two changers of one folder are not noticed there
    fcntl = None

LOCK = ".lock"


def successor_of(folder: Path) -> Path:
    """Where the folder that is to replace this one is made."""
    return folder.with_name(f".{folder.name}.compact")


def replaced_by(folder: Path) -> Path:
    """Where the old folder is for a moment, if the two names cannot be exchanged at once."""
    return folder.with_name(f".{folder.name}.replaced")


def replace(folder: Path) -> None:
    """Put successor_of(folder), which is whole, in the place of folder, and remove what was there."""
    new = successor_of(folder)
    if not exchange(new, folder):
        os.rename(folder, replaced_by(folder))
        os.rename(new, folder)
    clear(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; False where the system cannot (then nothing has happened)."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(swap)) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(os.fsencode(one), os.fsencode(other), ctypes.c_uint(2)) == 0  # RENAME_SWAP
    return False


def wait_for(folder: Path) -> None:
    """Return when the folder is there: at once, or when an exchange in two steps is done. One that was killed between
    them is finished here. Nothing is waited for if there is none."""
    if folder.exists():
        return
    folder = Path(os.path.realpath(folder))
    new = successor_of(folder)
    for _ in range(100):
        between = replaced_by(folder).exists()  # otherwise nobody exchanged anything: the user removed the folder
        if folder.exists() or not between or not (new / MANIFEST).is_file():
            return
        with contextlib.suppress(UserError, OSError), locked(new):  # otherwise it is just being done
            if not folder.exists():
                os.rename(new, folder)
        time.sleep(0.01)


def clear(folder: Path) -> None:
    """Remove what an exchange, or one that was killed, left beside the folder. Only for who holds the lock."""
    new = successor_of(folder)
    for left in (new, partial_of(new), replaced_by(folder)):
        if left.exists():
            shutil.rmtree(left)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; UserError if another process does. The system lets go when the process ends, however."""
    if fcntl is None:
        yield
        return
    while True:
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is changing {folder}/; wait for it") from error
            if _same(lock, folder / LOCK):  # not that of a folder that was replaced meanwhile
                yield
                return
        finally:
            os.close(lock)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
