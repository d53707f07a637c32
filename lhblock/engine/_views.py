"""Read-only volumes of snapshots.

A view reads the layers from the oldest to its snapshot, on every usable replica, through stores of
its own. Those layers never change their content, but a merge moves blocks between them: so merges
leave every layer of an open view alone, and go on when it is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio

from lhblock._native import (
    STORE_DIRECT,
    VOLUME_READ_ONLY,
    Event,
    EventType,
    NativeEngine,
    NativeVolume,
)
from lhblock.engine._device import Device
from lhblock.engine._member import Member, Store
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import NativeError, SnapshotNotFound, VolumeError
from lhblock.replica import Disk, snapshot_image

log = structlog.get_logger(__name__)


class SnapshotView(Device):
    """The content of one snapshot, read-only.

    Attributes:
      snapshot: its name.
      images: the layers it reads.
    """

    def __init__(
        self,
        native: NativeVolume,
        stores: list[Store],
        *,
        volume: str,
        snapshot: str,
        images: frozenset[str],
        direct: bool,
    ) -> None:
        super().__init__(native, name=f"{volume}@{snapshot}", read_only=True, direct=direct)
        self._stores = stores
        self.snapshot = snapshot
        self.images = images
        self.users = 0

    def on_event(self, event: Event) -> None:
        """Take an event; a store that fails here missed no write, so nothing has to be fenced."""
        super().on_event(event)
        if event.type == EventType.STORE_FAILED:
            log.error("replica failed under a view", volume=self.name, error=event.error)
            try:
                self._native.fenced(event.subject_id)
            except NativeError as error:
                log.error("release after a failure", volume=self.name, reason=str(error))

    async def close(self) -> None:
        """Close connections, the native volume and the stores. Not cancelled."""
        with trio.CancelScope(shield=True):
            await run_metadata(self._close)

    def _close(self) -> None:
        self._native.close()
        for store in self._stores:
            store.close()


class Views:
    """Open views of one volume, shared by everybody who looks at the same snapshot.

    Args:
      volume: its name, for messages.
      engine: the C engine.
      replicas: whose usable members a view reads.
      lock: the structure lock, so that layers stay while a view opens.
      store_flags: how the volume's stores are opened.
      add_device: to receive a view's events.
      remove_device: to stop that.
      changed: called when a view closed, because a merge may have waited for it.
    """

    def __init__(
        self,
        volume: str,
        engine: NativeEngine,
        replicas: ReplicaSet,
        lock: trio.Lock,
        *,
        store_flags: int,
        add_device: Callable[[Device], None],
        remove_device: Callable[[int], None],
        changed: Callable[[], None],
    ) -> None:
        self._volume = volume
        self._engine = engine
        self._replicas = replicas
        self._lock = lock
        self._store_flags = store_flags
        self._add_device = add_device
        self._remove_device = remove_device
        self._changed = changed
        self._open: dict[str, SnapshotView] = {}

    @property
    def open_snapshots(self) -> tuple[str, ...]:
        """Names of the snapshots that have an open view."""
        return tuple(sorted(self._open))

    def pinned(self) -> frozenset[str]:
        """Images that some view reads."""
        return frozenset().union(*(view.images for view in self._open.values()))

    @asynccontextmanager
    async def view(self, snapshot: str) -> AsyncIterator[SnapshotView]:
        """Open, or share, a view for the block; see :meth:`Volume.open_view`."""
        async with self._lock:
            view = self._open.get(snapshot)
            if view is None:
                view = await self._open_view(snapshot)
                self._open[snapshot] = view
                self._add_device(view)
            view.users += 1
        try:
            yield view
        finally:
            with trio.CancelScope(shield=True):
                async with self._lock:
                    view.users -= 1
                    if view.users == 0:
                        native_id = view.native_id
                        await view.close()
                        self._remove_device(native_id)
                        del self._open[snapshot]
                        self._changed()

    async def _open_view(self, snapshot: str) -> SnapshotView:
        first = self._replicas.first
        disk = first.records.disks.get(snapshot_image(snapshot))
        if disk is None or disk.removed:
            raise SnapshotNotFound(
                self._volume,
                f"it has no snapshot {snapshot!r}; `lhblock snapshot ls` shows them",
            )
        sizes = await run_metadata(first.layer_sizes)
        size_bytes = sizes[disk.name].image_bytes
        images: set[str] = set()

        def open_store(member: Member) -> Store:
            chain = [layer.name for layer in chain_of(member, disk.name)]
            images.update(chain)
            return member.open_view(chain, size_bytes)

        with trio.CancelScope(shield=True):
            stores: list[Store] = []
            try:
                # A replica whose layers cannot be opened is as bad as one that cannot be read.
                opened = await self._replicas.each(open_store, during="opening a snapshot")
                await self._replicas.withdraw()
                stores = list(opened.values())
                native = await run_metadata(
                    NativeVolume, self._engine, size_bytes, VOLUME_READ_ONLY
                )
                try:
                    native.publish(stores)
                except NativeError:
                    native.close()
                    raise
            except NativeError as error:
                for store in stores:
                    store.close()
                raise VolumeError(
                    self._volume, f"cannot open snapshot {snapshot!r}: {error}"
                ) from error
        return SnapshotView(
            native,
            stores,
            volume=self._volume,
            snapshot=snapshot,
            images=frozenset(images),
            direct=bool(self._store_flags & STORE_DIRECT),
        )


def chain_of(member: Member, image: str) -> tuple[Disk, ...]:
    """The layers that make up an image's content, oldest first."""
    disks = member.records.disks
    chain: list[Disk] = []
    while image:
        chain.append(disks[image])
        image = disks[image].parent
    return tuple(reversed(chain))
