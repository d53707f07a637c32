from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(_message.Message):
    __slots__ = ("name", "size_bytes", "read_only", "cache", "state", "pid", "driver", "driver_reason", "uris", "replicas", "statistics", "jobs", "merges_pending", "version", "clients", "history")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    DRIVER_REASON_FIELD_NUMBER: _ClassVar[int]
    URIS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    MERGES_PENDING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    read_only: bool
    cache: str
    state: str
    pid: int
    driver: str
    driver_reason: str
    uris: _containers.RepeatedScalarFieldContainer[str]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    statistics: Statistics
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    merges_pending: int
    version: str
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    history: _containers.RepeatedCompositeFieldContainer[Membership]
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., read_only: _Optional[bool] = ..., cache: _Optional[str] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., driver: _Optional[str] = ..., driver_reason: _Optional[str] = ..., uris: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., statistics: _Optional[_Union[Statistics, _Mapping]] = ..., jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., merges_pending: _Optional[int] = ..., version: _Optional[str] = ..., clients: _Optional[_Iterable[_Union[Client, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[Membership, _Mapping]]] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("generation", "time", "reason", "members", "left")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    time: str
    reason: str
    members: int
    left: int
    def __init__(self, generation: _Optional[int] = ..., time: _Optional[str] = ..., reason: _Optional[str] = ..., members: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("peer", "export", "since")
    PEER_FIELD_NUMBER: _ClassVar[int]
    EXPORT_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    export: str
    since: str
    def __init__(self, peer: _Optional[str] = ..., export: _Optional[str] = ..., since: _Optional[str] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("address", "mode", "error", "generation", "rebuild", "lag")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REBUILD_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    address: str
    mode: str
    error: str
    generation: int
    rebuild: Rebuild
    lag: int
    def __init__(self, address: _Optional[str] = ..., mode: _Optional[str] = ..., error: _Optional[str] = ..., generation: _Optional[int] = ..., rebuild: _Optional[_Union[Rebuild, _Mapping]] = ..., lag: _Optional[int] = ...) -> None: ...

class Rebuild(_message.Message):
    __slots__ = ("phase", "source", "done_bytes", "total_bytes", "rate_bytes_s", "left_s", "attempts", "error", "compares", "why")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMPARES_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    phase: str
    source: str
    done_bytes: int
    total_bytes: int
    rate_bytes_s: int
    left_s: float
    attempts: int
    error: str
    compares: str
    why: str
    def __init__(self, phase: _Optional[str] = ..., source: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., rate_bytes_s: _Optional[int] = ..., left_s: _Optional[float] = ..., attempts: _Optional[int] = ..., error: _Optional[str] = ..., compares: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class ReplicaAddRequest(_message.Message):
    __slots__ = ("address", "force", "rebuild")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    REBUILD_FIELD_NUMBER: _ClassVar[int]
    address: str
    force: bool
    rebuild: bool
    def __init__(self, address: _Optional[str] = ..., force: _Optional[bool] = ..., rebuild: _Optional[bool] = ...) -> None: ...

class ReplicaRemoveRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class ReplicaWaitRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class Statistics(_message.Message):
    __slots__ = ("reads", "writes", "flushes", "trims", "zeroes", "read_bytes", "write_bytes", "trim_bytes", "zero_bytes", "read_ns", "write_ns", "flush_ns", "errors", "in_flight", "connections", "map_bytes", "freeze_ns_max")
    READS_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    FLUSHES_FIELD_NUMBER: _ClassVar[int]
    TRIMS_FIELD_NUMBER: _ClassVar[int]
    ZEROES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRIM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ZERO_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_NS_FIELD_NUMBER: _ClassVar[int]
    WRITE_NS_FIELD_NUMBER: _ClassVar[int]
    FLUSH_NS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    MAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREEZE_NS_MAX_FIELD_NUMBER: _ClassVar[int]
    reads: int
    writes: int
    flushes: int
    trims: int
    zeroes: int
    read_bytes: int
    write_bytes: int
    trim_bytes: int
    zero_bytes: int
    read_ns: int
    write_ns: int
    flush_ns: int
    errors: int
    in_flight: int
    connections: int
    map_bytes: int
    freeze_ns_max: int
    def __init__(self, reads: _Optional[int] = ..., writes: _Optional[int] = ..., flushes: _Optional[int] = ..., trims: _Optional[int] = ..., zeroes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., write_bytes: _Optional[int] = ..., trim_bytes: _Optional[int] = ..., zero_bytes: _Optional[int] = ..., read_ns: _Optional[int] = ..., write_ns: _Optional[int] = ..., flush_ns: _Optional[int] = ..., errors: _Optional[int] = ..., in_flight: _Optional[int] = ..., connections: _Optional[int] = ..., map_bytes: _Optional[int] = ..., freeze_ns_max: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("name", "parent", "children", "created", "removed", "user_created", "labels", "size_bytes", "allocated_bytes")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    USER_CREATED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: str
    children: _containers.RepeatedScalarFieldContainer[str]
    created: str
    removed: bool
    user_created: bool
    labels: _containers.ScalarMap[str, str]
    size_bytes: int
    allocated_bytes: int
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[str] = ..., children: _Optional[_Iterable[str]] = ..., created: _Optional[str] = ..., removed: _Optional[bool] = ..., user_created: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., size_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ...) -> None: ...

class SnapshotListReply(_message.Message):
    __slots__ = ("snapshots", "merges_pending", "volume_bytes")
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    MERGES_PENDING_FIELD_NUMBER: _ClassVar[int]
    VOLUME_BYTES_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    merges_pending: int
    volume_bytes: int
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ..., merges_pending: _Optional[int] = ..., volume_bytes: _Optional[int] = ...) -> None: ...

class SnapshotRemoveRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SnapshotRevertRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SnapshotHashRequest(_message.Message):
    __slots__ = ("name", "rehash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REHASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    rehash: bool
    def __init__(self, name: _Optional[str] = ..., rehash: _Optional[bool] = ...) -> None: ...

class JobGetRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "kind", "subject", "replica", "state", "done_bytes", "total_bytes", "error", "checksums", "mismatches", "verified", "without_record")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_RECORD_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    subject: str
    replica: str
    state: str
    done_bytes: int
    total_bytes: int
    error: str
    checksums: _containers.RepeatedCompositeFieldContainer[Checksum]
    mismatches: _containers.RepeatedCompositeFieldContainer[Mismatch]
    verified: int
    without_record: int
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., replica: _Optional[str] = ..., state: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., error: _Optional[str] = ..., checksums: _Optional[_Iterable[_Union[Checksum, _Mapping]]] = ..., mismatches: _Optional[_Iterable[_Union[Mismatch, _Mapping]]] = ..., verified: _Optional[int] = ..., without_record: _Optional[int] = ...) -> None: ...

class Checksum(_message.Message):
    __slots__ = ("replica", "snapshot", "method", "value")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    replica: str
    snapshot: str
    method: str
    value: str
    def __init__(self, replica: _Optional[str] = ..., snapshot: _Optional[str] = ..., method: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Mismatch(_message.Message):
    __slots__ = ("replica", "snapshot", "expected", "found", "repaired_from")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FROM_FIELD_NUMBER: _ClassVar[int]
    replica: str
    snapshot: str
    expected: str
    found: str
    repaired_from: str
    def __init__(self, replica: _Optional[str] = ..., snapshot: _Optional[str] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ..., repaired_from: _Optional[str] = ...) -> None: ...
