"""One replica directory: metadata and the order of its writes, lock, clean-up, generation,
checksums."""

from __future__ import annotations

from lhblock.replica._checksum import (
    ChecksumRecord,
    change_time_text,
    hash_image,
    read_checksum,
    valid_checksum,
    write_checksum,
)
from lhblock.replica._create import Probe, has_room
from lhblock.replica._directory import ACTIVITY_NAME, EXPANSION_LABEL, ReplicaDirectory
from lhblock.replica._generation import (
    OPENED,
    UNSERVED,
    Candidate,
    Choice,
    Generation,
    HeadFingerprint,
    HistoryEntry,
    Stale,
    choose,
    have_quorum,
    never_counted,
    new_set,
    quorum,
    supersede,
)
from lhblock.replica._lock import lock_holder
from lhblock.replica._metadata import (
    BLOCK_BYTES,
    LAYERS_MAX,
    Disk,
    MalformedError,
    VolumeMeta,
    created_text,
    walk_up,
    why_bad_size,
)
from lhblock.replica._names import (
    check_snapshot_name,
    is_head,
    is_image,
    next_head,
    snapshot_image,
    snapshot_of,
    why_unusable,
)
from lhblock.replica._peek import peek
from lhblock.replica._pending import PendingHead
from lhblock.replica._progress import PROGRESS_NAME, LayerStamp, RebuildProgress

__all__ = [
    "ACTIVITY_NAME",
    "BLOCK_BYTES",
    "EXPANSION_LABEL",
    "LAYERS_MAX",
    "OPENED",
    "PROGRESS_NAME",
    "UNSERVED",
    "Candidate",
    "ChecksumRecord",
    "Choice",
    "Disk",
    "Generation",
    "HeadFingerprint",
    "HistoryEntry",
    "LayerStamp",
    "MalformedError",
    "PendingHead",
    "Probe",
    "RebuildProgress",
    "ReplicaDirectory",
    "Stale",
    "VolumeMeta",
    "change_time_text",
    "check_snapshot_name",
    "choose",
    "created_text",
    "has_room",
    "hash_image",
    "have_quorum",
    "is_head",
    "is_image",
    "lock_holder",
    "never_counted",
    "new_set",
    "next_head",
    "peek",
    "quorum",
    "read_checksum",
    "snapshot_image",
    "snapshot_of",
    "supersede",
    "valid_checksum",
    "walk_up",
    "why_bad_size",
    "why_unusable",
    "write_checksum",
]
