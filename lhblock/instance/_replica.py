"""The replica of a replica process: not there yet, closed, or open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog
import trio

from lhblock.engine import (
    CacheMode,
    DrivenReplica,
    Engine,
    HostedReplica,
    LocalMember,
    check_size,
    open_driven,
    probe,
)
from lhblock.errors import LhblockError, ReplicaError, ReplicaForeign
from lhblock.instance._registry import MADE_FILES, ReplicaRecord
from lhblock.instance._removal import removable, remove_replica
from lhblock.replica import Generation, ReplicaDirectory, VolumeMeta, peek

_log = structlog.get_logger("lhblock.instance")

ReplicaState = Literal["initial", "closed", "open", "dirty", "rebuilding", "error"]


class Replica:
    """One directory, which an engine opens and closes.

    Whoever changes or looks at it holds `lock`; only `opened` and `hosted` may be read without. An
    engine of Longhorn's has it `opened`, one of ours `hosted`; never both, for there is one lock on
    the directory.

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
        self.hosted: HostedReplica | None = None

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
        check_size(self._volume or self.path.name, size_bytes)
        # Without a generation: which volume it belongs to is for its first engine to say.
        await self._create(size_bytes, None, encrypted=self._encrypted)

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

    async def create_as(
        self, size_bytes: int, generation: Generation, *, encrypted: bool = False
    ) -> None:
        """Make a replica of zeros that belongs to a set from its first moment.

        Raises:
          UsageError: the size cannot be.
          ReplicaError: the directory cannot be made or is not empty.

        Not cancelled.
        """

        def make_room() -> None:
            meta = peek(self.path)
            if meta is not None and meta.size_bytes == size_bytes:
                if not _is_empty(self.path, named=False):
                    raise ReplicaForeign(self.path, "has been written to; give an empty one")
                self._uncreate()

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(make_room)
            await self._create(size_bytes, generation, encrypted=encrypted or self._encrypted)

    async def _create(
        self, size_bytes: int, generation: Generation | None, *, encrypted: bool
    ) -> None:
        def create() -> None:
            ReplicaDirectory.create(
                self.path,
                size_bytes=size_bytes,
                generation=generation,
                encrypted=encrypted,
                probe=probe,
            )

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(create)

    async def is_blank(self) -> bool:
        """Whether a closed replica has nothing in it and never belonged to a volume of ours.

        Cancelled: nothing happened.
        """

        def look() -> bool:
            try:
                return _is_empty(self.path, named=False)
            except ReplicaError:
                return False

        return await trio.to_thread.run_sync(look)

    async def uncreate(self) -> None:
        """Delete a replica that nobody has written to; the directory stays.

        Raises:
          ReplicaForeign: somebody has.
          ReplicaError: it is in use, or cannot be deleted.

        Not cancelled.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._uncreate)

    def _uncreate(self) -> None:
        if not _is_empty(self.path, named=True):
            raise ReplicaForeign(self.path, "has been written to, and is not removed")
        record = ReplicaRecord(self.path, MADE_FILES)
        with removable(record) as names:
            remove_replica(record, names)

    async def with_member(self, function: Callable[[LocalMember], None]) -> None:
        """Do something, blocking, with a member that is not open. Not cancelled."""
        member = LocalMember(self.path, self._engine.native, 0)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(function, member)

    async def host(
        self, engine_id: str, open_member: Callable[[LocalMember], None], *, read_only: bool
    ) -> HostedReplica:
        """Open it for one of our own engines; what is hosted is left behind dirty.

        Args:
          engine_id: whose session this is.
          open_member: blocking; how the member is opened.

        Raises:
          ReplicaError: it cannot be opened.

        Cancelled: it stays closed, or what was hosted is closed all the same.
        """
        await self.end_hosting(lambda member: member.close(clean=False))
        hosted = HostedReplica(
            self._engine, self.path, engine_id, cache=self._cache, read_only=read_only
        )
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(open_member, hosted.member)
            self.hosted = hosted
        return hosted

    async def end_hosting(self, close_member: Callable[[LocalMember], None]) -> None:
        """Close what :meth:`host` opened. Harmless when nothing is.

        Args:
          close_member: blocking; how the member is closed.

        Raises:
          ReplicaError, NativeError: as `close_member`; it is closed all the same.

        Not cancelled.
        """
        hosted, self.hosted = self.hosted, None
        if hosted is not None:
            await hosted.close(lambda: close_member(hosted.member))

    async def hold_hosted(self) -> None:
        """Run until cancelled, and then see to it that nothing stays open."""
        try:
            await trio.sleep_forever()
        finally:
            try:
                # The engine did not close it, so others may lack what it has, or have more.
                await self.end_hosting(lambda member: member.close(clean=False))
            except LhblockError as error:
                _log.error("close", replica=str(self.path), reason=str(error))

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


def _is_empty(path: Path, *, named: bool) -> bool:
    """Whether a replica that is not open has one layer, without data. Blocking.

    Args:
      named: it may belong to a volume of ours.
    """
    with ReplicaDirectory.open(path, read_only=True, unfinished=True) as directory:
        if len(directory.disks) > 1 or not (directory.generation is None or named):
            return False
        head = os.stat(directory.head.name, dir_fd=directory.dir_fd, follow_symlinks=False)
        return head.st_blocks == 0
