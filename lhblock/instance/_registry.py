"""The volumes of a data directory: one ``volumes/<name>/volume.json`` each.

The record says where the replicas are and what this program made itself, so that removing a
volume removes that and nothing else. Records are written to a temporary file, synced and
renamed; creations and removals of one data directory exclude each other with a lock file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lhblock.errors import LhblockError, UsageError, VolumeError, VolumeExists, VolumeNotFound
from lhblock.settings import DataDir, RemoteAddress, check_volume_name, parse_replica

RECORD = "volume.json"
RECORD_BYTES_MAX = 1 << 20
SNAPSHOTS_MAX = 250
REPLICAS_MAX = 8
CACHES = ("writeback", "none")

# What of a replica directory is ours to delete.
MADE_DIRECTORY = "directory"
MADE_FILES = "files"
MADE_NOTHING = ""


@dataclass(frozen=True)
class ReplicaRecord:
    """Where one replica is, and what of it was made by us.

    Attributes:
      place: an absolute path, or the address of a replica process.
      made: ``directory``: directory and files; ``files``: the directory was there, empty;
        ``""``: a replica that existed before and was adopted.
    """

    place: Path | RemoteAddress
    made: str

    @property
    def path(self) -> Path:
        """Of a directory of this host."""
        assert isinstance(self.place, Path)
        return self.place


@dataclass(frozen=True)
class VolumeRecord:
    """What is known of a volume without opening it.

    Attributes:
      size_bytes: at the last change recorded; an expansion by a foreign program is not seen.
      cache: ``writeback`` or ``none``, unless the serving process is told otherwise.
      created: UTC, RFC 3339, whole seconds.
      snapshot_count_max: limit on snapshots that are not removed.
      snapshot_bytes_max: limit on their allocated bytes; 0 is none.
    """

    name: str
    size_bytes: int
    cache: str
    created: str
    replicas: tuple[ReplicaRecord, ...]
    snapshot_count_max: int = SNAPSHOTS_MAX
    snapshot_bytes_max: int = 0

    @property
    def places(self) -> tuple[Path | RemoteAddress, ...]:
        return tuple(replica.place for replica in self.replicas)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of the replicas that are directories of this host."""
        return tuple(place for place in self.places if isinstance(place, Path))


class Registry:
    """The records of one data directory. Every method blocks for small files only."""

    def __init__(self, data_dir: DataDir) -> None:
        self.data_dir = data_dir

    def names(self) -> list[str]:
        """Return the recorded names, sorted; damaged records are among them."""
        try:
            entries = sorted(os.listdir(self.data_dir.volumes))  # noqa: PTH208 names only
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LhblockError(f"cannot list {self.data_dir.volumes}: {error.strerror}") from error
        return [name for name in entries if self._path(name).exists()]

    def get(self, name: str) -> VolumeRecord:
        """Return one record.

        Raises:
          UsageError: no volume may have this name.
          VolumeNotFound: none is recorded.
          VolumeError: the record is damaged or cannot be read.
        """
        check_volume_name(name)
        path = self._path(name)
        try:
            with path.open("rb") as file:
                raw = file.read(RECORD_BYTES_MAX + 1)
        except FileNotFoundError as error:
            raise VolumeNotFound(
                name,
                f"there is none in {self.data_dir.path}; create it with"
                f" 'lhblock serve {name} --size SIZE'",
            ) from error
        except OSError as error:
            raise VolumeError(name, f"cannot read {path}: {error.strerror}") from error
        try:
            return _parse(name, raw)
        except (ValueError, KeyError, TypeError) as error:
            raise VolumeError(
                name, f"{path} is damaged ({error}); restore it or write it anew"
            ) from error

    def add(self, record: VolumeRecord) -> None:
        """Record a new volume, durably. Call within `locked`.

        Raises:
          VolumeExists: the name is taken.
        """
        if self._path(record.name).exists():
            raise VolumeExists(record.name, f"it exists already in {self.data_dir.path}")
        with contextlib.suppress(FileExistsError):
            self.data_dir.volume(record.name).mkdir(mode=0o700)
        self._write(record)

    def update(self, name: str, **changes: Any) -> VolumeRecord:
        """Replace fields of a record, durably, and return it. Raises as `get`.

        One call at a time for each volume: who has it open sees to that.
        """
        record = replace(self.get(name), **changes)
        self._write(record)
        return record

    def forget(self, name: str) -> None:
        """Remove the record and the volume's directory if that is empty. Call within `locked`."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)
        # Not empty: somebody put something there, which is not ours to delete.
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        _sync_directory(self.data_dir.volumes)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude creations and removals by other processes. Waits for them; they are short."""
        path = self.data_dir.volumes / ".lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise LhblockError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _path(self, name: str) -> Path:
        return self.data_dir.volume(name) / RECORD

    def _write(self, record: VolumeRecord) -> None:
        path = self._path(record.name)
        scratch = path.with_suffix(".tmp")
        try:
            with scratch.open("wb") as file:
                file.write(_format(record))
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
            _sync_directory(path.parent)
            _sync_directory(path.parent.parent)
        except OSError as error:
            raise VolumeError(record.name, f"cannot write {path}: {error.strerror}") from error


def new_record(
    name: str, *, size_bytes: int, cache: str, replicas: Sequence[ReplicaRecord]
) -> VolumeRecord:
    """Return the record of a volume created now."""
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return VolumeRecord(name, size_bytes, cache, created, tuple(replicas))


def _format(record: VolumeRecord) -> bytes:
    document = {
        "name": record.name,
        "size_bytes": record.size_bytes,
        "cache": record.cache,
        "created": record.created,
        "replicas": [
            {_key(item.place): str(item.place), "made": item.made} for item in record.replicas
        ],
        "snapshot_count_max": record.snapshot_count_max,
        "snapshot_bytes_max": record.snapshot_bytes_max,
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def _key(place: Path | RemoteAddress) -> str:
    return "path" if isinstance(place, Path) else "address"


def _place(item: dict[str, Any]) -> Path | RemoteAddress:
    if "address" not in item:
        path = Path(_text(item["path"]))
        if not path.is_absolute():
            raise ValueError(f"replica path {path} is not absolute")
        return path
    try:
        place = parse_replica(_text(item["address"]), Path("/"))
    except UsageError as error:
        raise ValueError(str(error)) from error
    if isinstance(place, Path):
        raise ValueError(f"replica address {item['address']!r} is none")
    return place


def _parse(name: str, raw: bytes) -> VolumeRecord:
    if len(raw) > RECORD_BYTES_MAX:
        raise ValueError(f"it is larger than {RECORD_BYTES_MAX} bytes")
    document = json.loads(raw)
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    if document["name"] != name:
        raise ValueError(f"it belongs to volume {document['name']!r}")
    replicas = tuple(
        ReplicaRecord(_place(item), _text(item["made"])) for item in document["replicas"]
    )
    if not 1 <= len(replicas) <= REPLICAS_MAX:
        raise ValueError(f"it has {len(replicas)} replicas")
    for replica in replicas:
        if replica.made not in (MADE_DIRECTORY, MADE_FILES, MADE_NOTHING):
            raise ValueError(f"made is {replica.made!r}")
    cache = _text(document["cache"])
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}")
    return VolumeRecord(
        name,
        _count(document["size_bytes"]),
        cache,
        _text(document["created"]),
        replicas,
        _count(document.get("snapshot_count_max", SNAPSHOTS_MAX)),
        _count(document.get("snapshot_bytes_max", 0)),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no string")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
