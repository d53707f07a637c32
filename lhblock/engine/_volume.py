"""An open volume: the face of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog
import trio

from lhblock._native import (
    STORE_DIRECT,
    STORES_MAX,
    VOLUME_READ_ONLY,
    Event,
    EventType,
    NativeVolume,
)
from lhblock.engine._activity import ActivityRounds
from lhblock.engine._config import VolumeConfig
from lhblock.engine._device import Connection, Device
from lhblock.engine._info import (
    JobInfo,
    RebuildInfo,
    ReplicaInfo,
    ScrubReport,
    SnapshotInfo,
    VolumeState,
)
from lhblock.engine._limits import SnapshotLimits
from lhblock.engine._member import Member, MemberState
from lhblock.engine._merge import Merger
from lhblock.engine._opening import Opening
from lhblock.engine._places import Members, Place, address_of
from lhblock.engine._rebuild import Rebuilder
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._scrub import Scrubber
from lhblock.engine._snapshots import SnapshotTree
from lhblock.engine._statistics import MetricsSampler, VolumeMetrics, VolumeStatistics
from lhblock.engine._threads import run_metadata
from lhblock.engine._views import SnapshotView, Views
from lhblock.errors import LhblockError, NativeError, ReplicaError, UsageError, VolumeError

if TYPE_CHECKING:
    from lhblock.engine._engine import Engine
from lhblock.replica import HistoryEntry

log = structlog.get_logger(__name__)


class Volume(Device):
    """A volume that is open. Use :meth:`Engine.open_volume`.

    Attributes:
      name: as configured.
      read_only: nothing about it can be changed.
      config: what it was opened with.
    """

    def __init__(
        self,
        engine: Engine,
        config: VolumeConfig,
        native: NativeVolume,
        members: list[Member],
        *,
        maker: Members,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(
            native,
            name=config.name,
            read_only=config.read_only,
            direct=bool(maker.store_flags & STORE_DIRECT),
        )
        self._maker = maker
        self._nursery = nursery
        self._out_of_space = 0
        self._metrics = MetricsSampler(native.statistics())
        self._replicas = ReplicaSet(
            config.name,
            members,
            native,
            read_only=config.read_only,
            deliver_events=engine.deliver_events,
            on_faulted=self.close_connections,
            on_left=lambda: self._rebuilder.member_left(),
            quorum_wait_s=config.quorum_wait_s,
        )
        self._snapshots = SnapshotTree(
            config.name,
            native,
            self._replicas,
            limits=config.limits,
            users=self._users,
            changed=self._tree_changed,
        )
        self._views = Views(
            config.name,
            engine.native,
            self._replicas,
            self._snapshots.lock,
            store_flags=maker.store_flags,
            add_device=engine.add_device,
            remove_device=engine.remove_device,
            changed=self._tree_changed,
        )
        self._rebuilder = Rebuilder(
            config.name,
            native,
            self._replicas,
            self._snapshots,
            options=config.rebuild,
            changed=self._tree_changed,
        )
        self._merger = Merger(
            config.name,
            self._replicas,
            self._snapshots.lock,
            pinned=lambda: self._views.pinned() | self._rebuilder.pinned(),
        )
        self._rounds = ActivityRounds(config.name, native)
        self._scrubber = Scrubber(config.name, self._replicas, self._snapshots.lock)
        self.config = config

    # ---- What it is.

    @property
    def state(self) -> VolumeState:
        """``healthy``, ``degraded`` (a replica is left out or was dropped) or ``faulted``."""
        return self._replicas.state

    @property
    def volume_id(self) -> str:
        """What identifies it for ever, whatever it is called and wherever its replicas are.

        Raises:
          VolumeFaulted: no replica is left.
        """
        return self._replicas.first.generation.volume_id

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """How its members changed, oldest first, as far as it is kept."""
        return self._replicas.history

    @property
    def limits(self) -> SnapshotLimits:
        """How much history it may hold."""
        return self._snapshots.limits

    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Every configured replica, in configured order."""
        return self._replicas.info()

    def check(self) -> None:
        """Refuse to go on without a usable replica.

        Raises:
          VolumeFaulted: with the reason.
        """
        self._replicas.check()

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Snapshots in tree order: each after its parent, the live chain's last among siblings.

        Raises:
          VolumeFaulted: no replica is usable.
        """
        return self._snapshots.infos()

    def head(self) -> SnapshotInfo:
        """The writable layer, described like a snapshot called ``volume-head``.

        Raises:
          VolumeFaulted: no replica is usable.
        """
        return self._snapshots.head()

    def jobs(self) -> tuple[JobInfo, ...]:
        """Merges going on now."""
        return self._merger.jobs()

    def rebuilds(self) -> tuple[RebuildInfo, ...]:
        """Replicas that are being rebuilt, wait for it, or cannot be without being told to."""
        return self._rebuilder.infos()

    def open_views(self) -> tuple[str, ...]:
        """Names of the snapshots that have an open view."""
        return self._views.open_snapshots

    def statistics(self) -> VolumeStatistics:
        """Totals since the volume was opened."""
        return VolumeStatistics(
            io=self._native.statistics(),
            snapshot_pause_ns_last=self._replicas.pause_ns_last,
            out_of_space=self._out_of_space,
            replicas_failed=self._replicas.failures,
        )

    def metrics(self) -> VolumeMetrics:
        """Rates over the last completed interval of at least a second.

        Computed when asked, from the totals of the last call that completed an interval: an idle
        volume has no timer.
        """
        return self._metrics.sample(self._native.statistics())

    # ---- Replicas.

    async def add_replica(self, place: Place, *, force: bool = False, rebuild: bool = True) -> None:
        """Add a replica, or bring one back that takes no part; it is rebuilt in the background.

        Args:
          place: a directory that does not exist or is empty, or holds a replica of this volume
            that was away; or a process that has the same. It may be one that is configured.
          force: overwrite whatever replica it holds.
          rebuild: False only prepares it, for a process that opens the volume later.

        Raises:
          UsageError: it takes part, or is being rebuilt, or there are too many.
          ReplicaError: the directory cannot be used.

        Cancelled before the directory is made: nothing was done. After that it is carried through.
        """
        self._refuse_read_only("add a replica")
        known = self._find(place)
        if known is not None and known.state is not MemberState.LEFT:
            raise UsageError(f"volume {self.name}: {place} is one of its replicas already")
        if known is None and len(self._replicas.members) >= STORES_MAX:
            raise UsageError(f"volume {self.name} has {STORES_MAX} replicas, the most there can be")
        first = self._replicas.first
        member = known or self._maker.make(place)

        def make() -> None:
            member.make_target(
                first.generation, size_bytes=self.size_bytes, encrypted=first.records.encrypted
            )

        def mark() -> None:
            member.open_target(
                first.generation,
                size_bytes=first.records.size_bytes,
                others=[each.generation.replica_id for each in self._replicas.usable],
                force=force,
            )
            member.close(clean=True)

        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await run_metadata(make)
            if not rebuild:
                await run_metadata(mark)
        if known is None:
            member.error = "waits for its rebuild"
            self._replicas.add(member)
        if rebuild:
            self._rebuilder.request(member, force=force)

    async def wait_rebuilt(self, place: Place) -> None:
        """Wait until a replica takes part, over as many attempts as it takes.

        Raises:
          UsageError: it is no replica of the volume.
          ReplicaStale: it may have what others have not, and is not touched without ``force``.

        Cancelled: the rebuild goes on.
        """
        member = self._find(place)
        if member is None:
            raise UsageError(f"volume {self.name} has no replica {place}")
        await self._rebuilder.wait(member)

    async def remove_replica(self, place: Place) -> None:
        """Take a replica out of the volume. Its directory stays as it is, and is stale from now on.

        Raises:
          UsageError: it is no replica of the volume.
          VolumeBusy: it is the last usable one.

        Cancelled before it is taken out: nothing was done.
        """
        self._refuse_read_only("remove a replica")
        member = self._find(place)
        if member is None:
            raise UsageError(f"volume {self.name} has no replica {place}")
        self._replicas.refuse_removal(member)
        await self._rebuilder.interrupt()
        with trio.CancelScope(shield=True):
            async with self._snapshots.lock:
                await self._replicas.remove(member)
                self._rebuilder.forget(member)
                await run_metadata(lambda: member.close(clean=False))
        log.info("replica removed", volume=self.name, replica=str(place))

    async def fail_replica(self, place: Place, reason: str) -> None:
        """Treat a replica as failed. It is brought back like any that failed.

        Raises:
          UsageError: it is no replica of the volume.
          VolumeBusy: it is the last usable one.

        Not cancelled once it is marked.
        """
        member = self._find(place)
        if member is None:
            raise UsageError(f"volume {self.name} has no replica {place}")
        self._replicas.refuse_removal(member)
        if self._replicas.note_failure(member, reason):
            with trio.CancelScope(shield=True):
                await self._replicas.withdraw()

    def _find(self, place: Place) -> Member | None:
        return self._replicas.find(address_of(place))

    # ---- Snapshots.

    async def create_snapshot(
        self,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        user_created: bool = True,
    ) -> str:
        """Take a snapshot of the present content while I/O goes on.

        I/O is paused for the switch of heads only; ``statistics().snapshot_pause_ns_last`` says how
        long. The snapshot is on stable storage of every usable replica when this returns.

        Args:
          name: None chooses a random one.
          labels: kept with it.
          user_created: False marks it as the system's.

        Returns:
          Its name.

        Raises:
          SnapshotExists: the name is taken, or its old bearer is still being merged away.
          SnapshotLimit: there are too many, or they hold too much.
          UsageError: the name cannot be.
          ReplicaError: no replica could do it; nothing changed.

        Cancelled before the heads are prepared: nothing was done. After that it is carried through
        until the switch is durable.
        """
        self._refuse_read_only("take a snapshot")
        return await self._snapshots.create(
            name, labels=dict(labels or {}), user_created=user_created
        )

    async def revert_snapshot(self, name: str) -> None:
        """Throw the head's content away and go on from a snapshot.

        Raises:
          VolumeBusy: clients are connected or views are open.
          SnapshotNotFound: there is none of this name.
          SnapshotBusy: it is marked as removed.
          ReplicaError: no replica could do it; nothing changed.

        Cancelled before the heads are prepared: nothing was done. After that it is carried through.
        """
        self._refuse_read_only("revert")
        await self._snapshots.revert(name)

    async def remove_snapshot(self, name: str) -> None:
        """Mark a snapshot for removal, durably; its layer is merged away in the background.

        A snapshot that is marked already is no error.

        Raises:
          SnapshotNotFound: there is none of this name.
          SnapshotBusy: it is exported.

        Cancelled before threads start: nothing was done. After that it is carried through.
        """
        self._refuse_read_only("remove a snapshot")
        await self._snapshots.mark_removed(name, exported=self._is_exported)

    async def wait_merged(self) -> None:
        """Wait until nothing is left that can be merged now.

        Layers that have to wait (several children, an open view, much data right below the head)
        do not count.

        Raises:
          VolumeError: a merge failed; its layer stays, marked as removed, and the next change of
            the tree or the next open tries again.

        Cancelled: merging goes on.
        """
        if not self.read_only:
            await self._merger.wait_idle()

    async def expand(self, size_bytes: int) -> None:
        """Grow the volume. Connected clients see the old size until they reconnect.

        Args:
          size_bytes: the new size, a multiple of 4096; the present one is no change.

        Raises:
          SizeError: it is smaller than the present size, or cannot be.
          SnapshotLimit: an expansion takes a snapshot, and there are too many.

        Cancelled: as :meth:`create_snapshot`.
        """
        self._refuse_read_only("expand")
        await self._snapshots.expand(size_bytes)

    async def set_limits(
        self, *, snapshot_max_count: int | None = None, snapshot_max_size: int | None = None
    ) -> None:
        """Change the limits; None leaves one as it is. They are not kept across an open.

        Raises:
          SnapshotLimit: the volume already holds more.
          UsageError: a limit that cannot be.

        Cancelled: nothing changed.
        """
        now = self._snapshots.limits
        await self._snapshots.set_limits(
            SnapshotLimits(
                count_max=now.count_max if snapshot_max_count is None else snapshot_max_count,
                size_bytes_max=(
                    now.size_bytes_max if snapshot_max_size is None else snapshot_max_size
                ),
            )
        )

    def open_view(self, snapshot: str) -> AbstractAsyncContextManager[SnapshotView]:
        """Open a read-only volume of a snapshot for the block; views of one snapshot are shared.

        Raises:
          SnapshotNotFound: there is none of this name, or it is marked as removed.
          VolumeError: it cannot be opened.

        Cancelled while opening: not opened.
        """
        return self._views.view(snapshot)

    async def hash_snapshot(self, name: str, *, rehash: bool = False) -> None:
        """Record the checksum of a snapshot's layer on every usable replica.

        Args:
          rehash: read the layer although a current record exists.

        Raises:
          SnapshotNotFound: there is none of this name.
          SnapshotBusy: it is marked as removed.

        Cancelled between replicas: the records made so far stay.
        """
        self._refuse_read_only("hash a snapshot")
        self._snapshots.find(name)
        await self._scrubber.hash_snapshot(name, rehash=rehash)

    async def checksums(self, name: str) -> dict[str, str]:
        """The recorded checksum of a snapshot's layer on every usable replica, by address.

        "" where there is none that counts.

        Raises:
          ReplicaError: a record cannot be read.

        Cancelled: nothing happened.
        """
        image = self._snapshots.find(name).name
        return {
            member.address: await run_metadata(member.checksum, image)
            for member in self._replicas.usable
        }

    async def measure(self) -> None:
        """Look at the layers' sizes that :meth:`snapshots` and :meth:`head` are about to tell.

        Of a replica elsewhere they tell what was heard last.

        Cancelled: nothing happened.
        """
        with suppress(LhblockError):
            await run_metadata(self._replicas.first.layer_sizes)

    async def scrub(self) -> ScrubReport:
        """Verify every layer that has a current checksum record; repair damage from a good replica.

        Cancelled between layers: what was repaired stays repaired.
        """
        self._refuse_read_only("scrub")
        return await self._scrubber.scrub()

    def attach(
        self,
        fd: int,
        *,
        structured: bool,
        base_allocation_id: int | None = None,
        read_only: bool = False,
    ) -> Connection:
        """See :meth:`Device.attach`; a volume without a usable replica takes no client.

        Raises:
          VolumeFaulted: no replica is usable.
          VolumeError: the core refused.
        """
        self._replicas.check()
        return super().attach(
            fd,
            structured=structured,
            base_allocation_id=base_allocation_id,
            read_only=read_only,
        )

    # ---- Events and the end.

    def on_event(self, event: Event) -> None:
        """Take an event of the core. Never blocks."""
        super().on_event(event)
        if event.type in (EventType.STORE_FAILED, EventType.LAST_PEER_LOST):
            self._store_failed(event)
        elif event.type == EventType.OUT_OF_SPACE:
            self._out_of_space += 1
            log.error("no space on any replica", volume=self.name, offset=event.offset_bytes)

    def _store_failed(self, event: Event) -> None:
        for member in self._replicas.members:
            if not member.has_store or member.store.id != event.subject_id:
                continue
            reason = member.why_failed(event.error, event.offset_bytes)
            if member.state is MemberState.USABLE and self._replicas.usable == [member]:
                self._replicas.fault(f"its last replica {member.address} failed: {reason}")
            else:
                self._replicas.note_failure(
                    member, reason, by_core=True, out_of_touch=member.is_out_of_touch(event.error)
                )
                self._nursery.start_soon(self._replicas.withdraw)

    def _users(self) -> str:
        if self.connections:
            return f"clients are connected ({self.connections})"
        if self.files:
            return f"its file is open ({self.files} times)"
        if self._views.open_snapshots:
            return f"snapshot {self._views.open_snapshots[0]!r} is open"
        return ""

    def _is_exported(self, snapshot: str) -> bool:
        return snapshot in self._views.open_snapshots

    def _tree_changed(self) -> None:
        self._merger.wake()

    def _refuse_read_only(self, what: str) -> None:
        if self.read_only:
            raise UsageError(f"volume {self.name} is open read-only: cannot {what}")

    def _start(self) -> None:
        self._replicas.publish()
        if not self.read_only:
            self._merger.wake()
            self._nursery.start_soon(self._merger.run)
            self._rebuilder.member_left()
            self._nursery.start_soon(self._rebuilder.run)
            self._nursery.start_soon(self._rounds.run)

    async def _close_native(self) -> None:
        self._replicas.stop_waiting()
        # A merge step uses the native volume from a thread of its own: it ends first.
        if not self.read_only:
            await self._rebuilder.stop()
            await self._merger.stop()
            await self._rounds.stop()
        async with self._snapshots.lock:
            await self._replicas.close_native()


@asynccontextmanager
async def open_volume(engine: Engine, config: VolumeConfig) -> AsyncIterator[Volume]:
    """See :meth:`Engine.open_volume`."""
    opening = Opening(config, engine.native)
    members = await opening.open()
    try:
        native = await _open_native(engine, config, members)
    except BaseException:
        with trio.CancelScope(shield=True):
            await opening.abandon()
        raise
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            volume = Volume(engine, config, native, members, maker=opening.maker, nursery=nursery)
            engine.add_device(volume)
            native_id = volume.native_id
            try:
                volume._start()
                members = volume._replicas.members  # some may come, and go
                log.info(
                    "volume opened",
                    volume=config.name,
                    size_bytes=volume.size_bytes,
                    state=volume.state,
                )
                yield volume
            except Exception as error:
                # Raised below, as it is, and not in a group.
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await volume._close_native()
                    engine.remove_device(native_id)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await _close_members(config, members)
    log.info("volume closed", volume=config.name)
    if failure is not None:
        raise failure


async def _close_members(config: VolumeConfig, members: list[Member]) -> None:
    """Close every replica: those that take part cleanly, if they can still be synced."""

    def close(member: Member) -> None:
        if member.state is MemberState.USABLE and not config.read_only:
            member.close_synced()
        else:
            member.close(clean=False)

    for member in members:
        if member.opened:
            try:
                await run_metadata(close, member)
            except (ReplicaError, NativeError, OSError) as error:
                log.error("close", replica=member.address, reason=str(error))


async def _open_native(engine: Engine, config: VolumeConfig, members: list[Member]) -> NativeVolume:
    records = next(m for m in members if m.state is MemberState.USABLE).records
    flags = VOLUME_READ_ONLY if config.read_only else 0
    activity = "" if records.generation is None else records.generation.activity

    def open_native() -> NativeVolume:
        native = NativeVolume(engine.native, records.size_bytes, flags)
        try:
            if activity and not config.read_only:
                native.start_activity(activity)
        except BaseException:
            native.close()
            raise
        return native

    try:
        return await run_metadata(open_native)
    except NativeError as error:
        raise VolumeError(config.name, f"cannot be opened: {error}") from error
