"""What tests do with files that are volumes."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH_HOLE = 3  # and keep the size
ZERO_RANGE = 16


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def extents(fd: int) -> list[tuple[int, int]]:
    """Where there is data: begin and end."""
    found: list[tuple[int, int]] = []
    end = 0
    with suppress(OSError):  # ENXIO: there is no more
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    return found
