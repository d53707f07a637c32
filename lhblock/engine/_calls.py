"""Requests of a front end that is written in Python, many at a time and without threads.

A thread for every request would cost more than the request: it is handed to a queue of the core
from the trio thread, which waits for it for a moment, because what the page cache answers is there
before a task could be switched. What takes longer goes on by itself, and an eventfd wakes the task.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import outcome
import trio

from lhblock._native import CALL_IN_PLACE, IO_FUA, Buffer, NativeCalls, Op
from lhblock.engine._device import Device
from lhblock.errors import NativeError, NotServing

# A page-cache hit takes some 10 us with its two wake-ups. Waiting longer would only keep
# other requests from being started.
WAIT_NS: Final = 50_000


class Calls:
    """Requests in flight. Use :meth:`Engine.open_calls`.

    Every method raises :class:`NativeError` with the errno of a request that failed, and
    :class:`NotServing` when the device was closed. None can be cancelled: the request ends first,
    because the memory is the core's until then.
    """

    def __init__(self, native: NativeCalls) -> None:
        self._native = native
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._last_tag = 0

    async def read(self, device: Device, offset_bytes: int, buffer: Buffer) -> None:
        """Fill a writable, block-aligned buffer."""
        await self._call(device, Op.READ, CALL_IN_PLACE, offset_bytes, len(buffer), buffer)

    async def write(
        self, device: Device, offset_bytes: int, data: Buffer, *, fua: bool = False
    ) -> None:
        """Write from memory anywhere; with `fua`, to stable storage."""
        flags = (IO_FUA if fua else 0) | (0 if device.direct else CALL_IN_PLACE)
        await self._call(device, Op.WRITE, flags, offset_bytes, len(data), data)

    async def flush(self, device: Device) -> None:
        """Put every completed write on stable storage of every replica."""
        await self._call(device, Op.FLUSH, 0, 0, 0, None)

    async def _call(
        self,
        device: Device,
        op: Op,
        flags: int,
        offset_bytes: int,
        length_bytes: int,
        data: Buffer | None,
    ) -> None:
        if device.native.closed:
            raise NotServing(device.name, "is being closed; try again when it is back")
        self._last_tag = tag = self._last_tag + 1
        if self._native.start(
            device.native, op, flags, offset_bytes, length_bytes, data, tag, WAIT_NS
        ):
            return
        self._waiting[tag] = trio.lowlevel.current_task()
        error = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if error:
            raise NativeError(op.name.lower(), error)

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._native.fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._native.fd)
            while (ended := self._native.next()) is not None:
                tag, error = ended
                trio.lowlevel.reschedule(self._waiting.pop(tag), outcome.Value(error))


@asynccontextmanager
async def open_calls(calls_max: int) -> AsyncIterator[Calls]:
    """See :meth:`Engine.open_calls`."""
    with NativeCalls(calls_max) as native:
        calls = Calls(native)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls._run)
            # Errors of the caller's block are raised as they are, not in a group.
            try:
                yield calls
            except Exception as error:
                failure = error
            assert not calls._waiting
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
