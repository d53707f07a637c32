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


@asynccontextmanager
async def open_replica(options: ReplicaOptions) -> AsyncIterator[RemoteAddress]:
    """Serve a replica for the block."""
    ready: list[ReplicaReady] = []
    started = trio.Event()

    def on_ready(report: ReplicaReady) -> None:
        ready.append(report)
        started.set()

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_replica, options, on_ready)
        await started.wait()
        address = parse_replica(f"tcp://{ready[0].control}", Path())
        assert isinstance(address, RemoteAddress)
        try:
            yield address
        except Exception as error:
            failure = error  # raised as it is, and in no group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def options_for(path: Path) -> ReplicaOptions:
    """How a replica in a directory is served."""
    return replace(_OPTIONS, path=path)


_OPTIONS = ReplicaOptions(path=Path(), listen=Listen("127.0.0.1", 0), queues=1, workers=4)
