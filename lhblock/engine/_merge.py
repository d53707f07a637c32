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
from typing import Literal

import structlog
import trio

from lhblock._native import MERGE_STEP_BYTES, NativeVolume
from lhblock.engine._info import JobInfo
from lhblock.engine._member import Member, MemberState, sentence
from lhblock.engine._occupied import occupied_steps
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, NativeError, VolumeError
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
    directory = member.directory
    while True:
        leaves = [
            disk.name
            for disk in directory.disks.values()
            if disk.removed and not directory.children(disk.name)
        ]
        if not leaves:
            return
        for leaf in leaves:
            directory.unlink_disk(leaf)


def merge_all_below(member: Member, upper: str) -> None:
    """Merge every removed layer right below ``upper`` into it, whatever its size. Blocking.

    Nothing serves the store, and no removed leaf is left. A half-done merge has moved blocks
    between two layers, on this replica and not on another; before a layer can be compared between
    replicas that has to be over.

    Raises:
      NativeError, ReplicaError: the merge can be begun again.
    """
    directory = member.directory
    while True:
        lower = directory.disks[upper].parent
        if not lower or not directory.disks[lower].removed:
            return
        if len(directory.children(lower)) > 1:
            return  # several branches want it, on every replica: it was merged nowhere
        total_bytes = max(member.image_bytes(lower), member.image_bytes(upper))
        lower_id, upper_id = member.layers[lower], member.layers[upper]
        for begin in occupied_steps(directory.dir_fd, lower):
            length = min(MERGE_STEP_BYTES, total_bytes - begin)
            member.store.merge_up(None, lower_id, upper_id, begin, length)
        member.store.drop_layer(None, member.layers.pop(lower))
        directory.unlink_disk(lower)


