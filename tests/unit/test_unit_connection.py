"""Connections for units: what each end makes of an other that breaks the protocol."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lhblock._native import UNIT_PACKED_BYTES, NativeUnit
from lhblock.engine import wire
from lhblock.engine._unit_connection import UnitConnection, serve_units
from lhblock.errors import NativeError, ReplicaIO, ReplicaUnreachable, UsageError

TIMEOUT_S = 30.0
IMAGE = "volume-snap-a.img"


class Layers:
    """One layer whose units are kept packed."""

    def __init__(self) -> None:
        self.units: dict[tuple[str, int], bytes] = {}
        self.error: Exception | None = None

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        if self.error is not None:
            raise self.error
        packed = self.units[image, offset_bytes]
        unit.unpack(bytearray(packed.ljust(UNIT_PACKED_BYTES, b"\0")), len(packed))

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        memory = bytearray(UNIT_PACKED_BYTES)
        length = unit.pack(memory)
        self.units[image, offset_bytes] = bytes(memory[:length])
        return 1 if empty else length


@contextmanager
def replica(layers: Layers) -> Iterator[socket.socket]:
    """The engine's end of a connection that is served."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)

    def run() -> None:
        with theirs:
            try:
                serve_units(theirs, layers)
            except OSError:
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def packed(blocks: int) -> bytes:
    return bytes([(1 << blocks) - 1]).ljust(64, b"\0") + b"d" * 4096 * blocks


def unit_of(data: bytes) -> NativeUnit:
    unit = NativeUnit()
    unit.unpack(bytearray(data.ljust(UNIT_PACKED_BYTES, b"\0")), len(data))
    return unit


def test_units_go_and_come_back() -> None:
    layers = Layers()
    with replica(layers) as sock, unit_of(packed(3)) as unit, NativeUnit() as back:
        connection = UnitConnection(sock.detach(), "r", TIMEOUT_S)
        assert connection.write(IMAGE, 1 << 20, unit, empty=False) == len(packed(3))
        assert connection.write(IMAGE, 0, unit, empty=True) == 1
        connection.read(IMAGE, 1 << 20, back)
        assert back.hash() == unit.hash()
        connection.close()


def test_errors_keep_their_kind_and_the_connection_goes_on() -> None:
    layers = Layers()
    layers.units[IMAGE, 0] = packed(1)
    with replica(layers) as sock, NativeUnit() as unit:
        connection = UnitConnection(sock.detach(), "r", TIMEOUT_S)
        layers.error = NativeError("read a layer", 28)
        with pytest.raises(NativeError, match="No space left"):
            connection.read(IMAGE, 0, unit)
        with pytest.raises(UsageError, match="before the beginning"):
            connection.read(IMAGE, -1, unit)
        layers.error = None
        connection.read(IMAGE, 0, unit)
        connection.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        wire.HEADER.pack(0x1234, 1, wire.UNIT_READ, 0, 0, 2) + b"\1a",
        wire.HEADER.pack(wire.MAGIC, 1, 0, 0, 0, 2) + b"\1a",
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_READ, 0, 0, 0),
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_READ, 0, 0, 0xFFFFFFFF),
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_READ, 0, 0, 2) + b"\xffa",
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, 256 + UNIT_PACKED_BYTES) + b"\0",
    ],
    ids=["magic", "type", "no name", "too long", "long name", "long unit"],
)
def test_replica_hangs_up_on_what_is_no_request(request_bytes: bytes) -> None:
    with replica(Layers()) as sock:
        sock.sendall(request_bytes)
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            return  # what it did not read is lost


def test_write_of_something_else_than_a_unit_is_refused() -> None:
    layers = Layers()
    with replica(layers) as sock:
        payload = b"\1a" + packed(2)[:-1]
        header = wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, len(payload))
        sock.sendall(header + payload)
        reply = wire.HEADER.unpack(sock.recv(wire.HEADER.size, socket.MSG_WAITALL))
        assert reply[2] == wire.ERROR
        assert b"no unit" in sock.recv(reply[5])
    assert layers.units == {}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (wire.HEADER.pack(0x1234, 1, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 2, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 1 << 30), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.ERROR, 0, 0, 1 << 30), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.ERROR, 0, 2, 2) + b"no", ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 100) + b"cut", ReplicaUnreachable),
        (b"", ReplicaUnreachable),
    ],
    ids=["magic", "sequence", "nothing", "too long", "long error", "text", "cut", "closed"],
)
def test_engine_doubts_replies(reply: bytes, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()
    with theirs, NativeUnit() as unit:
        theirs.sendall(reply)
        theirs.shutdown(socket.SHUT_WR)
        connection = UnitConnection(ours.detach(), "tcp://h:1", TIMEOUT_S)
        with pytest.raises(error):
            connection.read(IMAGE, 0, unit)
        connection.close()
