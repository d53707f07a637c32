"""Connections for units: what each end makes of an other that breaks the protocol."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lhblock._native import UNIT_BYTES, NativeUnit
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
        fill(unit, self.units[image, offset_bytes])

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        self.units[image, offset_bytes] = b"".join([unit.maps, *unit.runs()])
        return 1 if empty else len(self.units[image, offset_bytes])


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


def fill(unit: NativeUnit, data: bytes) -> None:
    unit.maps[:] = data[:64]
    at = 64
    for run in unit.runs():
        run[:] = data[at : at + len(run)]
        at += len(run)


def unit_of(data: bytes) -> NativeUnit:
    unit = NativeUnit()
    fill(unit, data)
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
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_READ, 0, 0, 3) + b"\1a!",
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, 257 + 64 + UNIT_BYTES) + b"\0",
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, 1 + 64 + UNIT_BYTES) + bytes(65),
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, 1 + 63) + bytes(64),
        wire.HEADER.pack(wire.MAGIC, 1, wire.UNIT_WRITE, 0, 0, 1 + 64) + b"\0\1" + bytes(63),
    ],
    ids=[
        "magic",
        "type",
        "no name",
        "too long",
        "long name",
        "payload of a read",
        "long unit",
        "unit longer than its map says",
        "half a map",
        "unit shorter than its map says",
    ],
)
def test_replica_hangs_up_on_what_is_no_request(request_bytes: bytes) -> None:
    with replica(Layers()) as sock:
        sock.sendall(request_bytes)
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            return  # what it did not read is lost


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (wire.HEADER.pack(0x1234, 1, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 2, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 0), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 1 << 30), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 64) + b"\1" + bytes(63), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.ERROR, 0, 0, 1 << 30), ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.ERROR, 0, 2, 2) + b"no", ReplicaIO),
        (wire.HEADER.pack(wire.MAGIC, 1, wire.RESPONSE, 0, 0, 100) + b"cut", ReplicaUnreachable),
        (b"", ReplicaUnreachable),
    ],
    ids=[
        "magic",
        "sequence",
        "nothing",
        "too long",
        "no unit",
        "long error",
        "text",
        "cut",
        "closed",
    ],
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
