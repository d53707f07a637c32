"""The replicas of one open volume: who takes part, who is left behind, and when I/O is frozen.

Promise 4 lives here. A replica that missed something is first ``FAILING``: C holds every
acknowledgement it missed. :meth:`ReplicaSet.fence` writes a new generation, which names the
replicas left behind, to stable storage of all that go on; only then is C told to release. A
replica on which that write fails is left behind as well and the fence starts over with a newer
generation. The last one is never left behind by Python, as it is not by C: it answers errors.

Promise 5 too, as far as it concerns a volume that is open: when a majority of three and more is
lost at once, another engine may have it. Then nothing is acknowledged until enough of the lost ones
have recorded that they are left behind. ``docs/internals/remote-replicas.md`` has the argument.

Three locks, always taken in this order when more than one is needed: the volume's structure lock
(not here), the freeze lock, the fence lock. A fence never waits for the first two, because whoever
holds them may be waiting for I/O that waits for the fence.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final, TypeVar

import structlog
import trio

from lhblock._native import NativeVolume, StoreMode
from lhblock.engine._generations import leave_behind, let_in
from lhblock.engine._info import ReplicaInfo, ReplicaMode, VolumeState
from lhblock.engine._member import Member, MemberState, Store, sentence
from lhblock.engine._missed import Missed
from lhblock.engine._threads import run_fence, run_metadata
from lhblock.errors import (
    LhblockError,
    NativeError,
    NoQuorum,
    NotServing,
    ReplicaIO,
    ReplicaLocked,
    ReplicaStale,
    ReplicaUnreachable,
    VolumeBusy,
    VolumeFaulted,
)
from lhblock.replica import Generation, HistoryEntry, have_quorum, quorum

log = structlog.get_logger(__name__)

T = TypeVar("T")

_QUORUM_POLL_S: Final = 0.5
_EVENT_WAIT_S: Final = 5.0
_EVENT_POLL_S: Final = 0.001

_MODES: Final[Mapping[MemberState, ReplicaMode]] = {
    MemberState.USABLE: "RW",
    MemberState.REBUILDING: "WO",
}


class ReplicaSet:
    """Members of a volume and the one native volume that they serve.

    Args:
      name: the volume's, for messages.
      members: in configured order, at least one usable.
      native: what the usable stores are published to; :meth:`publish` does it first.
      read_only: nothing can be missed, so a fence has nothing to write down.
      deliver_events: brings events that wait in the ring to :meth:`note_failure`.
      on_left: called when a member has become ``LEFT``.
      quorum_wait_s: how long acknowledgements wait for a majority that was lost at once.
      on_faulted: called once, when no replica is left that acknowledgements could rest on.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        native: NativeVolume,
        *,
        read_only: bool,
        quorum_wait_s: float,
        deliver_events: Callable[[], None],
        on_faulted: Callable[[], None],
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._native = native
        self._deliver_events = deliver_events
        self._on_faulted = on_faulted
        self._on_left = on_left
        self._quorum_wait_s = quorum_wait_s
        self._ending = trio.Event()
        # Of the last generation that enough members of the one before have: what a fence that
        # reached fewer says does not count.
        self._committed: frozenset[str] = frozenset()
        self._fence_lock = trio.Lock()
        self._freeze_lock = trio.Lock()
        self._published: list[tuple[Store, StoreMode]] = []
        self._faulted = ""
        self._abandoned = False  # a fence failed: what waits for it is never acknowledged
        self._closed = False
        self._read_only = read_only
        self.members = list(members)
        for member in self.members:
            member.serve(native)
        if self.usable and self.usable[0].records.generation is not None:
            self._committed = frozenset(self.usable[0].generation.members)
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
    def history(self) -> tuple[HistoryEntry, ...]:
        """Generations that changed the members, oldest first; empty once none is usable."""
        return self.usable[0].generation.history if self.usable else ()

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
            reasons = "; ".join(f"{member.address}: {member.error}" for member in self.members)
            raise VolumeFaulted(self._name, f"no usable replica is left: {reasons}")

    @property
    def rebuilding(self) -> list[Member]:
        """Members that get every change but answer no reads, in configured order."""
        return [member for member in self.members if member.state is MemberState.REBUILDING]

    @property
    def writers(self) -> list[Member]:
        """Members that get every change."""
        return [*self.usable, *self.rebuilding]

    def info(self) -> tuple[ReplicaInfo, ...]:
        """Describe every configured replica. Those of a faulted volume all say why."""
        newest = max((member.generation_counter for member in self.members), default=0)
        return tuple(
            ReplicaInfo(
                address=member.address,
                mode="ERR" if self._faulted else _MODES.get(member.state, "ERR"),
                error=member.error or self._faulted,
                generation=member.generation_counter,
                lag=newest - member.generation_counter if member.generation_counter else 0,
            )
            for member in self.members
        )

    def publish(self) -> None:
        """Make the members' stores the replica set. Before the first request, or frozen."""
        wanted = self._wanted()
        if self.usable and wanted != self._published:
            self._track_withdrawn()
            self._native.publish([store for store, _ in wanted], [mode for _, mode in wanted])
            self._published = wanted

    def _wanted(self) -> list[tuple[Store, StoreMode]]:
        return [
            *((member.store, StoreMode.RW) for member in self.usable),
            *((member.store, StoreMode.WO) for member in self.rebuilding),
        ]

    def note_failure(
        self, member: Member, reason: str, *, by_core: bool = False, out_of_touch: bool = False
    ) -> bool:
        """Mark a member as failing, unless it is the last one. :meth:`fence` must follow.

        Args:
          by_core: C reported it and holds acknowledgements.
          out_of_touch: it could not be reached, which says nothing of its disk.

        Returns:
          Whether it was marked.
        """
        if member.state is MemberState.REBUILDING:
            self.lose_rebuilding(member, reason, by_core=by_core)
            return True
        if member.state is not MemberState.USABLE:
            if by_core:
                self._note_dropped(member)
            return False
        if self.usable == [member]:
            return False
        member.state = MemberState.FAILING
        member.error = reason
        member.dropped_by_core = by_core
        records = member.records
        member.missed = Missed(
            tracker_id=member.store.id,
            images=frozenset(name for name, disk in records.disks.items() if not disk.is_head),
            head=records.head.name,
            witness=member.witness(),
            doubt="" if out_of_touch else "its failure may be that of its disk",
        )
        self.failures += 1
        log.error("replica failed", volume=self._name, replica=member.address, reason=reason)
        return True

    def _note_dropped(self, member: Member) -> None:
        """C drops, and holds acknowledgements for, one that Python had given up before.

        It is published until I/O is frozen, which waits for what is held.
        """
        member.dropped_by_core = True
        if member.state is MemberState.LEFT and not self._abandoned:
            self._release_held(member)

    def doubt_missed(self, reason: str, *, image: str = "") -> None:
        """What members that take no part lack is more than the core recorded.

        Args:
          image: only of those that had this layer when they left.
        """
        for member in self.members:
            missed = member.missed
            if member.state is MemberState.USABLE or missed is None:
                continue
            if not image or image in missed.images:
                missed.doubt = missed.doubt or reason

    def _forget_missed(self, member: Member) -> None:
        missed, member.missed = member.missed, None
        if missed is not None:
            with suppress(NativeError):  # there was no room for a map
                self._native.untrack(missed.tracker_id)

    def lose_rebuilding(self, member: Member, reason: str, *, by_core: bool = False) -> None:
        """A member that is being rebuilt cannot go on. Nobody believed it, so nothing is fenced.

        :meth:`withdraw` must follow, before its store is closed.
        """
        assert member.state is MemberState.REBUILDING
        member.state = MemberState.LEFT
        member.error = reason
        member.dropped_by_core = by_core
        self._on_left()

    async def join(self, member: Member) -> None:
        """Name a rebuilt replica as a member: on the others first, then on itself.

        It is still marked as rebuilding, so a crash in between leaves one that nobody believes.
        Not cancelled.

        Raises:
          LhblockError: it could not be recorded everywhere; it is no member.
        """
        with trio.CancelScope(shield=True):
            async with self._fence_lock:
                survivors = self.usable
                joined = member.generation.replica_id
                made = let_in(survivors, [joined], f"{member.name} was rebuilt")
                await self._write_generations(survivors, made)
                if joined not in self._committed:
                    raise ReplicaIO(member.address, "too few replicas agree to it as a member")
                await self._give_generation(member)
            await self.fence()
            self.check()

    def _agreed(self, replica_ids: Collection[str]) -> bool:
        """Whether these are enough members for what they have to count."""
        return have_quorum(replica_ids, self._committed)

    async def _write_generations(
        self,
        members: Sequence[Member],
        made: Mapping[Member, Generation],
        *,
        agreed: Collection[str] = (),
    ) -> bool:
        """Whether all have it now; the others are failing, unless that is all of them.

        Args:
          agreed: replica ids of others that agree to it.

        Raises:
          ReplicaIO: none has it.
        """
        errors: dict[Member, BaseException] = {}

        async def write(member: Member) -> None:
            try:
                await run_fence(member.write_generation, made[member])
            except (LhblockError, OSError) as error:
                errors[member] = error

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(write, member)
        if len(errors) == len(members):
            first = next(iter(errors))
            raise ReplicaIO(
                first.address, f"cannot record a new generation: {sentence(errors[first])}"
            )
        have = {member.generation.replica_id for member in members if member not in errors}
        if self._agreed(have.union(agreed)):
            self._committed = frozenset(next(iter(made.values())).members)
        for member, error in errors.items():
            self.note_failure(
                member,
                f"cannot record a new generation: {sentence(error)}",
                out_of_touch=isinstance(error, ReplicaUnreachable),
            )
        return not errors

    async def _give_generation(self, member: Member) -> None:
        """The newest generation, on one that is marked as rebuilding."""
        newest = max((m.generation for m in self.usable), key=lambda each: each.counter)
        own = replace(newest, replica_id=member.generation.replica_id)
        if own.counter != member.generation.counter or own.members != member.generation.members:
            await run_fence(member.note_repaired)
            await run_fence(member.write_generation, own)

    async def complete(self, member: Member) -> None:
        """From a member that is written to one that takes part. I/O is frozen by the caller.

        Raises:
          LhblockError: it takes no part; if that is not certain, it is ``FAILING`` and the end of
            the freeze fences it.
        """
        assert member.state is MemberState.REBUILDING
        await run_metadata(member.start_promotion)
        async with self._fence_lock:
            self.check()
            await self._give_generation(member)
            if member.generation.replica_id not in self.first.generation.members:
                raise ReplicaIO(member.address, "was left behind while it was let in")
            try:
                await run_fence(member.set_rebuilding, False)
            except (LhblockError, OSError) as error:
                # The mark may be gone all the same.
                member.state = MemberState.FAILING
                member.error = f"cannot record that it is complete: {sentence(error)}"
                raise
            if member.state is not MemberState.REBUILDING:
                # It has lost its mark and is named as a member, so it has to be left behind.
                member.state = MemberState.FAILING
                raise ReplicaIO(member.address, f"was lost while it was let in: {member.error}")
            member.finish_promotion()
            self._forget_missed(member)
            member.state = MemberState.USABLE
            member.error = ""
            member.dropped_by_core = False

    def add(self, member: Member) -> None:
        """Configure one more, which takes no part yet."""
        assert member.state is MemberState.LEFT
        member.serve(self._native)
        self.members.append(member)

    def find(self, address: str) -> Member | None:
        """The member of an address; of a directory, its absolute path."""
        return next((m for m in self.members if m.key == address), None)

    def refuse_removal(self, member: Member) -> None:
        """Raises VolumeBusy if a member is the last usable one."""
        if self.usable == [member]:
            raise VolumeBusy(
                self._name, f"{member.address} is its last usable replica and cannot be removed"
            )

    async def remove(self, member: Member) -> None:
        """Take a member out for good, named as left behind by the others if it took part.

        Nothing publishes its store when this returns.

        Raises:
          VolumeBusy: it is the last usable one.
          NotServing: the volume is being closed.

        Not cancelled.
        """
        with trio.CancelScope(shield=True):
            self.refuse_removal(member)
            tracker_id = member.store.id if member.has_store else 0
            if member.state is MemberState.USABLE:
                member.state = MemberState.FAILING
                member.error = "removed"
                member.dropped_by_core = False
            elif member.state is MemberState.REBUILDING:
                self.lose_rebuilding(member, "removed")
            await self.withdraw()
            self.check()
            if self._closed:
                raise NotServing(self._name, "is being closed")
            # One that the core dropped by itself is published still.
            await self.unpublish(member)
            self._forget_missed(member)
            with suppress(NativeError):  # it has none, or that was it
                self._native.untrack(tracker_id)
            self.members.remove(member)

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
        dropped = [
            member.store
            for member in self.members
            if member.state is MemberState.LEFT and member.dropped_by_core and member.has_store
        ]
        if [each for each in self._published if each[0] not in dropped] != self._wanted():
            try:
                async with self.frozen():
                    pass
            except NotServing:
                return  # closed meanwhile: nothing is published any more

    async def unpublish(self, member: Member) -> None:
        """Let the core know nothing of a member that takes no part, so that it may be closed.

        Not cancelled once I/O is frozen.
        """
        assert member.state is MemberState.LEFT
        if member.has_store and any(store is member.store for store, _ in self._published):
            async with self.frozen():
                pass

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
                for member in self.members:
                    member.serve(None)

    def _failing(self) -> list[Member]:
        return [member for member in self.members if member.state is MemberState.FAILING]

    def stop_waiting(self) -> None:
        """The volume is closed soon: what waits for a quorum is not acknowledged any more."""
        self._ending.set()

    async def _agreement(
        self, survivors: Sequence[Member], failing: Sequence[Member], made: Generation
    ) -> frozenset[str]:
        """Wait until enough members agree to the next generation.

        Survivors do, if they record it, which comes after this; so do those whose directories
        nobody else can open. Others have to record it.

        Returns:
          The replica ids of those that agree and are no survivors.

        Raises:
          NoQuorum: why there is no agreement.
        """
        going_on = {member.generation.replica_id for member in survivors}
        agreed = {each.generation.replica_id for each in failing if each.exclusive and each.opened}
        if self._agreed(going_on | agreed):
            return frozenset(agreed)
        count = len(self._committed)
        said = f"{len(survivors)} of {count} replicas are left, {quorum(count)} are needed"
        log.error("quorum lost, acknowledgements wait", volume=self._name, reason=said)
        lost = {each.generation.replica_id: each for each in failing if each.opened}
        with trio.move_on_after(self._quorum_wait_s):
            while not self._ending.is_set():
                for replica_id, left in lost.items():
                    if replica_id in agreed:
                        continue
                    try:
                        await run_fence(left.leave_behind, made)
                    except (ReplicaLocked, ReplicaStale) as error:
                        raise NoQuorum(self._name, str(error)) from error
                    except (LhblockError, OSError) as error:
                        log.info("asked for its agreement", reason=str(error))
                        continue
                    agreed.add(replica_id)
                if self._agreed(going_on | agreed):
                    for member in survivors:
                        if member.state is not MemberState.USABLE:
                            raise NoQuorum(self._name, f"{member.address} failed meanwhile, too")
                    return frozenset(agreed)
                with trio.move_on_after(_QUORUM_POLL_S):
                    await self._ending.wait()
        raise NoQuorum(
            self._name,
            f"{said}, and the others did not come back within {self._quorum_wait_s:g} s",
        )

    async def _name_left_behind(self, failing: list[Member]) -> bool:
        survivors = self.usable
        generations = leave_behind(
            survivors,
            [member.generation.replica_id for member in failing],
            "; ".join(f"{member.name}: {member.error}" for member in failing),
        )
        try:
            made = next(iter(generations.values()))
            agreed = await self._agreement(survivors, failing, made)
            generations = {m: each.with_agreement(agreed) for m, each in generations.items()}
            return await self._write_generations(survivors, generations, agreed=agreed)
        except NoQuorum as error:
            if not self._ending.is_set():
                self.fault(error.sentence)
        except ReplicaIO as error:
            self.fault(f"no replica could record that another one failed: {error}")
        self._abandoned = True
        for member in failing:
            member.state = MemberState.LEFT
        return False

    def _track_withdrawn(self) -> None:
        # The core tracks what it drops by itself. Frozen: nothing is changed meanwhile.
        for member in self.members:
            if member.state is MemberState.USABLE or not member.has_store:
                continue
            if (member.store, StoreMode.RW) in self._published:
                try:
                    self._native.track(member.store.id)
                except NativeError as error:
                    # Without a map everything counts as changed when it comes back.
                    log.warning(
                        "changes are not tracked", replica=member.address, reason=str(error)
                    )

    def _release(self, failing: list[Member]) -> None:
        for member in failing:
            member.state = MemberState.LEFT
            self._on_left()
            if member.dropped_by_core:
                self._release_held(member)
            # else frozen() publishes a set without it

    def _release_held(self, member: Member) -> None:
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
                        await self._publish_present()
                    except NativeError as error:
                        self.fault(f"the replica set cannot be changed: {error}")
                        # Now without those that left, though the last one may have ended: who
                        # waits for that closes their stores.
                        self.publish()
                    finally:
                        self._native.thaw()
                        self.pause_ns_last = time.monotonic_ns() - begun_ns

    async def _publish_present(self) -> None:
        """Fence and publish. I/O is frozen.

        A peer may have ended, so that the core does not take it, while the event that says so is
        on its way to us.
        """
        limit_s = trio.current_time() + _EVENT_WAIT_S
        while True:
            await self.fence()
            try:
                self.publish()
            except NativeError as error:
                if error.errno != errno.ENOTCONN or trio.current_time() > limit_s:
                    raise
            else:
                return
            for member in self.rebuilding:
                if member.store_ended:  # before it was published, so there will be no event
                    self.lose_rebuilding(member, "its connection ended before it took part")
            await trio.sleep(_EVENT_POLL_S)
            self._deliver_events()

    async def each(
        self,
        function: Callable[[Member], T],
        *,
        members: Sequence[Member] | None = None,
        during: str,
    ) -> dict[Member, T]:
        """Run a blocking function on members in parallel; drop those that fail among others.

        One that is being rebuilt may be among them: it counts neither as a success nor as a
        failure, and its rebuild ends when it fails.

        A member that failed is ``FAILING`` afterwards, and fenced: but it stays in the published
        set until the caller freezes or calls :meth:`withdraw`.

        Args:
          function: undoes what it did when it raises.
          members: default all usable ones. Members that take no part any more are skipped.
          during: what is going on, for the reason: ``"taking a snapshot"``.

        Returns:
          The results of the members that succeeded, at least one.

        Raises:
          LhblockError: all failed; the error of the first.
          VolumeFaulted: no member is usable.

        Cancelled before threads start: nothing was done. After that it is carried through.
        """
        self.check()
        takes_part = (MemberState.USABLE, MemberState.REBUILDING)
        chosen = [member for member in (members or self.usable) if member.state in takes_part]
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
            if not any(member.state is MemberState.USABLE for member in results):
                # What they did alone makes them different from the others.
                for member in results:
                    if member.state is MemberState.REBUILDING:
                        self.lose_rebuilding(member, f"no other replica came through {during}")
                failed = [m for m in errors if m.state is MemberState.USABLE]
                if not failed:
                    raise VolumeFaulted(self._name, f"no usable replica is left while {during}")
                first = min(failed, key=self.members.index)
                if isinstance(errors[first], NativeError | OSError):
                    raise ReplicaIO(
                        first.address, f"failed while {during}: {sentence(errors[first])}"
                    ) from errors[first]
                raise errors[first]
            for member, error in errors.items():
                self.note_failure(
                    member,
                    f"failed while {during}: {sentence(error)}",
                    out_of_touch=isinstance(error, ReplicaUnreachable),
                )
            await self.fence()
        return results
