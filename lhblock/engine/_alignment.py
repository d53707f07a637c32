"""Giving the target of a rebuild the source's tree of layers, before any data is copied.

The target keeps what it has of the source's layers, whatever their content is: every one is
compared later. Its old head becomes the layer that grew out of it on the source. What the source
has not, goes. All of this happens to a directory that is marked as rebuilding, so a crash leaves
one that nobody believes, and the next attempt aligns what is there.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from lhblock.errors import UsageError
from lhblock.replica import Disk, ReplicaDirectory, check_snapshot_name


@dataclass(frozen=True)
class Alignment:
    """What becomes of the target's layers.

    Attributes:
      kept: images that stay, under the same name.
      head_becomes: image of the source that the old head becomes; "": it is given up.
    """

    kept: frozenset[str]
    head_becomes: str


def parents_first(disks: Mapping[str, Disk]) -> list[Disk]:
    """All disks, each after its parent."""
    ordered: dict[str, Disk] = {}
    for disk in disks.values():
        line = [disk]
        while line[-1].parent and line[-1].parent not in ordered:
            line.append(disks[line[-1].parent])
        for each in reversed(line):
            ordered.setdefault(each.name, each)
    return list(ordered.values())


def _nearest(disks: Mapping[str, Disk], image: str, kept: Set[str]) -> str:
    while image and image not in kept:
        image = disks[image].parent
    return image


def plan_alignment(
    source: Mapping[str, Disk],
    chain: Sequence[str],
    target: Mapping[str, Disk],
    target_head: Disk,
) -> Alignment:
    """Decide what stays.

    A layer stays if it is the same snapshot, taken at the same time, and lies above the same one of
    those that stay. Names are given again after a removal, so the name alone says little.

    Args:
      source: its frozen layers by image name.
      chain: images of its live chain, oldest first, without the head.
      target: its layers by image name.
      target_head: the one of them that is its head.
    """
    kept: set[str] = set()
    for disk in parents_first(source):
        ours = target.get(disk.name)
        if ours is None or ours.is_head or ours.created != disk.created:
            continue
        if _nearest(target, ours.parent, kept) == _nearest(source, disk.parent, kept):
            kept.add(disk.name)
    below = _nearest(target, target_head.parent, kept)
    head_becomes = ""
    if not below:
        head_becomes = chain[0]
    elif below in chain[:-1]:
        head_becomes = chain[chain.index(below) + 1]
    if head_becomes in kept or not _can_be_named(source, head_becomes):
        head_becomes = ""
    return Alignment(frozenset(kept), head_becomes)


def _can_be_named(source: Mapping[str, Disk], image: str) -> bool:
    if not image:
        return False
    try:
        check_snapshot_name(source[image].snapshot)
    except UsageError:  # a name that another program gave
        return False
    return True


def align(
    directory: ReplicaDirectory,
    plan: Alignment,
    source: Mapping[str, Disk],
    *,
    newest: str,
    sizes: Mapping[str, int],
    size_bytes: int,
    created: str,
) -> None:
    """Carry a plan out. Afterwards the target has the source's layers and an empty head. Blocking.

    Args:
      directory: the target's, marked as rebuilding.
      source: the frozen layers that it shall have.
      newest: the one of them below the head.
      sizes: of their images.
      size_bytes: of the volume.
      created: the time, for the new head.

    Raises:
      ReplicaError: the target is neither as it was nor as it shall be; it may be begun again.
    """
    for image in [name for name, disk in directory.disks.items() if not disk.is_head]:
        if image not in plan.kept:
            directory.unlink_disk(image, force=True)
    becomes = source.get(plan.head_becomes)
    given_up = f"rebuild-{uuid.uuid4()}-old"
    pending = directory.prepare_snapshot(
        given_up if becomes is None else becomes.snapshot,
        user_created=False if becomes is None else becomes.user_created,
        created=created if becomes is None else becomes.created,
        labels={} if becomes is None else becomes.labels,
        size_bytes=size_bytes,
    )
    pending.commit()
    pending.settle()
    if becomes is None:
        directory.unlink_disk(directory.head.parent, force=True)
    for disk in parents_first(source):
        if disk.name in directory.disks:
            directory.rewrite_disk(disk)
        else:
            directory.add_disk(disk, size_bytes=sizes[disk.name])
    directory.rewrite_disk(replace(directory.head, parent=newest))
