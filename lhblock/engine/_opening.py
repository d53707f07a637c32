"""Opening the replicas of a volume: whom to believe, what to repair, and what to write down first.

The order matters and is explained in docs/internals/recovery.md: lock and clean every directory;
choose the newest generation; make the trees agree; make the data of heads agree if a crash may have
torn them; record who is missing; only then serve.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from lhblock._native import Extent, NativeEngine
from lhblock.engine._activity import Differences, find_differences
from lhblock.engine._agreement import agree
from lhblock.engine._clock import utc_now
from lhblock.engine._config import VolumeConfig, check_size
from lhblock.engine._equal import make_equal
from lhblock.engine._generations import leave_behind
from lhblock.engine._member import Member, MemberState, sentence
from lhblock.engine._merge import merge_all_below, unlink_removed_leaves
from lhblock.engine._peer_client import PlainReplica
from lhblock.engine._places import Members, Place
from lhblock.engine._plain_member import PlainMember
from lhblock.engine._remote_creation import create_replica, uncreate_replica
from lhblock.engine._target import probe
from lhblock.engine._threads import run_metadata
from lhblock.errors import (
    LhblockError,
    NoQuorum,
    ReplicaError,
    ReplicaLocked,
    ReplicaUnsupported,
    SizeError,
    VolumeBusy,
    VolumeFaulted,
)
from lhblock.replica import (
    OPENED,
    UNSERVED,
    Choice,
    Generation,
    ReplicaDirectory,
    choose,
    have_quorum,
    new_set,
    quorum,
)
from lhblock.settings import RemoteAddress

log = structlog.get_logger(__name__)

T = TypeVar("T")


async def create_replicas(
    volume: str,
    places: Sequence[Place],
    size_bytes: int,
    *,
    encrypted: bool = False,
) -> None:
    """Make the replicas of a new volume, all of them or none.

    Args:
      volume: its name.
      places: directories that do not exist or are empty, with parents that exist; or processes
        whose replica does not exist yet.
      size_bytes: of the volume.
      encrypted: noted for Longhorn: the content will be a LUKS volume.

    Raises:
      SizeError: the size cannot be.
      ReplicaError: a replica could not be made; those already made are removed again.

    Cancelled: carried through, like an error, by removing what was made.
    """
    check_size(volume, size_bytes)
    generations = new_set(len(places), time=utc_now())

    def create_one(place: Place, generation: Generation) -> Callable[[], None]:
        if isinstance(place, Path):
            ReplicaDirectory.create(
                place,
                size_bytes=size_bytes,
                generation=generation,
                encrypted=encrypted,
                probe=probe,
            )
            return lambda: _remove_new(place)
        create_replica(place, generation, volume=volume, size_bytes=size_bytes, encrypted=encrypted)
        return lambda: uncreate_replica(place)

    def create() -> None:
        made: list[Callable[[], None]] = []
        try:
            for place, generation in zip(places, generations, strict=True):
                made.append(create_one(place, generation))
        except LhblockError:
            for remove in made:
                _undo(remove)
            raise

    await run_metadata(create)


def _undo(remove: Callable[[], None]) -> None:
    try:
        remove()
    except LhblockError as error:
        log.warning("a new replica stays", reason=str(error))


def _remove_new(path: Path) -> None:
    # The directory was made a moment ago and nobody was told of it.
    for entry in list(path.iterdir()):
        if entry.name.startswith(("lhblock.", "volume")):
            entry.unlink(missing_ok=True)
    try:
        path.rmdir()
    except OSError as error:
        log.warning("a new replica directory stays", replica=str(path), reason=str(error))


class Opening:
    """One attempt to open a volume's replicas.

    Args:
      config: the volume.
      engine: the C engine.

    Attributes:
      maker: makes members of this volume.
    """

    def __init__(self, config: VolumeConfig, engine: NativeEngine) -> None:
        self._config = config
        self.maker = Members(engine, config)
        self.members: list[Member] = []
        self._committed: Sequence[str] = ()

    @property
    def _usable(self) -> list[Member]:
        return [member for member in self.members if member.state is MemberState.USABLE]

    async def open(self) -> list[Member]:
        """Open everything; the members come back in configured order, usable ones with stores.

          Raises:
            VolumeFaulted: no replica is usable.
        NoQuorum: too few are to know that no other one is newer.
            VolumeBusy: a replica is open elsewhere.
            SizeError: the replicas have another size than was asked for.
            ReplicaError: the replicas contradict each other and the user has to choose.

          Cancelled: not while something is being changed; everything is closed again.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            try:
                await self._open_directories()
                written = await self._choose()
                await self._agree(written)
                if not self._config.read_only:
                    await self._record_opening()
            except BaseException:
                await self.abandon()
                raise
        return self.members

    async def abandon(self) -> None:
        """Close everything, leaving dirty what was dirty."""

        def close(member: Member) -> None:
            # With a store it may have been compared halfway.
            member.close(clean=not member.records.was_dirty and not member.has_store)

        for member in self.members:
            if member.opened:
                try:
                    await run_metadata(close, member)
                except ReplicaError as error:
                    log.warning("close", replica=member.address, reason=error.sentence)

    async def _open_directories(self) -> None:
        opened: dict[Place, Member] = {}
        errors: list[ReplicaError] = []
        read_only = self._config.read_only

        async def open_one(place: Place) -> None:
            member = opened[place] = self.maker.make(place)
            try:
                try:
                    await run_metadata(partial(member.open, read_only=read_only))
                except PlainReplica:
                    assert isinstance(place, RemoteAddress)
                    member = opened[place] = self.maker.make_plain(place)
                    await run_metadata(partial(member.open, read_only=read_only))
                    log.warning(
                        "a replica speaks Longhorn's protocol only: what it missed cannot be told, "
                        "and a flush does not reach its disk",
                        volume=self._config.name,
                        replica=member.address,
                    )
                member.state = MemberState.USABLE
            except ReplicaError as error:
                errors.append(error)
                member.error = error.sentence

        async with trio.open_nursery() as nursery:
            for place in self._config.replicas:
                nursery.start_soon(open_one, place)
        self.members = [opened[place] for place in self._config.replicas]
        for error in errors:
            if isinstance(error, ReplicaLocked):
                raise VolumeBusy(self._config.name, str(error)) from error
        self._require_some()
        for member in self.members:
            if not member.opened:
                self._tell_left(member)
                continue
            for cleaned in member.records.cleaned:
                log.info("cleaned up", replica=member.address, what=cleaned)

    def _require_some(self) -> None:
        if not self._usable:
            reasons = "; ".join(f"{member.address}: {member.error}" for member in self.members)
            raise VolumeFaulted(self._config.name, f"no replica is usable: {reasons}")

    def _tell_left(self, member: Member) -> None:
        log.error(
            "replica left out",
            volume=self._config.name,
            replica=member.address,
            reason=member.error,
        )

    async def _leave(self, member: Member, reason: str) -> None:
        def leave() -> None:
            member.leave(reason)

        try:
            await run_metadata(leave)
        except ReplicaError as error:
            log.warning("close", replica=member.address, reason=error.sentence)
        self._tell_left(member)

    async def _choose(self) -> bool:
        """Leave stale replicas out. Returns whether data may differ although nobody crashed."""
        candidates = self._usable
        plain = [member for member in candidates if isinstance(member, PlainMember)]
        if plain and len(plain) < len(candidates):
            raise ReplicaUnsupported(
                plain[0].address,
                "speaks Longhorn's protocol only and keeps no generation, so it cannot stand "
                "beside replicas that do; open the volume without it",
            )
        choice = choose([member.records for member in candidates])
        if not choice.newest:
            choice = self._choose_left_behind(candidates, choice)
        lagging = [candidates[index] for index in choice.lagging]
        newest = [candidates[index] for index in choice.newest]
        for stale in choice.stale:
            await self._leave(candidates[stale.index], f"is stale: {stale.reason}")
        if choice.doubt and not self._config.force:
            raise NoQuorum(
                self._config.name,
                f"{choice.doubt}; bring the others back, or give --force to go on without them and "
                "lose what only they have",
            )
        self._require_quorum(newest + lagging, choice.members)
        self._committed = choice.members
        # The newest come first, because the first one is the source where data differs; among them
        # those that were closed cleanly, because then everything had been synced.
        newest.sort(key=lambda member: member.records.was_dirty)
        self._order = newest + lagging
        written = [member for member in self._order if member.records.written_elsewhere]
        for member in written:
            log.warning(
                "written by another program",
                replica=member.address,
                reason=member.records.written_elsewhere,
            )
        if self._config.read_only:
            for member in lagging:
                await self._leave(member, "lags behind a fence; open the volume for writing once")
        elif any(member.records.generation is None for member in newest):
            generations = dict(
                zip(newest, new_set(len(newest), time=utc_now(), counter=UNSERVED), strict=True)
            )
            await self._each(lambda m: m.write_generation(generations[m]))
        return bool(written or lagging)

    def _choose_left_behind(self, candidates: list[Member], choice: Choice) -> Choice:
        """What to believe where only replicas are that were left behind, if one may."""
        reasons = "; ".join(
            f"{candidates[each.index].address} {each.reason}" for each in choice.stale
        )
        if not self._config.force:
            raise NoQuorum(
                self._config.name,
                f"only replicas that were left behind are there ({reasons}); start those that "
                "have what these missed, or give --force to serve without it",
            )
        counters = [member.generation.counter for member in candidates]
        newest = tuple(i for i, each in enumerate(counters) if each == max(counters))
        log.warning("replicas that were left behind are believed, by force", reason=reasons)
        stale = tuple(each for each in choice.stale if each.index not in newest)
        return Choice(newest, (), stale)

    def _require_quorum(self, believed: Sequence[Member], members: Sequence[str]) -> None:
        """Refuse a minority: the others may be newer, or in use.

        Args:
          members: replica ids of whom enough have to be there; none: it is not known yet.

        Raises:
          NoQuorum
        """
        if not members or self._config.force:
            return
        there = {
            member.records.generation.replica_id
            for member in believed
            if member.records.generation is not None
        }.intersection(members)
        count = len(members)
        if not have_quorum(there, members):
            missing = "; ".join(
                f"{member.address}: {member.error}"
                for member in self.members
                if member not in believed
            )
            raise NoQuorum(
                self._config.name,
                f"{len(there)} of its {count} replicas can be used, and {quorum(count)} are "
                "needed, because the others may have newer writes or be in use elsewhere "
                f"({missing or 'they are not configured'}); bring them back, or give --force to "
                "go on without them and lose what only they have",
            )
        if len(there) == 1 and count == 2 and not self._config.read_only:
            log.warning(
                "one of two replicas is served; nothing keeps the other from being served alone, "
                "three would",
                volume=self._config.name,
            )

    def _require_agreement(self) -> None:
        there = {member.generation.replica_id for member in self._usable}
        if not self._config.force and not have_quorum(there, self._committed):
            count = len(self._committed)
            raise NoQuorum(
                self._config.name,
                f"{len(there.intersection(self._committed))} of {count} replicas are left while it "
                f"is opened, {quorum(count)} are needed; open it again",
            )

    async def _agree(self, written: bool) -> None:
        usable = [member for member in self._order if member.state is MemberState.USABLE]
        torn = written or any(member.records.was_dirty or member.records.torn for member in usable)
        if self._config.read_only:
            if torn:
                for member in usable[1:]:
                    await self._leave(
                        member,
                        "may differ from the first after a crash and cannot be repaired read-only",
                    )
            source = usable[0]
        else:
            source = await self._agree_on_trees(usable)
        self._check_size(source)
        await self._each(lambda member: member.open_store())
        if torn and not self._config.read_only:
            await self._make_equal(source)

    async def _agree_on_trees(self, usable: list[Member]) -> Member:
        while True:
            try:
                source, others = await run_metadata(agree, self._config.name, usable)
            except ReplicaError as error:
                failed = [member for member in usable if member.address == error.replica]
                if not failed or len(usable) == 1:
                    raise
                # A full disk perhaps: the others can do without it.
                await self._leave(failed[0], error.sentence)
                usable = [member for member in usable if member not in failed]
                continue
            for member in others:
                await self._leave(member, "holds other snapshots than the majority")
            return source

    def _check_size(self, source: Member) -> None:
        size_bytes = source.records.size_bytes
        wanted_bytes = self._config.size_bytes
        if wanted_bytes is not None and wanted_bytes != size_bytes:
            raise SizeError(
                self._config.name,
                f"it has {size_bytes} bytes, not {wanted_bytes}; expand it, or leave the size out",
            )

    async def _each(self, function: Callable[[Member], T]) -> dict[Member, T]:
        """Run something on every usable member; leave those out that fail."""
        results: dict[Member, T] = {}
        errors: dict[Member, Exception] = {}

        async def run(member: Member) -> None:
            try:
                results[member] = await run_metadata(function, member)
            except (LhblockError, OSError) as error:
                errors[member] = error

        async with trio.open_nursery() as nursery:
            for member in self._usable:
                nursery.start_soon(run, member)
        for member, error in errors.items():
            await self._leave(member, sentence(error))
        self._require_some()
        return results

    async def _make_equal(self, source: Member) -> None:
        """Give every replica the source's head, and its newest snapshot if that may be torn."""
        usable = self._usable
        if len(usable) < 2:
            return
        if source not in usable:
            source = usable[0]
        # A leftover means that a crash met a change of the tree: the snapshot being taken was never
        # acknowledged, and its data may have reached one disk and not another.
        torn_snapshot = any(member.records.torn for member in usable)
        where = await self._find_differences(usable)

        def merge(member: Member) -> None:
            unlink_removed_leaves(member)
            head = member.records.head
            if torn_snapshot and head.parent and not member.records.disks[head.parent].removed:
                merge_all_below(member, head.parent)
            merge_all_below(member, head.name)

        def repair(member: Member) -> int:
            if member is source:
                return 0
            changed_bytes = 0
            pairs = [(member.records.head.name, source.records.head.name)]
            below, source_below = (each.records.head.parent for each in (member, source))
            if torn_snapshot and below and below == source_below:
                pairs.insert(0, (below, source_below))
            for image, source_image in pairs:
                changed_bytes += make_equal(member, image, source, source_image, where.ranges)
            # Also when no byte changed: a hole that read as zeros may have become data.
            member.reopen_store()
            return changed_bytes

        await self._each(merge)
        if source.state is not MemberState.USABLE:
            raise VolumeFaulted(
                self._config.name,
                f"{source.address} failed while the replicas were made equal after a crash: "
                f"{source.error}; open the volume again",
            )
        log.info(
            "comparing replicas after a crash",
            volume=self._config.name,
            compares="everything" if where.why else "hot extents",
            bytes=where.length_bytes,
            why=where.why or None,
        )
        for member in usable:
            if member is source or member.state is not MemberState.USABLE:
                continue
            try:
                changed_bytes = await run_metadata(repair, member)
            except (LhblockError, OSError) as error:
                await self._leave(member, sentence(error))
                continue
            log.info(
                "replica compared",
                volume=self._config.name,
                replica=member.address,
                changed_bytes=changed_bytes,
            )
        await self._each(lambda member: member.sync())

    async def _find_differences(self, usable: Sequence[Member]) -> Differences:
        size_bytes = usable[0].records.size_bytes
        if self._config.force:
            return Differences([Extent(0, size_bytes)], "replicas are believed by force")
        return await run_metadata(find_differences, usable, size_bytes)

    async def _make_activity(self) -> str:
        """Empty activity logs in all replicas, which are equal now; the id, or "": there is none.

        Without one everything is compared after a crash, so nothing fails for the want of it.
        """
        if len(self.members) == 1 or any(isinstance(m, PlainMember) for m in self._usable):
            return ""
        log_id = str(uuid.uuid4())

        def make() -> None:
            for member in self._usable:
                member.make_activity(log_id)

        try:
            await run_metadata(make)
        except (LhblockError, OSError) as error:
            log.warning("no activity log", volume=self._config.name, reason=sentence(error))
            return ""
        return log_id

    async def _record_opening(self) -> None:
        """Make generations durable that name every absent member stale, before anything is served.

        There are two for a volume of several replicas, whoever is there: a directory that was
        copied before this moment and put back later is then two steps behind, and not taken for one
        that a fence did not reach.
        """
        await self._record_members()
        await self._each(lambda member: member.note_repaired())
        await self._record_members(await self._make_activity())

    async def _record_members(self, activity: str | None = None) -> None:
        """One generation.

        Args:
          activity: the id of the activity log from now on; None: still that of the last opening.
        """
        while True:
            usable = self._usable
            best = max(usable, key=lambda member: member.generation.counter).generation

            def catch_up(member: Member, best: Generation = best) -> None:
                if member.generation.counter != best.counter:
                    own = replace(best, replica_id=member.generation.replica_id)
                    member.write_generation(own)

            await self._each(catch_up)
            usable = self._usable
            present = {member.generation.replica_id for member in usable}
            missing = [member for member in best.members if member not in present]
            log_id = best.activity if activity is None else activity
            same = best.counter != UNSERVED and best.activity == log_id
            if not missing and len(usable) == 1 and same:
                return
            # What fewer than enough members have does not count, as if it had not been written.
            self._committed = self._committed or best.members
            self._require_agreement()
            reason = "missing when the volume was opened" if missing else OPENED
            if missing and self._config.force:
                reason += f", by force with {len(usable)} of {len(best.members)}"
            again = [member for member in present if member not in best.members]
            made = leave_behind(usable, missing, reason, joined=again)
            if self._config.force:
                made = {m: each.with_agreement(self._committed) for m, each in made.items()}
            made = {member: replace(each, activity=log_id) for member, each in made.items()}

            def write(member: Member, made: dict[Member, Generation] = made) -> None:
                member.write_generation(made[member])

            await self._each(write)
            have = {member.generation.replica_id for member in self._usable}
            if have_quorum(have, self._committed):
                self._committed = next(iter(made.values())).members
            if len(self._usable) == len(usable):
                if missing:
                    log.warning(
                        "replicas left behind",
                        volume=self._config.name,
                        count=len(missing),
                        generation=best.counter + 1,
                    )
                return
