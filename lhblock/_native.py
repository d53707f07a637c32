"""The only importer of the cffi module: typed wrappers over ``native/cdef.h``.

Every wrapper owns its C handle: it closes it once and refuses use after that with
:class:`ValueError`, because a stale handle is a bug of ours and never the user's. A negative
return value becomes :class:`~lhblock.errors.NativeError` with the operation's name; whoever knows
the volume or the replica adds that.

The extension is loaded at the first use of a function, so that importing this module costs nothing
in commands that never touch a volume. Functions whose docstring says *Blocking* release the GIL and
may wait for I/O: call them from a worker thread, never from the trio thread.
"""

from __future__ import annotations

import errno
import functools
import importlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self, TypeAlias

from lhblock.errors import NativeError

Buffer: TypeAlias = bytes | bytearray | memoryview

# These mirror native/cdef.h, because a command like `volume ls` may want a bound without
# loading the extension. _module() compares them when it loads it.
BLOCK_BYTES = 4096
LAYERS_MAX = 250
STORES_MAX = 8
MERGE_STEP_BYTES = 64 << 20
DIRTY_GRANULE_BYTES = 64 << 10
RANGE_STEP_BYTES = 32 << 10
ACTIVITY_EXTENT_BYTES = 4 << 20
ACTIVITY_ID_BYTES = 16

STORE_DIRECT = 1
STORE_READ_ONLY = 2
PEER_OURS = 1
STORE_WRITE_ONLY = 4
UNIT_BYTES = 1 << 20
UNIT_MAP_BYTES = 32
VOLUME_READ_ONLY = 1
IO_FUA = 1
IO_NO_HOLE = 2
FUSE_WRITABLE = 1
FUSE_FUA = 2
NBD_STRUCTURED = 1
NBD_BASE_ALLOCATION = 2
NBD_READ_ONLY = 4

EXTENTS_MAX = 1024  # descriptors fetched by one lhb_file_extents call
STATUS_PAIRS_MAX = 1024


class Driver(IntEnum):
    """How the queues do disk I/O."""

    AUTO = 0
    URING = 1
    POOL = 2


class Op(IntEnum):
    """Kinds of request of :meth:`NativeVolume.io`."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    TRIM = 3
    ZERO = 4


class EventType(IntEnum):
    """What the core has to say."""

    STORE_FAILED = 1
    CONNECTION_CLOSED = 2
    OUT_OF_SPACE = 3
    LAST_PEER_LOST = 4


class StoreMode(IntEnum):
    """What a volume uses a store for."""

    RW = 0
    WO = 1  # gets every change, answers no reads


class PeerEnd(IntEnum):
    """Why the connections of a peer were closed."""

    NONE = 0
    CLOSED = 1
    SOCKET_ERROR = 2
    EOF = 3
    MID_REPLY = 4
    TIMEOUT = 5
    BAD_MAGIC = 6
    BAD_SEQUENCE = 7
    BAD_TYPE = 8
    BAD_LENGTH = 9
    GOODBYE = 10


class CloseReason(IntEnum):
    """Why a connection ended."""

    CLIENT = 0
    EOF = 1
    MID_REQUEST = 2
    BAD_MAGIC = 3
    TOO_LARGE = 4
    SOCKET_ERROR = 5
    READ_FAILED = 6
    ASKED = 7


@dataclass(frozen=True)
class Event:
    """One record of the event ring.

    Attributes:
      type: what happened.
      error: an errno, or a :class:`CloseReason` for ``CONNECTION_CLOSED``.
      volume_id: the volume it happened to.
      subject_id: the store or the connection.
      offset_bytes: where, if it concerns a range.
      length_bytes: how much, if it concerns a range.
    """

    type: int
    error: int
    volume_id: int
    subject_id: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class Extent:
    """A range of a file or of a volume, in bytes, block aligned."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class NativeStatistics:
    """Totals of one volume since it was opened. See ``struct lhb_statistics``."""

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
    waits: int
    inline_reads: int
    driver_reads: int
    inline_writes: int
    driver_writes: int
    in_flight: int
    connections: int
    map_bytes: int
    freeze_ns_max: int


@dataclass(frozen=True)
class PeerStatistics:
    """Totals of one peer since it was opened. See ``struct lhb_peer_statistics``.

    Attributes:
      ended: the errno its connections were closed with, 0 while they are not.
      end_reason: a :class:`PeerEnd`.
    """

    frames_sent: int
    frames_received: int
    bytes_sent: int
    bytes_received: int
    errors: int
    timeouts: int
    in_flight: int
    waiting: int
    connections: int
    ended: int
    end_reason: int


