"""Open files of a FUSE mount whose I/O never comes to Python (docs/internals/fuse.md)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lhblock._native import NativeEngine, NativeFuse
from lhblock.engine._device import Device
from lhblock.engine._threads import run_io
from lhblock.errors import NativeError, NotServing


class Relay:
    """A mount. Use :meth:`Engine.open_relay`."""

    def __init__(self, native: NativeFuse) -> None:
        self._native = native

    async def ended(self) -> None:
        """Wait until somebody has unmounted it. Cancelled: nothing changes."""
        await trio.lowlevel.wait_readable(self._native.fd)

    @asynccontextmanager
    async def serve(
        self, handle: int, device: Device, *, writable: bool, fua: bool
    ) -> AsyncIterator[None]:
        """Answer I/O of a file for the block, from before the kernel is told its handle.

        Raises:
          NotServing: the device is being closed.
          NativeError: EMFILE when too many files are open.
        """
        if device.native.closed:
            raise NotServing(device.name, "is being closed; try again when it is back")
        self._native.add_file(handle, device.native, writable=writable, fua=fua)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await run_io(self._native.remove_file, handle)


@asynccontextmanager
async def open_relay(engine: NativeEngine, kernel_fd: int, server_fd: int) -> AsyncIterator[Relay]:
    """See :meth:`Engine.open_relay`."""
    try:
        native = NativeFuse(engine, kernel_fd, server_fd)
    except NativeError:
        os.close(kernel_fd)
        os.close(server_fd)
        raise
    try:
        yield Relay(native)
    finally:
        with trio.CancelScope(shield=True):
            await run_io(native.close)
