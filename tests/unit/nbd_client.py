"""A small NBD client for handshakes, and exports that record what they are given."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from lhblock._native import CloseReason
from lhblock.frontend.nbd import ByteStream, ExportDescription, UnknownExport

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 8, 9, 10, 11
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID = 2**31 + 1, 2**31 + 2, 2**31 + 3
ERR_UNKNOWN, ERR_TOO_BIG = 2**31 + 6, 2**31 + 9


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def go_data(name: str | bytes, *infos: int) -> bytes:
    raw = name if isinstance(name, bytes) else name.encode()
    return struct.pack(f">I{len(raw)}sH{len(infos)}H", len(raw), raw, len(infos), *infos)


def context_data(name: str, *queries: str | bytes) -> bytes:
    packed = struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(">I", len(queries))
    for query in queries:
        raw = query if isinstance(query, bytes) else query.encode()
        packed += struct.pack(">I", len(raw)) + raw
    return packed


@dataclass(frozen=True)
class Reply:
    option: int
    kind: int
    data: bytes


class Client:
    """The client's side of a handshake over any stream."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream

    async def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            chunk = await self.stream.receive_some(length - len(data))
            if not chunk:
                raise EOFError(f"{length - len(data)} bytes are missing after {data!r}")
            data += chunk
        return data

    async def at_end(self) -> bool:
        return await self.stream.receive_some(1) == b""

    async def greet(self, flags: int = 3) -> None:
        assert await self.receive(18) == GREETING
        await self.stream.send_all(struct.pack(">I", flags))

    async def reply(self) -> Reply:
        magic, number, kind, length = struct.unpack(">QIII", await self.receive(20))
        assert magic == REPLY_MAGIC
        return Reply(number, kind, await self.receive(length))

    async def ask(self, number: int, data: bytes = b"") -> list[Reply]:
        """Send an option and collect its replies up to the final one."""
        await self.stream.send_all(option(number, data))
        return await self.replies(number)

    async def replies(self, number: int) -> list[Reply]:
        collected = []
        while True:
            one = await self.reply()
            assert one.option == number
            collected.append(one)
            if one.kind == ACK or one.kind & 2**31:
                return collected


@dataclass
class FakeConnection:
    """A handed-over socket; the test reads and writes it and says when it is over."""

    fd: int
    structured: bool
    base_allocation_id: int | None
    ended: trio.Event = field(default_factory=trio.Event)
    reason: CloseReason = CloseReason.ASKED

    async def closed(self) -> CloseReason:
        await self.ended.wait()
        return self.reason

    async def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            await trio.lowlevel.wait_readable(self.fd)
            chunk = os.read(self.fd, length - len(data))
            if not chunk:
                return data
            data += chunk
        return data

    def end(self, reason: CloseReason) -> None:
        os.close(self.fd)
        self.reason = reason
        self.ended.set()


@dataclass
class FakeExport:
    size_bytes: int = 7 << 20
    read_only: bool = False
    description: str = ""
    opened: int = 0
    closed: int = 0
    refuse: Exception | None = None
    connections: list[FakeConnection] = field(default_factory=list)
    attached: trio.Event = field(default_factory=trio.Event)

    def attach(
        self, fd: int, *, structured: bool, base_allocation_id: int | None
    ) -> FakeConnection:
        if self.refuse is not None:
            raise self.refuse
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        connection = FakeConnection(fd, structured, base_allocation_id)
        self.connections.append(connection)
        self.attached.set()
        return connection

    def close(self) -> None:
        for connection in self.connections:
            if not connection.ended.is_set():
                os.close(connection.fd)


class FakeExports:
    def __init__(self, **exports: FakeExport) -> None:
        self.exports = {name.replace("_at_", "@"): e for name, e in exports.items()}

    def list(self) -> list[ExportDescription]:
        return [
            ExportDescription(name, export.description, snapshot="@" in name)
            for name, export in self.exports.items()
        ]

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[FakeExport]:
        if name not in self.exports:
            raise UnknownExport(f"no export {name!r} is served")
        export = self.exports[name]
        # Views of snapshots own nurseries, so a context must nest like one.
        async with trio.open_nursery():
            export.opened += 1
            try:
                yield export
            finally:
                export.closed += 1


class SocketStream:
    """A trio socket as the stream :class:`Client` wants."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock

    async def receive_some(self, max_bytes: int) -> bytes:
        try:
            return await self.socket.recv(max_bytes)
        except ConnectionResetError:
            return b""

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self.socket.send(view) :]

    def close(self) -> None:
        self.socket.close()
