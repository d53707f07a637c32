"""Rebuilding replicas: a new one, one that was away, one that failed and is tried again.

One at a time for a volume. docs/internals/rebuild.md gives the order of writes, with what a crash
at each step leaves. The rule behind it: from before the first change until the last byte is
verified and synced the target is marked, on its own disk, as being rebuilt, and nobody believes a
replica that is marked.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

import structlog
import trio

from lhblock._native import UNIT_BYTES, NativeVolume
from lhblock.engine._agreement import shape_of
from lhblock.engine._alignment import Alignment, parents_first, plan_alignment
from lhblock.engine._clock import utc_now
from lhblock.engine._config import RebuildOptions
from lhblock.engine._info import RebuildInfo, RebuildPhase
from lhblock.engine._layer_copy import LayerCopy, plan_copy
from lhblock.engine._member import Member, MemberState, sentence
from lhblock.engine._missed import units_of
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._snapshots import SnapshotTree
from lhblock.engine._threads import run_copy, run_io, run_metadata
from lhblock.engine._throttle import Throttle
from lhblock.errors import (
    LhblockError,
    ReplicaDamaged,
    ReplicaError,
    ReplicaForeign,
    ReplicaIO,
    ReplicaStale,
    ReplicaUnreachable,
    ReplicaUnsupported,
)
from lhblock.replica import Disk, LayerStamp, RebuildProgress, snapshot_image

log = structlog.get_logger(__name__)

SYSTEM_PREFIX: Final = "rebuild-"
"""Snapshots that a rebuild takes, and that the next one, or the end of it, removes."""
RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 300.0
"""A rebuild that failed is tried again after this long, twice as long each time."""
UNREACHABLE_S_MAX: Final = 30.0
"""The most for a replica whose process does not answer: asking costs next to nothing."""


@dataclass
class _Work:
    """One replica that is to be rebuilt, or is."""

    member: Member
    force: bool
    phase: RebuildPhase = "waiting"
    attempts: int = 0
    not_before_s: float = 0.0
    began_s: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0
    copied_bytes: int = 0
    source: str = ""
    error: str = ""
    compares: Literal["", "changes", "everything"] = ""
    why: str = ""
    refused: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class _Lost(LhblockError):
    """The rebuild makes no sense any more: the sentence says why."""


class Rebuilder:
    """Rebuilds the replicas of one volume.

    Args:
      name: the volume's, for messages.
      native: the volume, for the latency of its clients.
      replicas: the replica set.
      tree: its snapshots, and the structure lock.
      options: how fast, and whether replicas that were away are brought back unasked.
      changed: called when merges may go on.
    """

    def __init__(
        self,
        name: str,
        native: NativeVolume,
        replicas: ReplicaSet,
        tree: SnapshotTree,
        *,
        options: RebuildOptions,
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._native = native
        self._replicas = replicas
        self._tree = tree
        self._options = options
        self._changed = changed
        self._work: dict[Member, _Work] = {}
        self._active: _Work | None = None
        self._wake = trio.Event()
        self._turn = trio.Event()
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    # ---- From outside.

    def infos(self) -> tuple[RebuildInfo, ...]:
        """Every replica that is, or is to be, rebuilt, and those whose rebuild was refused."""
        return tuple(_describe(work) for work in self._work.values())

    def pinned(self) -> frozenset[str]:
        """Images that merges must leave alone: all there are, while a rebuild goes on."""
        if self._active is None:
            return frozenset()
        return frozenset().union(*(m.records.disks for m in self._replicas.writers))

    def request(self, member: Member, *, force: bool = False) -> None:
        """Rebuild a replica that takes no part, now or when its turn comes."""
        work = self._work.get(member)
        if work is None:
            self._work[member] = _Work(member, force)
        elif work is not self._active:
            work.not_before_s, work.refused = 0.0, False
            work.force = work.force or force
        self._wake.set()

    def member_left(self) -> None:
        """A replica was dropped: bring it back, if that is wanted; or it was a target."""
        active = self._active
        if active is not None and active.member.state is MemberState.LEFT and active.began_s:
            active.scope.cancel()
        self._find_returning()

    def _find_returning(self) -> None:
        if not self._options.automatic:
            return
        for member in self._replicas.members:
            if member.state is MemberState.LEFT and member not in self._work:
                work = self._work[member] = _Work(member, force=False)
                if member.has_store:
                    # It was dropped a moment ago: let whatever it was pass.
                    work.not_before_s = trio.current_time() + RETRY_S_MIN
        self._wake.set()

    async def wait(self, member: Member) -> None:
        """Wait until a replica is rebuilt, over as many attempts as it takes.

        Raises:
          ReplicaStale: only the user can say that it may be overwritten.

        Cancelled: the rebuild goes on.
        """
        while (work := self._work.get(member)) is not None:
            if work.refused:
                raise ReplicaStale(member.address, work.error)
            await self._turn.wait()

    async def interrupt(self) -> None:
        """End the attempt that is going on, which may use a replica that has to go.

        Cancelled: it ends all the same.
        """
        if self._active is not None:
            self._active.scope.cancel()
            await self._active.ended.wait()

    def forget(self, member: Member) -> None:
        """A replica is not the volume's any more. With the structure lock held."""
        self._work.pop(member, None)
        if self._active is not None and self._active.member is member:
            self._active.scope.cancel()
        self._turn.set()
        self._turn = trio.Event()

    async def run(self) -> None:
        """Rebuild until :meth:`stop`.

        Cancelled between two batches of units; the next open goes on.
        """
        try:
            with self._scope:
                if not self._work:
                    await self._remove_leftovers()
                while True:
                    self._wake = trio.Event()
                    work = self._next()
                    if work is None or (wait_s := work.not_before_s - trio.current_time()) > 0:
                        with trio.move_on_after(math.inf if work is None else wait_s):
                            await self._wake.wait()
                        continue
                    await self._try(work)
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """End :meth:`run`, which was started, and wait until its last step is over."""
        self._scope.cancel()
        await self._stopped.wait()

    def _next(self) -> _Work | None:
        waiting = [work for work in self._work.values() if not work.refused]
        return min(waiting, key=lambda work: work.not_before_s, default=None)

    # ---- One attempt.

    async def _try(self, work: _Work) -> None:
        work.scope, work.ended = trio.CancelScope(), trio.Event()
        work.attempts += 1
        work.done_bytes = work.total_bytes = work.copied_bytes = 0
        work.compares = work.why = ""
        work.began_s = trio.current_time()
        failure: Exception | None = None
        try:
            self._active = work
            with work.scope:
                try:
                    await self._rebuild(work)
                except (LhblockError, OSError) as error:
                    failure = error
            if not self._scope.cancel_called:
                with trio.CancelScope(shield=True):
                    await self._end(work, failure)
        finally:
            self._active = None
            work.ended.set()
            self._turn.set()
            self._turn = trio.Event()
            self._changed()

    async def _end(self, work: _Work, failure: Exception | None) -> None:
        """Whatever came of it: nothing of the rebuild is left behind on the volume."""
        member = work.member
        done = member.state is MemberState.USABLE
        if done:
            log.info(
                "replica rebuilt",
                volume=self._name,
                replica=member.address,
                compared=work.compares,
                copied_bytes=work.copied_bytes,
                took_s=round(trio.current_time() - work.began_s, 3),
            )
        else:
            reason = member.error if failure is None else sentence(failure)
            await self._give_up(member, reason)
            work.phase, work.error = "waiting", reason
            work.refused = isinstance(failure, ReplicaError) and not _is_passing(failure)
            longest_s = (
                UNREACHABLE_S_MAX if isinstance(failure, ReplicaUnreachable) else RETRY_S_MAX
            )
            delay_s = min(longest_s, RETRY_S_MIN * 2 ** min(work.attempts - 1, 16))
            work.not_before_s = trio.current_time() + delay_s
            log.error(
                "replica not rebuilt",
                volume=self._name,
                replica=member.address,
                reason=reason,
                again_in_s=None if work.refused else delay_s,
            )
        await self._remove_leftovers()
        if done:
            # Last: whoever waits for the replica finds no snapshot of its rebuild either.
            self._work.pop(member, None)
            # It may have failed since, and was passed over as one that is being rebuilt.
            self._find_returning()

    async def _give_up(self, member: Member, reason: str) -> None:
        async with self._tree.lock:
            if member.state is MemberState.REBUILDING:
                self._replicas.lose_rebuilding(member, reason)
            # Why it was left out is better known than why it is not back yet.
            member.error = member.error or reason
            await self._detach(member)

    async def _detach(self, member: Member) -> None:
        """Take a member that takes no part out of the published set, and close it."""
        await self._replicas.unpublish(member)
        try:
            await run_metadata(lambda: member.close(clean=False))
        except ReplicaError as error:
            log.warning("close", replica=member.address, reason=error.sentence)

    async def _remove_leftovers(self) -> None:
        """Mark the snapshots of rebuilds as removed, of this one and of such that were cut off."""
        async with self._tree.lock:
            with suppress(LhblockError):
                left = [
                    disk.snapshot
                    for disk in tuple(self._replicas.first.records.disks.values())
                    if disk.snapshot.startswith(SYSTEM_PREFIX)
                    and not disk.user_created
                    and not disk.removed
                ]
                for snapshot in left:
                    await self._tree.mark_removed_locked(snapshot)
        self._changed()

    async def _rebuild(self, work: _Work) -> None:
        member = work.member
        with trio.CancelScope(shield=True):
            # Whoever does not answer costs its time-out here, where nobody waits for it.
            await self._detach(member)
            await run_metadata(member.reach)
        async with self._tree.lock:
            with trio.CancelScope(shield=True):
                work.phase = "preparing"
                self._replicas.check()
                # Another one the next time: it may have been the source's fault.
                sources = self._replicas.usable
                source = sources[(work.attempts - 1) % len(sources)]
                work.source = source.address
                frozen = await self._prepare(work, source)
        work.phase = "copying"
        log.info(
            "rebuilding a replica",
            volume=self._name,
            replica=member.address,
            source=work.source,
            layers=len(frozen),
            compares=work.compares,
            why=work.why or None,
        )
        await self._copy_layers(work, source, [disk.name for disk in parents_first(frozen)])
        work.phase = "finishing"
        await self._promote(work)

    async def _prepare(self, work: _Work, source: Member) -> Mapping[str, Disk]:
        """Steps 1 and 2: mark, align, and let it have every change from one snapshot on."""
        member = work.member
        await self._tree.check_room()
        others = [m.generation.replica_id for m in self._replicas.usable]
        records = source.records
        size_bytes = records.size_bytes
        like = source.generation
        name, created = f"{SYSTEM_PREFIX}{uuid.uuid4()}", utc_now()
        head = records.head
        newest = Disk(snapshot_image(name), parent=head.parent, created=created)
        frozen = {disk.name: disk for disk in records.disks.values() if not disk.is_head}
        frozen[newest.name] = newest
        chain = [disk.name for disk in records.chain[:-1]] + [newest.name]

        def prepare() -> None:
            member.open_target(like, size_bytes=size_bytes, others=others, force=work.force)
            known = source.layer_sizes()
            sizes = {
                image: known[head.name if image == newest.name else image].image_bytes
                for image in frozen
            }
            ours = member.records
            alignment = plan_alignment(frozen, chain, ours.disks, ours.head)
            self._choose(work, alignment, same_size=ours.size_bytes == size_bytes)
            member.align(
                alignment,
                frozen,
                newest=newest.name,
                sizes=sizes,
                size_bytes=size_bytes,
                created=created,
            )
            if member.missed is not None:
                member.missed.aligned(alignment)
            if like.activity:
                # Before anything is written there: the core lets it have the rest of the log.
                member.make_activity(like.activity)
            member.open_store(write_only=True)

        await run_metadata(prepare)
        await self._tree.create_locked(
            name, labels={}, user_created=False, created=created, joining=member
        )
        return frozen

    def _choose(self, work: _Work, alignment: Alignment, *, same_size: bool) -> None:
        """Whether what changed since the replica left is all that it may lack."""
        member, ours = work.member, work.member.records
        missed = member.missed
        work.compares = "everything"
        if missed is None:
            return
        if work.force:
            missed.doubt = missed.doubt or "it is overwritten by force"
        missed.doubt = missed.doubt or missed.find_doubt(
            ours.disks, ours.head.name, alignment, member.witness(), same_size=same_size
        )
        work.why = missed.doubt
        if not work.why:
            work.compares = "changes"

    def _changed_units(self, work: _Work) -> Mapping[str, Collection[int]]:
        """Of the layers that the target had when it left: the units that may differ."""
        missed = work.member.missed
        if work.compares != "changes" or missed is None:
            return {}
        extents = self._native.dirty_extents(missed.tracker_id)
        if extents is None:
            missed.doubt = work.why = "there was no memory to record what changed"
            work.compares = "everything"
            return {}
        return dict.fromkeys(missed.images, units_of(extents))

    # ---- Steps 3 and 4: the layers.

    async def _copy_layers(self, work: _Work, source: Member, images: list[str]) -> None:
        member = work.member

        def check() -> None:
            if member.state is not MemberState.REBUILDING:
                raise _Lost(member.error)
            if source.state is not MemberState.USABLE:
                raise _Lost(f"its source {source.address} failed: {source.error}")

        def open_layers() -> None:
            for image in images:
                source.open_units(image)
                member.open_units(image)

        async with self._tree.lock:
            check()
            await run_metadata(open_layers)
        progress = await run_metadata(member.read_progress)
        if progress.source != source.generation.replica_id:
            progress = RebuildProgress(source=source.generation.replica_id)
        throttle = Throttle(self._options.rate_bytes_s, self._foreground)
        changed = self._changed_units(work)
        plans = {}
        for image in images:
            check()
            if not await run_copy(_is_done, source, member, image, progress):
                look = partial(plan_copy, source, member, image, only=changed.get(image))
                plans[image] = await run_copy(look)
        work.total_bytes = sum(2 * len(p.offsets_bytes) * UNIT_BYTES for p in plans.values())

        def advanced(units: int) -> None:
            work.done_bytes += units * UNIT_BYTES

        for image, plan in plans.items():
            stamp = await run_copy(source.layer_stamp, image)
            resumes = progress.partial == image and progress.partial_source == stamp
            copy = LayerCopy(
                source,
                member,
                image,
                plan,
                from_bytes=progress.partial_bytes if resumes else 0,
            )

            def note(
                before_bytes: int,
                image: str = image,
                stamp: LayerStamp = stamp,
                done: RebuildProgress = progress,
            ) -> None:
                member.write_progress(
                    replace(done, partial=image, partial_source=stamp, partial_bytes=before_bytes)
                )

            work.phase = "copying"
            try:
                await copy.copy(
                    streams=self._options.streams,
                    throttle=throttle,
                    check=check,
                    advanced=advanced,
                    note=None if image in changed else note,  # not all of it is looked at
                )
                work.copied_bytes += copy.copied_bytes
                work.phase = "verifying"
                await copy.verify(streams=self._options.streams, check=check, advanced=advanced)
            except ReplicaDamaged:
                # What an attempt before has left may be the reason: the next one starts anew.
                await run_copy(member.forget_progress)
                raise
            if image not in changed:
                progress = await run_copy(_note_done, source, member, image, progress)

    def _foreground(self) -> tuple[int, int]:
        totals = self._native.statistics()
        return (
            totals.reads + totals.writes + totals.flushes,
            totals.read_ns + totals.write_ns + totals.flush_ns,
        )

    # ---- Step 5: it takes part.

    async def _promote(self, work: _Work) -> None:
        member = work.member
        async with self._tree.lock:
            if member.state is not MemberState.REBUILDING:
                raise _Lost(member.error)
            with trio.CancelScope(shield=True):
                await self._promote_locked(member)

    async def _promote_locked(self, member: Member) -> None:
        first, ours = self._replicas.first.records, member.records
        if shape_of(ours.size_bytes, ours.disks) != shape_of(first.size_bytes, first.disks):
            raise ReplicaIO(
                member.address, "holds other snapshots than the volume after its rebuild"
            )
        # What is synced now does not have to be while I/O waits.
        await run_metadata(member.sync)
        await run_metadata(member.prepare_promotion)
        try:
            # From here on it may be believed.
            await run_io(self._native.write_activity)
            await self._replicas.join(member)
            async with self._replicas.frozen():
                if member.state is not MemberState.REBUILDING:
                    raise _Lost(member.error)
                await self._replicas.complete(member)
        finally:
            await run_metadata(member.abandon_promotion)
        await run_metadata(member.release_replaced)
        await run_metadata(member.forget_progress)


