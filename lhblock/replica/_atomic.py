"""Small files of a replica directory, replaced so that a crash leaves the old or the new one.

Every function works relative to a directory file descriptor and never follows a symbolic link. They
raise ``OSError``; the caller knows which replica it was and makes the sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

FILE_BYTES_MAX = 1 << 20
"""No metadata file is larger; a larger one is refused, not read."""

SPARE_NAME = "lhblock.spare"
"""Blocks kept aside so that the metadata of a full file system can still be replaced."""

SPARE_BYTES = 65536

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def stat_file(dir_fd: int, name: str) -> os.stat_result | None:
    """Return the state of ``name`` itself (not of what a link points to), or None when absent."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def read_small(dir_fd: int, name: str) -> bytes | None:
    """Return the content of a regular file of at most ``FILE_BYTES_MAX`` bytes, None when absent.

    Raises:
      OSError: EFBIG when the file is larger, EINVAL when it is no regular file, ELOOP when it is a
        symbolic link, or what the kernel says.
    """
    try:
        fd = os.open(name, _READ_FLAGS, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        if state.st_size > FILE_BYTES_MAX:
            raise OSError(errno.EFBIG, f"{state.st_size} bytes are too many", name)
        parts: list[bytes] = []
        left_bytes = FILE_BYTES_MAX
        while left_bytes > 0 and (part := os.read(fd, left_bytes)):
            parts.append(part)
            left_bytes -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def create_file(dir_fd: int, name: str, *, mode: int = 0o644) -> int:
    """Create ``name``, which must not exist, and return its descriptor."""
    return os.open(name, _CREATE_FLAGS, mode, dir_fd=dir_fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the current position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_directory(dir_fd: int) -> None:
    """Make every name given, changed and removed so far durable."""
    os.fsync(dir_fd)


def unlink_if_there(dir_fd: int, name: str) -> bool:
    """Remove ``name``. Returns whether it was there."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True


def write_synced(dir_fd: int, name: str, data: bytes, *, mode: int = 0o644) -> None:
    """Write a new file ``name`` and its content to stable storage; its name is not yet durable.

    An older file of that name is removed first, so this is only for transient names. On failure
    nothing of that name is left.
    """
    unlink_if_there(dir_fd, name)
    fd = create_file(dir_fd, name, mode=mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        # The error that is already under way says more than a failed removal would.
        with contextlib.suppress(OSError):
            unlink_if_there(dir_fd, name)
        raise


def write_durable(
    dir_fd: int,
    name: str,
    data: bytes,
    *,
    mode: int = 0o644,
    transient: str | None = None,
    spare: bool = True,
) -> None:
    """Replace ``name`` by ``data``, durable when it returns; a crash leaves the old or the new
    file.

    Args:
      transient: the name used before the rename, ``name`` + ``.tmp`` unless given.
      spare: give up the spare blocks when the file system is full, and try once more.
    """
    transient = transient or f"{name}.tmp"
    try:
        write_synced(dir_fd, transient, data, mode=mode)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (spare and full and unlink_if_there(dir_fd, SPARE_NAME)):
            raise
        write_synced(dir_fd, transient, data, mode=mode)
    os.rename(transient, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    sync_directory(dir_fd)


def keep_spare(dir_fd: int) -> None:
    """Make sure the spare blocks exist, as far as there is space: a full disk has none to spare."""
    if stat_file(dir_fd, SPARE_NAME) is not None:
        return
    try:
        fd = create_file(dir_fd, SPARE_NAME, mode=0o600)
    except OSError:
        return
    try:
        os.posix_fallocate(fd, 0, SPARE_BYTES)
    except OSError:
        with contextlib.suppress(OSError):
            unlink_if_there(dir_fd, SPARE_NAME)
    finally:
        os.close(fd)
