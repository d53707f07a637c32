"""Replicas that join a volume that is open, or leave it, and the record of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from lhblock.engine import greet_replica
from lhblock.errors import LhblockError, UsageError
from lhblock.instance._registry import (
    MADE_DIRECTORY,
    MADE_FILES,
    MADE_NOTHING,
    Registry,
    ReplicaRecord,
)
from lhblock.instance._served import ServedVolume
from lhblock.rpc import CallFailed
from lhblock.settings import RemoteAddress, parse_replica


def replica_place(address: str) -> Path | RemoteAddress:
    """Where a replica is that a caller named.

    Raises:
      CallFailed: INVALID_ARGUMENT.
    """
    try:
        place = parse_replica(address, Path())
    except UsageError as error:
        raise CallFailed("INVALID_ARGUMENT", str(error)) from error
    if isinstance(place, Path) and not place.is_absolute():
        raise CallFailed("INVALID_ARGUMENT", f"invalid replica {address!r}: give an absolute path")
    return place


async def add_replica(
    registry: Registry,
    served: ServedVolume,
    place: Path | RemoteAddress,
    *,
    force: bool = False,
    rebuild: bool = True,
) -> None:
    """Add a replica, as `Volume.add_replica`, and record it.

    One that a replica process has made by itself, and that nobody has written to, is overwritten
    without `force`: nothing is lost.

    Raises:
      CallFailed: it cannot be.
    """
    made = await trio.to_thread.run_sync(_would_make, place)
    with sentences():
        force = force or await trio.to_thread.run_sync(_is_blank, served.name, place)
        await served.volume.add_replica(place, force=force, rebuild=rebuild)
        if place not in served.record.places:
            await _record(registry, served, (*served.record.replicas, ReplicaRecord(place, made)))


async def remove_replica(
    registry: Registry, served: ServedVolume, place: Path | RemoteAddress
) -> None:
    """Take a replica out, as `Volume.remove_replica`, and out of the record.

    Raises:
      CallFailed: it cannot be.
    """
    with sentences():
        await served.volume.remove_replica(place)
        left = tuple(item for item in served.record.replicas if item.place != place)
        await _record(registry, served, left)


async def _record(
    registry: Registry, served: ServedVolume, replicas: tuple[ReplicaRecord, ...]
) -> None:
    async with served.recording:
        served.record = await trio.to_thread.run_sync(
            lambda: registry.update(served.name, replicas=replicas)
        )


def _would_make(place: Path | RemoteAddress) -> str:
    """What of a replica is made when it is added, and goes with the volume. Blocking."""
    if isinstance(place, RemoteAddress):
        return MADE_NOTHING
    if (place / "volume.meta").exists():
        return MADE_NOTHING
    return MADE_FILES if place.exists() else MADE_DIRECTORY


def _is_blank(volume: str, place: Path | RemoteAddress) -> bool:
    return isinstance(place, RemoteAddress) and greet_replica(place, volume=volume).blank


@contextmanager
def sentences() -> Iterator[None]:
    """Answer errors of the engine with their sentence and a code."""
    try:
        yield
    except UsageError as error:
        raise CallFailed("INVALID_ARGUMENT", str(error)) from error
    except LhblockError as error:
        raise CallFailed("FAILED_PRECONDITION", str(error)) from error
