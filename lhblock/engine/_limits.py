"""How much history a volume may hold, and the check before a snapshot adds to it."""

from __future__ import annotations

from dataclasses import dataclass

from lhblock._native import LAYERS_MAX
from lhblock.errors import SnapshotLimit, UsageError


@dataclass(frozen=True)
class SnapshotLimits:
    """How much history a volume may hold.

    Attributes:
      count_max: snapshots that are not removed, 1..250.
      size_bytes_max: allocated bytes of those snapshots and the head together; 0 is no limit.
    """

    count_max: int = LAYERS_MAX
    size_bytes_max: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count_max <= LAYERS_MAX:
            raise UsageError(f"snapshot count limit {self.count_max}: choose 1 to {LAYERS_MAX}")
        if self.size_bytes_max < 0:
            raise UsageError(f"snapshot size limit {self.size_bytes_max}: choose 0 or more bytes")


@dataclass(frozen=True)
class SnapshotUsage:
    """What one replica holds.

    Attributes:
      count: disks that are neither removed nor the head.
      total: all disks, the head and removed ones included.
      chain_bytes: allocated bytes of the live chain's snapshots that are not removed.
      head_bytes: allocated bytes of the head.
    """

    count: int
    total: int
    chain_bytes: int
    head_bytes: int


def check_limits(volume: str, limits: SnapshotLimits, usages: list[SnapshotUsage]) -> None:
    """Refuse a snapshot that would go beyond the limits on any replica.

    Args:
      usages: of every usable replica, at least one.

    Raises:
      SnapshotLimit: with the numbers.
    """
    count = max(usage.count for usage in usages)
    total = max(usage.total for usage in usages)
    if count >= limits.count_max:
        raise SnapshotLimit(
            volume,
            f"snapshot count usage {count} is equal or larger than snapshotMaxCount "
            f"{limits.count_max}; remove a snapshot first",
        )
    if total >= LAYERS_MAX:
        raise SnapshotLimit(
            volume,
            f"snapshot count total is already too big: {total}; remove a snapshot and wait until "
            "it is merged",
        )
    if limits.size_bytes_max == 0:
        return
    free_bytes = limits.size_bytes_max - max(usage.chain_bytes for usage in usages)
    head_bytes = max(usage.head_bytes for usage in usages)
    if head_bytes > free_bytes:
        raise SnapshotLimit(
            volume,
            f"snapshot free space {free_bytes} is not enough for head file {head_bytes}; "
            "remove a snapshot first or raise the limit",
        )


def check_new_limits(volume: str, limits: SnapshotLimits, usages: list[SnapshotUsage]) -> None:
    """Refuse limits that the volume already exceeds.

    Raises:
      SnapshotLimit: with the numbers.
    """
    count = max(usage.count for usage in usages)
    used_bytes = max(usage.chain_bytes for usage in usages)
    if limits.count_max < count:
        raise SnapshotLimit(
            volume,
            f"cannot set snapshotMaxCount={limits.count_max} smaller than current snapshot count "
            f"usage={count}, please purge snapshots first",
        )
    if 0 < limits.size_bytes_max < used_bytes:
        raise SnapshotLimit(
            volume,
            f"cannot set snapshotMaxSize={limits.size_bytes_max} smaller than current snapshot "
            f"size usage={used_bytes}, please purge snapshots first",
        )