_PEER_STATISTICS_FIELDS = tuple(PeerStatistics.__dataclass_fields__)
_STATISTICS_FIELDS = tuple(NativeStatistics.__dataclass_fields__)


@functools.cache
def _module() -> Any:
    module = importlib.import_module("lhblock._lhblock")
    lib = module.lib
    mirrored = {
        "LHB_BLOCK_BYTES": BLOCK_BYTES,
        "LHB_LAYERS_MAX": LAYERS_MAX,
        "LHB_STORES_MAX": STORES_MAX,
        "LHB_MERGE_STEP_BYTES": MERGE_STEP_BYTES,
        "LHB_DIRTY_GRANULE_BYTES": DIRTY_GRANULE_BYTES,
        "LHB_RANGE_STEP_BYTES": RANGE_STEP_BYTES,
        "LHB_ACTIVITY_EXTENT_BYTES": ACTIVITY_EXTENT_BYTES,
        "LHB_ACTIVITY_ID_BYTES": ACTIVITY_ID_BYTES,
        "LHB_STORE_DIRECT": STORE_DIRECT,
        "LHB_STORE_READ_ONLY": STORE_READ_ONLY,
        "LHB_PEER_OURS": PEER_OURS,
        "LHB_STORE_WRITE_ONLY": STORE_WRITE_ONLY,
        "LHB_UNIT_BYTES": UNIT_BYTES,
        "LHB_UNIT_MAP_BYTES": UNIT_MAP_BYTES,
        "LHB_VOLUME_READ_ONLY": VOLUME_READ_ONLY,
        "LHB_IO_FUA": IO_FUA,
        "LHB_IO_NO_HOLE": IO_NO_HOLE,
        "LHB_FUSE_WRITABLE": FUSE_WRITABLE,
        "LHB_FUSE_FUA": FUSE_FUA,
        "LHB_NBD_STRUCTURED": NBD_STRUCTURED,
        "LHB_NBD_BASE_ALLOCATION": NBD_BASE_ALLOCATION,
        "LHB_NBD_READ_ONLY": NBD_READ_ONLY,
        **{f"LHB_DRIVER_{member.name}": member.value for member in Driver},
        **{f"LHB_OP_{member.name}": member.value for member in Op},
        **{f"LHB_EVENT_{member.name}": member.value for member in EventType},
        **{f"LHB_CLOSE_{member.name}": member.value for member in CloseReason},
        **{f"LHB_MODE_{member.name}": member.value for member in StoreMode},
        **{f"LHB_PEER_END_{member.name}": member.value for member in PeerEnd},
    }
    for name, value in mirrored.items():
        native = getattr(lib, name)
        if native != value:
            raise ImportError(f"lhblock._lhblock was built from another source: {name} is {native}")
    return module


def _check(operation: str, result: int) -> int:
    if result < 0:
        raise NativeError(operation, -result)
    return result


def built_with_uring() -> bool:
    """Whether the extension was compiled with liburing."""
    return bool(_module().lib.lhb_built_with_uring())


def probe_uring() -> int:
    """Return 0 when io_uring works in this process, else the errno that says why not."""
    return -int(_module().lib.lhb_probe_uring())


def probe_fiemap(fd: int) -> int:
    """Return 0 when the file system of ``fd`` tells extents, else the errno. Blocking."""
    return -int(_module().lib.lhb_probe_fiemap(fd))


def crc64(data: Buffer, crc: int = 0) -> int:
    """CRC-64/ISO of ``data``, continuing from ``crc``."""
    module = _module()
    view = module.ffi.from_buffer(data)
    return int(module.lib.lhb_crc64(crc, view, len(view)))


def file_crc64(fd: int, offset_bytes: int, length_bytes: int, crc: int = 0) -> int:
    """CRC-64/ISO of a range of a file, holes read as zeros. Blocking."""
    module = _module()
    running = module.ffi.new("uint64_t *", crc)
    _check("checksum", module.lib.lhb_file_crc64(fd, offset_bytes, length_bytes, running))
    return int(running[0])


def next_extent(fd: int, offset_bytes: int) -> Extent | None:
    """The first data extent of a file at or after ``offset_bytes``; None: no more. Blocking."""
    module = _module()
    extent = module.ffi.new("struct lhb_extent *")
    count = _check("read extents", module.lib.lhb_file_extents(fd, offset_bytes, extent, 1))
    return Extent(extent.offset_bytes, extent.length_bytes) if count else None


