"""Data connections of a replica: accepted here, served by the C core while the replica is open.

Longhorn's engine connects before it opens the replica, so that a connection may wait. Until
somebody sends something it costs a task and a descriptor; then it is given to the core, or, while
the replica is not open, its frames are read here, one at a time, and answered with an error. An
engine of ours says first who it is, with a Hello frame, and is let in if it is the one that has
opened the replica.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Final

import structlog
import trio

from lhblock.engine import CloseReason, Connection, DrivenReplica, HostedDevice, HostedReplica, wire
from lhblock.errors import LhblockError
from lhblock.frontend.nbd import Listener, SocketBytes, detach, notice_loss, peer_name, tune
from lhblock.instance._replica import Replica

CONNECTIONS_MAX: Final = 64
FRAME_TIMEOUT_S: Final = 30.0
"""For the rest of a frame whose first byte is here, and for its answer."""

_MAGIC: Final = 0x1B01
_HEADER: Final = struct.Struct("<HIIqII")  # magic, sequence, type, offset, size, payload bytes
_READ, _WRITE, _RESPONSE, _ERROR, _PING, _UNMAP, _HELLO = 0, 1, 2, 3, 6, 7, wire.HELLO_FRAME
_REQUESTS: Final = frozenset({_READ, _WRITE, _PING, _UNMAP, *range(0x4C00, 0x4C08)})
_PAYLOAD_BYTES_MAX: Final = 32 << 20
_PIECE_BYTES: Final = 64 << 10

_log = structlog.get_logger(__name__)


class _Dropped(Exception):
    """The peer broke the protocol or went away; ``str()`` is the reason that is counted."""


class DataServer:
    """Accepts data connections.

    Attributes:
      connections: those there are now.
      ended: how many ended for which reason.
    """

    def __init__(self, replica: Replica, *, connections_max: int = CONNECTIONS_MAX) -> None:
        self._replica = replica
        self._connections_max = connections_max
        self.connections = 0
        self.ended: Counter[str] = Counter()

    async def serve(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled. Closes the listeners when it ends.

        Raises:
          FrontendError: a listener failed for good.

        Cancelled: connections that the core has stay until the replica is closed.
        """
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery)
                task_status.started()
        finally:
            for listener in listeners:
                listener.close()

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            sock, address = await listener.accept()
            peer = peer_name(sock, address)
            if self.connections >= self._connections_max:
                sock.close()
                self._note(peer, f"there are {self._connections_max} connections already")
                continue
            self.connections += 1
            nursery.start_soon(self._serve, sock, peer)

    def _note(self, peer: str, reason: str) -> None:
        self.ended[reason] += 1
        _log.info("data connection ended", peer=peer, reason=reason, count=self.ended[reason])

    async def _serve(self, sock: trio.socket.SocketType, peer: str) -> None:
        tune(sock)
        try:
            connection = await self._refuse_until_open(sock)
            if isinstance(connection, HostedReplica):
                await connection.serve_units(socket.socket(fileno=detach(sock)))
                reason = "connection for units ended"
            else:
                reason = _REASONS[await connection.closed()]
        except _Dropped as dropped:
            reason = str(dropped)
        except OSError as error:
            reason = f"the socket failed: {errno.errorcode.get(error.errno or 0, 'unknown')}"
        except Exception as error:
            # One connection is no reason to end the process.
            _log.error("data connection failed", peer=peer, exc_info=error)
            reason = "a defect"
        finally:
            sock.close()
            self.connections -= 1
        self._note(peer, reason)

    async def _refuse_until_open(self, sock: trio.socket.SocketType) -> Connection | HostedReplica:
        """Answer errors to requests until the replica is open; then hand the socket over.

        Returns:
          The connection; or, when it is one for units, whom to hand it to.
        """
        while True:
            await trio.lowlevel.wait_readable(sock)
            connection = self._hand_over(sock)
            if connection is not None:
                return connection
            with trio.move_on_after(FRAME_TIMEOUT_S) as scope:
                device = await self._answer_frame(SocketBytes(sock))
            if scope.cancelled_caught:
                raise _Dropped("peer stalled inside a request")
            if device is not None:
                # Another engine waits for the end of the connections of one that has gone.
                notice_loss(sock)
            if isinstance(device, HostedReplica):
                return device
            if device is not None:
                return self._give(sock, device)

    def _hand_over(self, sock: trio.socket.SocketType) -> Connection | None:
        """Give the socket, which is between two frames, to the core. None: it is not open."""
        replica = self._replica.opened
        if replica is None or replica.error:
            return None
        return self._give(sock, replica)

    def _give(
        self, sock: trio.socket.SocketType, replica: DrivenReplica | HostedDevice
    ) -> Connection:
        fd = detach(sock)
        try:
            return replica.attach_data(fd)
        except LhblockError as error:
            os.close(fd)
            raise _Dropped("the core refused it") from error

    async def _answer_frame(self, stream: SocketBytes) -> HostedDevice | HostedReplica | None:
        """Read one frame and answer it: with an error, unless it is the Hello of an engine that is
        let in; then return what its connection is for."""
        header = await _receive(stream, _HEADER.size, at_start=True)
        magic, sequence, kind, offset, _, payload_bytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _Dropped(_REASONS[CloseReason.BAD_MAGIC])
        if payload_bytes > _PAYLOAD_BYTES_MAX:
            raise _Dropped(_REASONS[CloseReason.TOO_LARGE])
        if kind == _HELLO and payload_bytes == wire.HELLO.size:
            device = self._admit(await _receive(stream, payload_bytes))
            if device is not None:
                await stream.send_all(_HEADER.pack(_MAGIC, sequence, _RESPONSE, 0, 0, 0))
                return device
            payload_bytes = 0
        while payload_bytes:
            payload_bytes -= len(await _receive(stream, min(payload_bytes, _PIECE_BYTES)))
        if kind not in _REQUESTS:
            return None
        text = "replica no longer exist"
        if kind == _HELLO:
            text = "the replica is not open for this engine"
        if kind == _PING:
            text = f"ping failure: replica state {self._replica.state}"
        elif self._replica.opened is not None:
            text = f"replica has failed: {self._replica.opened.error}"
        data = text.encode()[:_PIECE_BYTES]
        reply = _HEADER.pack(_MAGIC, sequence, _ERROR, offset, len(data), len(data))
        await stream.send_all(reply + data)
        return None

    def _admit(self, payload: bytes) -> HostedDevice | HostedReplica | None:
        """What the engine that says Hello may use; None: it is not the one."""
        _, engine, view = wire.HELLO.unpack(payload)
        hosted = self._replica.hosted
        if hosted is None or str(uuid.UUID(bytes=engine)) != hosted.engine_id:
            return None
        if view == wire.UNITS_VIEW:
            return hosted
        device = hosted.find_device(view)
        return None if device is None or device.error else device


async def _receive(stream: SocketBytes, count: int, *, at_start: bool = False) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            between = at_start and not data
            raise _Dropped(_REASONS[CloseReason.EOF if between else CloseReason.MID_REQUEST])
        data += more
    return data


_REASONS: Final = {
    CloseReason.CLIENT: "peer disconnected",
    CloseReason.EOF: "peer vanished between requests",
    CloseReason.MID_REQUEST: "peer vanished inside a request",
    CloseReason.BAD_MAGIC: "peer sent a request with a wrong magic number",
    CloseReason.TOO_LARGE: "peer sent a request too large to skip",
    CloseReason.SOCKET_ERROR: "the socket failed",
    CloseReason.READ_FAILED: "a read failed after its reply had begun",
    CloseReason.ASKED: "closed with the replica",
}
