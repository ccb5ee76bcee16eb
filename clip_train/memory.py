"""How this process's C library treats memory that torch frees."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them in malloc.h


def keep_freed_memory() -> bool:
    """Let large tensors reuse the memory of earlier ones, where the C library is glibc; returns whether it is.

    By default glibc takes every block above some megabytes from the system and gives it back, and the system fills each
    new page with zeros on its first touch. A training step on a CPU frees and takes the same blocks again and again
    (the gradient of a vocabulary alone is 100 MB), which costs a noticeable part of the `tiny` preset's time. Memory
    once used stays with the process. Of no use on GPUs, whose memory torch keeps by itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
