from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Replica(_message.Message):
    __slots__ = ("dirty", "rebuilding", "head", "parent", "size", "sector_size", "backing_file", "state", "chain", "disks", "remain_snapshots", "revision_counter", "last_modify_time", "head_file_size", "revision_counter_disabled", "unmap_mark_disk_chain_removed", "snapshot_count_usage", "snapshot_size_usage", "snapshot_count_total")
    class DisksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: DiskInfo
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[DiskInfo, _Mapping]] = ...) -> None: ...
    DIRTY_FIELD_NUMBER: _ClassVar[int]
    REBUILDING_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SECTOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    BACKING_FILE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    DISKS_FIELD_NUMBER: _ClassVar[int]
    REMAIN_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    REVISION_COUNTER_FIELD_NUMBER: _ClassVar[int]
    LAST_MODIFY_TIME_FIELD_NUMBER: _ClassVar[int]
    HEAD_FILE_SIZE_FIELD_NUMBER: _ClassVar[int]
    REVISION_COUNTER_DISABLED_FIELD_NUMBER: _ClassVar[int]
    UNMAP_MARK_DISK_CHAIN_REMOVED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COUNT_USAGE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_SIZE_USAGE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COUNT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    dirty: bool
    rebuilding: bool
    head: str
    parent: str
    size: str
    sector_size: int
    backing_file: str
    state: str
    chain: _containers.RepeatedScalarFieldContainer[str]
    disks: _containers.MessageMap[str, DiskInfo]
    remain_snapshots: int
    revision_counter: int
    last_modify_time: int
    head_file_size: int
    revision_counter_disabled: bool
    unmap_mark_disk_chain_removed: bool
    snapshot_count_usage: int
    snapshot_size_usage: int
    snapshot_count_total: int
    def __init__(self, dirty: _Optional[bool] = ..., rebuilding: _Optional[bool] = ..., head: _Optional[str] = ..., parent: _Optional[str] = ..., size: _Optional[str] = ..., sector_size: _Optional[int] = ..., backing_file: _Optional[str] = ..., state: _Optional[str] = ..., chain: _Optional[_Iterable[str]] = ..., disks: _Optional[_Mapping[str, DiskInfo]] = ..., remain_snapshots: _Optional[int] = ..., revision_counter: _Optional[int] = ..., last_modify_time: _Optional[int] = ..., head_file_size: _Optional[int] = ..., revision_counter_disabled: _Optional[bool] = ..., unmap_mark_disk_chain_removed: _Optional[bool] = ..., snapshot_count_usage: _Optional[int] = ..., snapshot_size_usage: _Optional[int] = ..., snapshot_count_total: _Optional[int] = ...) -> None: ...

class DiskInfo(_message.Message):
    __slots__ = ("name", "parent", "children", "removed", "user_created", "created", "size", "labels")
    class ChildrenEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bool] = ...) -> None: ...
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
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    USER_CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: str
    children: _containers.ScalarMap[str, bool]
    removed: bool
    user_created: bool
    created: str
    size: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[str] = ..., children: _Optional[_Mapping[str, bool]] = ..., removed: _Optional[bool] = ..., user_created: _Optional[bool] = ..., created: _Optional[str] = ..., size: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PrepareRemoveAction(_message.Message):
    __slots__ = ("action", "source", "target")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    action: str
    source: str
    target: str
    def __init__(self, action: _Optional[str] = ..., source: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class ReplicaCreateRequest(_message.Message):
    __slots__ = ("size",)
    SIZE_FIELD_NUMBER: _ClassVar[int]
    size: str
    def __init__(self, size: _Optional[str] = ...) -> None: ...

class ReplicaOpenRequest(_message.Message):
    __slots__ = ("is_upgrade", "expected_backend_size")
    IS_UPGRADE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BACKEND_SIZE_FIELD_NUMBER: _ClassVar[int]
    is_upgrade: bool
    expected_backend_size: int
    def __init__(self, is_upgrade: _Optional[bool] = ..., expected_backend_size: _Optional[int] = ...) -> None: ...

class ReplicaRevertRequest(_message.Message):
    __slots__ = ("name", "created")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    name: str
    created: str
    def __init__(self, name: _Optional[str] = ..., created: _Optional[str] = ...) -> None: ...

class ReplicaSnapshotRequest(_message.Message):
    __slots__ = ("name", "user_created", "created", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    USER_CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    user_created: bool
    created: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., user_created: _Optional[bool] = ..., created: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ReplicaExpandRequest(_message.Message):
    __slots__ = ("size",)
    SIZE_FIELD_NUMBER: _ClassVar[int]
    size: int
    def __init__(self, size: _Optional[int] = ...) -> None: ...

class DiskRemoveRequest(_message.Message):
    __slots__ = ("name", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class DiskReplaceRequest(_message.Message):
    __slots__ = ("target", "source")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    target: str
    source: str
    def __init__(self, target: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class DiskPrepareRemoveRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DiskPrepareRemoveResponse(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[PrepareRemoveAction]
    def __init__(self, operations: _Optional[_Iterable[_Union[PrepareRemoveAction, _Mapping]]] = ...) -> None: ...

class DiskMarkAsRemovedRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RebuildingSetRequest(_message.Message):
    __slots__ = ("rebuilding",)
    REBUILDING_FIELD_NUMBER: _ClassVar[int]
    rebuilding: bool
    def __init__(self, rebuilding: _Optional[bool] = ...) -> None: ...

class RevisionCounterSetRequest(_message.Message):
    __slots__ = ("counter",)
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    counter: int
    def __init__(self, counter: _Optional[int] = ...) -> None: ...

class UnmapMarkDiskChainRemovedSetRequest(_message.Message):
    __slots__ = ("enabled",)
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    def __init__(self, enabled: _Optional[bool] = ...) -> None: ...

class SnapshotMaxCountSetRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class SnapshotMaxSizeSetRequest(_message.Message):
    __slots__ = ("size",)
    SIZE_FIELD_NUMBER: _ClassVar[int]
    size: int
    def __init__(self, size: _Optional[int] = ...) -> None: ...

class ReplicaCreateResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaGetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaOpenResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaCloseResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaReloadResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaRevertResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaSnapshotResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class ReplicaExpandResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class DiskRemoveResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class DiskReplaceResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class DiskMarkAsRemovedResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class RebuildingSetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class RevisionCounterSetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class UnmapMarkDiskChainRemovedSetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class SnapshotMaxCountSetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class SnapshotMaxSizeSetResponse(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...
