"""SIGINT and SIGTERM: once to stop cleanly, twice to stop at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable

import structlog
import trio

from lhblock.instance._notify import Notifier

_log = structlog.get_logger("lhblock.instance")


async def run_until_signal(work: Callable[[], Awaitable[None]]) -> None:
    """Run a process's work until it ends or a signal cancels it. Its errors are raised as they
    are, and not in a group.

    Cancelled: as after a signal.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        stop = trio.CancelScope()
        await nursery.start(watch_signals, stop)
        try:
            with stop:
                await work()
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def watch_signals(
    stop: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel `stop` at the first SIGINT or SIGTERM; end the process at the second.

    Cancelled: the signals do what they did before.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        asked = False
        async for number in signals:
            name = signal.Signals(number).name
            if asked:
                # What was acknowledged as flushed is safe; the next start cleans up the rest.
                _log.warning("stopping at once", signal=name)
                sys.stderr.flush()
                os._exit(128 + number)
            asked = True
            _log.info("stopping; once more to stop at once", signal=name)
            Notifier().stopping()
            stop.cancel()
