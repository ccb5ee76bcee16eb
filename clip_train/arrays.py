"""A .npy file that is made before its rows are known, and then filled."""

import errno
import os
from pathlib import Path

import numpy as np


def new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of zeros to write into. OSError naming it if the disk has no room for all of it: without that, the
    process would be killed (SIGBUS) where it writes what does not fit. Some file systems cannot keep room free."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with open(path, "rb+") as file:
            _keep_room(file.fileno(), path.stat().st_size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def _keep_room(descriptor: int, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
