"""Making a volume: its record and its replica directories, or nothing at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog
import trio

from lhblock.engine import RemoteReplica, create_replicas, greet_replica, uncreate_replica
from lhblock.errors import (
    LhblockError,
    ReplicaForeign,
    ReplicaLocked,
    UsageError,
    VolumeExists,
)
from lhblock.instance._registry import (
    MADE_DIRECTORY,
    MADE_FILES,
    MADE_NOTHING,
    REPLICAS_MAX,
    Registry,
    ReplicaRecord,
    VolumeRecord,
    new_record,
)
from lhblock.instance._removal import removable, remove_replica
from lhblock.replica import ReplicaDirectory, has_room
from lhblock.settings import RemoteAddress, check_volume_name

DEFAULT_REPLICA = "replica"
META = "volume.meta"

_log = structlog.get_logger("lhblock.instance")


async def create_volume(
    registry: Registry,
    name: str,
    *,
    size_bytes: int | None,
    replicas: Sequence[Path | RemoteAddress] = (),
    cache: str = "writeback",
) -> VolumeRecord:
    """Create and record a volume.

    Directories that hold a replica already, Longhorn's included, are adopted: then all must, and
    the size is theirs. Directories that are absent or empty get a new replica each. The same is
    true of replica processes; a replica that one has made by itself and that is of zeros counts as
    a new one where no other holds data, and has to have the volume's size.

    Args:
      size_bytes: of the new replicas; may be None when existing ones are adopted.
      replicas: none means one directory below the volume's own.

    Raises:
      UsageError: the arguments contradict each other or what is on disk.
      VolumeExists: the name is taken.
      ReplicaForeign: a directory holds something else.
      LhblockError: the system refuses. What was made before is removed again.

    Cancelled: either nothing was made, or it is removed again.
    """
    check_volume_name(name)
    if len(replicas) > REPLICAS_MAX:
        raise UsageError(f"volume {name}: {len(replicas)} replicas; give at most {REPLICAS_MAX}")
    registry.data_dir.prepare()
    places = [Path.cwd() / each if isinstance(each, Path) else each for each in replicas]
    places = places or [registry.data_dir.volume(name) / DEFAULT_REPLICA]
    _check_apart(name, places)
    greetings = await trio.to_thread.run_sync(_greet, name, places)
    plain = [place for place, hello in greetings.items() if hello.plain]
    if plain and len(plain) < len(places):
        raise UsageError(
            f"volume {name}: {plain[0]} speaks Longhorn's protocol only and keeps no generation;"
            " a volume consists of such replicas, or of none"
        )
    with registry.locked():
        if name in registry.names():
            raise VolumeExists(name, f"it exists already in {registry.data_dir.path}")
        found = {place: _kind(place, greetings) for place in places}
        blank = {place: hello.size_bytes for place, hello in greetings.items() if hello.blank}
        if blank and not any(
            kind == MADE_NOTHING for place, kind in found.items() if place not in blank
        ):
            size_bytes = size_bytes or max(blank.values())
            for place, bytes_ in blank.items():
                if bytes_ != size_bytes:
                    raise UsageError(
                        f"volume {name}: {place} was made with {bytes_} bytes, not {size_bytes};"
                        " give all replicas and the volume the same size"
                    )
                found[place] = MADE_FILES
        adopted = [place for place, kind in found.items() if kind == MADE_NOTHING]
        if adopted and len(adopted) < len(places):
            missing = next(place for place in places if place not in adopted)
            raise UsageError(
                f"volume {name}: {adopted[0]} holds a replica and {missing} does not; adopt the"
                " ones that exist, without the others"
            )
        if adopted:
            _check_not_taken(registry, name, adopted)
            sizes = {place: _replica_size(place, greetings) for place in places}
            return _adopt(registry, name, sizes, size_bytes, cache)
        if size_bytes is None:
            raise UsageError(f"volume {name} does not exist; give --size to create it")
        # A directory below the volume's own is ours even if a killed creation left it there.
        made = [ReplicaRecord(p, found[p] if replicas else MADE_DIRECTORY) for p in places]
        record = new_record(name, size_bytes=size_bytes, cache=cache, replicas=made)
        return await _make(registry, record)


def uncreate_volume(registry: Registry, record: VolumeRecord) -> None:
    """Remove a volume that was created a moment ago and could not be served. Blocking."""
    with registry.locked():
        registry.forget(record.name)
        _unmake(record.replicas)
        registry.forget(record.name)


def _check_apart(name: str, places: Sequence[Path | RemoteAddress]) -> None:
    resolved = [place.resolve() for place in places if isinstance(place, Path)]
    remote = {place for place in places if isinstance(place, RemoteAddress)}
    if len(set(resolved)) + len(remote) != len(places):
        raise UsageError(f"volume {name}: a replica is given twice")
    for path in resolved:
        # Neither could be removed: a replica directory holds files of the format only.
        outer = next((other for other in resolved if other in path.parents), None)
        if outer is not None:
            raise UsageError(f"volume {name}: the replica directory {path} is inside {outer}")


def _check_not_taken(
    registry: Registry, name: str, adopted: Sequence[Path | RemoteAddress]
) -> None:
    wanted = {_resolved(place) for place in adopted}
    for other in registry.names():
        try:
            places = registry.get(other).places
        except LhblockError:
            # A damaged record cannot tell, and must not be in the way.
            continue
        taken = next((place for place in places if _resolved(place) in wanted), None)
        if taken is not None:
            raise UsageError(f"volume {name}: {taken} is a replica of volume {other}")


def _resolved(place: Path | RemoteAddress) -> Path | RemoteAddress:
    return place.resolve() if isinstance(place, Path) else place


def _greet(
    volume: str, places: Sequence[Path | RemoteAddress]
) -> dict[Path | RemoteAddress, RemoteReplica]:
    """What the replica processes among some places say of themselves. Blocking."""
    return {
        place: greet_replica(place, volume=volume)
        for place in places
        if isinstance(place, RemoteAddress)
    }


def _kind(
    place: Path | RemoteAddress, greetings: Mapping[Path | RemoteAddress, RemoteReplica]
) -> str:
    """What would have to be made there: MADE_NOTHING if there is a replica."""
    if isinstance(place, Path):
        return _kind_of_directory(place)
    state = greetings[place].state
    if state == "initial":
        return MADE_FILES
    if state == "closed":
        return MADE_NOTHING
    raise ReplicaLocked(str(place), f"is {state!r} and cannot be used; see the log of its process")


def _kind_of_directory(path: Path) -> str:
    try:
        entries = os.listdir(path)  # noqa: PTH208 names only
    except FileNotFoundError:
        return MADE_DIRECTORY
    except NotADirectoryError as error:
        raise ReplicaForeign(path, "is not a directory; choose another path") from error
    except OSError as error:
        raise ReplicaForeign(path, f"cannot be read: {error.strerror}") from error
    if META in entries:
        return MADE_NOTHING
    # Also what mkfs leaves at the top of every ext file system, and what a kill left of a creation.
    if has_room(path):
        return MADE_FILES
    raise ReplicaForeign(
        path, f"is not empty and holds no replica ({min(entries)!r} is there); choose another path"
    )


def _adopt(
    registry: Registry,
    name: str,
    sizes: Mapping[Path | RemoteAddress, int],
    size_bytes: int | None,
    cache: str,
) -> VolumeRecord:
    size = max(sizes.values())
    if size_bytes not in (None, size):
        raise UsageError(
            f"volume {name}: the replica in {next(iter(sizes))} has {size} bytes, not {size_bytes};"
            " leave --size out to adopt it"
        )
    replicas = [ReplicaRecord(place, MADE_NOTHING) for place in sizes]
    record = new_record(name, size_bytes=size, cache=cache, replicas=replicas)
    registry.add(record)
    return record


def _replica_size(
    place: Path | RemoteAddress, greetings: Mapping[Path | RemoteAddress, RemoteReplica]
) -> int:
    if isinstance(place, RemoteAddress):
        return greetings[place].size_bytes
    directory = ReplicaDirectory.open(place, read_only=True)
    try:
        return directory.size_bytes
    finally:
        directory.close()


async def _make(registry: Registry, record: VolumeRecord) -> VolumeRecord:
    undo: list[Callable[[], None]] = []
    try:
        registry.data_dir.volume(record.name).mkdir(mode=0o700, exist_ok=True)
        undo.append(lambda: registry.forget(record.name))
        await create_replicas(record.name, record.places, record.size_bytes)
        undo.append(lambda: _unmake(record.replicas))
        registry.add(record)
    except BaseException as error:
        for step in reversed(undo):
            try:
                step()
            except LhblockError as failure:
                _log.error("something of the new volume is left", reason=str(failure))
        if isinstance(error, OSError):
            raise LhblockError(
                f"cannot create volume {record.name}: {error.strerror}: {error.filename}"
            ) from error
        raise
    return record


def _unmake(replicas: Sequence[ReplicaRecord]) -> None:
    for replica in replicas:
        if isinstance(replica.place, RemoteAddress):
            if replica.made != MADE_NOTHING:
                uncreate_replica(replica.place)
        elif replica.made != MADE_NOTHING:
            with removable(replica) as names:
                remove_replica(replica, names)
