"""Accepting clients, bounding them, and handing each to its export.

Every connection is one task with one cancel scope. Its deadline is the handshake time-out, and is
lifted when the transmission phase begins; the task then only waits for the C core to say that it
closed the socket, and keeps the export open until then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import structlog
import trio

from lhblock._native import CloseReason
from lhblock.errors import LhblockError

from ._exports import Exports
from ._listeners import Listener
from ._negotiation import Agreement, HandshakeEnded, negotiate
from ._sockets import SocketBytes, detach, peer_name, tune

HANDSHAKES_MAX: Final = 128

CLOSE_REASONS: Final = {
    CloseReason.CLIENT: "client disconnected",
    CloseReason.EOF: "client vanished between requests",
    CloseReason.MID_REQUEST: "client vanished inside a request",
    CloseReason.BAD_MAGIC: "client sent a request with a wrong magic number",
    CloseReason.TOO_LARGE: "client sent a request too large to skip",
    CloseReason.SOCKET_ERROR: "the socket failed",
    CloseReason.READ_FAILED: "a read failed after its reply had begun",
    CloseReason.ASKED: "closed by the server",
}

_log = structlog.get_logger("lhblock.frontend.nbd")


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """A client in its transmission phase.

    Attributes:
      peer: ``host:port``, or the process behind a Unix socket.
      export: full name of the export it uses.
      since: when its transmission phase began, in UTC.
    """

    peer: str
    export: str
    since: datetime


@dataclass(eq=False, slots=True)
class _Visit:
    """One connection from accept to its end."""

    peer: str
    scope: trio.CancelScope
    began_s: float
    export: str | None = None
    admitted: bool = False
    evicted: bool = False
    client: ClientInfo | None = None
    reason: str = field(default="server stopped")


class NbdServer:
    """All connections of one set of exports, over any number of listeners."""

    def __init__(
        self,
        exports: Exports,
        *,
        handshake_timeout_s: float,
        connections_max: int,
        handshakes_max: int = HANDSHAKES_MAX,
    ) -> None:
        assert connections_max >= 1
        assert handshakes_max >= 1
        self._exports = exports
        self._handshake_timeout_s = handshake_timeout_s
        self._connections_max = connections_max
        self._handshakes_max = handshakes_max
        self._handshakes: dict[_Visit, None] = {}  # oldest first
        self._visits: dict[_Visit, None] = {}
        self._admitted = 0

    def clients(self) -> tuple[ClientInfo, ...]:
        """Clients in their transmission phase, oldest connection first."""
        return tuple(visit.client for visit in self._visits if visit.client is not None)

    async def serve(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[NbdServer] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve clients until cancelled. Closes the listeners when it ends.

        Raises:
          FrontendError: a listener failed for good.

        Cancelled: nothing is accepted any more, handshakes are cut off, exports are left.
        Connections in their transmission phase belong to the volumes, which close them.
        """
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery)
                task_status.started(self)
        finally:
            for listener in listeners:
                listener.close()

    async def serve_socket(self, sock: trio.socket.SocketType, peer: str) -> str:
        """Serve one connected socket, which is closed or handed over. Returns why it ended."""
        visit = self._expect(peer)
        await self._visit(sock, visit)
        return visit.reason

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            sock, address = await listener.accept()
            self._make_room()
            visit = self._expect(peer_name(sock, address))
            nursery.start_soon(self._visit, sock, visit)

    def _make_room(self) -> None:
        """Let go of the oldest handshake when there are too many.

        A handshake takes milliseconds, so the oldest of many is one that stalls, and a client
        that means it is never kept waiting by those that do not.
        """
        while len(self._handshakes) >= self._handshakes_max:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.evicted = True
            oldest.scope.cancel()

    def _expect(self, peer: str) -> _Visit:
        now = trio.current_time()
        scope = trio.CancelScope(deadline=now + self._handshake_timeout_s)
        visit = _Visit(peer=peer, scope=scope, began_s=now)
        self._handshakes[visit] = None
        self._visits[visit] = None
        return visit

    async def _visit(self, sock: trio.socket.SocketType, visit: _Visit) -> None:
        try:
            with visit.scope:
                visit.reason = await self._serve(sock, visit)
            if visit.scope.cancelled_caught:
                visit.reason = (
                    "too many clients are in their handshake and this is the oldest"
                    if visit.evicted
                    else f"handshake not done within {self._handshake_timeout_s:g} s"
                )
        except Exception:
            # A defect of ours: it must not take the other connections along.
            visit.reason = "internal error"
            _log.exception("nbd connection failed", peer=visit.peer, export=visit.export)
        finally:
            sock.close()
            self._handshakes.pop(visit, None)
            del self._visits[visit]
            self._admitted -= visit.admitted
            _log.info(
                "nbd connection ended",
                peer=visit.peer,
                export=visit.export,
                reason=visit.reason,
                seconds=round(trio.current_time() - visit.began_s, 3),
            )

    async def _serve(self, sock: trio.socket.SocketType, visit: _Visit) -> str:
        tune(sock)
        # The reason is returned and not raised through the export's context, which may be a
        # nursery and would wrap it.
        async with AsyncExitStack() as held:
            try:
                agreement = await negotiate(
                    SocketBytes(sock), self._exports, held, admit=lambda: self._admit(visit)
                )
            except HandshakeEnded as ended:
                return str(ended)
            self._handshakes.pop(visit, None)
            visit.scope.deadline = math.inf
            if visit.scope.cancel_called:
                # Too late: the core must not get a socket that nobody will wait for.
                await trio.lowlevel.checkpoint()
            return await self._transmit(sock, visit, agreement)

    def _admit(self, visit: _Visit) -> str | None:
        if self._admitted >= self._connections_max:
            return f"all {self._connections_max} connections are taken; try again later"
        self._admitted += 1
        visit.admitted = True
        return None

    async def _transmit(
        self, sock: trio.socket.SocketType, visit: _Visit, agreement: Agreement
    ) -> str:
        visit.export = agreement.export_name
        fd = detach(sock)
        try:
            connection = agreement.export.attach(
                fd,
                structured=agreement.structured,
                base_allocation_id=agreement.base_allocation_id,
            )
        except LhblockError as error:
            os.close(fd)
            return str(error)
        except BaseException:
            os.close(fd)
            raise
        visit.client = ClientInfo(visit.peer, agreement.export_name, datetime.now(UTC))
        return CLOSE_REASONS[await connection.closed()]


async def serve_nbd(
    listeners: Sequence[Listener],
    exports: Exports,
    *,
    handshake_timeout_s: float,
    connections_max: int,
    task_status: trio.TaskStatus[NbdServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``exports`` on ``listeners`` until cancelled; see :meth:`NbdServer.serve`.

    Args:
      handshake_timeout_s: how long a client may take to choose its export. Settings own it.
      connections_max: clients in their transmission phase at one time. Others may look around,
        and are told the limit when they choose an export.
      task_status: ``nursery.start`` returns the :class:`NbdServer`, once it is accepting.
    """
    server = NbdServer(
        exports, handshake_timeout_s=handshake_timeout_s, connections_max=connections_max
    )
    await server.serve(listeners, task_status=task_status)
