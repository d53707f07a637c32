"""One replica that an engine on another host drives: what the process beside its disk serves.

It is a volume of one store, and snapshots, reverts and merges are done as for any volume. What
differs: the engine decides. It says when to open, what a snapshot is called and when it was taken;
it disconnects its own clients before a revert, so that data connections stay; and the generation
of the set is its to write, so opening names nobody stale.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from lhblock._native import (
    STORE_DIRECT,
    Event,
    EventType,
    NativeEngine,
    NativeVolume,
)
from lhblock.engine._clock import utc_now
from lhblock.engine._config import CacheMode
from lhblock.engine._device import Connection, Device
from lhblock.engine._engine import Engine
from lhblock.engine._limits import SnapshotLimits
from lhblock.engine._local_member import LocalMember
from lhblock.engine._member import MemberState
from lhblock.engine._merge import Merger
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._snapshots import SnapshotTree
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, NativeError, NotServing, ReplicaError, VolumeFaulted
from lhblock.replica import Disk, new_set

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ReplicaFound:
    """What opening a directory found, for an engine that has to decide whether to trust it.

    Attributes:
      was_dirty: the last user did not close it.
      torn: a crash met a change of its tree.
      written_elsewhere: why another program must have written to it; "" if none has.
      cleaned: a sentence for each leftover that was removed.
    """

    was_dirty: bool
    torn: bool
    written_elsewhere: str
    cleaned: tuple[str, ...]


@dataclass(frozen=True)
class ReplicaDisk:
    """One layer: its record, and the space it takes."""

    disk: Disk
    children: tuple[str, ...]
    allocated_bytes: int


@dataclass(frozen=True)
class ReplicaLayers:
    """All layers of a replica at one moment.

    Attributes:
      disks: by image name, removed ones and side branches included.
      chain: image names of the live chain, head first, removed ones included.
      head_modified_ns: when the head's file was last written, since the epoch.
    """

    disks: Mapping[str, ReplicaDisk]
    chain: tuple[str, ...]
    head_modified_ns: int

    @property
    def head(self) -> ReplicaDisk:
        return self.disks[self.chain[0]]


class DrivenReplica(Device):
    """A replica that is open. Use :func:`open_driven`.

    Attributes:
      path: the directory.
      found: what opening it found.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        native: NativeVolume,
        member: LocalMember,
        found: ReplicaFound,
        *,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(native, name=name, read_only=False, direct=False)
        self._member = member
        self._nursery = nursery
        self._changed_since_open = False
        self._replicas = ReplicaSet(
            name,
            [member],
            native,
            read_only=False,
            quorum_wait_s=0,  # a set of one is never without it
            deliver_events=engine.deliver_events,
            on_faulted=self.close_connections,
        )
        self._tree = SnapshotTree(
            name,
            native,
            self._replicas,
            limits=SnapshotLimits(),
            users=lambda: "",
            changed=self._tree_changed,
        )
        self._merger = Merger(name, self._replicas, self._tree.lock, pinned=self._pinned)
        self.path = member.path
        self.found = found

    # ---- What it is.

    @property
    def error(self) -> str:
        """Why nothing can be read or written any more; "" while all is well."""
        try:
            self._replicas.check()
        except VolumeFaulted as error:
            return error.sentence
        return ""

    @property
    def rebuilding(self) -> bool:
        """Whether this copy lacks data."""
        return self._member.directory.rebuilding

    @property
    def encrypted(self) -> bool:
        """Whether the content is noted as a LUKS volume."""
        return self._member.directory.encrypted

    @property
    def dirty(self) -> bool:
        """Whether it was written to, or snapshotted, since the last clean close."""
        io = self._native.statistics()
        written = io.writes + io.trims + io.zeroes > 0
        return self.found.was_dirty or self._changed_since_open or written

    async def layers(self) -> ReplicaLayers:
        """Look at every layer.

        Raises:
          ReplicaIO: a file cannot be looked at; the replica counts as failed from now on.

        Cancelled: nothing happened.
        """
        async with self._tree.lock:
            try:
                return await run_metadata(self._look)
            except ReplicaError as error:
                self._replicas.fault(error.sentence)
                raise

    def _look(self) -> ReplicaLayers:
        member, directory = self._member, self._member.directory
        disks = {
            name: ReplicaDisk(
                disk,
                tuple(child.name for child in directory.children(name)),
                member.layer_size(name).allocated_bytes,
            )
            for name, disk in directory.disks.items()
        }
        return ReplicaLayers(
            disks,
            tuple(disk.name for disk in reversed(directory.chain)),
            member.modified_ns(directory.head.name),
        )

    # ---- The tree.

    async def create_snapshot(
        self, name: str, *, user_created: bool, created: str, labels: Mapping[str, str]
    ) -> None:
        """Take a snapshot as the engine says; as :meth:`Volume.create_snapshot`."""
        await self._tree.create(name, labels=labels, user_created=user_created, created=created)
        self._changed_since_open = True

    async def revert(self, snapshot: str, *, created: str) -> None:
        """Go back to a snapshot; data connections stay. As :meth:`Volume.revert_snapshot`."""
        await self._tree.revert(snapshot, created=created)
        self._changed_since_open = True

    async def expand(self, size_bytes: int) -> None:
        """Grow; as :meth:`Volume.expand`."""
        if await self._tree.expand(size_bytes):
            self._changed_since_open = True

    async def mark_removed(self, snapshot: str) -> None:
        """Mark a snapshot for removal; as :meth:`Volume.remove_snapshot`."""
        await self._tree.mark_removed(snapshot, exported=lambda _: False)

    async def remove_disk(self, image: str) -> None:
        """Remove a layer without keeping what others see through it, where nobody can.

        A leaf is deleted. So is any layer of a copy that is being rebuilt, because its content is
        void. Any other layer is marked as removed and merged away, which keeps the content.

        Raises:
          ReplicaError: it could not be done.

        Cancelled before I/O is frozen: nothing was done.
        """
        async with self._tree.lock:
            directory = self._member.directory
            if directory.rebuilding:
                await self._rearrange(lambda: directory.unlink_disk(image, force=True))
            elif not directory.children(image):
                await run_metadata(self._member.remove_leaf, image)
            else:
                await run_metadata(directory.mark_removed, image)
        self._tree_changed()

    async def wait_merged(self) -> None:
        """As :meth:`Volume.wait_merged`."""
        await self._merger.wait_idle()

    async def set_rebuilding(self, rebuilding: bool) -> None:
        """Note durably that this copy lacks data, or that it is whole.

        While it lacks data no removed layer is merged: the set of layers is the engine's.

        Raises:
          ReplicaError: the note could not be written.

        Cancelled before it is written: nothing was done.
        """
        async with self._tree.lock:
            await self._replicas.each(
                lambda member: member.set_rebuilding(rebuilding),
                during="noting the rebuild",
            )
        self._tree_changed()

    async def reload(self) -> None:
        """Read the directory again and open its layers anew; data connections stay.

        Raises:
          ReplicaError, NativeError: what is there cannot be used; if the layers could not be
            opened the replica counts as failed from now on.

        Cancelled before I/O is frozen: nothing was done.
        """
        async with self._tree.lock:
            await self._rearrange(self._member.directory.reload)
        self._tree_changed()

    async def _rearrange(self, change: Callable[[], None]) -> None:
        """Change which layers there are, and open them anew, with I/O frozen."""
        member = self._member
        changed = False

        def rearrange() -> None:
            nonlocal changed
            # The new store knows nothing of what the old one has not synced.
            member.sync()
            change()
            changed = True
            member.open_store()

        self._replicas.check()
        await run_metadata(member.sync)
        with trio.CancelScope(shield=True):
            try:
                async with self._replicas.frozen():
                    await run_metadata(rearrange)
            except (LhblockError, OSError) as error:
                if changed:
                    self._replicas.fault(f"its layers could not be opened anew: {error}")
                raise
            await run_metadata(member.release_replaced)

    def _pinned(self) -> frozenset[str]:
        directory = self._member.directory
        return frozenset(directory.disks) if directory.rebuilding else frozenset()

    def _tree_changed(self) -> None:
        self._merger.wake()

    # ---- Connections, events, and the end.

    def attach_data(self, fd: int) -> Connection:
        """Hand the socket of a data connection to the core, between two frames.

        Args:
          fd: on success it belongs to the core; on an error it is still the caller's.

        Raises:
          NotServing: it is being closed.
          VolumeFaulted: the replica has failed.
          NativeError: the core refused, for instance because memory ran out.
        """
        if self._native.closed:
            raise NotServing(self.name, "is being closed")
        self._replicas.check()
        return self._take_in(self._native.attach_replica(fd))

    def on_event(self, event: Event) -> None:
        """Take an event of the core. Never blocks."""
        super().on_event(event)
        if event.type == EventType.STORE_FAILED:
            reason = os.strerror(event.error)
            self._replicas.fault(f"I/O at {event.offset_bytes}: {reason}")
        elif event.type == EventType.OUT_OF_SPACE:
            log.error("no space", replica=str(self.path), offset=event.offset_bytes)

    def _start(self) -> None:
        self._replicas.publish()
        self._merger.wake()
        self._nursery.start_soon(self._merger.run)

    async def _close_native(self) -> None:
        # A merge step uses the native volume from a thread of its own: it ends first.
        await self._merger.stop()
        async with self._tree.lock:
            await self._replicas.close_native()


