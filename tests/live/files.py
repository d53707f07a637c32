"""What tests do with files that are volumes."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from tests.live.serving import tool

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


def write_and_verify(file: Path, size: int) -> None:
    """fio writes with many requests in flight, and finds its checksums again."""
    tool(
        "fio",
        "--name=job",
        f"--filename={file}",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--iodepth=16",
        "--fsync=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=7",
        f"--size={size}",
    )
