"""One connection on standard input and output, for inetd-like parents and fuzzers."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import suppress
from typing import Final

import trio

from ._exports import Exports
from ._server import NbdServer

PUMP_BYTES: Final = 256 << 10
_DUP_LOWEST_FD: Final = 3


async def serve_stdio(
    exports: Exports, *, handshake_timeout_s: float, stdin_fd: int = 0, stdout_fd: int = 1
) -> str:
    """Serve one client on standard input and output; return why its connection ended.

    When standard input is a socket it is served directly, in both directions. Otherwise (pipes,
    files) a socket pair stands in and the bytes are carried between. The end of standard input
    is the client closing its side.

    Cancelled: the connection is left to its volume, which closes it.
    """
    server = NbdServer(exports, handshake_timeout_s=handshake_timeout_s, connections_max=1)
    if stat.S_ISSOCK(os.fstat(stdin_fd).st_mode):
        # A duplicate, because whoever gets the descriptor closes it, and 0 must stay open.
        own = fcntl.fcntl(stdin_fd, fcntl.F_DUPFD_CLOEXEC, _DUP_LOWEST_FD)
        return await server.serve_socket(_adopt(socket.socket(fileno=own)), "stdio")

    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with _adopt(outside) as client:
        ours = _adopt(inside)
        reason = ""
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump_in, stdin_fd, client)

            async def serve() -> None:
                nonlocal reason
                reason = await server.serve_socket(ours, "stdio")
                ended.set()

            nursery.start_soon(serve)
            await _pump_out(client, stdout_fd)
            # The server's side is closed and all its answers are out. Standard input may stay
            # open for ever, so nobody waits for it; the connection's end is reported on its own.
            client.close()
            await ended.wait()
            nursery.cancel_scope.cancel()
    return reason


def _adopt(sock: socket.socket) -> trio.socket.SocketType:
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


async def _pump_in(fd: int, client: trio.socket.SocketType) -> None:
    # Threads, not epoll: standard input may be a regular file, and its flags are shared with
    # other processes, so it must not be made non-blocking.
    try:
        while data := await trio.to_thread.run_sync(
            os.read, fd, PUMP_BYTES, abandon_on_cancel=True
        ):
            view = memoryview(data)
            while view:
                view = view[await client.send(view) :]
        client.shutdown(socket.SHUT_WR)
    except (OSError, trio.ClosedResourceError):
        # The server hung up, or standard input cannot be read; either ends the connection.
        _shutdown(client, socket.SHUT_WR)


async def _pump_out(client: trio.socket.SocketType, fd: int) -> None:
    try:
        while data := await client.recv(PUMP_BYTES):
            view = memoryview(data)
            while view:
                view = view[await trio.to_thread.run_sync(os.write, fd, view) :]
    except OSError:
        # Nobody reads our output any more, so the client is gone.
        _shutdown(client, socket.SHUT_RDWR)


def _shutdown(client: trio.socket.SocketType, how: int) -> None:
    with suppress(OSError, trio.ClosedResourceError):
        client.shutdown(how)
