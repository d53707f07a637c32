"""Units of layers on their way between engine and replica: connections of their own, and frames.

A unit is a megabyte, and a rebuild is many of them. Through gRPC each would be copied five times on
either side; here the socket takes it from its own memory, and fills it. The frames are
those of the data protocol: ``UNIT_READ`` with a layer's name as payload, ``UNIT_WRITE`` with the
name and the unit; ``RESPONSE`` with a unit, or the bytes that changed as its offset; ``ERROR`` with
an error as :func:`lhblock.engine.wire.encode_error` has it. A unit is its two maps and then the
blocks of the first one. One request at a time.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from lhblock._native import UNIT_BYTES, UNIT_MAP_BYTES, NativeUnit
from lhblock.engine import wire
from lhblock.errors import LhblockError, ReplicaIO, ReplicaUnreachable, UsageError

_NAME_BYTES_MAX: Final = 255
_ERROR_BYTES_MAX: Final = 1 << 16
_MAPS_BYTES: Final = 2 * UNIT_MAP_BYTES
_UNIT_BYTES_MAX: Final = _MAPS_BYTES + UNIT_BYTES


class Layers(Protocol):
    """Whose units they are: a member, seen from the connection."""

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None: ...
    def write_unit(
        self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool
    ) -> int: ...


class UnitConnection:
    """The engine's end. Blocking; one thread at a time.

    Args:
      fd: past its Hello; it belongs to this object.
      timeout_s: for one unit.
    """

    def __init__(self, fd: int, address: str, timeout_s: float) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(timeout_s)
        self._address = address
        self._sequence = 0

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def read(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        """Read a unit.

        Raises:
          ReplicaUnreachable, ReplicaIO: the connection is of no use any more.
          LhblockError: what the replica said went wrong.
        """
        self._send(wire.UNIT_READ, offset_bytes, 0, image, [])
        _, length_bytes = self._reply()
        if not _MAPS_BYTES <= length_bytes <= _UNIT_BYTES_MAX:
            raise ReplicaIO(self._address, f"sent {length_bytes} bytes as a unit of {image}")
        try:
            whole = receive_unit(self._socket, unit, length_bytes)
        except OSError as error:
            raise self._lost(error) from error
        if not whole:
            raise ReplicaIO(self._address, f"sent a unit of {image} that is none")

    def write(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        """Write a unit; return the bytes that changed. Raises: as :meth:`read`."""
        flags = wire.UNIT_EMPTY if empty else 0
        self._send(wire.UNIT_WRITE, offset_bytes, flags, image, [unit.maps, *unit.runs()])
        changed_bytes, length_bytes = self._reply()
        if length_bytes:
            raise ReplicaIO(self._address, f"sent {length_bytes} bytes after a write of {image}")
        return changed_bytes

    def _send(
        self,
        kind: int,
        offset_bytes: int,
        flags: int,
        image: str,
        payload: Sequence[memoryview],
    ) -> None:
        self._sequence += 1
        name = image.encode()
        length_bytes = 1 + len(name) + sum(map(len, payload))
        header = wire.HEADER.pack(
            wire.MAGIC, self._sequence, kind, offset_bytes, flags, length_bytes
        )
        try:
            send_all(self._socket, header + bytes([len(name)]) + name, payload)
        except OSError as error:
            raise self._lost(error) from error

    def _reply(self) -> tuple[int, int]:
        """The offset field, and the length of the payload that follows."""
        try:
            header = receive(self._socket, wire.HEADER.size)
            magic, sequence, kind, offset, _, payload_bytes = wire.HEADER.unpack(header)
            if magic != wire.MAGIC or sequence != self._sequence:
                raise ReplicaIO(self._address, "sent a reply to something else")
            if kind == wire.ERROR and payload_bytes <= _ERROR_BYTES_MAX:
                text = receive(self._socket, payload_bytes).decode(errors="replace")
                raise wire.decode_error(self._address, text)
        except OSError as error:
            raise self._lost(error) from error
        if kind != wire.RESPONSE:
            raise ReplicaIO(self._address, f"sent {payload_bytes} bytes of type {kind}")
        return offset, payload_bytes

    def _lost(self, error: OSError) -> ReplicaUnreachable:
        return ReplicaUnreachable(
            self._address, f"a connection for units failed: {error.strerror or error}"
        )


def serve_units(sock: socket.socket, layers: Layers) -> None:
    """The replica's end: answer until the peer hangs up or breaks the protocol. Blocking.

    To end it, shut the socket down. The layers stay as long.

    Args:
      sock: past its Hello, blocking; the caller's.
      layers: raises ``LhblockError`` for what cannot be.

    Raises:
      OSError: the connection failed.
    """
    with NativeUnit() as unit:
        while first := sock.recv(1):
            header = first + receive(sock, wire.HEADER.size - 1)
            magic, sequence, kind, offset, size, payload_bytes = wire.HEADER.unpack(header)
            if (
                magic != wire.MAGIC
                or kind not in (wire.UNIT_READ, wire.UNIT_WRITE)
                or not 1 <= payload_bytes <= 1 + _NAME_BYTES_MAX + _UNIT_BYTES_MAX
            ):
                return
            name_bytes = receive(sock, 1)[0]
            if 1 + name_bytes > payload_bytes:
                return
            image = receive(sock, name_bytes).decode(errors="replace")
            length_bytes = payload_bytes - 1 - name_bytes
            if kind == wire.UNIT_WRITE:
                if not receive_unit(sock, unit, length_bytes):
                    return
            elif length_bytes:
                return
            answer, payload = 0, list[memoryview]()
            try:
                if offset < 0:
                    raise UsageError(f"offset {offset} is before the beginning")
                if kind == wire.UNIT_READ:
                    layers.read_unit(image, offset, unit)
                    payload = [unit.maps, *unit.runs()]
                else:
                    empty = bool(size & wire.UNIT_EMPTY)
                    answer = layers.write_unit(image, offset, unit, empty=empty)
            except LhblockError as error:
                text = wire.encode_error(error).encode()[:_ERROR_BYTES_MAX]
                reply = wire.HEADER.pack(
                    wire.MAGIC, sequence, wire.ERROR, offset, len(text), len(text)
                )
                sock.sendall(reply + text)
                continue
            length_bytes = sum(map(len, payload))
            reply = wire.HEADER.pack(
                wire.MAGIC, sequence, wire.RESPONSE, answer, length_bytes, length_bytes
            )
            send_all(sock, reply, payload)


def send_all(sock: socket.socket, head: bytes, payload: Sequence[memoryview]) -> None:
    """Send some bytes and some pieces of memory, in as few calls as it takes."""
    rest = [memoryview(head), *payload]
    while rest:
        rest = _without(rest, sock.sendmsg(rest))


def receive(sock: socket.socket, count: int) -> bytes:
    """Receive so many bytes.

    Raises:
      OSError: the connection ended before.
    """
    data = bytearray(count)
    _receive_into(sock, [memoryview(data)])
    return bytes(data)


def receive_unit(sock: socket.socket, unit: NativeUnit, length_bytes: int) -> bool:
    """Receive a unit into its memory.

    Returns:
      Whether it goes with the length; if not, it is void, and so is what follows on the socket.

    Raises:
      OSError: as :func:`receive`.
    """
    if length_bytes < _MAPS_BYTES:
        return False
    _receive_into(sock, [unit.maps])
    runs = unit.runs()
    if _MAPS_BYTES + sum(map(len, runs)) != length_bytes:
        return False
    _receive_into(sock, runs)
    return True


def _receive_into(sock: socket.socket, pieces: Sequence[memoryview]) -> None:
    rest = [piece for piece in pieces if piece]
    while rest:
        got = sock.recvmsg_into(rest)[0]
        if got == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the other side closed it")
        rest = _without(rest, got)


def _without(pieces: list[memoryview], count: int) -> list[memoryview]:
    """What is left of pieces without their first bytes."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []
