"""The messages between a serving process and ``mount-fuse``: docs/internals/fuse.md.

One JSON object for each message of a ``SOCK_SEQPACKET`` socket. Every byte is doubted, although
both ends belong to one user.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from lhblock.errors import FrontendError, UsageError
from lhblock.settings import check_volume_name

MESSAGE_BYTES_MAX: Final = 128 << 10
# More would not fit a message.
VOLUMES_MAX: Final = 1024
PATH_BYTES_MAX: Final = 4095

_FUSE_DEVICE: Final = os.makedev(10, 229)
_SOCKET: Final = re.compile(r"serve-[0-9]+")


@dataclass(frozen=True)
class Free:
    """To mount-fuse: nothing is mounted, and the session is yours."""


@dataclass(frozen=True)
class Mounted:
    """To mount-fuse: these volumes are below `directory`."""

    directory: Path
    volumes: tuple[str, ...]


@dataclass(frozen=True)
class Handover:
    """From mount-fuse, with the descriptor: `directory` is mounted, `shown` is for users."""

    directory: Path
    shown: Path


def is_socket_name(stem: str) -> bool:
    """Whether a process would call its socket so."""
    return _SOCKET.fullmatch(stem) is not None


async def send_state(sock: trio.socket.SocketType, state: Free | Mounted) -> None:
    """OSError: nobody is there any more."""
    if isinstance(state, Free):
        document: dict[str, Any] = {"state": "free"}
    else:
        document = {
            "state": "mounted",
            "directory": str(state.directory),
            "volumes": list(state.volumes),
        }
    await sock.send(json.dumps(document).encode())


async def receive_state(sock: trio.socket.SocketType) -> Free | Mounted | None:
    """Wait for the next state; None: the process has ended the connection.

    Raises:
      FrontendError: it is no state.
    """
    document, descriptors = await _receive(sock)
    _close(descriptors)
    if document is None:
        return None
    try:
        if document["state"] == "free":
            return Free()
        if document["state"] != "mounted":
            raise ValueError(f"state is {document['state']!r}")
        names = document["volumes"]
        if not isinstance(names, list) or len(names) > VOLUMES_MAX:
            raise ValueError("volumes is no list, or too long")
        return Mounted(_path(document["directory"]), tuple(map(_name, names)))
    except (KeyError, ValueError) as error:
        raise FrontendError(f"a message makes no sense: {error}") from error


async def send_handover(sock: trio.socket.SocketType, handover: Handover, kernel_fd: int) -> None:
    """Hand over a mount; the descriptor stays the caller's. OSError: nobody is there any more."""
    document = {"directory": str(handover.directory), "shown": str(handover.shown)}
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [kernel_fd]))
    await sock.sendmsg([json.dumps(document).encode()], [rights])


async def receive_handover(sock: trio.socket.SocketType) -> tuple[Handover, int] | None:
    """Wait for a mount, with the descriptor of ``/dev/fuse``, which the caller closes.

    None: mount-fuse has ended the connection.

    Raises:
      FrontendError: it is no such message.
    """
    document, descriptors = await _receive(sock)
    if document is None:
        _close(descriptors)
        return None
    try:
        handover = Handover(_path(document["directory"]), _path(document["shown"]))
        _check_kernel(descriptors)
    except (KeyError, ValueError) as error:
        _close(descriptors)
        raise FrontendError(f"a message makes no sense: {error}") from error
    return handover, descriptors[0]


def _check_kernel(descriptors: list[int]) -> None:
    if len(descriptors) != 1:
        raise ValueError(f"{len(descriptors)} descriptors came with it")
    about = os.fstat(descriptors[0])
    if not stat.S_ISCHR(about.st_mode) or about.st_rdev != _FUSE_DEVICE:
        raise ValueError("the descriptor is not /dev/fuse")


async def _receive(
    sock: trio.socket.SocketType,
) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and the descriptors that came with it; None at the end of the connection."""
    data, ancillary, flags, _ = await sock.recvmsg(
        MESSAGE_BYTES_MAX,
        socket.CMSG_SPACE(array("i").itemsize),
        socket.MSG_CMSG_CLOEXEC,
    )
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = array("i")
            found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
            descriptors.extend(found)
    if not data:
        return None, descriptors
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("it is too long")
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        _close(descriptors)
        raise FrontendError(f"a message makes no sense: {error}") from error
    return document, descriptors


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{value!r} is no absolute path")
    if len(os.fsencode(value)) > PATH_BYTES_MAX:
        raise ValueError("a path is too long")
    return Path(value)


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    try:
        return check_volume_name(value)
    except UsageError as error:
        raise ValueError(str(error)) from error
