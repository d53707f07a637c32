"""The kernel's NBD client, driven through netlink (``linux/nbd-netlink.h``).

A device configured this way outlives the process that configured it. Requests wait when every
connection is dead, and `reconfigure` puts new sockets in the place of dead ones; neither exists
with the older ioctls, where a lost server is an I/O error under the file system at once.

The identity given at `connect` is kept by the kernel and shown in sysfs as ``backend``. A device
can be reconfigured by whoever knows it only.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from lhblock.device._netlink import Family, attribute, nested, parse_attributes, text

FAMILY: Final = "nbd"
EVENTS: Final = "nbd_mc_group"
LOGICAL_BLOCK_BYTES: Final = 512  # partition tables in images count in these
IDENTITY_BYTES_MAX: Final = 2048  # sysfs shows a page at most

_CONNECT: Final = 1
_DISCONNECT: Final = 2
_RECONFIGURE: Final = 3

_INDEX: Final = 1
_SIZE_BYTES: Final = 2
_BLOCK_SIZE_BYTES: Final = 3
_TIMEOUT_S: Final = 4
_SERVER_FLAGS: Final = 5
_SOCKETS: Final = 7
_DEAD_TIMEOUT_S: Final = 8
_BACKEND: Final = 10
_SOCKET_ITEM: Final = 1
_SOCKET_FD: Final = 1


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def _sockets(fds: Sequence[int]) -> bytes:
    return nested(_SOCKETS, *(nested(_SOCKET_ITEM, _u32(_SOCKET_FD, fd)) for fd in fds))


def connect(
    family: Family,
    fds: Sequence[int],
    *,
    size_bytes: int,
    flags: int,
    timeout_s: int,
    away_s: int,
    identity: str,
) -> int:
    """Make a device of negotiated sockets and return its number. The kernel keeps its own
    references to the sockets.

    Args:
      flags: the transmission flags the server sent.
      timeout_s: after which a request is tried on another connection, and its own is given up.
      away_s: how long requests wait for a connection before they fail.

    Raises:
      OSError: as the kernel answers.
    """
    replies = family.request(
        _CONNECT,
        _u64(_SIZE_BYTES, size_bytes)
        + _u64(_BLOCK_SIZE_BYTES, LOGICAL_BLOCK_BYTES)
        + _u64(_TIMEOUT_S, timeout_s)
        + _u64(_DEAD_TIMEOUT_S, away_s)
        + _u64(_SERVER_FLAGS, flags)
        + attribute(_BACKEND, text(identity))
        + _sockets(fds),
    )
    for reply in replies:
        if _INDEX in reply:
            return int(struct.unpack("=I", reply[_INDEX])[0])
    raise OSError(errno.EPROTO, "the kernel did not name the device it made")


def reconfigure(
    family: Family, index: int, fds: Sequence[int], *, size_bytes: int, identity: str
) -> None:
    """Give a device its size anew, and sockets for as many of its connections as are dead.

    Sockets beyond that are left alone. OSError: EINVAL when the device is not connected or has
    another identity.
    """
    family.request(
        _RECONFIGURE,
        _u32(_INDEX, index)
        + _u64(_SIZE_BYTES, size_bytes)
        + attribute(_BACKEND, text(identity))
        + (_sockets(fds) if fds else b""),
    )


def disconnect(family: Family, index: int) -> None:
    """Take a device away, orderly. It must not be in use, or its users see I/O errors."""
    family.request(_DISCONNECT, _u32(_INDEX, index))


def dead_link(datagram_payload: bytes) -> int | None:
    """The device number of an event, which says that one of its connections died."""
    for kind, payload in parse_attributes(datagram_payload[4:]):
        if kind == _INDEX and len(payload) == 4:
            return int(struct.unpack("=I", payload)[0])
    return None


def identities(sysfs: Path) -> dict[int, str]:
    """The devices that have an identity, by number."""
    found = {}
    for path in sysfs.glob("block/nbd*/backend"):
        number = path.parent.name.removeprefix("nbd")
        with suppress(OSError):  # taken away while we look
            identity = path.read_text(errors="surrogateescape").rstrip("\n")
            if identity and number.isascii() and number.isdecimal():
                found[int(number)] = identity
    return found
