"""The lock of a replica directory: one writer, or any number of readers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from lhblock.errors import ReplicaIO, ReplicaLocked
from lhblock.replica._atomic import stat_file

LOCK_NAME = "lhblock.lock"
LOCK_WAIT_MS_MAX = 200
"""``lock_holder`` takes the lock for an instant; an open that meets it there tries again this
long."""

_RETRY_MS = 10
_PID_BYTES_MAX = 32


class DirectoryLock:
    """A held lock. It ends with ``release`` or with the process."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; once more does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _open_lock_file(dir_fd: int, *, exclusive: bool) -> int | None:
    """Open the lock file, creating it. None: the file system is read-only, so nobody can write."""
    flags = (os.O_RDWR if exclusive else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(LOCK_NAME, flags | os.O_CREAT, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if exclusive or error.errno != errno.EROFS:
            raise
    with contextlib.suppress(FileNotFoundError):
        return os.open(LOCK_NAME, flags, dir_fd=dir_fd)
    return None


def _read_pid(fd: int) -> int:
    """The process named in the lock file, 0 when it names none."""
    text = os.pread(fd, _PID_BYTES_MAX, 0).strip()
    return int(text) if text.isdigit() else 0


def _use(fd: int) -> str:
    """Say who is in the way. Only writers leave their pid in the file."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "being read by another process"
    pid = _read_pid(fd)
    return f"in use by process {pid}" if pid else "in use by another process"


def acquire_lock(path: Path, dir_fd: int, *, exclusive: bool) -> DirectoryLock:
    """Lock the directory, for writing or for reading. Blocks ``LOCK_WAIT_MS_MAX`` at most.

    Raises:
      ReplicaLocked: another process has it; a writer is named.
      ReplicaIO: the lock file cannot be used.
    """
    deadline_s = time.monotonic() + LOCK_WAIT_MS_MAX / 1000
    try:
        while True:
            fd = _open_lock_file(dir_fd, exclusive=exclusive)
            if fd is None:
                return DirectoryLock(None)
            try:
                if _try_lock(dir_fd, fd, exclusive=exclusive):
                    lock, fd = DirectoryLock(fd), None
                    return lock
                if time.monotonic() >= deadline_s:
                    raise ReplicaLocked(path, f"is {_use(fd)}; stop that one first")
            finally:
                if fd is not None:
                    os.close(fd)
            time.sleep(_RETRY_MS / 1000)
    except OSError as error:
        raise ReplicaIO(path, f"cannot lock {LOCK_NAME}: {error.strerror}") from error


def _try_lock(dir_fd: int, fd: int, *, exclusive: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    here = stat_file(dir_fd, LOCK_NAME)
    # A failed create removes its lock file: a lock on a file without a name is none.
    if here is None or not os.path.samestat(here, os.fstat(fd)):
        return False
    if exclusive:
        _write_pid(fd)
    return True


def _write_pid(fd: int) -> None:
    # The pid is for messages only: a full disk must not keep a volume from opening.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def lock_holder(path: Path) -> int | None:
    """Say who has the directory open: a pid, 0 when unknown, None when nobody (or no directory).

    The lock is taken for reading for an instant, so several callers do not disturb each other.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path / LOCK_NAME, flags)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ReplicaIO(path, f"cannot look at {LOCK_NAME}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(fd)
    else:
        return None
    finally:
        os.close(fd)
