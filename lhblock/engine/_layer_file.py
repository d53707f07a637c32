"""Checksums of one layer's file, and its repair in place. All blocking; errors are ``OSError``.

The repair writes into the file that a store has open, so it never changes which blocks are there:
the map of the store was built from the file's extents, and they were right when it opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lhblock._native import Extent, file_crc64, file_extents
from lhblock.engine._clock import utc_now
from lhblock.engine._member import LayerDamage
from lhblock.replica import (
    ChecksumRecord,
    change_time_text,
    hash_image,
    valid_checksum,
    write_checksum,
)


def hash_layer(dir_fd: int, image: str, *, rehash: bool) -> None:
    """Record the checksum of a frozen layer, if it is not recorded or ``rehash`` says so."""
    hash_image(dir_fd, image, _crc64, now=utc_now(), rehash=rehash)


def verify_layer(dir_fd: int, image: str) -> ChecksumRecord | LayerDamage | None:
    """The record if it is right, the damage if not, None if nothing can be said."""
    record = valid_checksum(dir_fd, image)
    if record is None:
        return None
    with _opened(dir_fd, image, os.O_RDONLY) as fd:
        found = _checksum_of(fd)
    if found == record.checksum:
        return record
    if valid_checksum(dir_fd, image) != record:
        return None  # it was merged meanwhile
    write_checksum(dir_fd, image, replace(record, silently_corrupted=True))
    return LayerDamage(record, found)


def layer_extents(dir_fd: int, image: str) -> Sequence[Extent]:
    """Data extents of a layer's file, in order."""
    with _opened(dir_fd, image, os.O_RDONLY) as fd:
        return file_extents(fd)


def read_layer(dir_fd: int, image: str, offset_bytes: int, length_bytes: int) -> bytes:
    """Read a layer's file; shorter at its end."""
    with _opened(dir_fd, image, os.O_RDONLY) as fd:
        return os.pread(fd, length_bytes, offset_bytes)


def begin_repair(dir_fd: int, image: str) -> bool:
    """Whether the layer is what its record was made of, damage apart."""
    return valid_checksum(dir_fd, image) is not None


def repair_layer(dir_fd: int, image: str, offset_bytes: int, data: bytes) -> None:
    """Write what differs."""
    with _opened(dir_fd, image, os.O_RDWR) as fd:
        if os.pread(fd, len(data), offset_bytes) == data:
            return
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], offset_bytes + written)


def finish_repair(dir_fd: int, image: str, record: ChecksumRecord) -> str:
    """Sync the layer and record its checksum if it is right now; return what it is."""
    with _opened(dir_fd, image, os.O_RDWR) as fd:
        os.fsync(fd)
        found = _checksum_of(fd)
        ctime_ns = os.fstat(fd).st_ctime_ns
    if found == record.checksum:
        right = replace(
            record,
            change_time=change_time_text(ctime_ns),
            last_hashed_at=utc_now(),
            silently_corrupted=False,
        )
        write_checksum(dir_fd, image, right)
    return found


def _crc64(fd: int, length_bytes: int) -> int:
    return file_crc64(fd, 0, length_bytes)


def _checksum_of(fd: int) -> str:
    return f"{_crc64(fd, os.fstat(fd).st_size):016x}"


@contextmanager
def _opened(dir_fd: int, image: str, mode: int) -> Iterator[int]:
    fd = os.open(image, mode | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)
