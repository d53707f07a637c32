"""Whether the replicas of a volume hold the same tree of snapshots, and how a crash is made good.

An operation that changes the tree is acknowledged only when every replica has done it. So where
replicas that hold the same generation differ, the operation was cut short and nobody was told that
it happened. The rules, with their reasons, are in docs/internals/recovery.md:

* a removal that some replica recorded is recorded on all;
* a snapshot (or expansion) that some replica has is taken on the others too: their heads hold what
  the snapshot holds;
* a revert that some replica did is undone there, because the others still have the head's data.

All functions are blocking and run while nothing serves the volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from lhblock.engine._clock import utc_now
from lhblock.engine._member import Member
from lhblock.errors import VolumeFaulted
from lhblock.replica import Disk, next_head, snapshot_image

log = structlog.get_logger(__name__)

HEAD = "volume-head"


@dataclass(frozen=True)
class Shape:
    """What must agree between replicas: removed layers do not count.

    Attributes:
      size_bytes: of the volume.
      parents: snapshot (or ``volume-head``) to the nearest older one that is not removed, or "".
    """

    size_bytes: int
    parents: Mapping[str, str]

    @property
    def snapshots(self) -> frozenset[str]:
        """Names, without the head."""
        return frozenset(self.parents) - {HEAD}


def shape_of(size_bytes: int, disks: Mapping[str, Disk]) -> Shape:
    """Compute the shape of one replica.

    Args:
      size_bytes: of the volume.
      disks: by image name; every parent is among them.
    """
    parents: dict[str, str] = {}
    for disk in disks.values():
        if disk.removed:
            continue
        parent = disk.parent
        while parent and disks[parent].removed:
            parent = disks[parent].parent
        parents[disk.snapshot] = disks[parent].snapshot if parent else ""
    return Shape(size_bytes, parents)


def agree(volume: str, members: Sequence[Member]) -> tuple[Member, list[Member]]:
    """Make the trees of all members equal, or say which of them cannot be.

    Args:
      volume: its name, for messages.
      members: open replicas of one generation, at least one.

    Returns:
      The member whose head is right where heads differ, and those whose tree differs from the
      majority's and which must be left out.

    Raises:
      VolumeFaulted: trees differ in a way that no crash explains and there is no majority.
      ReplicaError: a replica could not be changed.
    """
    _agree_on_removals(members)
    source = members[0]
    for behind in members:
        for ahead in members:
            if _finish_snapshot(behind, ahead):
                log.warning("finished a snapshot that was cut short", replica=behind.address)
            elif _undo_revert(behind, ahead):
                log.warning("undid a revert that was cut short", replica=ahead.address)
                source = behind
    groups: list[tuple[Shape, list[Member]]] = []
    for member in members:
        shape = _shape(member)
        for known, group in groups:
            if known == shape:
                group.append(member)
                break
        else:
            groups.append((shape, [member]))
    if len(groups) == 1:
        return source, []
    largest = max(groups, key=lambda group: len(group[1]))[1]
    if 2 * len(largest) <= len(members):
        held = "; ".join(
            f"{', '.join(member.address for member in group)}: {_describe(shape)}"
            for shape, group in groups
        )
        raise VolumeFaulted(
            volume,
            f"its replicas hold different snapshots and no tree is in the majority: {held}. Open "
            "it without the replicas that are wrong",
        )
    others = [member for member in members if member not in largest]
    return (source if source in largest else largest[0]), others


def _shape(member: Member) -> Shape:
    return shape_of(member.records.size_bytes, member.records.disks)


def _describe(shape: Shape) -> str:
    names = ", ".join(sorted(shape.snapshots)) or "no snapshots"
    below = shape.parents.get(HEAD) or "nothing"
    return f"{names}, head on {below}, {shape.size_bytes} bytes"


def _agree_on_removals(members: Sequence[Member]) -> None:
    removed = {
        disk.name for member in members for disk in member.records.disks.values() if disk.removed
    }
    for member in members:
        for image in sorted(removed):
            disk = member.records.disks.get(image)
            if disk is not None and not disk.removed:
                member.mark_removed(disk.snapshot)


def _finish_snapshot(behind: Member, ahead: Member) -> bool:
    """Take on ``behind`` the snapshot that only ``ahead`` has, if that explains the difference."""
    old, new = _shape(behind), _shape(ahead)
    extra = new.snapshots - old.snapshots
    if len(extra) != 1:
        return False
    (snapshot,) = extra
    expected = {**old.parents, snapshot: old.parents[HEAD], HEAD: snapshot}
    if dict(new.parents) != expected or new.size_bytes < old.size_bytes:
        return False
    disk = ahead.records.disks[snapshot_image(snapshot)]
    behind.finish_snapshot(disk, size_bytes=new.size_bytes)
    return True


def _undo_revert(behind: Member, ahead: Member) -> bool:
    """Give ``ahead`` an empty head where ``behind`` has its own, if a revert was cut short."""
    old, new = _shape(behind), _shape(ahead)
    if old.size_bytes != new.size_bytes or old.snapshots != new.snapshots:
        return False
    if old.parents[HEAD] == new.parents[HEAD]:
        return False
    if any(old.parents[snapshot] != new.parents[snapshot] for snapshot in old.snapshots):
        return False
    if next_head(behind.records.head.name) != ahead.records.head.name:
        return False
    parent = old.parents[HEAD]
    if not parent:
        return False
    # Its new head is empty: should the next step not come, nothing else says that all of it has to
    # be filled.
    ahead.forget_activity()
    ahead.undo_revert(parent, created=utc_now())
    return True
