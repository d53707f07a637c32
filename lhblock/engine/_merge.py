"""Removed snapshots are merged away in the background, one step at a time.

Every replica is walked for itself: which layers are left, and how far a merge is, may differ
between replicas without harm, because a removed layer is nobody's content. Nothing about a merge is
recorded: each step leaves the layers readable, and after a crash the walk starts anew and finds
most of its work done. docs/internals/snapshots.md has the rules and their reasons.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import structlog
import trio

from lhblock._native import MERGE_STEP_BYTES
from lhblock.engine._info import JobInfo
from lhblock.engine._member import Member, MemberState, MergeKind, sentence
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, NativeError, ReplicaUnreachable, VolumeError
from lhblock.replica import Disk

log = structlog.get_logger(__name__)

HEAD_MERGE_BYTES_MAX = 1 << 30
"""A removed layer below the head is copied into it only if at most this much of it is still needed.

Such a copy competes with clients for the head's disk and range locks; a bigger layer waits for the
next snapshot, when the same merge does not concern them.
"""


@dataclass(frozen=True)
class Merge:
    """A removed layer and what it goes into.

    Attributes:
      lower: image of the removed layer.
      upper: image of its only child, or "" if it has none and is simply deleted.
      into_head: ``upper`` is the head.
    """

    lower: str
    upper: str
    into_head: bool = False


def next_merge(
    disks: Mapping[str, Disk], head: str, *, pinned: Set[str], skipped: Set[str]
) -> Merge | None:
    """Choose what to do next in one replica.

    Leaves go first, because that frees space and costs nothing. The layer below the head comes
    last, because a snapshot taken meanwhile makes it cheaper.

    Args:
      disks: by image name.
      head: image of the head.
      pinned: images that somebody reads through a view.
      skipped: images that were tried and have to wait.

    Returns:
      None when nothing can be done now.
    """
    children: dict[str, list[str]] = {}
    for disk in disks.values():
        children.setdefault(disk.parent, []).append(disk.name)
    below_head: Merge | None = None
    pair: Merge | None = None
    for name in sorted(disks):
        if not disks[name].removed or name in pinned or name in skipped:
            continue
        above = children.get(name, [])
        if not above:
            return Merge(lower=name, upper="")
        if len(above) > 1 or above[0] in pinned:
            continue
        if above[0] == head:
            below_head = Merge(lower=name, upper=head, into_head=True)
        elif pair is None:
            pair = Merge(lower=name, upper=above[0])
    return pair or below_head


def unlink_removed_leaves(member: Member) -> None:
    """Delete every removed layer that nothing is built on, again and again. Blocking.

    Nothing serves the store, and none of its side layers is open. Afterwards a layer has as many
    children as it has branches that somebody wants, which is the same number on every replica.

    Raises:
      ReplicaError: the deletion can be begun again.
    """
    while True:
        records = member.records
        leaves = [
            disk.name
            for disk in records.disks.values()
            if disk.removed and not records.children(disk.name)
        ]
        if not leaves:
            return
        for leaf in leaves:
            member.remove_leaf(leaf)


def merge_all_below(member: Member, upper: str) -> None:
    """Merge every removed layer right below ``upper`` into it, whatever its size. Blocking.

    Nothing serves the store, and no removed leaf is left. A half-done merge has moved blocks
    between two layers, on this replica and not on another; before a layer can be compared between
    replicas that has to be over.

    Raises:
      NativeError, ReplicaError: the merge can be begun again.
    """
    while True:
        records = member.records
        lower = records.disks[upper].parent
        if not lower or not records.disks[lower].removed:
            return
        if len(records.children(lower)) > 1:
            return  # several branches want it, on every replica: it was merged nowhere
        token = member.begin_merge(lower, upper)
        for offset_bytes in member.merge_offsets(lower):
            member.merge_step("merge-up", lower, upper, offset_bytes, token)
        member.finish_merge("merge-up", lower, upper, token)


class Merger:
    """Merges what can be merged in one volume.

    Args:
      name: the volume's, for messages.
      replicas: whose usable members are walked.
      lock: the structure lock, taken for each step and never for longer.
      pinned: images that open views read.
    """

    def __init__(
        self,
        name: str,
        replicas: ReplicaSet,
        lock: trio.Lock,
        *,
        pinned: Callable[[], Set[str]],
    ) -> None:
        self._name = name
        self._replicas = replicas
        self._lock = lock
        self._pinned = pinned
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._job: JobInfo | None = None
        self._error = ""
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    def wake(self) -> None:
        """Something changed: look for work again."""
        self._wake.set()
        if self._idle.is_set():
            self._idle = trio.Event()

    def jobs(self) -> tuple[JobInfo, ...]:
        """What is being merged now."""
        return () if self._job is None else (self._job,)

    async def wait_idle(self) -> None:
        """Wait until nothing can be merged now.

        Raises:
          VolumeError: a merge failed; its snapshot stays, marked as removed.

        Cancelled: merging goes on.
        """
        while not self._idle.is_set():
            await self._idle.wait()
        if self._error:
            raise VolumeError(self._name, self._error)

    async def run(self) -> None:
        """Merge until :meth:`stop`.

        Cancelled between steps; the next open goes on.
        """
        try:
            with self._scope:
                while True:
                    while self._wake.is_set():
                        self._wake = trio.Event()
                        self._error = ""
                        for member in self._replicas.usable:
                            await self._merge_member(member)
                    self._idle.set()
                    await self._wake.wait()
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """End :meth:`run`, which was started, and wait until its last step is over."""
        self._scope.cancel()
        await self._stopped.wait()

    async def _merge_member(self, member: Member) -> None:
        skipped: set[str] = set()
        if member.merges_itself:
            return
        try:
            while member.state is MemberState.USABLE:
                merge = next_merge(
                    dict(member.records.disks),
                    member.records.head.name,
                    pinned=self._pinned(),
                    skipped=skipped,
                )
                if merge is None:
                    return
                try:
                    if not await self._carry_out(member, merge):
                        skipped.add(merge.lower)
                finally:
                    self._job = None
        except (LhblockError, OSError) as error:
            await self._failed(member, error)

    async def _failed(self, member: Member, error: LhblockError | OSError) -> None:
        reason = f"merging a removed snapshot failed on {member.address}: {sentence(error)}"
        log.error("merge failed", volume=self._name, replica=member.address, reason=reason)
        full = isinstance(error, NativeError | OSError) and error.errno == errno.ENOSPC
        lost = isinstance(error, ReplicaUnreachable)
        if not full and self._replicas.note_failure(member, reason, out_of_touch=lost):
            await self._replicas.withdraw()
        if member.state is MemberState.USABLE:
            self._error = reason  # else the others merge, and it is left behind

    async def _carry_out(self, member: Member, merge: Merge) -> bool:
        """Do one merge. False: it has to wait, and others may be tried."""
        if not merge.upper:
            return await self._step(member, merge, lambda: member.remove_leaf(merge.lower))
        walk = _Walk(self, member, merge)
        if not (await walk.begin() and await walk.all_steps("prune")):
            return True  # the tree changed under it: look again
        lower_bytes, upper_bytes = await walk.allocated()
        if merge.into_head and lower_bytes > HEAD_MERGE_BYTES_MAX:
            log.info(
                "a removed snapshot waits for the next snapshot",
                volume=self._name,
                replica=member.address,
                image=merge.lower,
                allocated_bytes=lower_bytes,
            )
            return False
        # Whichever has less is copied.
        if merge.into_head or lower_bytes <= upper_bytes:
            if await walk.all_steps("merge-up"):
                await walk.finish("merge-up")
        elif await walk.all_steps("merge-down"):
            await walk.finish("merge-down")
        return True

    async def _step(self, member: Member, merge: Merge, function: Callable[[], object]) -> bool:
        """Run a blocking step under the structure lock if ``merge`` is still right."""
        async with self._lock:
            if not self._still_right(member, merge):
                return False
            await run_metadata(function)
            return True

    def _still_right(self, member: Member, merge: Merge) -> bool:
        if member.state is not MemberState.USABLE:
            return False
        records = member.records
        lower = records.disks.get(merge.lower)
        if lower is None or not lower.removed:
            return False
        children = tuple(child.name for child in records.children(merge.lower))
        if children != ((merge.upper,) if merge.upper else ()):
            return False
        return not {merge.lower, merge.upper} & self._pinned()


class _Walk:
    """One pair of layers of one replica, walked from the first block to the last."""

    def __init__(self, merger: Merger, member: Member, merge: Merge) -> None:
        self._merger = merger
        self._member = member
        self._merge = merge
        self._token = 0

    async def begin(self) -> bool:
        """Open layers that are not in the live chain and measure the pair. False: not any more."""
        member, merge = self._member, self._merge

        def begin() -> None:
            self._token = member.begin_merge(merge.lower, merge.upper)

        return await self._merger._step(member, merge, begin)

    async def allocated(self) -> tuple[int, int]:
        """Allocated bytes of the lower and the upper layer."""
        member, merge = self._member, self._merge

        sizes = await run_metadata(member.layer_sizes)
        return sizes[merge.lower].allocated_bytes, sizes[merge.upper].allocated_bytes

    async def all_steps(self, kind: MergeKind) -> bool:
        """Walk the whole range. False: the pair is no longer what it was."""
        member, merge = self._member, self._merge
        moved = merge.upper if kind == "merge-down" else merge.lower
        begins: list[int] = []

        def look() -> bool:
            begins.extend(member.merge_offsets(moved))
            return True

        if not await self._step(look):
            return False
        for done, begin in enumerate(begins):
            self._report(kind, done * MERGE_STEP_BYTES, len(begins) * MERGE_STEP_BYTES)

            def step(begin: int = begin) -> bool:
                return member.merge_step(kind, merge.lower, merge.upper, begin, self._token)

            if not await self._step(step):
                return False
        return True

    async def finish(self, kind: MergeKind) -> None:
        """After all steps: the lower layer goes."""
        member, merge = self._member, self._merge

        def finish() -> bool:
            return member.finish_merge(kind, merge.lower, merge.upper, self._token)

        if await self._step(finish):
            self._log(kind.removeprefix("merge-"))

    async def _step(self, function: Callable[[], bool]) -> bool:
        done: list[bool] = []
        right = await self._merger._step(self._member, self._merge, lambda: done.append(function()))
        return right and done == [True]

    def _report(self, kind: MergeKind, done_bytes: int, total_bytes: int) -> None:
        disk = self._member.records.disks.get(self._merge.lower)
        self._merger._job = JobInfo(
            kind=kind,
            replica=self._member.address,
            snapshot=disk.snapshot if disk is not None else self._merge.lower,
            done_bytes=done_bytes,
            total_bytes=total_bytes,
        )

    def _log(self, direction: str) -> None:
        log.info(
            "removed snapshot merged away",
            volume=self._merger._name,
            replica=self._member.address,
            image=self._merge.lower,
            direction=direction,
        )
