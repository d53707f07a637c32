"""Replica processes without processes: what one serves, in the test's own event loop.

The sockets, the calls and the core are real; the engine of a replica is another one than the
volume's. Faults that a test arms or patches in reach both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from lhblock.instance import ReplicaOptions, ReplicaReady
from lhblock.instance._replica_process import serve_replica
from lhblock.settings import Listen, RemoteAddress, parse_replica


class ReplicaHost:
    """Serves replicas until its block ends."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._served: dict[Path, RemoteAddress] = {}
        self._scopes: dict[Path, trio.CancelScope] = {}
        self._ended: dict[Path, trio.Event] = {}

    async def serve(self, options: ReplicaOptions) -> RemoteAddress:
        """The address of a replica, which is served from now on if it was not."""
        if options.path not in self._served:
            self._served[options.path] = await self._nursery.start(self._serve, options)
        return self._served[options.path]

    async def stop(self, path: Path) -> None:
        """The process of a replica ends, without a word to its engine."""
        self._scopes[path].cancel()
        await self._ended[path].wait()

    async def start(self, path: Path) -> None:
        """Again, where it was."""
        at = self._served[path]
        options = replace(options_for(path), listen=Listen(at.host, at.port))
        assert await self._nursery.start(self._serve, options) == at

    async def _serve(
        self, options: ReplicaOptions, *, task_status: trio.TaskStatus[RemoteAddress]
    ) -> None:
        def on_ready(report: ReplicaReady) -> None:
            address = parse_replica(f"tcp://{report.control}", Path())
            assert isinstance(address, RemoteAddress)
            task_status.started(address)

        self._scopes[options.path], self._ended[options.path] = trio.CancelScope(), trio.Event()
        try:
            with self._scopes[options.path]:
                await serve_replica(options, on_ready)
        finally:
            self._ended[options.path].set()


@asynccontextmanager
async def open_host() -> AsyncIterator[ReplicaHost]:
    """Serve replicas for the block; its errors are raised as they are, and in no group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield ReplicaHost(nursery)
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def open_replica(options: ReplicaOptions) -> AsyncIterator[RemoteAddress]:
    """Serve a replica for the block."""
    async with open_host() as host:
        yield await host.serve(options)


def options_for(path: Path) -> ReplicaOptions:
    """How a replica in a directory is served."""
    return replace(_OPTIONS, path=path)


_OPTIONS = ReplicaOptions(path=Path(), listen=Listen("127.0.0.1", 0), queues=1, workers=4)
