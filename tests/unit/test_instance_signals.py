"""Stopping: the first signal asks, the second ends the process at once."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from lhblock.instance import _signals

TIMEOUT_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_second_signal_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    ended: list[int] = []
    gone = trio.Event()

    def leave(status: int) -> None:
        ended.append(status)
        gone.set()

    monkeypatch.setattr(os, "_exit", leave)
    stop = trio.CancelScope()
    stopping = trio.Event()

    async def work() -> None:
        with stop:
            await trio.sleep_forever()
        stopping.set()

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await nursery.start(_signals.watch_signals, stop)
            os.kill(os.getpid(), number)
            await stopping.wait()
            assert ended == []
            os.kill(os.getpid(), number)
            await gone.wait()
            nursery.cancel_scope.cancel()
    assert ended == [128 + number]
