"""A scripted client of the data protocol: frames as bytes, and one connection that sends them."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

MAGIC = 0x1B01
READ, WRITE, RESPONSE, ERROR, PING, UNMAP = 0, 1, 2, 3, 6, 7
HEADER = struct.Struct("<HIIqII")
TIMEOUT_S = 60.0


def frame(
    kind: int,
    sequence: int,
    *,
    offset: int = 0,
    size: int | None = None,
    payload: bytes = b"",
    payload_bytes: int | None = None,
    magic: int = MAGIC,
) -> bytes:
    """One frame; ``size`` and ``payload_bytes`` are what the payload has unless given."""
    count = len(payload) if payload_bytes is None else payload_bytes
    size = len(payload) if size is None else size
    return HEADER.pack(magic, sequence, kind, offset, size, count) + payload


@dataclass(frozen=True)
class Reply:
    """One reply as it came."""

    raw: bytes
    sequence: int
    kind: int
    offset: int
    size: int
    payload: bytes

    @property
    def text(self) -> str:
        assert self.kind == ERROR, self
        return self.payload.decode()


class DataClient:
    """One data connection."""

    def __init__(self, address: str) -> None:
        if address.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(TIMEOUT_S)
            self.socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self._sequence = 0

    def __enter__(self) -> DataClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the replica closed the connection")
            data += more
        return data

    def receive(self) -> Reply:
        raw = self._exactly(HEADER.size)
        magic, sequence, kind, offset, size, count = HEADER.unpack(raw)
        assert magic == MAGIC
        payload = self._exactly(count)
        return Reply(raw + payload, sequence, kind, offset, size, payload)

    def ask(self, kind: int, **fields: int | bytes) -> Reply:
        """Send one request and return its reply, the only one outstanding."""
        self._sequence += 1
        self.send(frame(kind, self._sequence, **fields))  # type: ignore[arg-type]
        reply = self.receive()
        assert reply.sequence == self._sequence
        return reply

    def write(self, offset: int, data: bytes) -> None:
        reply = self.ask(WRITE, offset=offset, payload=data)
        assert (reply.kind, reply.size) == (RESPONSE, len(data)), reply

    def read(self, offset: int, length: int) -> bytes:
        reply = self.ask(READ, offset=offset, size=length)
        assert (reply.kind, reply.size) == (RESPONSE, length), reply
        return reply.payload

    def is_closed(self) -> bool:
        """Wait for the replica's end of the connection; False if it sends something instead."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
