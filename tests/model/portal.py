"""Trio in a thread of its own, for tests that are driven from outside of it."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import trio

T = TypeVar("T")

START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0  # what is called has shorter limits of its own

Job = tuple[Callable[..., Awaitable[Any]], tuple[Any, ...], "Future[Any]"]


class Portal:
    """Calls async functions one after the other in one task.

    So a context that one call enters may be left by a later one.
    """

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Job](1)
        self._started: Future[trio.lowlevel.TrioToken] = Future()
        self._current: Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="portal", daemon=True)
        self._thread.start()
        self._token = self._started.result(START_TIMEOUT_S)

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Wait for the result, or raise what the function raised."""
        future: Future[T] = Future()
        self._current = future
        job = (function, arguments, future)
        self._token.run_sync_soon(self._send.send_nowait, job)
        return future.result(CALL_TIMEOUT_S)

    def close(self) -> None:
        """End the thread. Contexts that are still open are not left."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._send.close)
            self._thread.join(CALL_TIMEOUT_S)

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            # A task of an open context failed and took this one with it.
            if self._current is not None and not self._current.done():
                self._current.set_exception(error)

    async def _serve(self) -> None:
        self._started.set_result(trio.lowlevel.current_trio_token())
        async for function, arguments, future in self._receive:
            try:
                result = await function(*arguments)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
