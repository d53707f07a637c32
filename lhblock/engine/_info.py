"""Frozen views of a volume's state, for callers to keep and print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

VolumeState: TypeAlias = Literal["healthy", "degraded", "faulted"]
RebuildPhase: TypeAlias = Literal[
    "waiting", "preparing", "copying", "verifying", "finishing", "refused"
]
ReplicaMode: TypeAlias = Literal["RW", "WO", "ERR"]


@dataclass(frozen=True)
class SnapshotInfo:
    """One snapshot of the tree.

    Attributes:
      name: ``s1``; the head is listed as ``volume-head``.
      parent: name of the older snapshot, "" for the oldest.
      children: names of what was built on it; ``volume-head`` among them for the head's parent.
      created: UTC, RFC 3339, whole seconds.
      removed: marked for removal, waiting to be merged away.
      labels: as given at creation.
      size_bytes: size of the volume when it was taken.
      allocated_bytes: space its own layer takes on the first usable replica.
      user_created: False for what the system made, such as an expansion.
    """

    name: str
    parent: str
    children: tuple[str, ...]
    created: str
    removed: bool
    labels: Mapping[str, str]
    size_bytes: int
    allocated_bytes: int
    user_created: bool


@dataclass(frozen=True)
class ReplicaInfo:
    """One replica of the set.

    Attributes:
      address: the directory's path, or the address of its process.
      mode: ``RW`` takes part, ``WO`` is being rebuilt, ``ERR`` was left out or dropped.
      error: why it is not ``RW``; "" otherwise.
      generation: counter of the newest generation it is known to hold; 0 if unknown.
      lag: how many generations that is behind the newest; 0 if unknown.
    """

    address: str
    mode: ReplicaMode
    error: str
    generation: int
    lag: int = 0


@dataclass(frozen=True)
class RebuildInfo:
    """The rebuild of one replica, going on or to come.

    Attributes:
      address: the directory's path.
      phase: ``waiting`` for its turn or for the next attempt; ``preparing``, ``copying``,
        ``verifying``, ``finishing``; ``refused``: only the user can say that it may be overwritten.
      source: address of the replica that is copied from.
      done_bytes: of ``total_bytes``, what is copied and what is verified; both count.
      total_bytes: what either has of the layers that may differ, twice; 0 while that is unknown.
      rate_bytes_s: mean since this attempt began.
      left_s: estimated seconds to go, or None.
      attempts: how often it was begun.
      error: why the last attempt ended; "" otherwise.
      compares: ``changes`` since the replica left, ``everything``, or "" while that is unknown.
      why: everything is compared although the replica was there while this engine ran.
    """

    address: str
    phase: RebuildPhase
    source: str
    done_bytes: int
    total_bytes: int
    rate_bytes_s: int
    left_s: float | None
    attempts: int
    error: str
    compares: Literal["", "changes", "everything"]
    why: str


@dataclass(frozen=True)
class JobInfo:
    """A merge going on.

    Attributes:
      kind: ``merge-up`` (into the newer layer), ``merge-down`` (into the older one) or ``prune``.
      replica: the directory's path.
      snapshot: the removed snapshot.
      done_bytes: of the volume's range that was walked.
      total_bytes: of that range.
    """

    kind: Literal["merge-up", "merge-down", "prune"]
    replica: str
    snapshot: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class ScrubMismatch:
    """A snapshot layer whose content is not what its checksum record says.

    Attributes:
      replica: the directory's path.
      snapshot: whose layer it is.
      expected: recorded checksum, 16 hexadecimal digits.
      found: checksum of what was read.
      repaired_from: path of the replica whose good copy replaced it; "" if none had one.
    """

    replica: str
    snapshot: str
    expected: str
    found: str
    repaired_from: str


@dataclass(frozen=True)
class ScrubReport:
    """What a scrub looked at.

    Attributes:
      verified: layers read and found right, over all replicas.
      without_record: layers that have no current checksum record, so nothing can be said.
      mismatches: damaged layers, repaired or not.
    """

    verified: int
    without_record: int
    mismatches: tuple[ScrubMismatch, ...]
