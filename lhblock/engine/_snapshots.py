"""The tree of snapshots of a volume: create, revert, mark for removal, expand.

Every operation does the same on all usable replicas: prepare in threads while I/O goes on, freeze,
switch, thaw, settle. docs/internals/snapshots.md gives the order and what a crash at each step
leaves. From the moment that the heads are prepared until the switch is durable an operation is
shielded from cancellation, because half a snapshot is worth nothing to anybody.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping

import structlog
import trio

from lhblock._native import NativeVolume
from lhblock.engine._clock import utc_now
from lhblock.engine._config import check_size
from lhblock.engine._info import SnapshotInfo
from lhblock.engine._limits import SnapshotLimits, check_limits, check_new_limits
from lhblock.engine._member import LayerSize, Member, MemberState
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import (
    LhblockError,
    SizeError,
    SnapshotBusy,
    SnapshotExists,
    SnapshotNotFound,
    VolumeBusy,
)
from lhblock.replica import EXPANSION_LABEL, Disk, snapshot_image

log = structlog.get_logger(__name__)


class SnapshotTree:
    """Snapshots of one open volume.

    Args:
      name: the volume's, for messages.
      native: the volume.
      replicas: the replica set.
      limits: see :class:`SnapshotLimits`.
      users: says who uses the volume in a way that excludes a revert; "" for nobody.
      changed: called when a merge may have become possible.

    Attributes:
      lock: the structure lock. Whoever changes layers holds it; merges take it for each step.
    """

    def __init__(
        self,
        name: str,
        native: NativeVolume,
        replicas: ReplicaSet,
        *,
        limits: SnapshotLimits,
        users: Callable[[], str],
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._native = native
        self._replicas = replicas
        self._users = users
        self._changed = changed
        self.limits = limits
        self.lock = trio.Lock()

    def infos(self) -> tuple[SnapshotInfo, ...]:
        """Snapshots, each after its parent; siblings by creation, the live chain's last."""
        member = self._replicas.first
        head = member.records.head.name
        by_parent: dict[str, list[Disk]] = {}
        for disk in tuple(member.records.disks.values()):
            by_parent.setdefault(disk.parent, []).append(disk)
        live = {disk.name for disk in member.records.chain}
        found: list[SnapshotInfo] = []
        waiting = [""]
        while waiting:
            children = by_parent.get(waiting.pop(), [])
            children.sort(key=lambda disk: (disk.name in live, disk.created, disk.name))
            for disk in children:
                if disk.name != head:
                    found.append(self._describe(member, disk, by_parent))
            waiting += [disk.name for disk in reversed(children)]
        return tuple(found)

    def head(self) -> SnapshotInfo:
        """The writable layer, described like a snapshot called ``volume-head``."""
        member = self._replicas.first
        return self._describe(member, member.records.head, {})

    def find(self, snapshot: str) -> Disk:
        """The first usable replica's record of a snapshot.

        Raises:
          SnapshotNotFound: there is none of this name.
        """
        disk = self._replicas.first.records.disks.get(snapshot_image(snapshot))
        if disk is None:
            raise SnapshotNotFound(
                self._name, f"it has no snapshot {snapshot!r}; `lhblock snapshot ls` shows them"
            )
        return disk

    async def set_limits(self, limits: SnapshotLimits) -> None:
        """Use other limits from now on.

        Raises:
          SnapshotLimit: the volume already holds more.

        Cancelled: nothing changed.
        """
        async with self.lock:
            usages = await self._replicas.each(
                lambda member: member.usage(), during="counting snapshots"
            )
            check_new_limits(self._name, limits, list(usages.values()))
            self.limits = limits

    async def create(
        self,
        snapshot: str | None,
        *,
        labels: Mapping[str, str],
        user_created: bool,
        created: str | None = None,
        size_bytes: int | None = None,
    ) -> str:
        """Take a snapshot; see :meth:`Volume.create_snapshot` and :meth:`Volume.expand`.

        Args:
          created: the time to note, when another host has set it for all replicas.
        """
        snapshot = str(uuid.uuid4()) if snapshot is None else snapshot
        async with self.lock:
            await self.create_locked(
                snapshot,
                labels=labels,
                user_created=user_created,
                created=utc_now() if created is None else created,
                size_bytes=size_bytes,
            )
        self._changed()
        return snapshot

    async def check_room(self) -> None:
        """Refuse what :meth:`create` would refuse, before something is prepared for it.

        Raises:
          SnapshotLimit: there are too many snapshots, or they hold too much.
        """
        usages = await self._replicas.each(
            lambda member: member.usage(), during="counting snapshots"
        )
        check_limits(self._name, self.limits, list(usages.values()))

    async def create_locked(
        self,
        snapshot: str,
        *,
        labels: Mapping[str, str],
        user_created: bool,
        created: str,
        size_bytes: int | None = None,
        joining: Member | None = None,
    ) -> None:
        """Take a snapshot, with the structure lock held.

        Args:
          joining: has the snapshot and an empty head already; it gets every change from the moment
            of the switch on.
        """
        image = snapshot_image(snapshot)
        self._replicas.check()
        for member in self._replicas.writers:
            known = member.records.disks.get(image)
            if known is not None:
                why = "is still being merged away" if known.removed else "already exists"
                raise SnapshotExists(self._name, f"snapshot {snapshot!r} {why}")
        await self.check_room()
        if joining is None:
            # Whoever has a layer of that name, perhaps of the same second, has another one.
            self._replicas.doubt_missed("a snapshot's name was given again", image=image)

        def prepare(member: Member) -> None:
            member.prepare_snapshot(
                snapshot,
                user_created=user_created,
                created=created,
                labels=labels,
                size_bytes=size_bytes,
            )

        with trio.CancelScope(shield=True):
            prepared = await self._replicas.each(
                prepare, members=self._replicas.writers, during="preparing a snapshot"
            )
            await self._switch(list(prepared), size_bytes or self._native.size_bytes, joining)
        log.info(
            "snapshot taken",
            volume=self._name,
            snapshot=snapshot,
            pause_us=self._replicas.pause_ns_last // 1000,
        )

    async def _switch(
        self, prepared: list[Member], size_bytes: int, joining: Member | None
    ) -> None:
        try:
            async with self._replicas.frozen():
                done = await self._replicas.each(
                    lambda member: member.commit_snapshot(size_bytes),
                    members=prepared,
                    during="switching heads",
                )
                if size_bytes != self._native.size_bytes:
                    self._native.resize(size_bytes)
                # A flush that is answered now would rest on renames that are not durable yet.
                self._native.gate_flushes(True)
                if joining is not None:
                    joining.state = MemberState.REBUILDING
                    joining.error = ""
                    joining.dropped_by_core = False
        except (LhblockError, OSError) as error:
            if any(member.switched for member in prepared):
                self._replicas.fault(f"the head was switched on disk but not in memory: {error}")
            raise
        finally:
            await self._abandon(prepared)

        try:
            await self._replicas.each(
                lambda member: member.settle_snapshot(),
                members=list(done),
                during="making a snapshot durable",
            )
        except (LhblockError, OSError) as error:
            # Flushes that wait at the gate end with an error.
            self._replicas.fault(f"a snapshot could not be made durable: {error}")
            raise
        self._native.gate_flushes(False)
        await self._replicas.withdraw()

    async def _abandon(self, members: list[Member]) -> None:
        for member in members:
            try:
                await run_metadata(member.abandon_head)
            except (LhblockError, OSError) as error:
                # The next open removes what is left.
                log.warning("clean up a head", replica=member.address, reason=str(error))

    async def revert(self, snapshot: str, *, created: str | None = None) -> None:
        """Go back to a snapshot; see :meth:`Volume.revert_snapshot`."""
        async with self.lock:
            self._refuse_users()
            if self._replicas.rebuilding:
                raise VolumeBusy(
                    self._name,
                    f"cannot revert while replica {self._replicas.rebuilding[0].address} is being "
                    "rebuilt; wait for it, or remove that replica",
                )
            if self.find(snapshot).removed:
                raise SnapshotBusy(self._name, f"cannot revert to removed snapshot {snapshot!r}")
            noted = utc_now() if created is None else created
            size_bytes = self._native.size_bytes
            with trio.CancelScope(shield=True):
                prepared = await self._replicas.each(
                    lambda member: member.prepare_revert(snapshot, created=noted),
                    during="preparing a revert",
                )
                try:
                    async with self._replicas.frozen():
                        self._refuse_users()
                        done = await self._replicas.each(
                            lambda member: member.commit_revert(),
                            members=list(prepared),
                            during="reverting",
                        )
                except (LhblockError, OSError) as error:
                    await self._abandon(list(prepared))
                    if any(member.switched for member in prepared):
                        self._replicas.fault(f"a revert could not be carried through: {error}")
                    raise
                finally:
                    self._replicas.doubt_missed("the volume was reverted")
                for member in done:
                    await run_metadata(member.release_replaced)
        assert size_bytes == self._native.size_bytes
        log.info("reverted", volume=self._name, snapshot=snapshot)
        self._changed()

    def _refuse_users(self) -> None:
        users = self._users()
        if users:
            raise VolumeBusy(self._name, f"cannot revert while {users}; disconnect first")

    async def mark_removed(self, snapshot: str, *, exported: Callable[[str], bool]) -> None:
        """Mark a snapshot for removal; see :meth:`Volume.remove_snapshot`."""
        async with self.lock:
            if self.find(snapshot).removed:
                return
            if exported(snapshot):
                raise SnapshotBusy(
                    self._name, f"snapshot {snapshot!r} is exported; disconnect its clients first"
                )
            await self.mark_removed_locked(snapshot)
        log.info("snapshot marked as removed", volume=self._name, snapshot=snapshot)
        self._changed()

    async def mark_removed_locked(self, snapshot: str) -> None:
        """Mark a snapshot that there is, with the structure lock held."""
        await self._replicas.each(
            lambda member: member.mark_removed(snapshot),
            members=self._replicas.writers,
            during="marking a snapshot as removed",
        )
        await self._replicas.withdraw()

    async def expand(self, size_bytes: int) -> bool:
        """Grow the volume; see :meth:`Volume.expand`. Returns whether anything changed."""
        check_size(self._name, size_bytes)
        now_bytes = self._native.size_bytes
        if size_bytes == now_bytes:
            return False
        if size_bytes < now_bytes:
            raise SizeError(
                self._name,
                f"it has {now_bytes} bytes and cannot be expanded to a smaller size {size_bytes}",
            )
        await self.create(
            f"expand-{size_bytes}",
            labels={EXPANSION_LABEL: str(size_bytes)},
            user_created=False,
            size_bytes=size_bytes,
        )
        log.info("expanded", volume=self._name, size_bytes=size_bytes)
        return True

    def _describe(
        self, member: Member, disk: Disk, by_parent: Mapping[str, list[Disk]]
    ) -> SnapshotInfo:
        parent = member.records.disks.get(disk.parent)
        try:
            size = member.layer_size(disk.name)
        except LhblockError:  # merged away in this moment
            size = LayerSize(0, 0)
        return SnapshotInfo(
            name=disk.snapshot,
            parent=parent.snapshot if parent is not None else "",
            children=tuple(sorted(child.snapshot for child in by_parent.get(disk.name, []))),
            created=disk.created,
            removed=disk.removed,
            labels=dict(disk.labels),
            size_bytes=size.image_bytes,
            allocated_bytes=size.allocated_bytes,
            user_created=disk.user_created,
        )
