"""The client's half of the NBD handshake on plain sockets, and the map of an export's holes.

The kernel speaks the transmission phase itself but leaves the handshake to whoever hands it the
socket. Blocking, with a time limit on every socket.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lhblock.errors import FrontendError
from lhblock.frontend.nbd._protocol import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_IHAVEOPT,
    NBD_INFO_EXPORT,
    NBD_MAGIC,
    NBD_OPT_GO,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REP_META_CONTEXT,
    OPTION_HEADER,
    REPLY_HEADER,
)
from lhblock.frontend.nbd._uri import NbdUri

REPLY_BYTES_MAX: Final = 64 << 10
REPLIES_MAX: Final = 64  # to one option
EXTENTS_MAX: Final = 1 << 16  # of one answer
STATUS_BYTES: Final = 1 << 30  # asked about at once
DESCRIPTOR_BYTES: Final = 8

_REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
_REQUEST_MAGIC: Final = 0x25609513
_CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of its data
_CHUNK_MAGIC: Final = 0x668E33EF
_CMD_DISC: Final = 2
_CMD_BLOCK_STATUS: Final = 7
_CHUNK_BLOCK_STATUS: Final = 5
_ZERO: Final = 1 << 1  # of base:allocation: reads as zeros


@dataclass(frozen=True)
class Export:
    """What the server said of the export. `flags` are the transmission flags."""

    size_bytes: int
    flags: int


def open_export(uri: NbdUri, *, timeout_s: float) -> tuple[socket.socket, Export]:
    """Connect and choose the export; the socket is then ready for the transmission phase.

    Raises:
      OSError: nobody answers, or not in time.
      FrontendError: the server refuses, or is none.
    """
    sock = _connect(uri, timeout_s)
    try:
        _greet(sock, uri)
        export = _go(sock, uri)
        sock.settimeout(None)
        return sock, export
    except BaseException:
        sock.close()
        raise


def data_extents(uri: NbdUri, *, timeout_s: float) -> Iterator[tuple[int, int]]:
    """Yield offset and length, in bytes, of what may read as something else than zeros.

    A server that cannot tell gets one extent: everything. Raises as `open_export`.
    """
    with _connect(uri, timeout_s) as sock:
        _greet(sock, uri)
        mapped = _ask_for_map(sock, uri)
        export = _go(sock, uri)
        if not mapped:
            yield 0, export.size_bytes
            return
        offset = 0
        while offset < export.size_bytes:
            asked = min(STATUS_BYTES, export.size_bytes - offset)
            for length, state in _status(sock, offset, asked):
                length = min(length, export.size_bytes - offset)
                if not state & _ZERO:
                    yield offset, length
                offset += length
        sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))


def _connect(uri: NbdUri, timeout_s: float) -> socket.socket:
    if uri.socket_path is not None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(uri.socket_path)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((uri.host or "", uri.port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def _greet(sock: socket.socket, uri: NbdUri) -> None:
    magic, style, flags = struct.unpack(">QQH", _receive(sock, 18))
    if magic != NBD_MAGIC or style != NBD_IHAVEOPT or not flags & NBD_FLAG_FIXED_NEWSTYLE:
        raise FrontendError(f"{uri}: what answers there is no NBD server that negotiates")
    ours = NBD_FLAG_C_FIXED_NEWSTYLE
    if flags & NBD_FLAG_NO_ZEROES:
        ours |= NBD_FLAG_C_NO_ZEROES
    sock.sendall(CLIENT_FLAGS.pack(ours))


def _go(sock: socket.socket, uri: NbdUri) -> Export:
    name = uri.export.encode()
    _send(sock, NBD_OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
    export: Export | None = None
    for kind, data in _replies(sock, NBD_OPT_GO):
        if kind & NBD_REP_FLAG_ERROR:
            said = data.decode("utf-8", "replace") or f"error {kind - NBD_REP_FLAG_ERROR}"
            raise FrontendError(f"{uri}: the server refuses export {uri.export!r}: {said}")
        if kind == NBD_REP_INFO and data[:2] == struct.pack(">H", NBD_INFO_EXPORT):
            if len(data) != 12:
                raise FrontendError(f"{uri}: the server's description of the export is cut off")
            export = Export(*struct.unpack(">QH", data[2:]))
    if export is None:
        raise FrontendError(f"{uri}: the server does not say how large the export is")
    return export


def _ask_for_map(sock: socket.socket, uri: NbdUri) -> bool:
    _send(sock, NBD_OPT_STRUCTURED_REPLY, b"")
    if any(kind != NBD_REP_ACK for kind, _ in _replies(sock, NBD_OPT_STRUCTURED_REPLY)):
        return False
    query = BASE_ALLOCATION.encode()
    name = uri.export.encode()
    _send(
        sock,
        NBD_OPT_SET_META_CONTEXT,
        struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(query)) + query,
    )
    kinds = [kind for kind, _ in _replies(sock, NBD_OPT_SET_META_CONTEXT)]
    return NBD_REP_META_CONTEXT in kinds and kinds[-1] == NBD_REP_ACK


def _status(sock: socket.socket, offset: int, length: int) -> list[tuple[int, int]]:
    sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_BLOCK_STATUS, 1, offset, length))
    magic, _, kind, _, data_bytes = _CHUNK.unpack(_receive(sock, _CHUNK.size))
    if magic != _CHUNK_MAGIC or data_bytes > 4 + EXTENTS_MAX * DESCRIPTOR_BYTES:
        raise FrontendError("the server's block status is no reply of NBD")
    data = _receive(sock, data_bytes)
    descriptors = data[4:]
    if kind == _CHUNK_BLOCK_STATUS and descriptors and not len(descriptors) % DESCRIPTOR_BYTES:
        pairs = [(int(size), int(state)) for size, state in struct.iter_unpack(">II", descriptors)]
        if all(size for size, _ in pairs):
            return pairs
    raise FrontendError(f"the server cannot tell what is at {offset} (+{length} bytes)")


def _send(sock: socket.socket, option: int, data: bytes) -> None:
    sock.sendall(OPTION_HEADER.pack(NBD_IHAVEOPT, option, len(data)) + data)


def _replies(sock: socket.socket, option: int) -> list[tuple[int, bytes]]:
    """Every reply to an option; the last is an acknowledgement or an error."""
    found: list[tuple[int, bytes]] = []
    while len(found) < REPLIES_MAX:
        head = _receive(sock, REPLY_HEADER.size)
        magic, about, kind, data_bytes = REPLY_HEADER.unpack(head)
        if magic != NBD_REP_MAGIC or about != option or data_bytes > REPLY_BYTES_MAX:
            raise FrontendError("the server's reply is none of NBD")
        found.append((kind, _receive(sock, data_bytes)))
        if kind == NBD_REP_ACK or kind & NBD_REP_FLAG_ERROR:
            return found
    raise FrontendError(f"the server's answer has more than {REPLIES_MAX} parts")


def _receive(sock: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = sock.recv(length)
        if not part:
            raise FrontendError("the server closed the connection in the handshake")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
