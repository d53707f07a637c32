"""The engine: one set of queue threads for all volumes of a process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import structlog
import trio

from lhblock._native import Driver, NativeEngine, built_with_uring, probe_uring
from lhblock.engine._config import EngineOptions, VolumeConfig
from lhblock.engine._device import Device
from lhblock.engine._relay import Relay, open_relay
from lhblock.engine._threads import run_metadata
from lhblock.errors import LhblockError, NativeError

from ._volume import Volume, open_volume

log = structlog.get_logger(__name__)

_DRIVERS = {"auto": Driver.AUTO, "io_uring": Driver.URING, "pool": Driver.POOL}


class Engine:
    """Queue threads, and one task that hands their events to volumes.

    Use :func:`open_engine`.

    Attributes:
      driver: ``io_uring`` or ``pool``: how disk I/O that may wait is done.
      driver_reason: why, in one phrase for people.
    """

    def __init__(self, native: NativeEngine, driver_reason: str) -> None:
        self._native = native
        self._devices: dict[int, Device] = {}
        self.driver = "io_uring" if native.driver is Driver.URING else "pool"
        self.driver_reason = driver_reason

    @property
    def native(self) -> NativeEngine:
        """The C engine, for the parts of this package."""
        return self._native

    def open_volume(self, config: VolumeConfig) -> AbstractAsyncContextManager[Volume]:
        """Open a volume's replicas and serve it until the block is left.

        Unusable replicas among good ones are left out, and the good ones say so on stable storage
        before anything is served. Leaving the block closes the connections, stops merges at their
        next step, and closes the replicas cleanly.

        Raises:
          VolumeFaulted: no replica is usable; the sentence lists why.
          VolumeBusy: another process has a replica open.
          SizeError: ``config.size_bytes`` is not what the replicas say.

        Cancelled while opening: everything opened so far is closed again.
        """
        return open_volume(self, config)

    def open_relay(self, kernel_fd: int, server_fd: int) -> AbstractAsyncContextManager[Relay]:
        """Answer I/O of files of a mount for the block, and pass the rest to a server.

        Args:
          kernel_fd: ``/dev/fuse`` of the mount.
          server_fd: a ``SOCK_SEQPACKET`` socket whose peer the server takes for ``/dev/fuse``.
            Both belong to the relay from now on.

        Raises:
          NativeError: EBUSY when this engine has a relay; both are closed.

        Cancelled: the block is; requests end first.
        """
        return open_relay(self._native, kernel_fd, server_fd)

    def add_device(self, device: Device) -> None:
        """Send events of this native volume to ``device`` from now on."""
        self._devices[device.native_id] = device

    def remove_device(self, native_id: int) -> None:
        """Forget a native volume that is closed, after delivering what it had to say."""
        self.deliver_events()
        del self._devices[native_id]

    def deliver_events(self) -> None:
        """Take every event out of the ring and hand it to its device. Never blocks."""
        # When nothing is new an event may still be there from before.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._native.event_fd)
        while (event := self._native.next_event()) is not None:
            device = self._devices.get(event.volume_id)
            if device is not None:
                device.on_event(event)

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._native.event_fd)
            self.deliver_events()


@asynccontextmanager
async def open_engine(options: EngineOptions | None = None) -> AsyncIterator[Engine]:
    """Start the queue threads and the event task; stop them when the block is left.

    Every volume is opened inside the block and closed before it ends.

    Raises:
      LhblockError: the forced driver does not work here, or threads cannot be had.

    Cancelled while starting: nothing is left running.
    """
    options = options or EngineOptions()
    try:
        native = await run_metadata(
            lambda: NativeEngine(
                queues=options.queues, workers=options.workers, driver=_DRIVERS[options.driver]
            )
        )
    except NativeError as error:
        raise LhblockError(f"{error} (driver {options.driver})") from error
    engine = Engine(native, _driver_reason(options, native))
    log.info("engine started", driver=engine.driver, reason=engine.driver_reason)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine._run)
            # Errors of the caller's block are raised as they are, not in a group.
            try:
                yield engine
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await run_metadata(native.close)
    if failure is not None:
        raise failure


def _driver_reason(options: EngineOptions, native: NativeEngine) -> str:
    if options.driver != "auto":
        return "forced by a setting"
    if native.driver is Driver.URING:
        return "the start-up probe of io_uring succeeded"
    if not built_with_uring():
        return "built without liburing"
    error = probe_uring()
    return f"io_uring_setup: {os.strerror(error)}" if error else "io_uring was not available"
