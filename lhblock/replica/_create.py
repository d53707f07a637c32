"""Making a new replica directory."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lhblock.errors import (
    ReplicaForeign,
    ReplicaIO,
    ReplicaNoExtents,
    ReplicaNotFound,
    ReplicaUnsupported,
    UsageError,
)
from lhblock.replica import _names as names
from lhblock.replica._atomic import (
    create_file,
    stat_file,
    sync_directory,
    unlink_if_there,
    write_durable,
)
from lhblock.replica._generation import GENERATION_NAME, Generation, HeadFingerprint
from lhblock.replica._lock import LOCK_NAME, acquire_lock
from lhblock.replica._metadata import (
    Disk,
    VolumeMeta,
    created_text,
    encode_disk,
    encode_volume,
    why_bad_size,
)
from lhblock.replica._survey import foreign_names, is_unfinished_create, list_names

Probe = Callable[[int], int]
"""Called with a descriptor of a file of the directory; 0 when its extent map can be read, else
-errno."""

_RECORD = names.record_name(names.FIRST_HEAD)
_MADE = (
    names.VOLUME_META,
    GENERATION_NAME,
    _RECORD,
    names.FIRST_HEAD,
    f"{names.VOLUME_META}.tmp",
    f"{GENERATION_NAME}.tmp",
    f"{_RECORD}.tmp",
)


def open_directory(path: Path) -> int:
    """Open a directory for use with the ``*at`` calls.

    Raises:
      ReplicaNotFound: it does not exist.
      ReplicaForeign: it is no directory.
      ReplicaIO: the kernel refuses for another reason.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ReplicaNotFound(path, "no such directory") from None
    except NotADirectoryError:
        raise ReplicaForeign(path, "is not a directory") from None
    except OSError as error:
        raise ReplicaIO(path, f"cannot open the directory: {error.strerror}") from error


def check_probe(path: Path, probe: Probe | None, fd: int) -> None:
    """Find out whether the file system tells data from holes.

    Raises:
      ReplicaNoExtents: it does not.
    """
    result = 0 if probe is None else probe(fd)
    if result < 0:
        raise ReplicaNoExtents(
            path,
            f"the file system cannot list extents (FIEMAP: {os.strerror(-result)}); use ext4 or "
            "xfs",
        )


def create_replica(
    path: Path,
    *,
    size_bytes: int,
    generation: Generation | None,
    encrypted: bool,
    rebuilding: bool,
    probe: Probe | None,
) -> None:
    """See ``ReplicaDirectory.create``."""
    if (reason := why_bad_size(size_bytes)) is not None:
        raise UsageError(f"volume size {size_bytes} {reason}")
    made_directory = _make_directory(path)
    dir_fd = -1
    try:
        dir_fd = open_directory(path)
        _require_room(path, dir_fd)
        made_lock = stat_file(dir_fd, LOCK_NAME) is None
        lock = acquire_lock(path, dir_fd, exclusive=True)
        try:
            # Once more: another process may have made a replica before we had the lock.
            _require_room(path, dir_fd)
            try:
                volume = VolumeMeta(
                    size_bytes, names.FIRST_HEAD, encrypted=encrypted, rebuilding=rebuilding
                )
                _fill(path, dir_fd, volume, generation, probe)
            except BaseException:
                for name in (*_MADE, *((LOCK_NAME,) if made_lock else ())):
                    with contextlib.suppress(OSError):
                        unlink_if_there(dir_fd, name)
                raise
        finally:
            lock.release()
        if made_directory:
            _sync_parent(path)
    except BaseException as error:
        if made_directory:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            if error.errno == errno.EFBIG:
                raise ReplicaUnsupported(
                    path, f"the file system has no files of {size_bytes} bytes; use a smaller size"
                ) from error
            raise ReplicaIO(path, f"cannot create the replica: {error.strerror}") from error
        raise
    finally:
        if dir_fd >= 0:
            os.close(dir_fd)


def _make_directory(path: Path) -> bool:
    try:
        path.mkdir(0o700)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise ReplicaNotFound(
            path, f"cannot be created: the directory {path.parent} does not exist"
        ) from None
    except OSError as error:
        raise ReplicaIO(path, f"cannot create the directory: {error.strerror}") from error
    return True


def _sync_parent(path: Path) -> None:
    parent_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory(parent_fd)
    finally:
        os.close(parent_fd)


def has_room(path: Path) -> bool:
    """Whether a replica can be made in a directory: it is empty, or a creation ended early there.

    Raises:
      ReplicaNotFound, ReplicaForeign, ReplicaIO: it is no directory that can be read.
    """
    dir_fd = open_directory(path)
    try:
        return _is_room(dir_fd, list_names(path, dir_fd))
    except OSError as error:
        raise ReplicaIO(path, f"cannot read the directory: {error.strerror}") from error
    finally:
        os.close(dir_fd)


def _is_room(dir_fd: int, found: frozenset[str]) -> bool:
    return not foreign_names(found) or is_unfinished_create(dir_fd, found)


def _require_room(path: Path, dir_fd: int) -> None:
    found = list_names(path, dir_fd)
    strangers = foreign_names(found)
    if _is_room(dir_fd, found):
        return
    if names.VOLUME_META in found or any(names.is_image(name) for name in found):
        raise ReplicaForeign(path, "holds a replica already; open that or give an empty directory")
    raise ReplicaForeign(path, f"is not empty: it holds {strangers[0]!r}; give an empty directory")


def _fill(
    path: Path,
    dir_fd: int,
    volume: VolumeMeta,
    generation: Generation | None,
    probe: Probe | None,
) -> None:
    for name in _MADE:
        unlink_if_there(dir_fd, name)
    fd = create_file(dir_fd, names.FIRST_HEAD)
    try:
        os.ftruncate(fd, volume.size_bytes)
        os.fsync(fd)
        check_probe(path, probe, fd)
        fingerprint = HeadFingerprint.of(names.FIRST_HEAD, os.fstat(fd))
    finally:
        os.close(fd)
    head = Disk(names.FIRST_HEAD, created=created_text(time.time()))
    write_durable(dir_fd, _RECORD, encode_disk(head))
    if generation is not None:
        data = replace(generation, head=fingerprint).encode()
        write_durable(dir_fd, GENERATION_NAME, data, mode=0o600)
    # The last, because it makes the directory a replica.
    write_durable(dir_fd, names.VOLUME_META, encode_volume(volume))
