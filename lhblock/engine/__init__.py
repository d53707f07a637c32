"""Volumes: replica sets, snapshots, merges, recovery, fences, views and statistics.

Nothing here knows of sockets being listened on or of text for terminals.
"""

from __future__ import annotations

from lhblock._native import MERGE_STEP_BYTES, UNIT_BYTES, CloseReason, NativeUnit
from lhblock.engine._alignment import Alignment
from lhblock.engine._config import (
    CacheMode,
    DriverChoice,
    EngineOptions,
    RebuildOptions,
    RemoteLimits,
    VolumeConfig,
    check_size,
)
from lhblock.engine._device import Connection, Device
from lhblock.engine._driven import (
    DrivenReplica,
    ReplicaDisk,
    ReplicaFound,
    ReplicaLayers,
    open_driven,
)
from lhblock.engine._engine import Engine, open_engine
from lhblock.engine._hosted import HostedDevice, HostedReplica
from lhblock.engine._info import (
    JobInfo,
    RebuildInfo,
    ReplicaInfo,
    ScrubMismatch,
    ScrubReport,
    SnapshotInfo,
)
from lhblock.engine._limits import SnapshotLimits
from lhblock.engine._local_member import LocalMember
from lhblock.engine._member import LayerDamage, MergeKind
from lhblock.engine._missed import Witness
from lhblock.engine._opening import create_replicas
from lhblock.engine._relay import Relay
from lhblock.engine._remote_creation import RemoteReplica, greet_replica, uncreate_replica
from lhblock.engine._remote_member import RemoteMember
from lhblock.engine._statistics import VolumeMetrics, VolumeStatistics
from lhblock.engine._target import probe
from lhblock.engine._threads import run_copy, run_fence, run_metadata
from lhblock.engine._views import SnapshotView
from lhblock.engine._volume import Volume

__all__ = [
    "MERGE_STEP_BYTES",
    "UNIT_BYTES",
    "Alignment",
    "CacheMode",
    "CloseReason",
    "Connection",
    "Device",
    "DrivenReplica",
    "DriverChoice",
    "Engine",
    "EngineOptions",
    "HostedDevice",
    "HostedReplica",
    "JobInfo",
    "LayerDamage",
    "LocalMember",
    "MergeKind",
    "NativeUnit",
    "RebuildInfo",
    "RebuildOptions",
    "Relay",
    "RemoteLimits",
    "RemoteMember",
    "RemoteReplica",
    "ReplicaDisk",
    "ReplicaFound",
    "ReplicaInfo",
    "ReplicaLayers",
    "ScrubMismatch",
    "ScrubReport",
    "SnapshotInfo",
    "SnapshotLimits",
    "SnapshotView",
    "Volume",
    "VolumeConfig",
    "VolumeMetrics",
    "VolumeStatistics",
    "Witness",
    "check_size",
    "create_replicas",
    "greet_replica",
    "open_driven",
    "open_engine",
    "probe",
    "run_copy",
    "run_fence",
    "run_metadata",
    "uncreate_replica",
]
