"""How fast a rebuild may go: a rate that was asked for, and what clients can bear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

SAMPLE_INTERVAL_S: Final = 0.2
"""Latency of clients is looked at this often."""
LATENCY_FACTOR: Final = 3.0
"""A rebuild slows down when requests take this much longer than at the best of times."""
LATENCY_FLOOR_S: Final = 0.002
"""Requests faster than this are fast enough, whatever they were before."""
PAUSE_MIN_S: Final = 0.002
PAUSE_MAX_S: Final = 0.25
"""Pause of one stream between two batches, at the least and at the most: it never stops."""


class Throttle:
    """Paces the streams of one rebuild.

    Args:
      rate_bytes_s: of all streams together; 0 is no limit.
      foreground: totals of the clients' requests so far: how many, and their summed latency in
        nanoseconds.
    """

    def __init__(self, rate_bytes_s: int, foreground: Callable[[], tuple[int, int]]) -> None:
        self._rate_bytes_s = rate_bytes_s
        self._foreground = foreground
        self._free_s = trio.current_time()
        self._sampled_s = trio.current_time()
        self._count, self._sum_ns = foreground()
        self._best_s: float | None = None
        self.pause_s = 0.0

    async def admit(self, length_bytes: int) -> None:
        """Wait until so much may be copied. Cancelled: the time is spent all the same."""
        now_s = trio.current_time()
        self._sample(now_s)
        wait_s = self.pause_s
        if self._rate_bytes_s:
            # A stream that was late does not save up: at most one interval of it.
            self._free_s = max(self._free_s, now_s - SAMPLE_INTERVAL_S)
            self._free_s += length_bytes / self._rate_bytes_s
            wait_s = max(wait_s, self._free_s - now_s)
        await trio.sleep(max(0.0, wait_s))

    def _sample(self, now_s: float) -> None:
        if now_s - self._sampled_s < SAMPLE_INTERVAL_S:
            return
        count, sum_ns = self._foreground()
        requests, spent_ns = count - self._count, sum_ns - self._sum_ns
        self._sampled_s, self._count, self._sum_ns = now_s, count, sum_ns
        if requests <= 0:
            self.pause_s = 0.0
            return
        latency_s = spent_ns / requests / 1e9
        self._best_s = latency_s if self._best_s is None else min(self._best_s, latency_s)
        if latency_s > max(LATENCY_FLOOR_S, LATENCY_FACTOR * self._best_s):
            self.pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * self.pause_s))
        else:
            self.pause_s = self.pause_s / 2 if self.pause_s > PAUSE_MIN_S else 0.0
