"""Deleting a replica directory: the files of the format, nothing else, no link followed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from lhblock.errors import ReplicaForeign, ReplicaIO, ReplicaLocked
from lhblock.instance._registry import MADE_DIRECTORY, MADE_NOTHING, ReplicaRecord
from lhblock.instance._serving import LOCK_FILE

# Every name the format knows, and what a crash may leave of it (docs/internals/architecture.md).
_NAMES = re.compile(
    r"volume\.meta(\.tmp)?"
    r"|volume-head-[0-9]{3,}\.img(\.meta)?(\.tmp)?"
    r"|volume-snap-.+\.img(\.meta|\.checksum|\.snap_tmp|\.snap_tmp\.meta)?(\.{1,2}tmp)?"
    r"|volume-delta-.+\.img(\.meta)?(\.tmp)?"
    r"|revision\.counter(\.tmp)?"
    r"|lhblock\.[a-z]+(\..+)?"
)


@contextlib.contextmanager
def removable(replica: ReplicaRecord) -> Iterator[list[str]]:
    """Hold a replica directory that may be deleted; yields the names of its files.

    Nothing is deleted yet, so all replicas of a volume can be checked before the first is
    touched. A directory that is gone yields no names.

    Raises:
      ReplicaLocked: a process has it open.
      ReplicaForeign: it is not a directory, or holds something no replica has.
      ReplicaIO: the system refuses.
    """
    try:
        fd = os.open(replica.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield []
        return
    except OSError as error:
        raise ReplicaForeign(
            replica.path, f"is not a directory of its own ({error.strerror}); nothing was deleted"
        ) from error
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(fd, replica.path))
            yield sorted(_checked_names(fd, replica.path))
    finally:
        os.close(fd)


def remove_replica(replica: ReplicaRecord, names: list[str]) -> None:
    """Delete what `removable` named, and the directory if we made it. Within `removable`.

    ``volume.meta`` goes first: what a crash leaves is then no replica any more, and a second
    removal takes the rest.

    Raises:
      ReplicaIO: the system refuses; what is left can be removed by trying again.
    """
    assert replica.made != MADE_NOTHING
    if not names and not replica.path.exists():
        return
    try:
        fd = os.open(replica.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in sorted(names, key=lambda name: name != "volume.meta"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        if replica.made == MADE_DIRECTORY:
            replica.path.rmdir()
    except OSError as error:
        raise ReplicaIO(replica.path, f"cannot delete it: {error.strerror}") from error


@contextlib.contextmanager
def _locked(directory: int, path: Path) -> Iterator[None]:
    try:
        fd = os.open(LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise ReplicaForeign(path, f"its {LOCK_FILE} is not a file: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ReplicaLocked(path, "a process has it open; stop that first") from error
    finally:
        os.close(fd)


def _checked_names(directory: int, path: Path) -> Iterator[str]:
    for name in os.listdir(directory):
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if _NAMES.fullmatch(name) is None or not stat.S_ISREG(mode):
            raise ReplicaForeign(
                path, f"it holds {name!r}, which is not part of a replica; move that away first"
            )
        yield name
