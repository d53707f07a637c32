"""Where blocking calls run, with a bound for each kind.

Three kinds are apart because they wait for each other: a request of the control path may wait for a
fence, and so may a freeze. If the fence had to wait for one of their threads, nobody would move.
The fourth copies for rebuilds, for hours, and must not hold up the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio
from trio.lowlevel import RunVar

T = TypeVar("T")

METADATA_THREADS_MAX: Final = 16
IO_THREADS_MAX: Final = 64
FENCE_THREADS_MAX: Final = 8
COPY_THREADS_MAX: Final = 8

_metadata: RunVar[trio.CapacityLimiter] = RunVar("lhblock.engine.metadata")
_io: RunVar[trio.CapacityLimiter] = RunVar("lhblock.engine.io")
_fence: RunVar[trio.CapacityLimiter] = RunVar("lhblock.engine.fence")
_copy: RunVar[trio.CapacityLimiter] = RunVar("lhblock.engine.copy")


def _limiter(variable: RunVar[trio.CapacityLimiter], total: int) -> trio.CapacityLimiter:
    try:
        return variable.get()
    except LookupError:
        limiter = trio.CapacityLimiter(total)
        variable.set(limiter)
        return limiter


async def run_metadata(function: Callable[..., T], *args: Any) -> T:
    """Run a call that reads or writes metadata or walks layers; it never waits for a fence.

    Cancelled before the thread starts: nothing was done. After that the call runs to its end.
    """
    limiter = _limiter(_metadata, METADATA_THREADS_MAX)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


async def run_io(function: Callable[..., T], *args: Any) -> T:
    """Run a call that goes through the request path, where it may wait for a fence.

    Cancelled before the thread starts: nothing was done. After that the call runs to its end.
    """
    limiter = _limiter(_io, IO_THREADS_MAX)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


async def run_fence(function: Callable[..., T], *args: Any) -> T:
    """Run a call that a fence consists of.

    Cancelled before the thread starts: nothing was done. After that the call runs to its end.
    """
    limiter = _limiter(_fence, FENCE_THREADS_MAX)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)


async def run_copy(function: Callable[..., T], *args: Any) -> T:
    """Run a call that copies or hashes data of a rebuild; it never waits for a fence.

    Cancelled before the thread starts: nothing was done. After that the call runs to its end.
    """
    limiter = _limiter(_copy, COPY_THREADS_MAX)
    return await trio.to_thread.run_sync(function, *args, limiter=limiter)
