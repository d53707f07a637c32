"""Checksums of frozen layers: recorded when asked, verified by a scrub, repaired from a replica.

A checksum covers one layer's file, holes as zeros, and is valid while the file's ctime stands
still; merges and everything else that writes a layer end it. The head has none.

Layers of one snapshot may differ in their files between replicas although the snapshot is the same
on both, because merges move blocks between layers on each replica for itself. So a layer is only
repaired from one whose record has the same checksum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import structlog
import trio

from lhblock._native import Extent, file_crc64, file_extents
from lhblock.engine._clock import utc_now
from lhblock.engine._info import ScrubMismatch, ScrubReport
from lhblock.engine._member import Member, MemberState, sentence
from lhblock.engine._replica_set import ReplicaSet
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, ReplicaIO, SnapshotBusy
from lhblock.replica import (
    ChecksumRecord,
    change_time_text,
    hash_image,
    snapshot_image,
    valid_checksum,
    write_checksum,
)

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

        def hash_layer(member: Member) -> ChecksumRecord | None:
            disk = member.directory.disks.get(image)
            if disk is None or disk.removed:
                raise SnapshotBusy(self._name, f"snapshot {snapshot!r} is marked as removed")
            with _named(member, f"hash {image}"):
                return hash_image(
                    member.directory.dir_fd, image, _crc64, now=utc_now(), rehash=rehash
                )

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
                for disk in tuple(member.directory.disks.values())
                if not disk.is_head and not disk.removed
            }
        )
        for image in images:
            damaged: list[_Damage] = []
            good: list[tuple[Member, ChecksumRecord]] = []
            for member in self._replicas.usable:
                disk = member.directory.disks.get(image)
                if disk is None or disk.removed:
                    continue
                checked = await run_metadata(_verify, member, image)
                if checked is None:
                    without_record += 1
                elif isinstance(checked, _Damage):
                    damaged.append(checked)
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
                log.error("repair failed", replica=str(damage.member.path), reason=sentence(error))
                continue
            repaired_from = str(source.path)
            break
        log.error(
            "a snapshot layer is damaged",
            volume=self._name,
            replica=str(damage.member.path),
            image=damage.image,
            repaired_from=repaired_from or "no replica",
        )
        return ScrubMismatch(
            replica=str(damage.member.path),
            snapshot=damage.member.directory.disks[damage.image].snapshot,
            expected=damage.record.checksum,
            found=damage.found,
            repaired_from=repaired_from,
        )


@contextmanager
def _named(member: Member, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReplicaIO(member.path, f"cannot {what}: {error.strerror}") from error


def _crc64(fd: int, length_bytes: int) -> int:
    return file_crc64(fd, 0, length_bytes)


def _checksum_of(member: Member, image: str) -> str:
    with _named(member, f"read {image}"):
        fd = os.open(
            image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=member.directory.dir_fd
        )
        try:
            return f"{_crc64(fd, os.fstat(fd).st_size):016x}"
        finally:
            os.close(fd)


def _verify(member: Member, image: str) -> ChecksumRecord | _Damage | None:
    """The record if it is right, the damage if not, None if nothing can be said. Blocking."""
    directory = member.directory
    with _named(member, f"read the checksum of {image}"):
        record = valid_checksum(directory.dir_fd, image)
    if record is None:
        return None
    found = _checksum_of(member, image)
    if found == record.checksum:
        return record
    with _named(member, f"record that {image} is damaged"):
        if valid_checksum(directory.dir_fd, image) != record:
            return None  # it was merged meanwhile
        write_checksum(directory.dir_fd, image, replace(record, silently_corrupted=True))
    return _Damage(member, image, record, found)


def _copy_layer(source: Member, damage: _Damage) -> None:
    """Make the damaged layer's file equal to the source's: data, holes and length. Blocking.

    It is written in place, because the store has it open; every block that changes was wrong. The
    new record is written only when the copy reads back with the right checksum.
    """
    image, target = damage.image, damage.member
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    with _named(target, f"repair {image}"):
        marked = valid_checksum(target.directory.dir_fd, image)
        if marked is None or valid_checksum(source.directory.dir_fd, image) is None:
            raise ReplicaIO(target.path, f"{image} was changed meanwhile")
        source_fd = os.open(image, os.O_RDONLY | flags, dir_fd=source.directory.dir_fd)
        try:
            target_fd = os.open(image, os.O_RDWR | flags, dir_fd=target.directory.dir_fd)
            try:
                _copy_extents(source_fd, target_fd)
                os.fsync(target_fd)
                found = f"{_crc64(target_fd, os.fstat(target_fd).st_size):016x}"
                ctime_ns = os.fstat(target_fd).st_ctime_ns
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)
        if found != damage.record.checksum:
            raise ReplicaIO(
                target.path, f"{image} still reads {found}, not {damage.record.checksum}"
            )
        record = replace(
            damage.record,
            change_time=change_time_text(ctime_ns),
            last_hashed_at=utc_now(),
            silently_corrupted=False,
        )
        write_checksum(target.directory.dir_fd, image, record)


def _copy_extents(source_fd: int, target_fd: int) -> None:
    size_bytes = os.fstat(source_fd).st_size
    wanted = file_extents(source_fd)
    if [*wanted] != file_extents(target_fd) or os.fstat(target_fd).st_size != size_bytes:
        # The map of the open store was built from the target's extents, and it was right when the
        # volume opened: a layer that lost or gained extents since is beyond a repair in place.
        raise OSError(22, "its extents differ from the good copy's")
    for extent in wanted:
        _copy_extent(source_fd, target_fd, extent)


def _copy_extent(source_fd: int, target_fd: int, extent: Extent) -> None:
    offset = extent.offset_bytes
    end = extent.offset_bytes + extent.length_bytes
    while offset < end:
        data = os.pread(source_fd, min(COPY_BYTES, end - offset), offset)
        if not data:
            raise OSError(5, "the good copy is shorter than its extents")
        if os.pread(target_fd, len(data), offset) != data:
            written = 0
            while written < len(data):
                written += os.pwrite(target_fd, data[written:], offset + written)
        offset += len(data)
