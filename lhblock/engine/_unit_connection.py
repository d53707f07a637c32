"""Units of layers on their way between engine and replica: connections of their own, and frames.

A unit is a megabyte, and a rebuild is many of them. Through gRPC each would be copied five times on
either side; here it goes from one piece of memory to the socket, and back into one. The frames are
those of the data protocol: ``UNIT_READ`` with a layer's name as payload, ``UNIT_WRITE`` with the
name and the unit; ``RESPONSE`` with a unit, or the bytes that changed as its offset; ``ERROR`` with
an error as :func:`lhblock.engine.wire.encode_error` has it. One request at a time.
"""

from __future__ import annotations

import socket
from typing import Final, Protocol

from lhblock._native import UNIT_PACKED_BYTES, NativeUnit
from lhblock.engine import wire
from lhblock.errors import LhblockError, ReplicaIO, ReplicaUnreachable, UsageError

_NAME_BYTES_MAX: Final = 255
_ERROR_BYTES_MAX: Final = 1 << 16


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
        self._memory = bytearray(UNIT_PACKED_BYTES)
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
        self._send(wire.UNIT_READ, offset_bytes, 0, image, 0)
        _, length_bytes = self._reply()
        try:
            unit.unpack(self._memory, length_bytes)
        except ValueError as error:
            raise ReplicaIO(self._address, f"sent a unit of {image} that is none") from error

    def write(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        """Write a unit; return the bytes that changed. Raises: as :meth:`read`."""
        length_bytes = unit.pack(self._memory)
        flags = wire.UNIT_EMPTY if empty else 0
        self._send(wire.UNIT_WRITE, offset_bytes, flags, image, length_bytes)
        return self._reply()[0]

    def _send(
        self, kind: int, offset_bytes: int, flags: int, image: str, length_bytes: int
    ) -> None:
        self._sequence += 1
        name = image.encode()
        header = wire.HEADER.pack(
            wire.MAGIC, self._sequence, kind, offset_bytes, flags, 1 + len(name) + length_bytes
        )
        try:
            send_all(self._socket, header + bytes([len(name)]) + name, self._memory, length_bytes)
        except OSError as error:
            raise self._lost(error) from error

    def _reply(self) -> tuple[int, int]:
        """The offset field and the length of the payload, which is in the memory."""
        try:
            header = receive(self._socket, wire.HEADER.size)
            magic, sequence, kind, offset, _, payload_bytes = wire.HEADER.unpack(header)
            if magic != wire.MAGIC or sequence != self._sequence:
                raise ReplicaIO(self._address, "sent a reply to something else")
            if kind == wire.ERROR and payload_bytes <= _ERROR_BYTES_MAX:
                text = receive(self._socket, payload_bytes).decode(errors="replace")
                raise wire.decode_error(self._address, text)
            if kind != wire.RESPONSE or payload_bytes > UNIT_PACKED_BYTES:
                raise ReplicaIO(self._address, f"sent {payload_bytes} bytes of type {kind}")
            receive_into(self._socket, self._memory, payload_bytes)
        except OSError as error:
            raise self._lost(error) from error
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
    memory = bytearray(UNIT_PACKED_BYTES)
    with NativeUnit() as unit:
        while first := sock.recv(1):
            header = first + receive(sock, wire.HEADER.size - 1)
            magic, sequence, kind, offset, size, payload_bytes = wire.HEADER.unpack(header)
            if (
                magic != wire.MAGIC
                or kind not in (wire.UNIT_READ, wire.UNIT_WRITE)
                or not 1 <= payload_bytes <= 1 + _NAME_BYTES_MAX + UNIT_PACKED_BYTES
            ):
                return
            name_bytes = receive(sock, 1)[0]
            if 1 + name_bytes > payload_bytes:
                return
            image = receive(sock, name_bytes).decode(errors="replace")
            length_bytes = payload_bytes - 1 - name_bytes
            if length_bytes > UNIT_PACKED_BYTES:
                return
            receive_into(sock, memory, length_bytes)
            answer, reply_bytes = 0, 0
            try:
                if offset < 0:
                    raise UsageError(f"offset {offset} is before the beginning")
                if kind == wire.UNIT_READ:
                    layers.read_unit(image, offset, unit)
                    reply_bytes = unit.pack(memory)
                else:
                    _unpack(unit, memory, length_bytes)
                    empty = bool(size & wire.UNIT_EMPTY)
                    answer = layers.write_unit(image, offset, unit, empty=empty)
                reply = wire.HEADER.pack(
                    wire.MAGIC, sequence, wire.RESPONSE, answer, reply_bytes, reply_bytes
                )
                send_all(sock, reply, memory, reply_bytes)
            except LhblockError as error:
                text = wire.encode_error(error).encode()[:_ERROR_BYTES_MAX]
                reply = wire.HEADER.pack(
                    wire.MAGIC, sequence, wire.ERROR, offset, len(text), len(text)
                )
                send_all(sock, reply + text, memory, 0)


def _unpack(unit: NativeUnit, memory: bytearray, length_bytes: int) -> None:
    try:
        unit.unpack(memory, length_bytes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def send_all(sock: socket.socket, head: bytes, memory: bytearray, length_bytes: int) -> None:
    """Send some bytes and the first of a piece of memory, in as few calls as it takes."""
    rest = [memoryview(head), memoryview(memory)[:length_bytes]]
    while rest:
        sent = sock.sendmsg(rest)
        while rest and sent >= len(rest[0]):
            sent -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][sent:]


def receive(sock: socket.socket, count: int) -> bytes:
    """Receive so many bytes.

    Raises:
      OSError: the connection ended before.
    """
    data = bytearray(count)
    receive_into(sock, data, count)
    return bytes(data)


def receive_into(sock: socket.socket, memory: bytearray, count: int) -> None:
    """Receive so many bytes into a piece of memory. Raises: as :func:`receive`."""
    view = memoryview(memory)[:count]
    while view:
        got = sock.recv_into(view)
        if got == 0:
            raise ConnectionResetError(104, "the other side closed it")
        view = view[got:]
