"""What a volume and a view of a snapshot have in common: requests and connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from lhblock._native import (
    NBD_BASE_ALLOCATION,
    NBD_READ_ONLY,
    NBD_STRUCTURED,
    Buffer,
    CloseReason,
    Event,
    EventType,
    NativeVolume,
)
from lhblock.engine._threads import run_io
from lhblock.errors import NativeError, NotServing, SizeError, VolumeError

T = TypeVar("T")


class Connection:
    """A client in its transmission phase. The socket belongs to the core."""

    def __init__(self, native: NativeVolume, connection_id: int) -> None:
        self._native = native
        self._done = trio.Event()
        self._reason: CloseReason | None = None
        self.id = connection_id

    async def closed(self) -> CloseReason:
        """Wait for the end of the connection and say why it ended.

        Cancelled: the connection goes on.
        """
        await self._done.wait()
        assert self._reason is not None
        return self._reason

    def close(self) -> None:
        """Ask the connection to end; :meth:`closed` returns when it has. Harmless if it ended."""
        if self._reason is None:
            try:
                self._native.close_connection(self.id)
            except NativeError:
                return  # it ended in this moment: its event is on the way

    def _ended(self, reason: CloseReason) -> None:
        self._reason = reason
        self._done.set()


class Device:
    """One native volume, its connections and the control path's own requests.

    Attributes:
      name: for messages.
      read_only: no request may change it.
      direct: its stores bypass the page cache, so they want block-aligned memory.
      files: how often it is open as a file, see :meth:`open_file`.
    """

    def __init__(self, native: NativeVolume, *, name: str, read_only: bool, direct: bool) -> None:
        self._native = native
        self._connections: dict[int, Connection] = {}
        self.name = name
        self.read_only = read_only
        self.direct = direct
        self.files = 0

    @property
    def native_id(self) -> int:
        """Id of the native volume, by which events are dispatched."""
        return self._native.id

    @property
    def native(self) -> NativeVolume:
        """The native volume, for the parts of this package."""
        return self._native

    @property
    def size_bytes(self) -> int:
        """Size that new connections are told."""
        return self._native.size_bytes

    @property
    def connections(self) -> int:
        """Clients connected now."""
        return len(self._connections)

    def attach(
        self,
        fd: int,
        *,
        structured: bool,
        base_allocation_id: int | None = None,
        read_only: bool = False,
    ) -> Connection:
        """Hand a socket that is past its NBD handshake to the core.

        Args:
          fd: a connected stream socket. On success it belongs to the core; on an error it is
            still the caller's.
          structured: structured replies were negotiated.
          base_allocation_id: id the client selected ``base:allocation`` with, or None.
          read_only: refuse changes on this connection.

        Raises:
          NotServing: it is being closed.
          VolumeError: the core refused, for instance because memory ran out.
        """
        if self._native.closed:
            raise NotServing(self.name, "is being closed; connect again when it is back")
        flags = NBD_STRUCTURED if structured else 0
        if base_allocation_id is not None:
            flags |= NBD_BASE_ALLOCATION
        if read_only or self.read_only:
            flags |= NBD_READ_ONLY
        try:
            connection_id = self._native.attach(fd, flags, base_allocation_id or 0)
        except NativeError as error:
            raise VolumeError(self.name, f"cannot serve a connection: {error}") from error
        return self._take_in(connection_id)

    def _take_in(self, connection_id: int) -> Connection:
        connection = Connection(self._native, connection_id)
        self._connections[connection_id] = connection
        return connection

    def close_connections(self) -> None:
        """Ask every connection to end."""
        for connection in list(self._connections.values()):
            connection.close()

    @contextmanager
    def open_file(self) -> Iterator[None]:
        """Count as a user for the block: somebody has it open as a file."""
        self.files += 1
        try:
            yield
        finally:
            self.files -= 1

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a range of any alignment.

        Raises:
          SizeError: the range is not within the volume.
          VolumeError: no replica could be read.

        Cancelled: the read ends first.
        """
        self._check_range(offset_bytes, length_bytes)
        return await self._run(self._native.read, offset_bytes, length_bytes)

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        """Write a range of any alignment to every replica.

        Raises:
          SizeError: the range is not within the volume.
          VolumeError: the write failed, for instance for want of space.

        Cancelled: the write ends first.
        """
        self._check_range(offset_bytes, len(data))
        await self._run(lambda: self._native.write(offset_bytes, data, fua=fua))

    async def flush(self) -> None:
        """Put every completed write on stable storage of every replica.

        Raises:
          VolumeError: a replica could not, and it is the last one.

        Cancelled: the flush ends first.
        """
        await self._run(self._native.flush)

    async def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """Discard a range; whole blocks of it read as zeros from now on.

        Raises:
          SizeError: the range is not within the volume.
          VolumeError: the discard failed.

        Cancelled: the discard ends first.
        """
        self._check_range(offset_bytes, length_bytes)
        await self._run(self._native.trim, offset_bytes, length_bytes)

    async def zero(self, offset_bytes: int, length_bytes: int, *, no_hole: bool = False) -> None:
        """Write zeros to a range of any alignment.

        Args:
          no_hole: leave allocated space behind instead of a hole.

        Raises:
          SizeError: the range is not within the volume.
          VolumeError: the write failed.

        Cancelled: the write ends first.
        """
        self._check_range(offset_bytes, length_bytes)
        await self._run(lambda: self._native.zero(offset_bytes, length_bytes, no_hole=no_hole))

    async def block_status(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """(length in bytes, NBD state flags) pairs from ``offset_bytes`` on; may stop early.

        Raises:
          SizeError: the range is not within the volume.

        Cancelled: the query ends first.
        """
        self._check_range(offset_bytes, length_bytes)
        return await self._run(self._native.block_status, offset_bytes, length_bytes)

    def on_event(self, event: Event) -> None:
        """Take an event of the core that carries this device's id. Never blocks."""
        if event.type == EventType.CONNECTION_CLOSED:
            connection = self._connections.pop(event.subject_id, None)
            if connection is not None:
                connection._ended(CloseReason(event.error))

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        try:
            return await run_io(function, *args)
        except NativeError as error:
            raise VolumeError(self.name, str(error)) from error

    def _check_range(self, offset_bytes: int, length_bytes: int) -> None:
        end_bytes = offset_bytes + length_bytes
        if offset_bytes < 0 or length_bytes < 0 or end_bytes > self.size_bytes:
            raise SizeError(
                self.name,
                f"range of {length_bytes} bytes at {offset_bytes} is not within its "
                f"{self.size_bytes} bytes",
            )
