"""The replicas of one open volume: who takes part, who is left behind, and when I/O is frozen.

Promise 4 lives here. A replica that missed something is first ``FAILING``: C holds every
acknowledgement it missed. :meth:`ReplicaSet.fence` writes a new generation, which names the
replicas left behind, to stable storage of all that go on; only then is C told to release. A
replica on which that write fails is left behind as well and the fence starts over with a newer
generation. The last one is never left behind by Python, as it is not by C: it answers errors.

Three locks, always taken in this order when more than one is needed: the volume's structure lock
(not here), the freeze lock, the fence lock. A fence never waits for the first two, because whoever
holds them may be waiting for I/O that waits for the fence.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog
import trio

from lhblock._native import NativeStore, NativeVolume
from lhblock.engine._generations import leave_behind
from lhblock.engine._info import ReplicaInfo, VolumeState
from lhblock.engine._member import Member, MemberState, sentence
from lhblock.engine._threads import run_fence, run_metadata
from lhblock.errors import LhblockError, NativeError, NotServing, ReplicaIO, VolumeFaulted

log = structlog.get_logger(__name__)

T = TypeVar("T")


class ReplicaSet:
    """Members of a volume and the one native volume that they serve.

    Args:
      name: the volume's, for messages.
      members: in configured order, at least one usable.
      native: what the usable stores are published to; :meth:`publish` does it first.
      read_only: nothing can be missed, so a fence has nothing to write down.
      deliver_events: brings events that wait in the ring to :meth:`note_failure`.
      on_faulted: called once, when no replica is left that acknowledgements could rest on.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        native: NativeVolume,
        *,
        read_only: bool,
        deliver_events: Callable[[], None],
        on_faulted: Callable[[], None],
    ) -> None:
        self._name = name
        self._native = native
        self._deliver_events = deliver_events
        self._on_faulted = on_faulted
        self._fence_lock = trio.Lock()
        self._freeze_lock = trio.Lock()
        self._published: list[NativeStore] = []
        self._faulted = ""
        self._closed = False
        self._read_only = read_only
        self.members = list(members)
        self.failures = 0
        self.pause_ns_last = 0

    @property
    def usable(self) -> list[Member]:
        """Members that take part, in configured order."""
        return [member for member in self.members if member.state is MemberState.USABLE]

    @property
    def first(self) -> Member:
        """The member that stands for all when metadata is read.

        Raises:
          VolumeFaulted: none is left.
        """
        self.check()
        return self.usable[0]

    @property
    def state(self) -> VolumeState:
        """How the volume is."""
        if self._faulted or not self.usable:
            return "faulted"
        return "healthy" if len(self.usable) == len(self.members) else "degraded"

    def check(self) -> None:
        """Refuse to go on without a usable replica.

        Raises:
          VolumeFaulted: with the reason.
        """
        if self._faulted:
            raise VolumeFaulted(self._name, self._faulted)
        if not self.usable:
            reasons = "; ".join(f"{member.path}: {member.error}" for member in self.members)
            raise VolumeFaulted(self._name, f"no usable replica is left: {reasons}")

    def info(self) -> tuple[ReplicaInfo, ...]:
        """Describe every configured replica. Those of a faulted volume all say why."""
        return tuple(
            ReplicaInfo(
                address=str(member.path),
                mode="ERR" if self._faulted or member.state is not MemberState.USABLE else "RW",
                error=member.error or self._faulted,
                generation=member.generation_counter,
            )
            for member in self.members
        )

    def publish(self) -> None:
        """Make the usable stores the replica set. Before the first request, or frozen."""
        stores = [member.store for member in self.usable]
        if stores and stores != self._published:
            self._native.publish(stores)
            self._published = stores

    def note_failure(self, member: Member, reason: str, *, by_core: bool = False) -> bool:
        """Mark a member as failing, unless it is the last one. :meth:`fence` must follow.

        Args:
          by_core: C reported it and holds acknowledgements.

        Returns:
          Whether it was marked.
        """
        if member.state is not MemberState.USABLE:
            return False
        if self.usable == [member]:
            return False
        member.state = MemberState.FAILING
        member.error = reason
        member.dropped_by_core = by_core
        self.failures += 1
        log.error("replica failed", volume=self._name, replica=str(member.path), reason=reason)
        return True

    def fault(self, reason: str) -> None:
        """Give up: nothing may be acknowledged any more."""
        if not self._faulted:
            self._faulted = reason
            log.critical("volume faulted", volume=self._name, reason=reason)
            if not self._closed:
                self._native.give_up()
            self._on_faulted()

    async def fence(self) -> None:
        """Name every failing member stale on all usable ones, durably; then release C.

        Not cancelled: what was begun is finished.
        """
        with trio.CancelScope(shield=True):
            async with self._fence_lock:
                while not self._closed and (failing := self._failing()):
                    if self._read_only or await self._name_left_behind(failing):
                        self._release(failing)

    async def withdraw(self) -> None:
        """Fence, and take members that C has not dropped by itself out of the replica set.

        Not cancelled once I/O is frozen.
        """
        await self.fence()
        usable = [member.store for member in self.usable]
        dropped = [
            member.store
            for member in self.members
            if member.state is MemberState.LEFT and member.dropped_by_core
        ]
        if [store for store in self._published if store not in dropped] != usable:
            try:
                async with self.frozen():
                    pass
            except NotServing:
                return  # closed meanwhile: nothing is published any more

    async def close_native(self) -> None:
        """Close connections, end requests, and let nobody use the native volume any more.

        A replica that fails from here on is not fenced: what it missed is not acknowledged. Not
        cancelled.
        """
        with trio.CancelScope(shield=True):
            await self.fence()
            async with self._freeze_lock, self._fence_lock:
                self._closed = True
                await run_metadata(self._native.close)

    def _failing(self) -> list[Member]:
        return [member for member in self.members if member.state is MemberState.FAILING]

    async def _name_left_behind(self, failing: list[Member]) -> bool:
        survivors = self.usable
        generations = leave_behind(
            survivors,
            [member.generation.replica_id for member in failing],
            "; ".join(f"{member.path.name}: {member.error}" for member in failing),
        )
        errors: dict[Member, BaseException] = {}

        async def write(member: Member) -> None:
            try:
                await run_fence(member.directory.write_generation, generations[member])
            except (LhblockError, OSError) as error:
                errors[member] = error

        async with trio.open_nursery() as nursery:
            for member in survivors:
                nursery.start_soon(write, member)
        if len(errors) == len(survivors):
            reasons = "; ".join(f"{m.path}: {sentence(error)}" for m, error in errors.items())
            self.fault(f"no replica could record that another one failed: {reasons}")
            for member in failing:
                member.state = MemberState.LEFT  # its acknowledgements are never released
            return False
        for member, error in errors.items():
            self.note_failure(member, f"cannot record a new generation: {sentence(error)}")
        return not errors

    def _release(self, failing: list[Member]) -> None:
        for member in failing:
            member.state = MemberState.LEFT
            if not member.dropped_by_core:
                continue  # frozen() publishes a set without it
            try:
                self._native.fenced(member.store.id)
            except NativeError as error:
                log.error("release after a fence", volume=self._name, reason=str(error))

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Freeze I/O for the block; members that failed by then are fenced and unpublished.

        Not cancelled: the block is short and shielded.

        Raises:
          NotServing: the volume is being closed.
          LhblockError: I/O could not be frozen; nothing happened.
        """
        async with self._freeze_lock:
            if self._closed:
                raise NotServing(self._name, "is being closed")
            with trio.CancelScope(shield=True):
                await run_metadata(self._native.freeze)
                begun_ns = time.monotonic_ns()
                try:
                    self._deliver_events()
                    yield
                finally:
                    try:
                        await self.fence()
                        self.publish()
                    except NativeError as error:
                        self.fault(f"the replica set cannot be changed: {error}")
                    finally:
                        self._native.thaw()
                        self.pause_ns_last = time.monotonic_ns() - begun_ns

    async def each(
        self,
        function: Callable[[Member], T],
        *,
        members: Sequence[Member] | None = None,
        during: str,
    ) -> dict[Member, T]:
        """Run a blocking function on members in parallel; drop those that fail among others.

        A member that failed is ``FAILING`` afterwards, and fenced: but it stays in the published
        set until the caller freezes or calls :meth:`withdraw`.

        Args:
          function: undoes what it did when it raises.
          members: default all usable ones. Members that stopped being usable are skipped.
          during: what is going on, for the reason: ``"taking a snapshot"``.

        Returns:
          The results of the members that succeeded, at least one.

        Raises:
          LhblockError: all failed; the error of the first.
          VolumeFaulted: no member is usable.

        Cancelled before threads start: nothing was done. After that it is carried through.
        """
        self.check()
        chosen = [m for m in (members or self.usable) if m.state is MemberState.USABLE]
        results: dict[Member, T] = {}
        errors: dict[Member, Exception] = {}

        async def run(member: Member) -> None:
            try:
                results[member] = await run_metadata(function, member)
            except (LhblockError, OSError) as error:
                errors[member] = error

        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for member in chosen:
                    nursery.start_soon(run, member)
            if not results:
                if not errors:
                    raise VolumeFaulted(self._name, f"no usable replica is left while {during}")
                first = min(errors, key=self.members.index)
                if isinstance(errors[first], NativeError | OSError):
                    raise ReplicaIO(
                        first.path, f"failed while {during}: {sentence(errors[first])}"
                    ) from errors[first]
                raise errors[first]
            for member, error in errors.items():
                self.note_failure(member, f"failed while {during}: {sentence(error)}")
            await self.fence()
        return results
