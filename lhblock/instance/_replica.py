"""The replica of a replica process: not there yet, closed, or open."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import trio

from lhblock.engine import CacheMode, DrivenReplica, Engine, create_replicas, open_driven
from lhblock.errors import ReplicaError
from lhblock.instance._registry import MADE_FILES, ReplicaRecord
from lhblock.instance._removal import removable, remove_replica
from lhblock.replica import VolumeMeta, peek

ReplicaState = Literal["initial", "closed", "open", "dirty", "rebuilding", "error"]


class Replica:
    """One directory, which an engine opens and closes.

    Whoever changes or looks at it holds `lock`; only `opened` may be read without.

    Args:
      nursery: where the open replica lives. Cancelling it closes the replica cleanly.
      volume: its volume's name, for messages; may be empty.
      encrypted: noted in a directory that is made here.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path,
        nursery: trio.Nursery,
        *,
        volume: str = "",
        cache: CacheMode = "writeback",
        encrypted: bool = False,
    ) -> None:
        self._engine = engine
        self._nursery = nursery
        self._volume = volume
        self._cache = cache
        self._encrypted = encrypted
        self._closing = trio.Event()
        self._closed = trio.Event()
        self.path = path
        self.lock = trio.Lock()
        self.opened: DrivenReplica | None = None

    @property
    def state(self) -> ReplicaState:
        """What Longhorn calls the state of an open replica; ``closed`` otherwise."""
        if self.opened is None:
            return "closed"
        if self.opened.error:
            return "error"
        if self.opened.rebuilding:
            return "rebuilding"
        return "dirty" if self.opened.dirty else "open"

    async def look(self) -> tuple[ReplicaState, VolumeMeta]:
        """The state of a replica that is not open, and what its ``volume.meta`` says."""
        assert self.opened is None
        try:
            meta = await trio.to_thread.run_sync(peek, self.path)
        except ReplicaError:
            return "error", VolumeMeta()
        return ("initial", VolumeMeta()) if meta is None else ("closed", meta)

    async def create(self, size_bytes: int) -> None:
        """Make a replica of zeros in a directory that has none.

        Raises:
          SizeError: the size cannot be.
          ReplicaError: the directory cannot be made or is not empty.

        Cancelled: as an error; nothing is left behind.
        """
        await create_replicas(
            self._volume or self.path.name, [self.path], size_bytes, encrypted=self._encrypted
        )

    async def open(self) -> DrivenReplica:
        """Open it.

        Raises:
          ReplicaError, NativeError: it cannot be opened.

        Cancelled: it stays closed.
        """
        assert self.opened is None
        self._closing, self._closed = trio.Event(), trio.Event()
        opened: DrivenReplica = await self._nursery.start(self._hold, self._closing, self._closed)
        return opened

    async def _hold(
        self,
        closing: trio.Event,
        closed: trio.Event,
        *,
        task_status: trio.TaskStatus[DrivenReplica],
    ) -> None:
        try:
            async with open_driven(
                self._engine, self.path, name=self._volume, cache=self._cache
            ) as replica:
                self.opened = replica
                task_status.started(replica)
                try:
                    await closing.wait()
                finally:
                    # From here on nobody finds it, while it ends what is in flight.
                    self.opened = None
        finally:
            closed.set()

    async def close(self) -> None:
        """Close it: what is in flight ends, data connections are closed. Harmless when closed.

        Not cancelled: a half-closed replica is of no use to anybody.
        """
        if self.opened is None:
            return
        with trio.CancelScope(shield=True):
            self._closing.set()
            await self._closed.wait()

    async def delete(self) -> None:
        """Close it and delete its files; the directory stays.

        Raises:
          ReplicaForeign: something that is not part of a replica is in the directory; nothing was
            deleted.
          ReplicaError: the system refuses; what is left can be deleted by trying again.

        Cancelled: not any more once it is closed.
        """
        await self.close()
        record = ReplicaRecord(self.path, MADE_FILES)

        def delete() -> None:
            with removable(record) as names:
                remove_replica(record, names)

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(delete)
