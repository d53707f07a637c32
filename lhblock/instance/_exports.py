"""What the NBD front end offers: the served volumes, and ``NAME@SNAPSHOT``, their snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from lhblock.engine import Connection, SnapshotView, Volume
from lhblock.errors import FrontendError
from lhblock.frontend.nbd import Export, ExportDescription, UnknownExport
from lhblock.instance._served import ServedVolume
from lhblock.settings import format_size

HEAD = "volume-head"


class VolumeExports:
    """Implements `lhblock.frontend.nbd.Exports` over the volumes of this process."""

    def __init__(self, volumes: Mapping[str, ServedVolume]) -> None:
        self._volumes = volumes

    def list(self) -> list[ExportDescription]:
        found = []
        for served in self._volumes.values():
            if not served.frontend_up:
                continue
            found.append(ExportDescription(served.name, _describe(served)))
            if served.volume.state == "faulted":
                continue
            for snapshot in served.volume.snapshots():
                if snapshot.name != HEAD and not snapshot.removed:
                    text = f"snapshot of {served.name}, {snapshot.created}, read-only"
                    found.append(
                        ExportDescription(f"{served.name}@{snapshot.name}", text, snapshot=True)
                    )
        return found

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Export]:
        volume, at, snapshot = name.partition("@")
        served = self._volumes.get(volume)
        if served is None:
            raise UnknownExport(f"no volume {volume!r} is served here")
        if not served.frontend_up:
            raise FrontendError(f"volume {volume} is not offered now: its front end is shut down")
        served.volume.check()
        if not at:
            if served.reverting:
                raise FrontendError(f"volume {volume} is being reverted; try again")
            yield _DeviceExport(served.volume, _describe(served))
            return
        known = {item.name for item in served.volume.snapshots() if not item.removed}
        if snapshot not in known or snapshot == HEAD:
            raise UnknownExport(f"volume {volume} has no snapshot {snapshot!r}")
        async with served.volume.open_view(snapshot) as view:
            yield _DeviceExport(view, f"snapshot of {volume}, read-only")


class _DeviceExport:
    """A volume or a view, as the front end wants to see it."""

    def __init__(self, device: Volume | SnapshotView, description: str) -> None:
        self._device = device
        self.description = description

    @property
    def size_bytes(self) -> int:
        return self._device.size_bytes

    @property
    def read_only(self) -> bool:
        return self._device.read_only

    def attach(self, fd: int, *, structured: bool, base_allocation_id: int | None) -> Connection:
        return self._device.attach(fd, structured=structured, base_allocation_id=base_allocation_id)


def _describe(served: ServedVolume) -> str:
    volume = served.volume
    mode = ", read-only" if volume.read_only else ""
    return f"{format_size(volume.size_bytes)}, {volume.state}{mode}"
