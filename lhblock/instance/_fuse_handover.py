"""Where a serving process takes over mounts that ``lhblock mount-fuse`` made.

Whatever goes wrong here ends one connection and its mount, and nothing else of the process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError, LhblockError
from lhblock.frontend.fuse import Volumes, serve_mount
from lhblock.frontend.nbd import peer_credentials
from lhblock.instance._channel import first_sentence
from lhblock.instance._fuse_session import FuseSession, Loan
from lhblock.instance._handover_wire import (
    VOLUMES_MAX,
    Free,
    Handover,
    Mounted,
    receive_handover,
    send_state,
)

CONNECTIONS_MAX: Final = 8
# From the promise of the session to the mount.
HANDOVER_S: Final = 30.0
# Between two looks at which volumes there are.
LOOK_S: Final = 1.0

_log = structlog.get_logger("lhblock.instance")


async def serve_handover(
    path: Path,
    session: FuseSession,
    volumes: Callable[[], Volumes],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take over mounts until cancelled, one at a time.

    Args:
      path: of the socket, which is removed at the end.
      volumes: what is shown; called for each mount.

    Raises:
      LhblockError: nothing can listen there.
    """
    with _listening(path) as listener:
        async with trio.open_nursery() as nursery:
            handovers = _Handovers(session, volumes)
            task_status.started()
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:  # no descriptor is left, or the client has gone
                    _log.warning("cannot take over a mount", reason=error.strerror)
                    await trio.sleep(LOOK_S)
                    continue
                if len(nursery.child_tasks) < CONNECTIONS_MAX:
                    nursery.start_soon(handovers.answer, sock)
                else:
                    sock.close()


@contextmanager
def _listening(path: Path) -> Iterator[trio.socket.SocketType]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.unlink(missing_ok=True)  # of a process that had our number
        listener.bind(os.fspath(path))
        path.chmod(0o600)  # before anybody can connect
        listener.listen(CONNECTIONS_MAX)
    except OSError as error:
        listener.close()
        raise LhblockError(f"cannot listen on {path}: {error.strerror}") from error
    try:
        with trio.socket.from_stdlib_socket(listener) as sock:
            yield sock
    finally:
        path.unlink(missing_ok=True)


class _Handovers:
    """What every connection needs."""

    def __init__(self, session: FuseSession, volumes: Callable[[], Volumes]) -> None:
        self._session = session
        self._volumes = volumes

    async def answer(self, sock: trio.socket.SocketType) -> None:
        """One connection, from the first message to its end."""
        with sock:
            _, uid = peer_credentials(sock)
            if uid not in (0, os.geteuid()):
                _log.warning("a mount of another user is refused", uid=uid)
                return
            try:
                await self._serve(sock)
            except* (FrontendError, OSError) as group:
                reason = str(first_sentence(group))
                _log.warning("the connection to mount-fuse failed", reason=reason)
            except* Exception as group:
                _log.error("the mount failed", exc_info=group)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        if self._session.free:
            with self._session.lend() as loan:
                await self._take_over(sock, loan)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_end, sock, nursery.cancel_scope)
            await self._tell(sock)
            nursery.cancel_scope.cancel()

    async def _take_over(self, sock: trio.socket.SocketType, loan: Loan) -> None:
        received = await self._receive(sock)
        if received is None:
            return
        handover, kernel_fd = received
        loan.mounted(handover.directory, handover.shown)

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await serve_mount(
                kernel_fd, handover.directory, self._volumes(), task_status=task_status
            )
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_end, sock, nursery.cancel_scope)
            await nursery.start(serve)
            await self._tell(sock)

    async def _receive(self, sock: trio.socket.SocketType) -> tuple[Handover, int] | None:
        await send_state(sock, Free())
        with trio.move_on_after(HANDOVER_S):
            return await receive_handover(sock)
        raise FrontendError(f"no mount came within {HANDOVER_S:.0f} s")

    async def _tell(self, sock: trio.socket.SocketType) -> None:
        """Say which volumes are where, until the session is free."""
        volumes, told = self._volumes(), None
        while not self._session.free:
            directory = self._session.directory
            if directory is not None:
                names = sorted(await volumes.names())[:VOLUMES_MAX]
                now = Mounted(directory, tuple(names))
                if now != told:
                    await send_state(sock, now)
                    told = now
            await trio.sleep(LOOK_S)


async def _watch_end(sock: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    # Nothing more is to come; if something does, that is the end, too.
    with suppress(OSError):
        await sock.recv(1)
    scope.cancel()