class Merger:
    """Merges what can be merged in one volume.

    Args:
      name: the volume's, for messages.
      replicas: whose usable members are walked.
      native: the volume, for the range locks of a merge into the head.
      lock: the structure lock, taken for each step and never for longer.
      pinned: images that open views read.
    """

    def __init__(
        self,
        name: str,
        replicas: ReplicaSet,
        native: NativeVolume,
        lock: trio.Lock,
        *,
        pinned: Callable[[], Set[str]],
    ) -> None:
        self._name = name
        self._replicas = replicas
        self._native = native
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
        try:
            while member.state is MemberState.USABLE:
                directory = member.directory
                merge = next_merge(
                    dict(directory.disks),
                    directory.head.name,
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
        reason = f"merging a removed snapshot failed on {member.path}: {sentence(error)}"
        log.error("merge failed", volume=self._name, replica=str(member.path), reason=reason)
        self._error = reason
        full = isinstance(error, NativeError | OSError) and error.errno == errno.ENOSPC
        if not full and self._replicas.note_failure(member, reason):
            await self._replicas.withdraw()

    async def _carry_out(self, member: Member, merge: Merge) -> bool:
        """Do one merge. False: it has to wait, and others may be tried."""
        if not merge.upper:
            return await self._step(member, merge, lambda: self._unlink_leaf(member, merge))
        walk = _Walk(self, member, merge)
        if not (await walk.begin() and await walk.all_steps("prune")):
            return True  # the tree changed under it: look again
        lower_bytes, upper_bytes = await walk.allocated()
        if merge.into_head and lower_bytes > HEAD_MERGE_BYTES_MAX:
            log.info(
                "a removed snapshot waits for the next snapshot",
                volume=self._name,
                replica=str(member.path),
                image=merge.lower,
                allocated_bytes=lower_bytes,
            )
            return False
        # Whichever has less is copied.
        if merge.into_head or lower_bytes <= upper_bytes:
            if await walk.all_steps("merge-up"):
                await walk.finish_up()
        elif await walk.all_steps("merge-down"):
            await walk.finish_down()
        return True

    def _unlink_leaf(self, member: Member, merge: Merge) -> None:
        member.drop_side_layers(self._native)
        member.directory.unlink_disk(merge.lower)

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
        directory = member.directory
        lower = directory.disks.get(merge.lower)
        if lower is None or not lower.removed:
            return False
        children = tuple(child.name for child in directory.children(merge.lower))
        if children != ((merge.upper,) if merge.upper else ()):
            return False
        return not {merge.lower, merge.upper} & self._pinned()


class _Walk:
    """One pair of layers of one replica, walked from the first block to the last."""

    def __init__(self, merger: Merger, member: Member, merge: Merge) -> None:
        self._merger = merger
        self._member = member
        self._merge = merge
        self._epoch = member.epoch
        self._lower = 0
        self._upper = 0
        self._total_bytes = 0

    async def begin(self) -> bool:
        """Open layers that are not in the live chain and measure the pair. False: not any more."""
        member, merge = self._member, self._merge

        def begin() -> None:
            self._epoch = member.epoch
            self._lower = member.side_layer(merge.lower)
            self._upper = member.side_layer(merge.upper)
            self._total_bytes = max(
                member.image_bytes(merge.lower), member.image_bytes(merge.upper)
            )

        return await self._merger._step(member, merge, begin)

    async def allocated(self) -> tuple[int, int]:
        """Allocated bytes of the lower and the upper layer."""
        member, merge = self._member, self._merge

        def measure() -> tuple[int, int]:
            return member.allocated_bytes(merge.lower), member.allocated_bytes(merge.upper)

        return await run_metadata(measure)

    async def all_steps(self, kind: Literal["prune", "merge-up", "merge-down"]) -> bool:
        """Walk the whole range. False: the pair is no longer what it was."""
        store, native = self._member.store, self._merger._native
        lower, upper = self._lower, self._upper
        moved = self._merge.upper if kind == "merge-down" else self._merge.lower
        begins: list[int] = []
        if not await self._step(lambda: begins.extend(self._occupied(moved))):
            return False
        for done, begin in enumerate(begins):
            self._report(kind, done * MERGE_STEP_BYTES, len(begins) * MERGE_STEP_BYTES)
            length = min(MERGE_STEP_BYTES, self._total_bytes - begin)

            def step(begin: int = begin, length: int = length) -> None:
                if kind == "prune":
                    store.merge_prune(lower, upper, begin, length)
                elif kind == "merge-up":
                    store.merge_up(native, lower, upper, begin, length)
                else:
                    store.merge_down(lower, upper, begin, length)

            if not await self._step(step):
                return False
        return True

    def _occupied(self, image: str) -> list[int]:
        return occupied_steps(self._member.directory.dir_fd, image)

    async def finish_up(self) -> None:
        """Nothing is needed from the lower layer any more: forget it and delete it."""
        member, merge = self._member, self._merge

        def finish() -> None:
            if merge.lower not in member.side_images:
                member.store.drop_layer(self._merger._native, member.layers.pop(merge.lower))
            member.drop_side_layers(self._merger._native)
            member.directory.unlink_disk(merge.lower)

        if await self._step(finish):
            self._log("up")

    async def finish_down(self) -> None:
        """The lower file holds everything: it becomes the upper layer's."""
        member, merge = self._member, self._merge

        def finish() -> None:
            store, native = member.store, self._merger._native
            store.merge_down_finish(self._lower, self._upper)
            member.directory.adopt_merged(merge.lower, merge.upper)
            if merge.lower not in member.side_images:
                store.replace_layer(native, self._lower, self._upper)
                del member.layers[merge.lower]
            member.drop_side_layers(native)

        if await self._step(finish):
            self._log("down")

    async def _step(self, function: Callable[[], object]) -> bool:
        def run() -> bool:
            if self._member.epoch != self._epoch:
                return False
            function()
            return True

        # The epoch only changes under the lock that the step holds.
        ran: list[bool] = []
        right = await self._merger._step(self._member, self._merge, lambda: ran.append(run()))
        return right and ran == [True]

    def _report(
        self, kind: Literal["prune", "merge-up", "merge-down"], done_bytes: int, total_bytes: int
    ) -> None:
        disk = self._member.directory.disks.get(self._merge.lower)
        self._merger._job = JobInfo(
            kind=kind,
            replica=str(self._member.path),
            snapshot=disk.snapshot if disk is not None else self._merge.lower,
            done_bytes=done_bytes,
            total_bytes=total_bytes,
        )

    def _log(self, direction: str) -> None:
        log.info(
            "removed snapshot merged away",
            volume=self._merger._name,
            replica=str(self._member.path),
            image=self._merge.lower,
            direction=direction,
        )
