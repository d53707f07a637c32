"""Making one frozen layer of the target equal to the source's: compare, copy, sync, verify.

The work is a list of units, those in which either of the two has anything; several streams take
batches of it. What is copied is hashed while it is in memory, and read back from the target after
it was synced, while more is copied: one keeps the disk busy and the other the CPU. The layer stays
what it is meanwhile: merges leave both replicas alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from lhblock._native import UNIT_BYTES, NativeUnit
from lhblock.engine._member import Member
from lhblock.engine._threads import run_copy
from lhblock.engine._throttle import Throttle
from lhblock.errors import LhblockError, ReplicaDamaged

BATCH_UNITS: Final = 4
"""Units that a stream copies before it looks up: a hop between threads for each costs 2 %."""
SYNC_UNITS: Final = 256
"""Units between two syncs, after which these are verified, and it is noted how far it is."""


@dataclass(frozen=True)
class CopyPlan:
    """What there is to do for one layer.

    Attributes:
      offsets_bytes: units in which source or target have anything, in order.
      empty: those of them in which the target has nothing.
      size_bytes: of the source's image.
      same_data: both have the same recorded checksum, so only shapes are compared.
    """

    offsets_bytes: Sequence[int]
    empty: frozenset[int]
    size_bytes: int
    same_data: bool


def plan_copy(
    source: Member, target: Member, image: str, *, only: Collection[int] | None = None
) -> CopyPlan:
    """Look at both files. Blocking.

    Args:
      only: units that may differ; None if that is unknown.
    """
    theirs, ours = source.occupied_units(image), target.occupied_units(image)
    sizes, our_sizes = source.layer_sizes(), target.layer_sizes()
    size_bytes = sizes[image].image_bytes
    occupied = {*theirs, *ours} if only is None else {*theirs, *ours}.intersection(only)
    wanted = sorted(offset for offset in occupied if offset < size_bytes)
    checksum = source.checksum(image)
    return CopyPlan(
        offsets_bytes=wanted,
        empty=frozenset(wanted).difference(ours),
        size_bytes=size_bytes,
        same_data=bool(checksum)
        and checksum == target.checksum(image)
        and our_sizes[image].image_bytes == size_bytes,
    )


class LayerCopy:
    """One layer on its way.

    Args:
      source: has it.
      target: gets it; the layer is open on both.
      image: the layer.
      plan: of :func:`plan_copy`.
      from_bytes: what lies before this was copied by an attempt before; it is verified only.
    """

    def __init__(
        self, source: Member, target: Member, image: str, plan: CopyPlan, *, from_bytes: int = 0
    ) -> None:
        self._source = source
        self._target = target
        self._image = image
        self._plan = plan
        self._hashes: dict[int, int] = {}
        self._todo = [offset for offset in plan.offsets_bytes if offset >= from_bytes]
        self._next = self._next_to_verify = 0
        self._synced_before_bytes = 0
        self._under_way: set[int] = set()
        self._syncing = trio.Lock()
        self._failure: LhblockError | OSError | None = None
        self.copied_bytes = 0

    @property
    def done_before_bytes(self) -> int:
        """Everything before this offset is copied."""
        if self._under_way:
            return min(self._under_way)
        return self._todo[self._next] if self._next < len(self._todo) else self._plan.size_bytes

    async def copy(
        self,
        *,
        streams: int,
        throttle: Throttle,
        check: Callable[[], None],
        advanced: Callable[[int], None],
        note: Callable[[int], None] | None,
    ) -> None:
        """Copy what differs, and verify what was synced meanwhile; synced when this returns.

        Args:
          streams: batches under way at a time.
          check: raises when it makes no sense any more to go on.
          advanced: told of units that are done.
          note: blocking; writes down that everything before an offset is copied and synced; None:
            that is worth nothing.

        Raises:
          ReplicaDamaged: as :meth:`verify`.

        Cancelled between batches.
        """
        await run_copy(self._target.begin_units, self._image, self._plan.size_bytes)
        advanced(len(self._plan.offsets_bytes) - len(self._todo))

        async def work(unit: NativeUnit) -> bool:
            if await self._verify_next(unit, advanced):
                return True
            await throttle.admit(BATCH_UNITS * UNIT_BYTES)
            check()
            return await self._copy_next(unit, advanced, note)

        await self._run_streams(streams, check, work)
        await run_copy(self._target.sync_units, self._image)
        self._synced_before_bytes = self._plan.size_bytes

    async def verify(
        self, *, streams: int, check: Callable[[], None], advanced: Callable[[int], None]
    ) -> None:
        """Read the rest of the target back and compare hashes.

        Raises:
          ReplicaDamaged: a unit is not what was copied.

        Cancelled between batches.
        """

        async def work(unit: NativeUnit) -> bool:
            return await self._verify_next(unit, advanced)

        await self._run_streams(streams, check, work)

    async def _run_streams(
        self,
        streams: int,
        check: Callable[[], None],
        work: Callable[[NativeUnit], Awaitable[bool]],
    ) -> None:
        async def run() -> None:
            try:
                with NativeUnit() as unit:
                    while self._failure is None and await work(unit):
                        check()
            except (LhblockError, OSError) as error:
                # The other streams end with it, and the error is raised as it is, in no group.
                self._failure = self._failure or error

        async with trio.open_nursery() as nursery:
            for _ in range(streams):
                nursery.start_soon(run)
        if self._failure is not None:
            raise self._failure

    async def _copy_next(
        self,
        unit: NativeUnit,
        advanced: Callable[[int], None],
        note: Callable[[int], None] | None,
    ) -> bool:
        """Copy a batch; False: there is none left."""
        begin, self._next = self._next, min(self._next + BATCH_UNITS, len(self._todo))
        batch = self._todo[begin : self._next]
        if not batch:
            return False
        self._under_way.add(batch[0])
        try:
            copied_bytes = await run_copy(self._copy_batch, unit, batch)
        finally:
            self._under_way.discard(batch[0])
        self.copied_bytes += copied_bytes  # here, where no other stream is in between
        advanced(len(batch))
        if begin // SYNC_UNITS != (begin + BATCH_UNITS) // SYNC_UNITS:
            async with self._syncing:  # one file, one writer
                before_bytes = self.done_before_bytes
                await run_copy(self._sync, before_bytes, note)
                self._synced_before_bytes = before_bytes
        return True

    def _copy_batch(self, unit: NativeUnit, batch: Sequence[int]) -> int:
        copied_bytes = 0
        for offset in self._differing_shapes(unit, batch) if self._plan.same_data else batch:
            self._source.read_unit(self._image, offset, unit)
            self._hashes[offset] = unit.hash()
            copied_bytes += self._target.write_unit(
                self._image, offset, unit, empty=offset in self._plan.empty
            )
        return copied_bytes

    def _differing_shapes(self, unit: NativeUnit, batch: Sequence[int]) -> list[int]:
        theirs, ours = (
            member.hash_units(self._image, batch, unit, shape_only=True)
            for member in (self._source, self._target)
        )
        return [at for at, *shapes in zip(batch, theirs, ours, strict=True) if len(set(shapes)) > 1]

    def _sync(self, before_bytes: int, note: Callable[[int], None] | None) -> None:
        self._target.sync_units(self._image)
        if note is not None:
            note(before_bytes)

    async def _verify_next(self, unit: NativeUnit, advanced: Callable[[int], None]) -> bool:
        """Verify a batch of what was synced; False: there is none now."""
        begin, offsets = self._next_to_verify, self._plan.offsets_bytes
        batch = [
            offset
            for offset in offsets[begin : begin + BATCH_UNITS]
            if offset < self._synced_before_bytes
        ]
        if not batch:
            return False
        self._next_to_verify += len(batch)
        await run_copy(self._verify_batch, unit, batch)
        advanced(len(batch))
        return True

    def _verify_batch(self, unit: NativeUnit, batch: Sequence[int]) -> None:
        unknown = [offset for offset in batch if offset not in self._hashes]
        hashes = self._source.hash_units(self._image, unknown, unit) if unknown else ()
        self._hashes.update(zip(unknown, hashes, strict=True))
        found_hashes = self._target.hash_units(self._image, batch, unit)
        for offset, found in zip(batch, found_hashes, strict=True):
            wanted = self._hashes[offset]
            if found != wanted:
                raise ReplicaDamaged(
                    self._target.address,
                    f"{self._image} at {offset} has hash {found:016x} after it was copied, not "
                    f"{wanted:016x}; check the disk",
                )
