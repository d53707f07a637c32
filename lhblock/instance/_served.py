"""A volume that this process has open, and what the control service keeps about it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from lhblock.engine import (
    Engine,
    RebuildOptions,
    RemoteLimits,
    SnapshotLimits,
    Volume,
    VolumeConfig,
)
from lhblock.errors import LhblockError
from lhblock.instance._fuse_session import FuseSession
from lhblock.instance._jobs import Jobs
from lhblock.instance._registry import Registry, VolumeRecord
from lhblock.settings import QUORUM_WAIT_S

FRONTEND = "nbd"
_CONNECTION_POLL_S = 0.01


@dataclass
class Expansion:
    """The last expansion: going on, failed, or neither."""

    running: bool = False
    error: str = ""
    failed_at: str = ""


@dataclass
class ServedVolume:
    """One open volume.

    Attributes:
      record: as in the registry; replaced when something recorded changes.
      addresses: where clients find it, but for its file; empty when nothing is offered (an
        offline command).
      fuse: knows where the file of the volume is.
      frontend: the name last started; stays when the front end is down, as in Longhorn.
      frontends: all that were started with the process.
      frontend_up: whether new clients are let in.
      rebuild_sync_limit: as set by a client.
      cache: the cache mode in use, which may differ from the recorded one.
      reverting: new clients are kept out for a moment.
      on_resized: called after an expansion, by front ends whose clients can be told.
      recording: held while the record, or the limits that it notes, change.
    """

    record: VolumeRecord
    volume: Volume
    jobs: Jobs
    nursery: trio.Nursery
    addresses: Sequence[str] = ()
    fuse: FuseSession | None = None
    frontend: str = ""
    frontends: Sequence[str] = (FRONTEND,)
    frontend_up: bool = False
    rebuild_sync_limit: int = 1
    cache: str = "writeback"
    expansion: Expansion = field(default_factory=Expansion)
    reverting: bool = False
    on_resized: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    recording: trio.Lock = field(default_factory=trio.Lock)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def file(self) -> str:
        """Path of its file, "" while it is not mounted."""
        return "" if self.fuse is None else self.fuse.file(self.name)

    @property
    def uris(self) -> Sequence[str]:
        """Everywhere that clients find it."""
        return (*self.addresses, self.file) if self.file else self.addresses

    async def refresh_record(self, registry: Registry) -> None:
        """Record the size again if a crash or a foreign program made it differ."""
        async with self.recording:
            size_bytes = self.volume.size_bytes
            if size_bytes != self.record.size_bytes and not self.volume.read_only:
                self.record = await trio.to_thread.run_sync(
                    lambda: registry.update(self.name, size_bytes=size_bytes)
                )

    def start_expansion(self, registry: Registry, size_bytes: int) -> None:
        """Expand in the background; `expansion` tells how it went."""
        self.expansion = Expansion(running=True)
        self.nursery.start_soon(self._expand, registry, size_bytes, self.expansion)

    async def _expand(self, registry: Registry, size_bytes: int, expansion: Expansion) -> None:
        try:
            await self.volume.expand(size_bytes)
            await self.refresh_record(registry)
            for tell in self.on_resized:
                await tell()
        except LhblockError as error:
            expansion.error = str(error)
            expansion.failed_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        finally:
            expansion.running = False

    async def wait_idle(self) -> None:
        """Wait for the last connection to end after all were asked to.

        Cancelled: they were asked all the same.
        """
        self.volume.close_connections()
        # The engine tells nobody when the last one ends, and this is asked once in a while only.
        while self.volume.connections:  # noqa: ASYNC110
            await trio.sleep(_CONNECTION_POLL_S)


@asynccontextmanager
async def open_served(
    engine: Engine,
    record: VolumeRecord,
    *,
    cache: str | None = None,
    read_only: bool = False,
    rebuild: RebuildOptions | None = None,
    remote: RemoteLimits | None = None,
    quorum_wait_s: float = QUORUM_WAIT_S,
    force: bool = False,
) -> AsyncIterator[ServedVolume]:
    """Open a recorded volume for as long as the block lasts. Jobs end with it.

    Raises:
      LhblockError: as `Engine.open_volume`.
    """
    chosen = cache or record.cache
    config = VolumeConfig(
        name=record.name,
        replicas=record.places,
        cache="none" if chosen == "none" else "writeback",
        read_only=read_only,
        limits=SnapshotLimits(
            count_max=record.snapshot_count_max, size_bytes_max=record.snapshot_bytes_max
        ),
        rebuild=rebuild or RebuildOptions(),
        remote=remote or RemoteLimits(),
        quorum_wait_s=quorum_wait_s,
        force=force,
    )
    async with engine.open_volume(config) as volume:
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            jobs = Jobs(record.name, nursery)
            # Errors of the caller's block are raised as they are, not in a group.
            try:
                yield ServedVolume(record, volume, jobs, nursery, cache=chosen)
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


@contextlib.contextmanager
def no_new_clients(served: ServedVolume) -> Iterator[None]:
    """Keep new clients out while the content is replaced."""
    served.reverting = True
    try:
        yield
    finally:
        served.reverting = False
