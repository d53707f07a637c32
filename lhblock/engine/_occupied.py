"""Where a layer has anything at all, so that walks pass over the empty parts of huge volumes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from lhblock._native import BLOCK_BYTES, MERGE_STEP_BYTES, next_extent
from lhblock.replica import ReplicaDirectory


def occupied_steps(dir_fd: int, image: str, step_bytes: int = MERGE_STEP_BYTES) -> list[int]:
    """Begins of the steps in which a frozen layer has data or discarded blocks. Blocking.

    Costs a system call for each extent or step that is occupied, whatever the size of the volume.

    Args:
      dir_fd: the replica directory.
      image: the layer's file in it.
      step_bytes: a multiple of eight blocks.

    Raises:
      OSError, NativeError: a file cannot be read.
    """
    steps = set(_data_steps(dir_fd, image, step_bytes))
    steps.update(_discard_steps(dir_fd, ReplicaDirectory.discard_name(image), step_bytes))
    return [step * step_bytes for step in sorted(steps)]


def _data_steps(dir_fd: int, image: str, step_bytes: int) -> Iterator[int]:
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        step = 0
        while (extent := next_extent(fd, step * step_bytes)) is not None:
            end = -(-(extent.offset_bytes + extent.length_bytes) // step_bytes)
            yield from range(extent.offset_bytes // step_bytes, end)
            step = end
    finally:
        os.close(fd)


def _discard_steps(dir_fd: int, discard: str, step_bytes: int) -> Iterator[int]:
    file_bytes = step_bytes // BLOCK_BYTES // 8
    try:
        fd = os.open(discard, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    try:
        step = 0
        while True:
            try:
                byte = os.lseek(fd, step * file_bytes, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only holes from here on
                    return
                raise
            step = byte // file_bytes
            yield step
            step += 1
    finally:
        os.close(fd)
