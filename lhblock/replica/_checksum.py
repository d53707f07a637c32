"""``*.img.checksum``: the hash of a frozen layer, valid while the image's ctime stands still."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from lhblock.replica._atomic import read_small, stat_file, unlink_if_there, write_durable
from lhblock.replica._metadata import (
    MalformedError,
    encode_go,
    first_object,
    flag_member,
    text_member,
)
from lhblock.replica._names import checksum_name

METHOD = "crc64"
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class ChecksumRecord:
    """What a checksum file says. ``checksum`` is 16 hexadecimal digits, most significant first."""

    checksum: str
    change_time: str
    last_hashed_at: str = ""
    silently_corrupted: bool = False
    method: str = METHOD


def change_time_text(ctime_ns: int) -> str:
    """A ctime as Go prints it in UTC: the fraction loses its trailing zeros, and goes when 0."""
    seconds, nanoseconds = divmod(ctime_ns, _NANOSECONDS)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{text}{fraction} +0000 UTC"


def read_checksum(dir_fd: int, image: str) -> ChecksumRecord | None:
    """Read the record of an image, however old; None when there is none that can be read.

    A record is a cache: one that is damaged is worth as much as none.
    """
    data = read_small(dir_fd, checksum_name(image))
    if not data:
        return None
    try:
        members = first_object(data)
        return ChecksumRecord(
            method=text_member(members, "method"),
            checksum=text_member(members, "checksum"),
            change_time=text_member(members, "change_time"),
            last_hashed_at=text_member(members, "last_hashed_at"),
            silently_corrupted=flag_member(members, "silently_corrupted"),
        )
    except MalformedError:
        return None


def valid_checksum(dir_fd: int, image: str) -> ChecksumRecord | None:
    """The record of an image if the image has not changed since, else None."""
    record = read_checksum(dir_fd, image)
    state = stat_file(dir_fd, image)
    if record is None or state is None or record.method != METHOD:
        return None
    return record if record.change_time == change_time_text(state.st_ctime_ns) else None


def write_checksum(dir_fd: int, image: str, record: ChecksumRecord) -> None:
    """Write a record, durable when it returns."""
    members = {
        "method": record.method,
        "checksum": record.checksum,
        "change_time": record.change_time,
        "last_hashed_at": record.last_hashed_at,
        "silently_corrupted": record.silently_corrupted,
    }
    name = checksum_name(image)
    write_durable(dir_fd, name, encode_go(members), transient=f"{name}..tmp", spare=False)


def hash_image(
    dir_fd: int, image: str, crc64: Callable[[int, int], int], *, now: str, rehash: bool = False
) -> ChecksumRecord | None:
    """Hash a frozen layer and record it. Blocks as long as ``crc64`` reads.

    Args:
      crc64: called with a descriptor and the length in bytes; returns the CRC-64/ISO of the file.
      now: the time, as disk records have it.
      rehash: read the file although a valid record is there.

    Returns the valid record; None when the image changed meanwhile, and then no record is left. A
    different checksum of an image whose ctime stood still is corruption: the old checksum is kept
    and ``silently_corrupted`` set.

    Raises:
      OSError: the image is gone or cannot be read.
    """
    known = valid_checksum(dir_fd, image)
    if known is not None and (known.silently_corrupted or not rehash):
        return known
    fd = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        before = os.fstat(fd)
        found = f"{crc64(fd, before.st_size):016x}"
        record = ChecksumRecord(found, change_time_text(before.st_ctime_ns), now)
        same_time = known is not None and known.change_time == record.change_time
        if known is not None and same_time and known.checksum != found:
            record = replace(known, silently_corrupted=True)
        write_checksum(dir_fd, image, record)
        if os.fstat(fd).st_ctime_ns == before.st_ctime_ns:
            return record
        unlink_if_there(dir_fd, checksum_name(image))
        return None
    finally:
        os.close(fd)