def file_extents(fd: int, offset_bytes: int = 0) -> list[Extent]:
    """All data extents of a file at and after ``offset_bytes``, in order. Blocking.

    Unwritten and delayed extents count as data. The number of extents is bounded by the size of
    the file, which the caller knows.
    """
    lib = _module().lib
    return _all_extents(
        offset_bytes,
        lambda at, batch: _check("read extents", lib.lhb_file_extents(fd, at, batch, EXTENTS_MAX)),
    )


def _all_extents(offset_bytes: int, fetch: Callable[[int, Any], int]) -> list[Extent]:
    """Fetch extents at and after an offset until there are no more.

    Args:
      fetch: puts up to ``EXTENTS_MAX`` of them, at and after an offset, into an array.
    """
    batch = _module().ffi.new("struct lhb_extent[]", EXTENTS_MAX)
    extents: list[Extent] = []
    while True:
        count = fetch(offset_bytes, batch)
        extents += [Extent(batch[i].offset_bytes, batch[i].length_bytes) for i in range(count)]
        if count < EXTENTS_MAX:
            return extents
        offset_bytes = extents[-1].offset_bytes + extents[-1].length_bytes


def encode_activity(log_id: str, size_bytes: int) -> bytes:
    """The file of an activity log in which all is cold.

    Args:
      log_id: a UUID.
      size_bytes: of the volume.
    """
    module = _module()
    length_bytes = int(module.lib.lhb_activity_file_bytes(size_bytes))
    file = module.ffi.new("char[]", length_bytes)
    module.lib.lhb_activity_encode(_activity_id(log_id), size_bytes, file)
    return bytes(module.ffi.buffer(file, length_bytes))


def _activity_id(log_id: str) -> Any:
    return _module().ffi.new("uint8_t[]", uuid.UUID(log_id).bytes)


@dataclass(frozen=True)
class ActivityState:
    """What an activity log says beside its extents.

    Attributes:
      sequence: of its last transaction.
      coolings: transactions that turned extents cold.
      pages: how many the volume has.
      pages_lost: those that say nothing, so that all of their extents count as hot.
    """

    sequence: int
    coolings: int
    pages: int
    pages_lost: int


