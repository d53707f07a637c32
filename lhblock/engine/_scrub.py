"""Checksums of frozen layers: recorded when asked, verified by a scrub, repaired from a replica.

A checksum covers one layer's file, holes as zeros, and is valid while the file's ctime stands
still; merges and everything else that writes a layer end it. The head has none.

Layers of one snapshot may differ in their files between replicas although the snapshot is the same
on both, because merges move blocks between layers on each replica for itself. So a layer is only
repaired from one whose record has the same checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lhblock.engine._info import ScrubMismatch, ScrubReport
from lhblock.engine._member import LayerDamage, Member, MemberState, sentence
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, ReplicaIO, SnapshotBusy
from lhblock.replica import ChecksumRecord, snapshot_image

log = structlog.get_logger(__name__)

COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class _Damage:
    member: Member
    image: str
    record: ChecksumRecord
    found: str


class Scrubber:
    """Hashes and verifies the layers of one volume.

    Args:
      name: the volume's, for messages.
      replicas: whose usable members are looked at.
      lock: the structure lock; held while a layer is repaired. Reading needs no lock: whatever
        changes a layer moves its ctime, and then its record says nothing any more.
    """

    def __init__(self, name: str, replicas: ReplicaSet, lock: trio.Lock) -> None:
        self._name = name
        self._replicas = replicas
        self._lock = lock

    async def hash_snapshot(self, snapshot: str, *, rehash: bool = False) -> None:
        """See :meth:`Volume.hash_snapshot`."""
        image = snapshot_image(snapshot)

        def hash_layer(member: Member) -> None:
            disk = member.records.disks.get(image)
            if disk is None or disk.removed:
                raise SnapshotBusy(self._name, f"snapshot {snapshot!r} is marked as removed")
            member.hash_layer(image, rehash=rehash)

        for member in self._replicas.usable:
            if member.state is MemberState.USABLE:
                await run_metadata(hash_layer, member)

    async def scrub(self) -> ScrubReport:
        """See :meth:`Volume.scrub`."""
        verified = without_record = 0
        mismatches: list[ScrubMismatch] = []
        images = sorted(
            {
                disk.name
                for member in self._replicas.usable
                for disk in tuple(member.records.disks.values())
                if not disk.is_head and not disk.removed
            }
        )
        for image in images:
            damaged: list[_Damage] = []
            good: list[tuple[Member, ChecksumRecord]] = []
            for member in self._replicas.usable:
                disk = member.records.disks.get(image)
                if disk is None or disk.removed:
                    continue
                checked = await run_metadata(member.verify_layer, image)
                if checked is None:
                    without_record += 1
                elif isinstance(checked, LayerDamage):
                    damaged.append(_Damage(member, image, checked.record, checked.found))
                else:
                    good.append((member, checked))
                    verified += 1
            for damage in damaged:
                mismatches.append(await self._repair(damage, good))
        return ScrubReport(verified, without_record, tuple(mismatches))

    async def _repair(
        self, damage: _Damage, good: list[tuple[Member, ChecksumRecord]]
    ) -> ScrubMismatch:
        repaired_from = ""
        for source, record in good:
            if record.checksum != damage.record.checksum:
                continue
            try:
                async with self._lock:
                    await run_metadata(_copy_layer, source, damage)
            except (LhblockError, OSError) as error:
                log.error("repair failed", replica=damage.member.address, reason=sentence(error))
                continue
            repaired_from = source.address
            break
        log.error(
            "a snapshot layer is damaged",
            volume=self._name,
            replica=damage.member.address,
            image=damage.image,
            repaired_from=repaired_from or "no replica",
        )
        return ScrubMismatch(
            replica=damage.member.address,
            snapshot=damage.member.records.disks[damage.image].snapshot,
            expected=damage.record.checksum,
            found=damage.found,
            repaired_from=repaired_from,
        )


def _copy_layer(source: Member, damage: _Damage) -> None:
    """Make the damaged layer's file equal to the source's: data, holes and length. Blocking.

    It is written in place, because a store has it open; every block that changes was wrong. The
    new record is written only when the copy reads back with the right checksum.
    """
    image, target = damage.image, damage.member
    target.begin_repair(image)
    if source.checksum(image) != damage.record.checksum:
        raise ReplicaIO(source.address, f"{image} was changed meanwhile")
    wanted = source.layer_extents(image)
    size_bytes = source.layer_sizes()[image].image_bytes
    if (
        list(wanted) != list(target.layer_extents(image))
        or target.layer_sizes()[image].image_bytes != size_bytes
    ):
        # The map of the open store was built from the target's extents, and it was right when the
        # volume opened: a layer that lost or gained extents since is beyond a repair in place.
        raise ReplicaIO(target.address, f"{image} has other extents than the good copy")
    for extent in wanted:
        end_bytes = min(extent.offset_bytes + extent.length_bytes, size_bytes)
        for offset_bytes in range(extent.offset_bytes, end_bytes, COPY_BYTES):
            length_bytes = min(COPY_BYTES, end_bytes - offset_bytes)
            data = source.read_layer(image, offset_bytes, length_bytes)
            if len(data) != length_bytes:
                raise ReplicaIO(source.address, f"{image} is shorter than its extents")
            target.repair_layer(image, offset_bytes, data)
    target.finish_repair(image, damage.record)
