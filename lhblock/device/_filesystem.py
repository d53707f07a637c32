"""File systems on attached devices: made on blank volumes only, and mounted."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lhblock.device._host import Host, said
from lhblock.device._kind import Attached
from lhblock.device._nbd import HANDSHAKE_TIMEOUT_S
from lhblock.device._nbd_client import data_extents
from lhblock.device._target import Target
from lhblock.errors import DeviceBusy, DeviceError, FrontendError, NotBlank

READ_BYTES: Final = 1 << 20

# Which program makes it, and which package has that.
FILE_SYSTEMS: Final = {"ext4": ("mkfs.ext4", "e2fsprogs"), "xfs": ("mkfs.xfs", "xfsprogs")}
_BLKID_NOTHING: Final = 2


def check_wishes(host: Host, *, kind: str | None, place: Path | None) -> None:
    """See before anything is attached whether a file system can be made, and mounted at `place`.

    Raises:
      DeviceError: a program is missing, or the directory.
    """
    if kind is not None:
        host.program(*FILE_SYSTEMS[kind])
        host.program("blkid", "util-linux")
    if place is not None:
        host.program("mount", "mount")
        if not place.is_dir():
            raise DeviceError(f"cannot mount at {place}: no such directory; make it first")


def make(host: Host, device: Attached, target: Target, kind: str) -> bool:
    """Make a file system if the volume is blank. False: it has one of this kind already.

    Blank means that blkid finds nothing and every byte reads as zero. Only what the server calls
    data is read, so that a large thin volume takes no time.

    Raises:
      NotBlank: the volume holds something else.
      DeviceError: a program is missing or fails.
    """
    program, package = FILE_SYSTEMS[kind]
    maker = host.program(program, package)
    content = signatures(host, device.device)
    if content.get("TYPE") == kind:
        return False
    if content:
        shown = content.get("TYPE") or content.get("PTTYPE") or "something"
        raise NotBlank(f"{device.device} holds {shown}; nothing was formatted")
    offset = first_data(device.device, target)
    if offset is not None:
        raise NotBlank(
            f"{device.device} holds data at byte {offset}; nothing was formatted."
            f" If it can go: blkdiscard {device.device}"
        )
    done = host.run_program([maker, "-q", device.device])
    if done.returncode:
        raise DeviceError(f"{program} failed on {device.device}: {said(done)}")
    return True


def mount(host: Host, device: Attached, place: Path) -> None:
    """Mount the device, or do nothing if it is mounted there.

    Raises:
      DeviceBusy: something else is mounted there, or the device somewhere else.
      DeviceError: mount refuses.
    """
    places = host.mounted_at(device.device)
    if str(place) in places:
        return
    if places:
        raise DeviceBusy(f"{device.device} is mounted at {', '.join(places)}")
    if place.is_mount():
        raise DeviceBusy(f"something else is mounted at {place}")
    done = host.run_program([host.program("mount", "mount"), device.device, place])
    if done.returncode:
        raise DeviceError(f"cannot mount {device.device} at {place}: {said(done)}")


def signatures(host: Host, device: Path) -> dict[str, str]:
    """What blkid recognises on the device; empty if nothing.

    Raises:
      DeviceError: blkid is missing, or found contradictions.
    """
    done = host.run_program([host.program("blkid", "util-linux"), "-p", "-o", "export", device])
    if done.returncode == _BLKID_NOTHING:
        return {}
    if done.returncode:
        raise DeviceError(f"blkid cannot tell what is on {device}: {said(done)}; see wipefs")
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, equals, value in pairs if equals}


def first_data(device: Path, target: Target) -> int | None:
    """The byte offset of the first piece of the device that is not zeros; None if blank.

    Raises:
      DeviceError: the device cannot be read, or the server does not answer.
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            for offset, length in _data(target):
                found = _first_nonzero(fd, offset, length)
                if found is not None:
                    return found
        finally:
            os.close(fd)
    except FrontendError as error:
        raise DeviceError(str(error)) from error
    except OSError as error:
        raise DeviceError(f"cannot read {device}: {error.strerror or error}") from error
    return None


def _data(target: Target) -> Iterator[tuple[int, int]]:
    if target.nbd is None and target.file is not None:
        return _file_extents(target.file)
    return data_extents(target.uri, timeout_s=HANDSHAKE_TIMEOUT_S)


def _file_extents(file: Path) -> Iterator[tuple[int, int]]:
    with file.open("rb", buffering=0) as opened:
        end = 0
        while True:
            try:
                start = os.lseek(opened.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # there is none any more
                    return
                raise
            end = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            yield start, end - start


def _first_nonzero(fd: int, offset: int, length: int) -> int | None:
    """`offset` rounded down to where a piece with something in it begins."""
    end = offset + length
    offset -= offset % mmap.PAGESIZE
    zeros = bytes(READ_BYTES)
    # O_DIRECT wants memory that begins on a page.
    with mmap.mmap(-1, READ_BYTES) as memory:
        while offset < end:
            wanted = min(READ_BYTES, -(-(end - offset) // mmap.PAGESIZE) * mmap.PAGESIZE)
            with memoryview(memory)[:wanted] as view:
                got = os.preadv(fd, [view], offset)
            if got == 0:
                return None
            if memory[:got] != zeros[:got]:
                return offset
            offset += got
    return None