class ActivityMap:
    """The extents that are hot in any of some activity logs.

    Args:
      size_bytes: of the volume.
    """

    def __init__(self, size_bytes: int) -> None:
        module = _module()
        self._lib, self._ffi = module.lib, module.ffi
        self._size_bytes = size_bytes
        self._bits = module.ffi.new("uint64_t[]", module.lib.LHB_ACTIVITY_BITMAP_BYTES // 8)

    def add(self, file: bytes, log_id: str) -> ActivityState:
        """Add what the file of a log says; nothing in it is believed but pages of its id."""
        state = self._ffi.new("struct lhb_activity_state *")
        self._lib.lhb_activity_decode(
            self._ffi.from_buffer(file),
            len(file),
            _activity_id(log_id),
            self._size_bytes,
            self._bits,
            state,
        )
        return ActivityState(state.sequence, state.coolings, state.pages, state.pages_lost)

    def ranges(self) -> list[Extent]:
        """Hot ranges of the volume, in order, adjacent ones joined."""
        return _all_extents(
            0,
            lambda at, batch: self._lib.lhb_activity_ranges(
                self._bits, self._size_bytes, at, batch, EXTENTS_MAX
            ),
        )


def arm_fault(point: str, error: int, *, store_id: int = 0, skip: int = 0, times: int = 1) -> None:
    """Let ``times`` passes of a fault point fail with ``error`` after ``skip`` good ones."""
    result = _module().lib.lhb_fault_arm(point.encode(), error, store_id, skip, times)
    _check(f"arm fault point {point}", result)


def clear_faults() -> None:
    """Disarm every fault point (tests)."""
    _module().lib.lhb_fault_clear()


class _Handle(ABC):
    """One C object: closed once, refused after."""

    def __init__(self, handle: Any) -> None:
        self._raw: Any | None = handle

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._raw is None

    @property
    def raw(self) -> Any:
        """The C pointer; :class:`ValueError` after close."""
        if self._raw is None:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._raw

    def _take(self) -> Any | None:
        raw, self._raw = self._raw, None
        return raw

    @abstractmethod
    def close(self) -> None:
        """Release the C object. Blocking. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class NativeEngine(_Handle):
    """Queue threads, the worker pool and the event ring.

    Args:
      queues: queue threads, 1..64.
      workers: worker pool threads at most, 1..64.
      driver: forced or chosen by a probe.

    Raises:
      NativeError: the driver was forced and does not work, or threads cannot be had.
    """

    def __init__(self, *, queues: int, workers: int, driver: Driver) -> None:
        module = _module()
        self._lib = module.lib
        options = module.ffi.new("struct lhb_engine_options *")
        options.queues = queues
        options.workers_max = workers
        options.driver = int(driver)
        out = module.ffi.new("lhb_engine **")
        _check("start the I/O engine", module.lib.lhb_engine_open(options, out))
        self._event = module.ffi.new("struct lhb_event *")
        super().__init__(out[0])

    @property
    def driver(self) -> Driver:
        """What is in use: ``URING`` or ``POOL``."""
        return Driver(self._lib.lhb_engine_driver(self.raw))

    @property
    def queues(self) -> int:
        """How many queue threads there are."""
        return int(self._lib.lhb_engine_queues(self.raw))

    @property
    def event_fd(self) -> int:
        """Readable while the ring may hold events. The engine owns it."""
        return int(self._lib.lhb_engine_event_fd(self.raw))

    def next_event(self) -> Event | None:
        """Take the oldest event, or ``None``. Clear the event fd before, so no wake-up is lost."""
        event = self._event
        if _check("read events", self._lib.lhb_engine_next_event(self.raw, event)) == 0:
            return None
        return Event(
            event.type,
            event.error,
            event.volume_id,
            event.subject_id,
            event.offset_bytes,
            event.length_bytes,
        )

    def close(self) -> None:
        """Stop all threads. Blocking. Every volume and store was closed before."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_engine_close(raw)


class NativeStore(_Handle):
    """One replica directory opened for sector I/O.

    Args:
      engine: outlives the store.
      dir_fd: the directory; duplicated.
      size_bytes: of the volume.
      flags: ``STORE_DIRECT``, ``STORE_READ_ONLY``, ``STORE_WRITE_ONLY``.
    """

    def __init__(self, engine: NativeEngine, dir_fd: int, size_bytes: int, flags: int) -> None:
        module = _module()
        self._lib = module.lib
        out = module.ffi.new("lhb_store **")
        result = module.lib.lhb_store_open(engine.raw, dir_fd, size_bytes, flags, out)
        _check("open the store", result)
        super().__init__(out[0])
        self.id = int(self._lib.lhb_store_id(out[0]))

    def close(self) -> None:
        """Release files and the block map. No volume publishes the store any more."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_store_close(raw)

    def add_layer(self, image: str, discard: str) -> int:
        """Add the next newer layer and return its id. Blocking: reads the extent map."""
        result = self._lib.lhb_store_add_layer(self.raw, image.encode(), discard.encode())
        return _check(f"open layer {image}", result)

    def add_side_layer(self, image: str, discard: str) -> int:
        """Add a layer outside the live chain, to merge there; return its id. Blocking."""
        result = self._lib.lhb_store_add_side_layer(self.raw, image.encode(), discard.encode())
        return _check(f"open layer {image}", result)

    def start(self) -> None:
        """The chain is complete; the newest layer is the head unless the store is read-only."""
        _check("start the store", self._lib.lhb_store_start(self.raw))

    def prepare_head(self, image: str, discard: str) -> None:
        """Open the next head while I/O goes on. Blocking."""
        result = self._lib.lhb_store_prepare_head(self.raw, image.encode(), discard.encode())
        _check(f"open head {image}", result)

    def abandon_head(self) -> None:
        """Forget what :meth:`prepare_head` opened."""
        self._lib.lhb_store_abandon_head(self.raw)

    def commit_head(self, size_bytes: int) -> int:
        """Make the prepared file the head. The volume is frozen. Returns the new layer's id."""
        result = self._lib.lhb_store_commit_head(self.raw, size_bytes)
        return _check("switch the head", result)

    def rename_discard(self, layer: int, discard: str) -> None:
        """Tell where a layer's discard file is, or would be made, from now on."""
        result = self._lib.lhb_store_rename_discard(self.raw, layer, discard.encode())
        _check("rename a discard file", result)

    def sync(self) -> None:
        """fdatasync whatever is not on stable storage. Blocking."""
        _check("sync the store", self._lib.lhb_store_sync(self.raw))

    @property
    def map_bytes(self) -> int:
        """Memory of the block map."""
        return int(self._lib.lhb_store_map_bytes(self.raw))

    def merge_up(
        self,
        volume: NativeVolume | None,
        lower: int,
        upper: int,
        offset_bytes: int,
        length_bytes: int,
    ) -> int:
        """Move what ``upper`` lacks from ``lower`` into it. Blocking. Returns bytes copied."""
        result = self._lib.lhb_merge_up(
            _raw_or_null(volume), self.raw, lower, upper, offset_bytes, length_bytes
        )
        return _check("merge into the newer layer", result)

    def merge_down(self, lower: int, upper: int, offset_bytes: int, length_bytes: int) -> int:
        """Copy what ``upper`` has into ``lower``. Blocking. Returns bytes copied."""
        result = self._lib.lhb_merge_down(self.raw, lower, upper, offset_bytes, length_bytes)
        return _check("merge into the older layer", result)

    def merge_down_finish(self, lower: int, upper: int) -> None:
        """Make everything :meth:`merge_down` copied durable. Blocking."""
        result = self._lib.lhb_merge_down_finish(self.raw, lower, upper)
        _check("finish a merge into the older layer", result)

    def merge_prune(self, lower: int, upper: int, offset_bytes: int, length_bytes: int) -> int:
        """Free in ``lower`` what ``upper`` hides. Blocking. Returns bytes freed."""
        result = self._lib.lhb_merge_prune(self.raw, lower, upper, offset_bytes, length_bytes)
        return _check("free hidden blocks", result)

    def replace_layer(self, volume: NativeVolume | None, lower: int, upper: int) -> None:
        """After a merge down: ``upper`` is read from ``lower``'s file; ``lower`` is forgotten."""
        result = self._lib.lhb_store_replace_layer(_raw_or_null(volume), self.raw, lower, upper)
        _check("replace a merged layer", result)

    def drop_layer(self, volume: NativeVolume | None, lower: int) -> None:
        """Forget a layer from which nothing is read any more. Blocking."""
        result = self._lib.lhb_store_drop_layer(_raw_or_null(volume), self.raw, lower)
        _check("drop a merged layer", result)

    def reconcile_layer(
        self, layer: int, source: NativeStore, source_layer: int, ranges: Sequence[Extent]
    ) -> int:
        """Make a layer equal to one of ``source`` in some ranges. Neither serves. Blocking.

        Args:
          ranges: they begin and end at multiples of ``RANGE_STEP_BYTES``, or end at the end of the
            layer; what lies beyond it does not count.

        Returns:
          Bytes changed; when that is not 0 the block map is out of date: close and reopen.
        """
        array = _extents(ranges)
        result = self._lib.lhb_store_reconcile(
            source.raw, source_layer, self.raw, layer, array, len(ranges)
        )
        return _check("reconcile replicas", result)

    def begin_units(self, layer: int, size_bytes: int) -> None:
        """Make a frozen layer ready for :meth:`write_unit`, with this size. Blocking."""
        result = self._lib.lhb_unit_begin(self.raw, layer, size_bytes)
        _check("prepare a layer for its rebuild", result)

    def read_unit(self, layer: int, offset_bytes: int, unit: NativeUnit) -> int:
        """Read a piece of a frozen layer. Blocking. Returns the bytes of data it has."""
        result = self._lib.lhb_unit_read(self.raw, layer, offset_bytes, unit.raw)
        return _check(f"read a layer at {offset_bytes}", result)

    def write_unit(self, layer: int, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        """Make a frozen layer equal to a unit there. Blocking. Returns the bytes changed.

        Args:
          empty: it is known to have no data there.
        """
        result = self._lib.lhb_unit_write(self.raw, layer, offset_bytes, unit.raw, int(empty))
        return _check(f"write a layer at {offset_bytes}", result)

    def sync_units(self, layer: int) -> None:
        """Put what :meth:`write_unit` wrote on stable storage. Blocking."""
        _check("sync a layer", self._lib.lhb_unit_sync(self.raw, layer))


class NativeUnit(_Handle):
    """A megabyte of a layer in memory: which blocks it has, which it discarded, and the data."""

    def __init__(self) -> None:
        module = _module()
        self._lib = module.lib
        out = module.ffi.new("lhb_unit **")
        _check("allocate a unit", module.lib.lhb_unit_open(out))
        super().__init__(out[0])

    def close(self) -> None:
        """Release the memory."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_unit_close(raw)

    def hash(self, *, shape_only: bool = False) -> int:
        """Hash of what it says; of which blocks there are and are discarded with ``shape_only``."""
        return int(self._lib.lhb_unit_hash(self.raw, int(shape_only)))

    @property
    def maps(self) -> memoryview:
        """Two maps, which blocks it has and which it discarded; to be read, or written.

        Like :meth:`runs`, a view of its memory that must not outlive it.
        """
        return self._view(self._lib.lhb_unit_maps(self.raw), 2 * UNIT_MAP_BYTES)

    def runs(self) -> list[memoryview]:
        """The data of the blocks that it has according to its maps, in order, in few pieces."""
        data = self._view(self._lib.lhb_unit_data(self.raw), UNIT_BYTES)
        left = int.from_bytes(self.maps[:UNIT_MAP_BYTES], "little")
        runs, at = [], 0
        while left:
            skipped = (left & -left).bit_length() - 1
            left >>= skipped
            blocks = (~left & (left + 1)).bit_length() - 1
            left >>= blocks
            begin, at = at + skipped, at + skipped + blocks
            runs.append(data[begin * BLOCK_BYTES : at * BLOCK_BYTES])
        return runs

    def _view(self, start: Any, length_bytes: int) -> memoryview:
        return memoryview(_module().ffi.buffer(start, length_bytes)).cast("B")


class NativePeer(_Handle):
    """A replica of another process, as a store without files.

    Args:
      engine: outlives the peer.
      size_bytes: of the volume.
      flags: ``PEER_OURS`` if it knows the frames that only lhblock has.
      reply_timeout_ms: a request that gets no reply in this time ends the peer, 1..3600000.
    """

    def __init__(
        self, engine: NativeEngine, size_bytes: int, flags: int, reply_timeout_ms: int
    ) -> None:
        module = _module()
        self._lib = module.lib
        self._ffi = module.ffi
        out = module.ffi.new("lhb_store **")
        result = module.lib.lhb_peer_open(engine.raw, size_bytes, flags, reply_timeout_ms, out)
        _check("open the peer", result)
        super().__init__(out[0])
        self.id = int(self._lib.lhb_store_id(out[0]))

    def close(self) -> None:
        """Close its connections. Blocking. No volume publishes the peer any more."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_store_close(raw)

    def add_connection(self, queue: int, socket_fd: int) -> None:
        """Hand over a connected socket, past its hello, for the requests of one queue.

        Every queue of the engine needs one before the peer is published. On success the socket
        belongs to the core. On failure it is still the caller's.
        """
        result = self._lib.lhb_peer_add_connection(self.raw, queue, socket_fd)
        _check("add a connection to the peer", result)

    def resize(self, size_bytes: int) -> None:
        """Set the size. The volume is frozen, or the peer is not published."""
        _check("resize the peer", self._lib.lhb_peer_resize(self.raw, size_bytes))

    def statistics(self) -> PeerStatistics:
        """Totals since it was opened, and why it ended if it did."""
        raw = self._ffi.new("struct lhb_peer_statistics *")
        self._lib.lhb_peer_statistics(self.raw, raw)
        return PeerStatistics(*(int(getattr(raw, name)) for name in _PEER_STATISTICS_FIELDS))


class NativeVolume(_Handle):
    """A replica set behind one range table.

    Args:
      engine: outlives the volume.
      size_bytes: a multiple of ``BLOCK_BYTES``.
      flags: ``VOLUME_READ_ONLY``.
    """

    def __init__(self, engine: NativeEngine, size_bytes: int, flags: int) -> None:
        module = _module()
        self._lib = module.lib
        self._ffi = module.ffi
        out = module.ffi.new("lhb_volume **")
        result = module.lib.lhb_volume_open(engine.raw, size_bytes, flags, out)
        _check("open the volume", result)
        super().__init__(out[0])
        self.id = int(self._lib.lhb_volume_id(out[0]))

    def close(self) -> None:
        """Close the connections and wait for what is in flight. Blocking. Stores stay open."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_volume_close(raw)

    def publish(
        self,
        stores: Sequence[NativeStore | NativePeer],
        modes: Sequence[StoreMode] | None = None,
    ) -> None:
        """Set the stores. Before the first request, or frozen.

        Args:
          stores: of the volume's size.
          modes: what each of them is used for; at least one is RW. By default all are.

        Raises:
          NativeError: ENOTCONN when a peer has ended, or lacks a connection of some queue. The set
            is what it was.
        """
        if modes is None:
            modes = [StoreMode.RW] * len(stores)
        if len(modes) != len(stores):
            raise ValueError(f"{len(stores)} stores, but {len(modes)} modes")
        array = self._ffi.new("lhb_store *[]", [store.raw for store in stores])
        numbers = self._ffi.new("uint32_t[]", [int(mode) for mode in modes])
        result = self._lib.lhb_volume_publish(self.raw, array, numbers, len(stores))
        _check("publish the replica set", result)

    def freeze(self) -> None:
        """Wait for all I/O in flight and keep new I/O waiting. Blocking."""
        _check("freeze I/O", self._lib.lhb_volume_freeze(self.raw))

    def thaw(self) -> None:
        """Let I/O go on."""
        self._lib.lhb_volume_thaw(self.raw)

    def resize(self, size_bytes: int) -> None:
        """Set the size. The volume is frozen."""
        _check("resize the volume", self._lib.lhb_volume_resize(self.raw, size_bytes))

    @property
    def size_bytes(self) -> int:
        """What connections are told."""
        return int(self._lib.lhb_volume_size_bytes(self.raw))

    def gate_flushes(self, shut: bool) -> None:
        """While shut, FLUSH and FUA wait."""
        self._lib.lhb_volume_gate_flushes(self.raw, int(shut))

    def give_up(self) -> None:
        """End with EIO what waits for a fence or for the gate, and every request from now on."""
        self._lib.lhb_volume_give_up(self.raw)

    def fenced(self, store_id: int) -> None:
        """The failed store is named stale on stable storage: release what waits for that."""
        _check("release fenced requests", self._lib.lhb_volume_fenced(self.raw, store_id))

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read through the same path as NBD, any alignment. Blocking."""
        buffer = bytearray(length_bytes)
        self._io(Op.READ, 0, offset_bytes, length_bytes, self._ffi.from_buffer(buffer))
        return bytes(buffer)

    def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        """Write through the same path as NBD, any alignment. Blocking."""
        view = self._ffi.from_buffer(data)
        self._io(Op.WRITE, IO_FUA if fua else 0, offset_bytes, len(view), view)

    def flush(self) -> None:
        """Put every completed write on stable storage. Blocking."""
        self._io(Op.FLUSH, 0, 0, 0, self._ffi.NULL)

    def trim(self, offset_bytes: int, length_bytes: int, *, fua: bool = False) -> None:
        """Discard a range; it reads as zeros afterwards. Blocking."""
        flags = IO_FUA if fua else 0
        self._io(Op.TRIM, flags, offset_bytes, length_bytes, self._ffi.NULL)

    def zero(
        self, offset_bytes: int, length_bytes: int, *, no_hole: bool = False, fua: bool = False
    ) -> None:
        """Write zeros, by a hole where that is allowed. Blocking."""
        flags = (IO_NO_HOLE if no_hole else 0) | (IO_FUA if fua else 0)
        self._io(Op.ZERO, flags, offset_bytes, length_bytes, self._ffi.NULL)

    def _io(self, op: Op, flags: int, offset_bytes: int, length_bytes: int, data: Any) -> None:
        result = self._lib.lhb_volume_io(self.raw, int(op), flags, offset_bytes, length_bytes, data)
        where = "" if op is Op.FLUSH else f" of {length_bytes} bytes at {offset_bytes}"
        _check(f"{op.name.lower()}{where}", result)

    def block_status(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """(length in bytes, NBD state flags) pairs from ``offset_bytes`` on; may stop early."""
        pairs = self._ffi.new("uint32_t[]", 2 * STATUS_PAIRS_MAX)
        count = _check(
            "read block status",
            self._lib.lhb_volume_block_status(
                self.raw, offset_bytes, length_bytes, pairs, STATUS_PAIRS_MAX
            ),
        )
        return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]

    def track(self, store_id: int = 0) -> int:
        """Record changes for a replica that is away; return the tracker's id, which is the store's.

        A store that the core drops is tracked by itself; this is for one that Python takes out of
        the set. With 0 it is a new id. Nothing has changed at first: what the store acknowledged,
        and may have lost with its host, is not in it.
        """
        out = self._ffi.new("uint64_t *")
        _check("track changes", self._lib.lhb_volume_track(self.raw, store_id, out))
        return int(out[0])

    def untrack(self, tracker_id: int) -> None:
        """The replica is back. ``NativeError`` (ENOENT) if it was not tracked."""
        _check("end tracking", self._lib.lhb_volume_untrack(self.raw, tracker_id))

    def dirty_extents(self, tracker_id: int, offset_bytes: int = 0) -> list[Extent] | None:
        """What changed at and after ``offset_bytes`` since the replica left, in order.

        Returns:
          Granules of ``DIRTY_GRANULE_BYTES``, adjacent ones joined; None when the replica is not
          tracked, and everything counts as changed.
        """

        def fetch(at: int, batch: Any) -> int:
            count = self._lib.lhb_dirty_extents(self.raw, tracker_id, at, batch, EXTENTS_MAX)
            return _check("read a dirty map", count)

        try:
            return _all_extents(offset_bytes, fetch)
        except NativeError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def mark_dirty(self, tracker_id: int, offset_bytes: int, length_bytes: int) -> None:
        """Count every granule that a range touches as changed."""
        result = self._lib.lhb_dirty_mark(self.raw, tracker_id, offset_bytes, length_bytes)
        _check("mark changes", result)

    def clear_dirty(self, tracker_id: int, offset_bytes: int, length_bytes: int) -> None:
        """Count the granules inside a range as equal, until they change again.

        Clear a range first and compare it then: a change that ends in between is kept.
        """
        result = self._lib.lhb_dirty_clear(self.raw, tracker_id, offset_bytes, length_bytes)
        _check("clear changes", result)

    def start_activity(self, log_id: str) -> None:
        """Record changes in the activity log from now on. Before the first request.

        Args:
          log_id: that of the empty logs in the directories of the stores.
        """
        result = self._lib.lhb_volume_activity_start(self.raw, _activity_id(log_id))
        _check("start the activity log", result)

    def write_activity(self) -> None:
        """Let every store that is published have the whole activity log. Blocking."""
        _check("write the activity log", self._lib.lhb_volume_activity_write(self.raw))

    def cool_activity(self) -> int:
        """Flush, and let extents turn cold that were not changed since the last call. Blocking.

        Returns:
          How many.
        """
        return _check("flush for the activity log", self._lib.lhb_volume_activity_cool(self.raw))

    @property
    def hot_extents(self) -> int:
        """Extents of ``ACTIVITY_EXTENT_BYTES`` that a crash now would have compared."""
        return int(self._lib.lhb_volume_activity_hot(self.raw))

    def statistics(self) -> NativeStatistics:
        """Totals since the volume was opened."""
        raw = self._ffi.new("struct lhb_statistics *")
        self._lib.lhb_volume_statistics(self.raw, raw)
        return NativeStatistics(*(int(getattr(raw, name)) for name in _STATISTICS_FIELDS))

    def close_connection(self, connection_id: int) -> None:
        """Ask a connection to end; its event follows. ``NativeError`` if it ended already."""
        result = self._lib.lhb_connection_close(self.raw, connection_id)
        _check("close a connection", result)

    def attach(self, socket_fd: int, flags: int, base_allocation_id: int) -> int:
        """Hand over a socket past its handshake; returns the connection id.

        On success the socket belongs to the core. On failure it is still the caller's.
        """
        out = self._ffi.new("uint64_t *")
        result = self._lib.lhb_nbd_attach(self.raw, socket_fd, flags, base_allocation_id, out)
        _check("attach a connection", result)
        return int(out[0])

    def attach_replica(self, socket_fd: int) -> int:
        """Hand over the data connection of an engine to this replica; as :meth:`attach`."""
        out = self._ffi.new("uint64_t *")
        result = self._lib.lhb_replica_attach(self.raw, socket_fd, out)
        _check("attach a data connection", result)
        return int(out[0])


class NativeFuse(_Handle):
    """The relay between ``/dev/fuse`` and a file-system server.

    Args:
      engine: outlives the relay; it has one.
      kernel_fd: ``/dev/fuse`` of a mount.
      server_fd: a ``SOCK_SEQPACKET`` socket whose peer the server takes for ``/dev/fuse``. Both
        descriptors belong to the relay from now on.

    Raises:
      NativeError: EBUSY when the engine has one; both are still the caller's.
    """

    def __init__(self, engine: NativeEngine, kernel_fd: int, server_fd: int) -> None:
        module = _module()
        self._lib = module.lib
        out = module.ffi.new("lhb_fuse **")
        result = module.lib.lhb_fuse_open(engine.raw, kernel_fd, server_fd, out)
        _check("relay a mount", result)
        super().__init__(out[0])

    @property
    def fd(self) -> int:
        """Readable for good when the kernel has ended the mount. This object owns it."""
        return int(self._lib.lhb_fuse_fd(self.raw))

    def add_file(self, handle: int, volume: NativeVolume, *, writable: bool, fua: bool) -> None:
        """Answer I/O of a file from now on.

        Raises:
          NativeError: EMFILE when too many are open.
        """
        flags = (FUSE_WRITABLE if writable else 0) | (FUSE_FUA if fua else 0)
        _check("open", self._lib.lhb_fuse_add_file(self.raw, handle, volume.raw, flags))

    def remove_file(self, handle: int) -> None:
        """Answer it no more. Blocking: its requests end first."""
        self._lib.lhb_fuse_remove_file(self.raw, handle)

    def close(self) -> None:
        """Answer what is in progress and read no more. Blocking."""
        raw = self._take()
        if raw is not None:
            self._lib.lhb_fuse_close(raw)


def _extents(ranges: Sequence[Extent]) -> Any:
    array = _module().ffi.new("struct lhb_extent[]", len(ranges))
    for index, each in enumerate(ranges):
        array[index].offset_bytes = each.offset_bytes
        array[index].length_bytes = each.length_bytes
    return array


def _raw_or_null(volume: NativeVolume | None) -> Any:
    return _module().ffi.NULL if volume is None else volume.raw
