"""One replica that an lhblock engine elsewhere has opened: the member it sees, on this host.

The engine orders every step and holds the locks that keep them apart (docs/internals/snapshots.md);
what is here is a :class:`LocalMember`, a native volume for its data connections, and the bound
between them: nothing is closed under a call that is going on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from lhblock._native import (
    STORE_DIRECT,
    STORE_READ_ONLY,
    VOLUME_READ_ONLY,
    Event,
    EventType,
    NativeUnit,
    NativeVolume,
)
from lhblock.engine import wire
from lhblock.engine._config import CacheMode
from lhblock.engine._device import Connection, Device
from lhblock.engine._engine import Engine
from lhblock.engine._local_member import LocalMember
from lhblock.engine._member import Store
from lhblock.engine._threads import run_metadata
from lhblock.engine._unit_connection import serve_units
from lhblock.errors import NotServing, ReplicaIO, ReplicaLocked, UsageError

log = structlog.get_logger(__name__)

T = TypeVar("T")
Runner = Callable[..., Awaitable[T]]

VIEWS_MAX: Final = 64
UNIT_CONNECTIONS_MAX: Final = 16


class HostedDevice(Device):
    """What data connections of an engine read and write: the live chain, or a snapshot.

    Attributes:
      error: why nothing can be read or written any more; "" while all is well.
    """

    def __init__(self, native: NativeVolume, *, name: str, read_only: bool) -> None:
        super().__init__(native, name=name, read_only=read_only, direct=False)
        self.error = ""

    def attach_data(self, fd: int) -> Connection:
        """As :meth:`DrivenReplica.attach_data`."""
        if self._native.closed:
            raise NotServing(self.name, "is being closed")
        return self._take_in(self._native.attach_replica(fd))

    def on_event(self, event: Event) -> None:
        """Take an event of the core. Never blocks."""
        super().on_event(event)
        if event.type == EventType.STORE_FAILED:
            # The engine learns it from the end of its connections, and does without this replica.
            self.error = f"I/O at {event.offset_bytes}: {os.strerror(event.error)}"
            log.error("replica failed", replica=self.name, reason=self.error)
            self._native.give_up()
            self.close_connections()


class _CheckedLayers:
    """The layers of a member, for whoever may ask for one that there is not."""

    def __init__(self, member: LocalMember) -> None:
        self._member = member

    def _check(self, image: str) -> str:
        if image not in self._member.records.disks:
            raise UsageError(f"replica {self._member.path} has no layer {image!r:.300}")
        return image

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        self._member.read_unit(self._check(image), offset_bytes, unit)

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        return self._member.write_unit(self._check(image), offset_bytes, unit, empty=empty)


async def _run_units(function: Callable[[], None]) -> None:
    # Each has a thread for as long as it is there; how many there are is bounded by others.
    await trio.to_thread.run_sync(function, limiter=trio.CapacityLimiter(1))


class HostedReplica:
    """A replica directory that one engine has opened.

    Args:
      engine_id: who.
      cache: as for :func:`open_driven`.

    Attributes:
      member: what the engine sees.
      device: for its data connections; None before :meth:`open_store`.
    """

    def __init__(
        self, engine: Engine, path: Path, engine_id: str, *, cache: CacheMode, read_only: bool
    ) -> None:
        flags = (STORE_DIRECT if cache == "none" else 0) | (STORE_READ_ONLY if read_only else 0)
        self._engine = engine
        self._read_only = read_only
        self._views: dict[int, tuple[HostedDevice, Store]] = {}
        self._next_view = wire.HEAD_VIEW + 1
        self._running = 0
        self._idle = trio.Event()
        self._closing = False
        self._tree = trio.Lock()
        self._unit_sockets: set[socket.socket] = set()
        self.engine_id = engine_id
        self.member = LocalMember(path, engine.native, flags)
        self.device: HostedDevice | None = None

    @property
    def connections(self) -> int:
        """Data connections that there are now."""
        return 0 if self.device is None else self.device.connections

    def find_device(self, view: int) -> HostedDevice | None:
        """What a data connection is for: ``wire.HEAD_VIEW``, or what :meth:`open_view` returned."""
        if view == wire.HEAD_VIEW:
            return self.device
        return self._views[view][0] if view in self._views else None

    async def run(self, run: Runner[T], function: Callable[[], T]) -> T:
        """Run a blocking call on the member; closing waits for it.

        Args:
          run: where: ``run_metadata`` or another of its kind.

        Cancelled before its thread starts: nothing was done.
        """
        if self._closing:
            raise ReplicaLocked(self.member.address, "is being closed")
        self._running += 1
        try:
            return await run(function)
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()
                self._idle = trio.Event()

    async def change(self, function: Callable[[], T]) -> T:
        """Run a blocking call that changes layers: one at a time. As :meth:`run`."""
        async with self._tree:
            return await self.run(run_metadata, function)

    async def switch(self, change: Callable[[], None]) -> None:
        """Run one after which another store, or another size, is published.

        The engine has frozen its I/O; a request of its that timed out may still be here.
        """
        device = self._need_device()

        def switch() -> None:
            native = device.native
            native.freeze()
            try:
                change()
                size_bytes = self.member.records.size_bytes
                if size_bytes != native.size_bytes:
                    native.resize(size_bytes)
                native.publish([self.member.store])
            finally:
                native.thaw()
            self.member.release_replaced()

        await self.change(switch)

    def _need_device(self) -> HostedDevice:
        if self.device is None:
            raise UsageError(f"replica {self.member.path} has no store open")
        return self.device

    async def open_store(self, *, write_only: bool) -> None:
        """Open the live chain and let data connections come.

        Raises:
          NativeError, ReplicaError: there is no store.
        """
        if self.device is not None:
            raise UsageError(f"replica {self.member.path} has a store open")
        member = self.member

        def open_store() -> NativeVolume:
            member.open_store(write_only=write_only)
            return self._open_volume(member.store, member.records.size_bytes, self._read_only)

        native = await self.change(open_store)
        self.device = self._add(native, member.address, self._read_only)
        member.serve(native)

    def _open_volume(self, store: Store, size_bytes: int, read_only: bool) -> NativeVolume:
        native = NativeVolume(self._engine.native, size_bytes, VOLUME_READ_ONLY if read_only else 0)
        try:
            native.publish([store])
        except BaseException:
            native.close()
            raise
        return native

    def _add(self, native: NativeVolume, name: str, read_only: bool) -> HostedDevice:
        device = HostedDevice(native, name=name, read_only=read_only)
        self._engine.add_device(device)
        return device

    async def open_view(self, images: Sequence[str], size_bytes: int) -> int:
        """Open some layers, oldest first, for data connections that read; return their number.

        Raises:
          NativeError, ReplicaError: nothing is left open.
        """
        if len(self._views) >= VIEWS_MAX:
            raise ReplicaIO(self.member.path, f"has {VIEWS_MAX} views open, the most there can be")

        def open_view() -> tuple[NativeVolume, Store]:
            store = self.member.open_view(images, size_bytes)
            try:
                return self._open_volume(store, size_bytes, True), store
            except BaseException:
                store.close()
                raise

        native, store = await self.change(open_view)
        view, self._next_view = self._next_view, self._next_view + 1
        self._views[view] = self._add(native, f"{self.member.address}@{view}", True), store
        return view

    async def close_view(self, view: int) -> None:
        """Close what :meth:`open_view` opened; harmless when it is closed."""
        if view in self._views:
            device, store = self._views.pop(view)
            await self._close_device(device)
            await run_metadata(store.close)

    async def serve_units(self, sock: socket.socket) -> None:
        """Answer on a connection for units until it ends, or this is closed. Closes the socket.

        Raises:
          OSError: the connection failed.

        Not cancelled: closing ends it.
        """
        with sock, trio.CancelScope(shield=True):
            sock.setblocking(True)
            if self._closing or len(self._unit_sockets) >= UNIT_CONNECTIONS_MAX:
                return
            self._unit_sockets.add(sock)
            try:
                await self.run(_run_units, lambda: serve_units(sock, _CheckedLayers(self.member)))
            finally:
                self._unit_sockets.discard(sock)

    async def close(self, close_member: Callable[[], None]) -> None:
        """Close everything, the member last.

        Args:
          close_member: blocking; how.

        Not cancelled: what is half closed is of no use to anybody.
        """
        with trio.CancelScope(shield=True):
            self._closing = True
            for sock in self._unit_sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            while self._running:
                await self._idle.wait()
            for view in list(self._views):
                await self.close_view(view)
            device, self.device = self.device, None
            if device is not None:
                await self._close_device(device)
                self.member.serve(None)
            await run_metadata(close_member)

    async def _close_device(self, device: HostedDevice) -> None:
        native_id = device.native_id
        await run_metadata(device.native.close)
        self._engine.remove_device(native_id)
