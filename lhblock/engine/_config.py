"""What a caller says about an engine and a volume before they are opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from lhblock._native import BLOCK_BYTES, STORES_MAX
from lhblock.engine._limits import SnapshotLimits
from lhblock.errors import SizeError, UsageError
from lhblock.settings import QUORUM_WAIT_S, REBUILD_STREAMS, RemoteAddress

DriverChoice: TypeAlias = Literal["auto", "io_uring", "pool"]
CacheMode: TypeAlias = Literal["writeback", "none"]

QUEUES_MAX = 64
WORKERS_MAX = 64
STREAMS_MAX = 8
SIZE_BYTES_MAX = 1 << 50  # beyond this a file offset times a few factors gets close to 2**63

_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class EngineOptions:
    """How a process does its disk I/O.

    Attributes:
      queues: queue threads, 1..64. Connections are spread over them.
      workers: threads at most for I/O that would stall a queue, 1..64.
      driver: ``auto`` takes io_uring where a probe says that it works.

    Raises:
      UsageError: a value is out of range.
    """

    queues: int = 2
    workers: int = 16
    driver: DriverChoice = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.queues <= QUEUES_MAX:
            raise UsageError(f"{self.queues} queues: choose 1 to {QUEUES_MAX}")
        if not 1 <= self.workers <= WORKERS_MAX:
            raise UsageError(f"{self.workers} workers: choose 1 to {WORKERS_MAX}")
        if self.driver not in ("auto", "io_uring", "pool"):
            raise UsageError(f"driver {self.driver!r}: choose auto, io_uring or pool")


@dataclass(frozen=True)
class RebuildOptions:
    """How replicas are rebuilt.

    Attributes:
      automatic: replicas of this volume that were away, or failed, are brought back unasked.
      rate_bytes_s: at most so much is compared and copied in a second; 0 is no limit.
      streams: units under way at a time, 1..8.

    Raises:
      UsageError: a value is out of range.
    """

    automatic: bool = False
    rate_bytes_s: int = 0
    streams: int = REBUILD_STREAMS

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= STREAMS_MAX:
            raise UsageError(f"{self.streams} rebuild streams: choose 1 to {STREAMS_MAX}")
        if self.rate_bytes_s < 0:
            raise UsageError(f"rebuild rate {self.rate_bytes_s}: choose 0 or more bytes a second")


@dataclass(frozen=True)
class RemoteLimits:
    """How long an engine waits for a replica of another process.

    Attributes:
      reply_timeout_ms: a read or write without an answer for so long ends the replica, 1000 or
        more.
      connect_timeout_s: for a data connection.
      call_timeout_s: for a call that something waits for: a generation, the switch of a head.
      long_timeout_s: for a call that reads or syncs what may be much.
      unit_timeout_s: for a unit of a rebuild.
      ping_s: how often a process is asked whether it is there while a call goes on; one that does
        not answer for as long again is gone.

    Raises:
      UsageError: a value is out of range.
    """

    reply_timeout_ms: int = 8000
    connect_timeout_s: float = 5.0
    call_timeout_s: float = 8.0
    long_timeout_s: float = 900.0
    unit_timeout_s: float = 60.0
    ping_s: float = 4.0

    def __post_init__(self) -> None:
        if not 1000 <= self.reply_timeout_ms <= 3_600_000:
            raise UsageError(
                f"reply time-out {self.reply_timeout_ms} ms: choose 1000 to 3600000 milliseconds"
            )
        times = (self.connect_timeout_s, self.call_timeout_s, self.long_timeout_s)
        if min(*times, self.unit_timeout_s, self.ping_s) <= 0:
            raise UsageError("time-outs are longer than 0 s")


@dataclass(frozen=True)
class VolumeConfig:
    """A volume to open.

    Attributes:
      name: for messages and events; 1 to 64 of letters, digits, ``.``, ``_``, ``-``.
      replicas: 1 to 8 replica directories, which exist, or addresses of replica processes.
      size_bytes: what the caller expects, or None to take what the replicas say.
      cache: ``writeback`` uses the page cache; ``none`` opens files with O_DIRECT.
      read_only: opens directories with a shared lock and writes nothing, metadata included.
      limits: of the snapshots.
      rebuild: how replicas are rebuilt.
      remote: how long to wait for replica processes.
      quorum_wait_s: how long I/O waits for lost replicas of a volume of three and more when a
        majority is lost at once.
      force: open it although too few replicas are there to know that they are the newest; what
        the others have that these have not is given up.

    Raises:
      UsageError: a value that cannot be.
    """

    name: str
    replicas: Sequence[Path | RemoteAddress]
    size_bytes: int | None = None
    cache: CacheMode = "writeback"
    read_only: bool = False
    limits: SnapshotLimits = field(default_factory=SnapshotLimits)
    rebuild: RebuildOptions = field(default_factory=RebuildOptions)
    remote: RemoteLimits = field(default_factory=RemoteLimits)
    quorum_wait_s: float = QUORUM_WAIT_S
    force: bool = False

    def __post_init__(self) -> None:
        check_volume_name(self.name)
        if not 1 <= len(self.replicas) <= STORES_MAX:
            raise UsageError(
                f"volume {self.name}: {len(self.replicas)} replicas; give 1 to {STORES_MAX}"
            )
        if self.cache not in ("writeback", "none"):
            raise UsageError(f"cache mode {self.cache!r}: choose writeback or none")
        seen: set[Path | RemoteAddress] = set()
        for place in self.replicas:
            key = place.absolute() if isinstance(place, Path) else place
            if key in seen:
                raise UsageError(f"volume {self.name}: replica {place} is given twice")
            seen.add(key)
        if self.size_bytes is not None:
            check_size(self.name, self.size_bytes)


def check_volume_name(name: str) -> None:
    """Refuse a name that could not be an export name, a file name and a word in a message.

    Raises:
      UsageError: with the rule.
    """
    if not _VOLUME_NAME.fullmatch(name):
        raise UsageError(
            f"volume name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )


def check_size(volume: str, size_bytes: int) -> None:
    """Refuse a size that no volume can have.

    Raises:
      SizeError: with the bounds.
    """
    if size_bytes % BLOCK_BYTES != 0:
        raise SizeError(volume, f"size {size_bytes} is not a multiple of {BLOCK_BYTES} bytes")
    if not BLOCK_BYTES <= size_bytes <= SIZE_BYTES_MAX:
        raise SizeError(
            volume, f"size {size_bytes} is not between {BLOCK_BYTES} and {SIZE_BYTES_MAX} bytes"
        )
