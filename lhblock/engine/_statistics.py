"""Totals of a volume, and rates computed from two samples of them."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from lhblock._native import NativeStatistics

METRICS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class VolumeStatistics:
    """Totals since the volume was opened.

    Attributes:
      io: requests, bytes, latencies and counters of the native core.
      snapshot_pause_ns_last: how long I/O was paused by the last snapshot, expansion or revert.
      out_of_space: times a write found no space on any replica.
      replicas_failed: replicas dropped since the volume was opened.
    """

    io: NativeStatistics
    snapshot_pause_ns_last: int
    out_of_space: int
    replicas_failed: int


@dataclass(frozen=True)
class VolumeMetrics:
    """Rates over the last completed interval, which is at least a second long.

    Attributes:
      interval_s: how long the interval was; 0 before the first is complete.
      read_bytes_s: bytes read per second.
      write_bytes_s: bytes written per second.
      read_iops: reads per second.
      write_iops: writes per second.
      read_latency_ns: mean of the reads, 0 if there were none.
      write_latency_ns: mean of the writes, 0 if there were none.
    """

    interval_s: float = 0.0
    read_bytes_s: float = 0.0
    write_bytes_s: float = 0.0
    read_iops: float = 0.0
    write_iops: float = 0.0
    read_latency_ns: int = 0
    write_latency_ns: int = 0


class MetricsSampler:
    """Computes rates when asked, so an idle volume needs no ticking task.

    Each call compares the totals with those of the last call that completed an interval. A caller
    that asks once a second gets the last second; one that asks after a minute gets that minute's
    mean. Two callers share the intervals, and both see complete ones.
    """

    def __init__(self, totals: NativeStatistics) -> None:
        self._since_s = trio.current_time()
        self._totals = totals
        self._last = VolumeMetrics()

    def sample(self, totals: NativeStatistics) -> VolumeMetrics:
        """Return the rates of the last completed interval, completing one if it is time."""
        now_s = trio.current_time()
        interval_s = now_s - self._since_s
        if interval_s < METRICS_INTERVAL_S:
            return self._last
        old = self._totals
        reads = totals.reads - old.reads
        writes = totals.writes - old.writes
        self._last = VolumeMetrics(
            interval_s=interval_s,
            read_bytes_s=(totals.read_bytes - old.read_bytes) / interval_s,
            write_bytes_s=(totals.write_bytes - old.write_bytes) / interval_s,
            read_iops=reads / interval_s,
            write_iops=writes / interval_s,
            read_latency_ns=(totals.read_ns - old.read_ns) // reads if reads else 0,
            write_latency_ns=(totals.write_ns - old.write_ns) // writes if writes else 0,
        )
        self._since_s, self._totals = now_s, totals
        return self._last