@asynccontextmanager
async def open_driven(
    engine: Engine, path: Path, *, name: str = "", cache: CacheMode = "writeback"
) -> AsyncIterator[DrivenReplica]:
    """Open a replica directory for an engine elsewhere; leaving the block closes it cleanly.

    Args:
      path: the directory. A copy whose rebuild never finished is opened as well.
      name: the volume's, for messages; default the directory's.
      cache: ``none`` opens files with O_DIRECT.

    Raises:
      ReplicaError: the directory cannot be used.
      NativeError: a layer cannot be opened.

    Cancelled while opening: everything is closed again.
    """
    flags = STORE_DIRECT if cache == "none" else 0
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True):
        member, native, found = await run_metadata(_open, engine.native, path, flags)
    for sentence in found.cleaned:
        log.info("cleaned up", replica=str(path), what=sentence)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            replica = DrivenReplica(
                engine, name or path.name, native, member, found, nursery=nursery
            )
            engine.add_device(replica)
            native_id = replica.native_id
            try:
                replica._start()
                log.info("replica opened", replica=str(path), size_bytes=replica.size_bytes)
                yield replica
            except Exception as error:
                # Raised below, as it is, and not in a group.
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await replica._close_native()
                    engine.remove_device(native_id)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await run_metadata(_close, member, bool(replica.error))
    log.info("replica closed", replica=str(path))
    if failure is not None:
        raise failure


def _open(
    engine: NativeEngine, path: Path, flags: int
) -> tuple[LocalMember, NativeVolume, ReplicaFound]:
    member = LocalMember(path, engine, flags)
    member.open(unfinished=True)
    member.state = MemberState.USABLE
    directory = member.directory
    found = ReplicaFound(
        directory.was_dirty, directory.torn, directory.written_elsewhere, directory.cleaned
    )
    try:
        if directory.generation is None:
            (generation,) = new_set(1, time=utc_now())
            directory.write_generation(generation)
        if found.written_elsewhere:
            log.warning(
                "written by another program",
                replica=str(path),
                reason=found.written_elsewhere,
            )
            # Discards noted until now are gone; those noted from now on count.
            directory.note_repaired()
        # What that engine writes is in no log.
        member.forget_activity()
        member.open_store()
        native = NativeVolume(engine, directory.size_bytes, 0)
    except BaseException:
        member.close(clean=not found.was_dirty)
        raise
    return member, native, found


def _close(member: LocalMember, failed: bool) -> None:
    try:
        if failed:
            member.close(clean=False)
        else:
            member.close_synced()
    except (ReplicaError, NativeError, OSError) as error:
        log.error("close", replica=str(member.path), reason=str(error))