def _describe(work: _Work) -> RebuildInfo:
    took_s = trio.current_time() - work.began_s if work.phase != "waiting" else 0.0
    rate_bytes_s = work.done_bytes / took_s if took_s > 0 else 0.0
    left_bytes = work.total_bytes - work.done_bytes
    return RebuildInfo(
        address=work.member.address,
        phase="refused" if work.refused else work.phase,
        source=work.source,
        done_bytes=work.done_bytes,
        total_bytes=work.total_bytes,
        rate_bytes_s=round(rate_bytes_s),
        left_s=round(left_bytes / rate_bytes_s, 1) if rate_bytes_s > 0 else None,
        attempts=work.attempts,
        error=work.error,
        compares=work.compares,
        why=work.why,
    )


def _is_passing(error: ReplicaError) -> bool:
    """Whether it may be otherwise the next time: a disk, a lock, a cable; and no decision."""
    return not isinstance(error, ReplicaForeign | ReplicaStale | ReplicaUnsupported)


def _is_done(source: Member, target: Member, image: str, progress: RebuildProgress) -> bool:
    """Whether a layer was found equal before, and neither file was written since. Blocking."""
    return progress.done.get(image) == (source.layer_stamp(image), target.layer_stamp(image))


def _note_done(
    source: Member, target: Member, image: str, progress: RebuildProgress
) -> RebuildProgress:
    stamps = (source.layer_stamp(image), target.layer_stamp(image))
    progress = RebuildProgress(source=progress.source, done={**progress.done, image: stamps})
    target.write_progress(progress)
    return progress
