"""What the FUSE front end shows of the volumes of this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from lhblock.engine import Engine, Relay
from lhblock.errors import NotServing, VolumeBusy
from lhblock.frontend.fuse import SnapshotFile, VolumeFiles
from lhblock.instance._served import ServedVolume

HEAD = "volume-head"


class ServedFiles:
    """Implements `lhblock.frontend.fuse.Volumes` with files that the engine serves."""

    def __init__(self, volumes: Mapping[str, ServedVolume], engine: Engine) -> None:
        self._volumes = volumes
        self._engine = engine
        self._relay: Relay | None = None

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
    async def open_relay(self, kernel_fd: int, server_fd: int) -> AsyncIterator[Relay]:
        async with self._engine.open_relay(kernel_fd, server_fd) as self._relay:
            yield self._relay

    @asynccontextmanager
    async def open(
        self, name: str, snapshot: str | None, *, handle: int, writable: bool, fua: bool
    ) -> AsyncIterator[None]:
        assert self._relay is not None
        served = self._offered(name)
        if snapshot is not None:
            async with (
                served.volume.open_view(snapshot) as view,
                self._relay.serve(handle, view, writable=False, fua=False),
            ):
                yield
            return
        if served.reverting:
            raise VolumeBusy(name, "it is being reverted; try again")
        with served.volume.open_file():
            async with self._relay.serve(handle, served.volume, writable=writable, fua=fua):
                yield

    def _offered(self, name: str) -> ServedVolume:
        served = self._volumes.get(name)
        if served is None or not served.frontend_up:
            raise NotServing(name, "is not offered now")
        return served


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
