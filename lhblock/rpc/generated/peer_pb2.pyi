from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerHello(_message.Message):
    __slots__ = ("version", "state", "size_bytes", "data_protocol", "data_socket", "data_port", "volume_name", "blank", "boot_id", "place", "up_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DATA_SOCKET_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    VOLUME_NAME_FIELD_NUMBER: _ClassVar[int]
    BLANK_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    UP_S_FIELD_NUMBER: _ClassVar[int]
    version: str
    state: str
    size_bytes: int
    data_protocol: str
    data_socket: str
    data_port: int
    volume_name: str
    blank: bool
    boot_id: str
    place: str
    up_s: float
    def __init__(self, version: _Optional[str] = ..., state: _Optional[str] = ..., size_bytes: _Optional[int] = ..., data_protocol: _Optional[str] = ..., data_socket: _Optional[str] = ..., data_port: _Optional[int] = ..., volume_name: _Optional[str] = ..., blank: _Optional[bool] = ..., boot_id: _Optional[str] = ..., place: _Optional[str] = ..., up_s: _Optional[float] = ...) -> None: ...

class PeerCreate(_message.Message):
    __slots__ = ("size_bytes", "generation", "encrypted")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    generation: bytes
    encrypted: bool
    def __init__(self, size_bytes: _Optional[int] = ..., generation: _Optional[bytes] = ..., encrypted: _Optional[bool] = ...) -> None: ...

class PeerOpen(_message.Message):
    __slots__ = ("read_only",)
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    read_only: bool
    def __init__(self, read_only: _Optional[bool] = ...) -> None: ...

class PeerTarget(_message.Message):
    __slots__ = ("like", "size_bytes", "encrypted", "others", "force")
    LIKE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    like: bytes
    size_bytes: int
    encrypted: bool
    others: _containers.RepeatedScalarFieldContainer[str]
    force: bool
    def __init__(self, like: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., encrypted: _Optional[bool] = ..., others: _Optional[_Iterable[str]] = ..., force: _Optional[bool] = ...) -> None: ...

class PeerClose(_message.Message):
    __slots__ = ("clean", "synced")
    CLEAN_FIELD_NUMBER: _ClassVar[int]
    SYNCED_FIELD_NUMBER: _ClassVar[int]
    clean: bool
    synced: bool
    def __init__(self, clean: _Optional[bool] = ..., synced: _Optional[bool] = ...) -> None: ...

class PeerOpenStore(_message.Message):
    __slots__ = ("write_only",)
    WRITE_ONLY_FIELD_NUMBER: _ClassVar[int]
    write_only: bool
    def __init__(self, write_only: _Optional[bool] = ...) -> None: ...

class PeerView(_message.Message):
    __slots__ = ("images", "size_bytes")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    size_bytes: int
    def __init__(self, images: _Optional[_Iterable[str]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class PeerViewId(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class PeerGeneration(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: bytes
    def __init__(self, generation: _Optional[bytes] = ...) -> None: ...

class PeerFlag(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: bool
    def __init__(self, value: _Optional[bool] = ...) -> None: ...

class PeerText(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: str
    def __init__(self, value: _Optional[str] = ...) -> None: ...

class PeerSize(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class PeerDisk(_message.Message):
    __slots__ = ("name", "parent", "removed", "user_created", "created", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    USER_CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: str
    removed: bool
    user_created: bool
    created: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[str] = ..., removed: _Optional[bool] = ..., user_created: _Optional[bool] = ..., created: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PeerRecords(_message.Message):
    __slots__ = ("size_bytes", "disks", "head", "generation", "encrypted", "rebuilding", "was_dirty", "torn", "written_elsewhere", "cleaned")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISKS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    REBUILDING_FIELD_NUMBER: _ClassVar[int]
    WAS_DIRTY_FIELD_NUMBER: _ClassVar[int]
    TORN_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    CLEANED_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    disks: _containers.RepeatedCompositeFieldContainer[PeerDisk]
    head: str
    generation: bytes
    encrypted: bool
    rebuilding: bool
    was_dirty: bool
    torn: bool
    written_elsewhere: str
    cleaned: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, size_bytes: _Optional[int] = ..., disks: _Optional[_Iterable[_Union[PeerDisk, _Mapping]]] = ..., head: _Optional[str] = ..., generation: _Optional[bytes] = ..., encrypted: _Optional[bool] = ..., rebuilding: _Optional[bool] = ..., was_dirty: _Optional[bool] = ..., torn: _Optional[bool] = ..., written_elsewhere: _Optional[str] = ..., cleaned: _Optional[_Iterable[str]] = ...) -> None: ...

class PeerLayer(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class PeerLayerSize(_message.Message):
    __slots__ = ("image", "image_bytes", "allocated_bytes")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    image: str
    image_bytes: int
    allocated_bytes: int
    def __init__(self, image: _Optional[str] = ..., image_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ...) -> None: ...

class PeerSizes(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[PeerLayerSize]
    def __init__(self, layers: _Optional[_Iterable[_Union[PeerLayerSize, _Mapping]]] = ...) -> None: ...

class PeerSnapshot(_message.Message):
    __slots__ = ("disk", "size_bytes")
    DISK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    disk: PeerDisk
    size_bytes: int
    def __init__(self, disk: _Optional[_Union[PeerDisk, _Mapping]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class PeerMerge(_message.Message):
    __slots__ = ("kind", "lower", "upper", "offset_bytes", "token")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    kind: str
    lower: str
    upper: str
    offset_bytes: int
    token: int
    def __init__(self, kind: _Optional[str] = ..., lower: _Optional[str] = ..., upper: _Optional[str] = ..., offset_bytes: _Optional[int] = ..., token: _Optional[int] = ...) -> None: ...

class PeerMergeToken(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: int
    def __init__(self, token: _Optional[int] = ...) -> None: ...

class PeerMerged(_message.Message):
    __slots__ = ("done", "records")
    DONE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    done: bool
    records: PeerRecords
    def __init__(self, done: _Optional[bool] = ..., records: _Optional[_Union[PeerRecords, _Mapping]] = ...) -> None: ...

class PeerSteps(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, runs: _Optional[_Iterable[int]] = ...) -> None: ...

class PeerHash(_message.Message):
    __slots__ = ("image", "rehash")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    REHASH_FIELD_NUMBER: _ClassVar[int]
    image: str
    rehash: bool
    def __init__(self, image: _Optional[str] = ..., rehash: _Optional[bool] = ...) -> None: ...

class PeerChecksum(_message.Message):
    __slots__ = ("checksum", "change_time", "last_hashed_at", "silently_corrupted", "method")
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    CHANGE_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_HASHED_AT_FIELD_NUMBER: _ClassVar[int]
    SILENTLY_CORRUPTED_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    checksum: str
    change_time: str
    last_hashed_at: str
    silently_corrupted: bool
    method: str
    def __init__(self, checksum: _Optional[str] = ..., change_time: _Optional[str] = ..., last_hashed_at: _Optional[str] = ..., silently_corrupted: _Optional[bool] = ..., method: _Optional[str] = ...) -> None: ...

class PeerVerified(_message.Message):
    __slots__ = ("record", "found")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    record: PeerChecksum
    found: str
    def __init__(self, record: _Optional[_Union[PeerChecksum, _Mapping]] = ..., found: _Optional[str] = ...) -> None: ...

class PeerRange(_message.Message):
    __slots__ = ("image", "offset_bytes", "length_bytes")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    image: str
    offset_bytes: int
    length_bytes: int
    def __init__(self, image: _Optional[str] = ..., offset_bytes: _Optional[int] = ..., length_bytes: _Optional[int] = ...) -> None: ...

class PeerExtents(_message.Message):
    __slots__ = ("bounds_bytes",)
    BOUNDS_BYTES_FIELD_NUMBER: _ClassVar[int]
    bounds_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bounds_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class PeerData(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PeerWrite(_message.Message):
    __slots__ = ("image", "offset_bytes", "data")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    image: str
    offset_bytes: int
    data: bytes
    def __init__(self, image: _Optional[str] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PeerRepaired(_message.Message):
    __slots__ = ("image", "record")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    image: str
    record: PeerChecksum
    def __init__(self, image: _Optional[str] = ..., record: _Optional[_Union[PeerChecksum, _Mapping]] = ...) -> None: ...

class PeerAlign(_message.Message):
    __slots__ = ("kept", "head_becomes", "source", "newest", "sizes", "size_bytes", "created")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    HEAD_BECOMES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    kept: _containers.RepeatedScalarFieldContainer[str]
    head_becomes: str
    source: _containers.RepeatedCompositeFieldContainer[PeerDisk]
    newest: str
    sizes: _containers.RepeatedCompositeFieldContainer[PeerLayerSize]
    size_bytes: int
    created: str
    def __init__(self, kept: _Optional[_Iterable[str]] = ..., head_becomes: _Optional[str] = ..., source: _Optional[_Iterable[_Union[PeerDisk, _Mapping]]] = ..., newest: _Optional[str] = ..., sizes: _Optional[_Iterable[_Union[PeerLayerSize, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., created: _Optional[str] = ...) -> None: ...

class PeerStamp(_message.Message):
    __slots__ = ("inode", "size_bytes", "mtime_ns")
    INODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MTIME_NS_FIELD_NUMBER: _ClassVar[int]
    inode: int
    size_bytes: int
    mtime_ns: int
    def __init__(self, inode: _Optional[int] = ..., size_bytes: _Optional[int] = ..., mtime_ns: _Optional[int] = ...) -> None: ...

class PeerHashUnits(_message.Message):
    __slots__ = ("image", "offsets_bytes", "shape_only")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHAPE_ONLY_FIELD_NUMBER: _ClassVar[int]
    image: str
    offsets_bytes: _containers.RepeatedScalarFieldContainer[int]
    shape_only: bool
    def __init__(self, image: _Optional[str] = ..., offsets_bytes: _Optional[_Iterable[int]] = ..., shape_only: _Optional[bool] = ...) -> None: ...

class PeerHashes(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hashes: _Optional[_Iterable[int]] = ...) -> None: ...
