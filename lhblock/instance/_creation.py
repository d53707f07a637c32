"""Making a volume: its record and its replica directories, or nothing at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from lhblock.engine import create_replicas
from lhblock.errors import LhblockError, ReplicaForeign, UsageError, VolumeExists
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
from lhblock.settings import check_volume_name

DEFAULT_REPLICA = "replica"
META = "volume.meta"

_log = structlog.get_logger("lhblock.instance")


async def create_volume(
    registry: Registry,
    name: str,
    *,
    size_bytes: int | None,
    replicas: Sequence[Path] = (),
    cache: str = "writeback",
) -> VolumeRecord:
    """Create and record a volume.

    Directories that hold a replica already, Longhorn's included, are adopted: then all must, and
    the size is theirs. Directories that are absent or empty get a new replica each.

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
    paths = [Path.cwd() / path for path in replicas]
    paths = paths or [registry.data_dir.volume(name) / DEFAULT_REPLICA]
    _check_apart(name, paths)
    with registry.locked():
        if name in registry.names():
            raise VolumeExists(name, f"it exists already in {registry.data_dir.path}")
        found = {path: _kind(path) for path in paths}
        adopted = [path for path, kind in found.items() if kind == MADE_NOTHING]
        if adopted and len(adopted) < len(paths):
            missing = next(path for path in paths if path not in adopted)
            raise UsageError(
                f"volume {name}: {adopted[0]} holds a replica and {missing} does not; adopt the"
                " ones that exist, without the others"
            )
        if adopted:
            _check_not_taken(registry, name, adopted)
            return _adopt(registry, name, paths, size_bytes, cache)
        if size_bytes is None:
            raise UsageError(f"volume {name} does not exist; give --size to create it")
        # A directory below the volume's own is ours even if a killed creation left it there.
        made = [ReplicaRecord(p, found[p] if replicas else MADE_DIRECTORY) for p in paths]
        record = new_record(name, size_bytes=size_bytes, cache=cache, replicas=made)
        return await _make(registry, record)


def uncreate_volume(registry: Registry, record: VolumeRecord) -> None:
    """Remove a volume that was created a moment ago and could not be served. Blocking."""
    with registry.locked():
        registry.forget(record.name)
        _unmake(record.replicas)
        registry.forget(record.name)


def _check_apart(name: str, paths: Sequence[Path]) -> None:
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        raise UsageError(f"volume {name}: a replica directory is given twice")
    for path in resolved:
        # Neither could be removed: a replica directory holds files of the format only.
        outer = next((other for other in resolved if other in path.parents), None)
        if outer is not None:
            raise UsageError(f"volume {name}: the replica directory {path} is inside {outer}")


def _check_not_taken(registry: Registry, name: str, adopted: Sequence[Path]) -> None:
    wanted = {path.resolve() for path in adopted}
    for other in registry.names():
        try:
            paths = registry.get(other).paths
        except LhblockError:
            # A damaged record cannot tell, and must not be in the way.
            continue
        taken = next((path for path in paths if path.resolve() in wanted), None)
        if taken is not None:
            raise UsageError(f"volume {name}: {taken} is a replica of volume {other}")


def _kind(path: Path) -> str:
    """What would have to be made at `path`: MADE_NOTHING if it holds a replica."""
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
    registry: Registry, name: str, paths: Sequence[Path], size_bytes: int | None, cache: str
) -> VolumeRecord:
    sizes = {path: _replica_size(path) for path in paths}
    size = max(sizes.values())
    if size_bytes not in (None, size):
        raise UsageError(
            f"volume {name}: the replica in {paths[0]} has {size} bytes, not {size_bytes};"
            " leave --size out to adopt it"
        )
    replicas = [ReplicaRecord(path, MADE_NOTHING) for path in paths]
    record = new_record(name, size_bytes=size, cache=cache, replicas=replicas)
    registry.add(record)
    return record


def _replica_size(path: Path) -> int:
    directory = ReplicaDirectory.open(path, read_only=True)
    try:
        return directory.size_bytes
    finally:
        directory.close()


async def _make(registry: Registry, record: VolumeRecord) -> VolumeRecord:
    undo: list[Callable[[], None]] = []
    try:
        registry.data_dir.volume(record.name).mkdir(mode=0o700, exist_ok=True)
        undo.append(lambda: registry.forget(record.name))
        await create_replicas(record.name, record.paths, record.size_bytes)
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
        if replica.made != MADE_NOTHING:
            with removable(replica) as names:
                remove_replica(replica, names)
