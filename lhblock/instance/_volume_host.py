"""The volume of a controller: it is opened when somebody says which replicas it has, closed when
somebody asks for that, and the process goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from lhblock.engine import Engine
from lhblock.errors import UsageError, VolumeNotFound
from lhblock.frontend.nbd import Listener
from lhblock.instance._creation import create_volume
from lhblock.instance._iscsi import IscsiDoor
from lhblock.instance._registry import MADE_NOTHING, Registry, ReplicaRecord, VolumeRecord
from lhblock.instance._serve import Process, open_recorded
from lhblock.instance._served import ServedVolume
from lhblock.instance._serving import refuse_served
from lhblock.settings import RemoteAddress, parse_replica


class VolumeHost:
    """Opens and closes one volume.

    Args:
      nursery: where the open volume lives. Cancelling it closes the volume cleanly.
      frontend: offered as soon as the volume is open; "" is none.
      limits: fields of the record that replace what is recorded.
      sync_limit: reported by ReplicaRebuildConcurrentSyncLimitGet.

    Attributes:
      size_bytes: of a new volume, and after the first start what it had last.
      unmap_mark: kept for callers who set it, without effect.
      door: of iSCSI, open while that is the front end and it is up.
    """

    def __init__(
        self,
        process: Process,
        name: str,
        engine: Engine,
        nursery: trio.Nursery,
        listeners: Sequence[Listener],
        *,
        size_bytes: int | None,
        frontend: str,
        limits: dict[str, int],
        unmap_mark: bool,
        sync_limit: int,
    ) -> None:
        self._process = process
        self._engine = engine
        self._nursery = nursery
        self._listeners = listeners
        self._create_bytes = size_bytes
        self._limits = limits
        self._sync_limit = sync_limit
        self._lock = trio.Lock()
        self._stop = trio.Event()
        self._closed = trio.Event()
        self.name = name
        self.size_bytes = 0
        self.frontend = frontend
        self.unmap_mark = unmap_mark
        self.door = IscsiDoor(
            nursery,
            engine=engine,
            volumes=process.volumes,
            data_dir=process.data_dir,
            settings=process.settings,
            fuse=process.fuse,
        )

    @property
    def frontends(self) -> Sequence[str]:
        """Those that this process can offer."""
        return self._process.settings.frontend

    @property
    def served(self) -> ServedVolume | None:
        """The volume while it is open."""
        return self._process.volumes.get(self.name)

    async def start(self, addresses: Sequence[str], size_bytes: int | None = None) -> None:
        """Open the volume with these replicas, which replace the recorded ones.

        Nothing happens if it is open.

        Blank replicas of a volume that is not recorded are created with `size_bytes`, or the
        size this process was started with.

        Raises:
          UsageError: an address, or no size for a new volume.
          VolumeBusy: another process has the volume open.
          LhblockError: it cannot be opened.

        Cancelled: while it opens, everything is closed again.
        """
        async with self._lock:
            if self.served is not None:
                return
            places = [parse_replica(address, Path.cwd()) for address in addresses]
            for place, address in zip(places, addresses, strict=True):
                if places.count(place) > 1:
                    raise UsageError(
                        f"invalid ReplicaAddress: duplicate replica addresses {address}"
                    )
            record = await self._record(places, size_bytes or self._create_bytes)
            self._stop, self._closed = trio.Event(), trio.Event()
            await self._nursery.start(self._hold, record)
            try:
                await self.door.open(self.frontend)
            except BaseException:
                self._stop.set()
                with trio.CancelScope(shield=True):
                    await self._closed.wait()
                raise

    async def shutdown(self) -> None:
        """Close the volume, its front end first. Closed already: nothing.

        Cancelled: it is closed all the same.
        """
        async with self._lock:
            served = self.served
            if served is None:
                return
            await self.door.close()
            served.frontend_up = False
            await served.wait_idle()
            self._stop.set()
            await self._closed.wait()

    async def _hold(
        self, record: VolumeRecord, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            async with AsyncExitStack() as stack:
                await open_recorded(stack, self._process, self._engine, record, self._listeners)
                served = self._process.volumes[self.name]
                served.frontend, served.frontend_up = self.frontend, bool(self.frontend)
                served.rebuild_sync_limit = self._sync_limit
                self.size_bytes = served.volume.size_bytes
                try:
                    task_status.started()
                    await self._stop.wait()
                finally:
                    self.size_bytes = served.volume.size_bytes
                    self.frontend = served.frontend
                    del self._process.volumes[self.name]
        finally:
            self._closed.set()

    async def _record(
        self, places: list[Path | RemoteAddress], size_bytes: int | None
    ) -> VolumeRecord:
        registry: Registry = self._process.registry
        try:
            record = registry.get(self.name)
        except VolumeNotFound:
            record = await create_volume(
                registry,
                self.name,
                size_bytes=size_bytes,
                replicas=places,
                cache=self._process.settings.cache or "writeback",
            )
            self._process.created.add(self.name)
        else:
            refuse_served(self._process.data_dir, record, but_pid=os.getpid())
        known = {item.place: item for item in record.replicas}
        replicas = tuple(known.get(place, ReplicaRecord(place, MADE_NOTHING)) for place in places)
        return await trio.to_thread.run_sync(
            lambda: registry.update(self.name, replicas=replicas, **self._limits)
        )
