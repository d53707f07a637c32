"""What the FUSE front end shows of the volumes of this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from lhblock.engine import Calls, Device
from lhblock.errors import NotServing, VolumeBusy
from lhblock.frontend.fuse import OpenFile, SnapshotFile, VolumeFiles
from lhblock.instance._served import ServedVolume

HEAD = "volume-head"


class ServedFiles:
    """Implements `lhblock.frontend.fuse.Volumes` with calls into the engine."""

    def __init__(self, volumes: Mapping[str, ServedVolume], calls: Calls) -> None:
        self._volumes = volumes
        self._calls = calls

    async def names(self) -> Sequence[str]:
        return [served.name for served in self._volumes.values() if served.frontend_up]

    async def find(self, name: str) -> VolumeFiles | None:
        served = self._volumes.get(name)
        if served is None or not served.frontend_up:
            return None
        volume = served.volume
        snapshots = [
            SnapshotFile(item.name, item.created, item.size_bytes)
            for item in volume.snapshots()
            if item.name != HEAD and not item.removed
        ]
        return VolumeFiles(name, volume.size_bytes, volume.read_only, snapshots)

    async def status(self, name: str) -> bytes:
        return status_json(self._offered(name))

    @asynccontextmanager
    async def open(self, name: str, snapshot: str | None) -> AsyncIterator[OpenFile]:
        served = self._offered(name)
        if snapshot is not None:
            async with served.volume.open_view(snapshot) as view:
                yield _DeviceFile(self._calls, view)
            return
        if served.reverting:
            raise VolumeBusy(name, "it is being reverted; try again")
        with served.volume.open_file():
            yield _DeviceFile(self._calls, served.volume)

    def _offered(self, name: str) -> ServedVolume:
        served = self._volumes.get(name)
        if served is None or not served.frontend_up:
            raise NotServing(name, "is not offered now")
        return served


class _DeviceFile:
    """A volume or a view, as the front end wants to see it."""

    def __init__(self, calls: Calls, device: Device) -> None:
        self._calls = calls
        self._device = device

    @property
    def size_bytes(self) -> int:
        return self._device.size_bytes

    async def read(self, offset_bytes: int, buffer: memoryview) -> None:
        await self._calls.read(self._device, offset_bytes, buffer)

    async def write(
        self, offset_bytes: int, data: bytes | bytearray | memoryview, *, fua: bool
    ) -> None:
        await self._calls.write(self._device, offset_bytes, data, fua=fua)

    async def flush(self) -> None:
        await self._calls.flush(self._device)


def status_json(served: ServedVolume) -> bytes:
    """The state of a volume as a JSON document; keys in docs/operating/fuse.md."""
    volume = served.volume
    document = {
        "name": served.name,
        "state": volume.state,
        "size_bytes": volume.size_bytes,
        "read_only": volume.read_only,
        "cache": served.cache,
        "replicas": [
            {
                "path": item.address,
                "mode": item.mode,
                "error": item.error,
                "generation": item.generation,
            }
            for item in volume.replicas()
        ],
        "snapshots": [
            {"name": item.name, "created": item.created, "size_bytes": item.size_bytes}
            for item in volume.snapshots()
            if item.name != HEAD and not item.removed
        ],
        "connections": volume.connections,
        "files": volume.files,
    }
    return json.dumps(document, indent=1).encode() + b"\n"
