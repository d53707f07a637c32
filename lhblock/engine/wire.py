"""What engine and replica process say to each other in ``lhblock.v1.PeerService``, as our types.

Whatever comes in is doubted here: names become file names and sizes become offsets only after they
passed. Both sides use this module; the engine's is :mod:`lhblock.engine._remote_member`.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lhblock import errors
from lhblock.engine._member import LayerSize, Records
from lhblock.errors import LhblockError, NativeError, ReplicaError, ReplicaIO, UsageError
from lhblock.replica import (
    ChecksumRecord,
    Disk,
    Generation,
    LayerStamp,
    MalformedError,
    is_head,
    is_image,
    snapshot_image,
    walk_up,
    why_bad_size,
    why_unusable,
)
from lhblock.rpc.generated import peer_pb2 as pb

ENGINE_KEY: Final = "lhblock-engine"
"""Metadata: which engine calls."""
HELLO_FRAME: Final = 0x4C05
HELLO: Final = struct.Struct("<Q16sI")
"""Payload of the frame that begins a data connection: epoch, engine, view (0: the live chain)."""
HEAD_VIEW: Final = 0
UNITS_VIEW: Final = 0xFFFFFFFF
"""Of a connection that carries units of layers, and no requests of clients."""
UNIT_READ: Final = 0x4C10
UNIT_WRITE: Final = 0x4C11
UNIT_EMPTY: Final = 1
"""Size field of a ``UNIT_WRITE``: the layer is known to have nothing there."""
MAGIC: Final = 0x1B01
HEADER: Final = struct.Struct("<HIIqII")
"""Of a frame: magic, sequence, type, offset, size, payload bytes."""
RESPONSE: Final = 2
ERROR: Final = 3
UNITS_MAX: Final = 64
"""In one call that hashes."""
EXTENTS_MAX: Final = 1 << 16
"""In one reply."""
DATA_BYTES_MAX: Final = 1 << 20
"""In one call that reads or writes."""
MESSAGE_BYTES_MAX: Final = 16 << 20
"""A reply beyond this is refused: no list of a volume of a PiB in pieces of 64 MiB is longer."""

TEXT_CHARS_MAX: Final = 4096
_COUNT_MAX: Final = 1 << 63

_ERRORS: Final[Mapping[str, type[ReplicaError]]] = {
    kind.__name__: kind
    for kind in (
        errors.ReplicaNotFound,
        errors.ReplicaForeign,
        errors.ReplicaDamaged,
        errors.ReplicaLocked,
        errors.ReplicaUnsupported,
        errors.ReplicaNoExtents,
        errors.ReplicaStale,
        errors.ReplicaIO,
    )
}


@dataclass(frozen=True)
class RemoteRecords:
    """The metadata of a replica elsewhere, as it told them last. See ``ReplicaDirectory``."""

    label: str
    size_bytes: int
    disks: Mapping[str, Disk]
    chain: tuple[Disk, ...]
    generation: Generation | None
    encrypted: bool
    rebuilding: bool
    was_dirty: bool
    torn: bool
    written_elsewhere: str
    cleaned: tuple[str, ...]

    @property
    def head(self) -> Disk:
        """The layer that is written."""
        return self.chain[-1]

    def children(self, name: str) -> tuple[Disk, ...]:
        """The disks whose parent is ``name``, an image or a snapshot."""
        image = name if name in self.disks else snapshot_image(name)
        return tuple(disk for disk in self.disks.values() if disk.parent == image)


def encode_disk(disk: Disk) -> pb.PeerDisk:
    return pb.PeerDisk(
        name=disk.name,
        parent=disk.parent,
        removed=disk.removed,
        user_created=disk.user_created,
        created=disk.created,
        labels=disk.labels,
    )


def decode_disk(message: pb.PeerDisk) -> Disk:
    """Raises MalformedError: it names no image."""
    _check_image(message.name)
    if message.parent:
        _check_image(message.parent)
        if is_head(message.parent):
            raise MalformedError(f"has the head {message.parent!r:.300} as a parent")
    return Disk(
        name=message.name,
        parent=message.parent,
        removed=message.removed,
        user_created=message.user_created,
        created=message.created[:TEXT_CHARS_MAX],
        labels=dict(message.labels),
    )


def _check_image(name: str) -> None:
    if not is_image(name) or why_unusable(name) is not None:
        raise MalformedError(f"has {name!r:.300}, which names no image")


def encode_records(records: Records) -> pb.PeerRecords:
    return pb.PeerRecords(
        size_bytes=records.size_bytes,
        disks=[encode_disk(disk) for disk in tuple(records.disks.values())],
        head=records.head.name,
        generation=b"" if records.generation is None else records.generation.encode(),
        encrypted=records.encrypted,
        rebuilding=records.rebuilding,
        was_dirty=records.was_dirty,
        torn=records.torn,
        written_elsewhere=records.written_elsewhere,
        cleaned=records.cleaned,
    )


def decode_records(label: str, message: pb.PeerRecords) -> RemoteRecords:
    """Raises MalformedError: says what cannot be."""
    reason = why_bad_size(message.size_bytes)
    if reason is not None:
        raise MalformedError(f"has a size of {message.size_bytes}, which {reason}")
    disks = {disk.name: disk for disk in map(decode_disk, message.disks)}
    for name in disks:
        tuple(walk_up(disks, name))
    if message.head not in disks or not disks[message.head].is_head:
        raise MalformedError(f"has the head {message.head!r:.300}, which is none")
    return RemoteRecords(
        label=label,
        size_bytes=message.size_bytes,
        disks=disks,
        chain=tuple(walk_up(disks, message.head))[::-1],
        generation=Generation.parse(message.generation) if message.generation else None,
        encrypted=message.encrypted,
        rebuilding=message.rebuilding,
        was_dirty=message.was_dirty,
        torn=message.torn,
        written_elsewhere=message.written_elsewhere[:TEXT_CHARS_MAX],
        cleaned=tuple(text[:TEXT_CHARS_MAX] for text in message.cleaned),
    )


def encode_sizes(sizes: Mapping[str, LayerSize]) -> list[pb.PeerLayerSize]:
    return [
        pb.PeerLayerSize(
            image=image, image_bytes=size.image_bytes, allocated_bytes=size.allocated_bytes
        )
        for image, size in sizes.items()
    ]


def decode_sizes(message: pb.PeerSizes) -> dict[str, LayerSize]:
    """Raises MalformedError: a size that no file has."""
    sizes = {}
    for layer in message.layers:
        sizes[layer.image] = LayerSize(count(layer.image_bytes), count(layer.allocated_bytes))
    return sizes


def encode_checksum(record: ChecksumRecord) -> pb.PeerChecksum:
    return pb.PeerChecksum(
        checksum=record.checksum,
        change_time=record.change_time,
        last_hashed_at=record.last_hashed_at,
        silently_corrupted=record.silently_corrupted,
        method=record.method,
    )


def decode_checksum(message: pb.PeerChecksum) -> ChecksumRecord:
    """Raises MalformedError: a text is too long."""
    texts = (message.checksum, message.change_time, message.last_hashed_at, message.method)
    if any(len(text) > TEXT_CHARS_MAX for text in texts):
        raise MalformedError("has a checksum record that is none")
    return ChecksumRecord(
        checksum=message.checksum,
        change_time=message.change_time,
        last_hashed_at=message.last_hashed_at,
        silently_corrupted=message.silently_corrupted,
        method=message.method,
    )


def encode_stamp(stamp: LayerStamp) -> pb.PeerStamp:
    return pb.PeerStamp(inode=stamp.inode, size_bytes=stamp.size_bytes, mtime_ns=stamp.mtime_ns)


def decode_stamp(message: pb.PeerStamp) -> LayerStamp:
    return LayerStamp(message.inode, message.size_bytes, message.mtime_ns)


def encode_steps(offsets_bytes: Sequence[int], step_bytes: int) -> pb.PeerSteps:
    """Begins of steps, in order."""
    runs: list[int] = []
    for offset_bytes in offsets_bytes:
        step = offset_bytes // step_bytes
        if runs and step == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [step, 1]
    return pb.PeerSteps(runs=runs)


def decode_steps(message: pb.PeerSteps, step_bytes: int, end_bytes: int) -> list[int]:
    """Raises MalformedError: they are not in order, or beyond the end."""
    offsets: list[int] = []
    next_step, end_step = 0, -(-end_bytes // step_bytes)
    if len(message.runs) % 2:
        raise MalformedError("has half a run of steps")
    for first, length in zip(message.runs[::2], message.runs[1::2], strict=True):
        if first < next_step or length > end_step - first:
            raise MalformedError(f"has {length} steps from {first}, of {end_step}")
        next_step = first + length
        offsets += range(first * step_bytes, next_step * step_bytes, step_bytes)
    return offsets


def count(value: int) -> int:
    """Raises MalformedError: it is no length of a file."""
    if value >= _COUNT_MAX:
        raise MalformedError(f"has {value} where a length belongs")
    return value


def decode_uuid(text: str) -> str:
    """Raises MalformedError: it is no UUID."""
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise MalformedError(f"has {text!r:.40} where a UUID belongs") from error


# ---- Errors.


def encode_error(error: LhblockError | OSError) -> str:
    """An error of a member's method, as the message of a call that failed."""
    document: dict[str, object]
    if isinstance(error, ReplicaError):
        document = {"kind": type(error).__name__, "sentence": error.sentence}
    elif isinstance(error, NativeError):
        document = {"kind": "NativeError", "operation": error.operation, "errno": error.errno}
    elif isinstance(error, OSError):
        document = {"kind": "ReplicaIO", "sentence": error.strerror or str(error)}
    else:
        document = {"kind": type(error).__name__, "sentence": str(error)}
    return json.dumps(document)


def decode_error(address: str, text: str) -> LhblockError:
    """The error that a replica told; whatever cannot be understood is its sentence."""
    try:
        document = json.loads(text)
        kind, sentence = document["kind"], str(document.get("sentence", ""))[:TEXT_CHARS_MAX]
        if kind == "NativeError":
            number = document["errno"]
            if isinstance(number, int) and 0 < number < 4096:
                return NativeError(str(document["operation"])[:TEXT_CHARS_MAX], number)
        if kind == "UsageError":
            return UsageError(sentence)
        return _ERRORS.get(kind, ReplicaIO)(address, sentence)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ReplicaIO(address, f"failed: {text[:TEXT_CHARS_MAX]}")
