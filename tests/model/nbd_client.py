"""The transmission phase of NBD from the client's side, with any number of requests in flight."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from lhblock.engine import SnapshotView, Volume

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA, NO_HOLE, DF = 1, 2, 4
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF
CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE = 0, 1, 2
CHUNK_ERROR = 1 << 15


class ConnectionLost(Exception):
    """The server closed the connection before it answered."""


@dataclass
class _Pending:
    offset: int
    read_bytes: int
    done: trio.Event
    data: bytearray
    error: int = 0
    lost: bool = False


class NbdClient:
    """One connection. :meth:`receive_replies` has to run while requests are made."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._send_lock = trio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0
        self._lost = False

    async def request(
        self, command: int, offset: int, length: int, *, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """Send one request and wait for its answer; others may be sent meanwhile.

        Returns:
          The error of the answer, 0 for success, and what was read.

        Raises:
          ConnectionLost: there is no answer; the request may have been carried out.
        """
        if self._lost:
            raise ConnectionLost
        self._cookie += 1
        cookie = self._cookie
        read_bytes = length if command == READ else 0
        pending = _Pending(offset, read_bytes, trio.Event(), bytearray(read_bytes))
        self._pending[cookie] = pending
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length)
        async with self._send_lock:
            try:
                await self._stream.send_all(header + data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._pending.pop(cookie, None)
                raise ConnectionLost from error
        await pending.done.wait()
        if pending.lost:
            raise ConnectionLost
        return pending.error, bytes(pending.data)

    async def disconnect(self) -> None:
        """Tell the server goodbye; it answers what is in flight and closes."""
        async with self._send_lock:
            await self._stream.send_all(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, DISC, 0, 0, 0))

    async def receive_replies(self) -> None:
        """Hand answers to their requests until the server closes the connection."""
        try:
            while True:
                await self._receive_reply()
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._lost = True
            for pending in self._pending.values():
                pending.lost = True
                pending.done.set()

    async def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            chunk = await self._stream.receive_some(length - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    async def _receive_reply(self) -> None:
        (magic,) = struct.unpack(">I", await self._receive(4))
        if magic == SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", await self._receive(12))
            pending = self._pending[cookie]
            pending.error = error
            if not error:
                pending.data[:] = await self._receive(pending.read_bytes)
            self._finish(cookie)
            return
        assert magic == STRUCTURED_MAGIC, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", await self._receive(16))
        pending = self._pending[cookie]
        content = await self._receive(length)
        if kind & CHUNK_ERROR:
            (pending.error,) = struct.unpack(">I", content[:4])
        elif kind == CHUNK_DATA:
            (offset,) = struct.unpack(">Q", content[:8])
            start = offset - pending.offset
            assert start >= 0
            assert start + length - 8 <= pending.read_bytes
            pending.data[start : start + length - 8] = content[8:]
        else:
            # Holes are zeroes, and so is the buffer.
            assert kind in (CHUNK_NONE, CHUNK_HOLE), kind
        if flags & CHUNK_DONE:
            self._finish(cookie)

    def _finish(self, cookie: int) -> None:
        self._pending.pop(cookie).done.set()


@asynccontextmanager
async def open_client(sock: socket.socket) -> AsyncIterator[NbdClient]:
    """Use a connected socket; it is closed when the block is left."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    client = NbdClient(stream)
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(client.receive_replies)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect(device: Volume | SnapshotView, *, structured: bool) -> AsyncIterator[NbdClient]:
    """Attach a client to an open volume or view; leaving the block waits until it is detached."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    try:
        connection = device.attach(theirs.fileno(), structured=structured)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    theirs.detach()
    async with open_client(ours) as client:
        yield client
    with trio.fail_after(30):
        await connection.closed()
