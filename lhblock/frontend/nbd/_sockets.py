"""Options of accepted sockets, names for their peers, and a plain stream over one.

trio's ``SocketStream`` is not used: it sets ``TCP_NOTSENT_LOWAT`` to 16 KiB, an option that would
stay with the socket for its transmission phase and make large reads trickle.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

import trio

from ._uri import format_address

UNIX_BUFFER_BYTES: Final = 1 << 20  # asked for; the kernel may grant less
KEEPALIVE_IDLE_S: Final = 60
KEEPALIVE_INTERVAL_S: Final = 15
LOSS_IDLE_S: Final = 5
LOSS_PROBES: Final = 3
KEEPALIVE_PROBES: Final = 4  # so a vanished peer is noticed after two minutes

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid


class SocketBytes:
    """Exact receives and whole sends on a trio socket, which keeps belonging to the caller."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._socket.recv(max_bytes)

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._socket.send(view) :]


def tune(sock: trio.socket.SocketType) -> None:
    """Set the options a connection is served with. A kernel that refuses one is not an error."""
    if sock.family == socket.AF_UNIX:
        wanted = [
            (socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES),
        ]
    elif sock.family in (socket.AF_INET, socket.AF_INET6):
        wanted = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        ]
    else:
        wanted = []
    for level, option, value in wanted:
        try:
            sock.setsockopt(level, option, value)
        except OSError:
            # The peer may be gone already, which the first read will tell.
            continue


def notice_loss(sock: trio.socket.SocketType) -> None:
    """Let the kernel find out within half a minute that the host at the other end has gone."""
    if sock.family == socket.AF_UNIX:
        return
    for option, value in (
        (socket.TCP_KEEPIDLE, LOSS_IDLE_S),
        (socket.TCP_KEEPINTVL, LOSS_IDLE_S),
        (socket.TCP_KEEPCNT, LOSS_PROBES),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def peer_credentials(sock: trio.socket.SocketType) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket. OSError: nobody is known."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return int(pid), int(uid)


def peer_name(sock: trio.socket.SocketType, address: object) -> str:
    """What to call the other end: an address, or the process behind a Unix socket."""
    if sock.family == socket.AF_UNIX:
        try:
            pid, uid = peer_credentials(sock)
        except OSError:
            return "unix"
        return f"unix pid {pid} uid {uid}"
    if isinstance(address, tuple) and len(address) >= 2:
        return format_address(str(address[0]), int(address[1]))
    return "unknown"


def detach(sock: trio.socket.SocketType) -> int:
    """Take the descriptor out of a trio socket. It stays non-blocking and close-on-exec.

    The number is kept rather than duplicated: trio leaves a disarmed entry for it in its epoll
    set, and the kernel removes that entry when the last descriptor of the socket is closed.
    """
    trio.lowlevel.notify_closing(sock)
    return sock.detach()
