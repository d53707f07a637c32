"""What a directory says of itself, read without its lock and without changing anything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lhblock.errors import ReplicaDamaged, ReplicaIO
from lhblock.replica import _names as names
from lhblock.replica._atomic import read_small
from lhblock.replica._metadata import MalformedError, VolumeMeta, parse_volume


def peek(path: Path) -> VolumeMeta | None:
    """Read ``volume.meta`` of a directory that nobody needs to have open. Blocking.

    Returns:
      None when there is no replica: no directory, or no or an empty ``volume.meta``.

    Raises:
      ReplicaDamaged: ``volume.meta`` makes no sense, or the path is no directory.
      ReplicaIO: a system call failed.
    """
    try:
        dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise ReplicaDamaged(path, "is not a directory") from error
        raise ReplicaIO(path, f"cannot open the directory: {error.strerror}") from error
    try:
        data = read_small(dir_fd, names.VOLUME_META)
    except OSError as error:
        raise ReplicaIO(path, f"cannot read {names.VOLUME_META}: {error.strerror}") from error
    finally:
        os.close(dir_fd)
    if not data:
        return None
    try:
        return parse_volume(data)
    except MalformedError as error:
        raise ReplicaDamaged(path, f"{names.VOLUME_META} {error}") from error
