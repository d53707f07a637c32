"""Where a layer has anything at all, so that walks pass over the empty parts of huge volumes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from lhblock._native import BLOCK_BYTES, MERGE_STEP_BYTES, next_extent
from lhblock.replica import ReplicaDirectory

_DISCARD_BYTES_PER_STEP = MERGE_STEP_BYTES // BLOCK_BYTES // 8


def occupied_steps(dir_fd: int, image: str) -> list[int]:
    """Begins of the merge steps in which a frozen layer has data or discarded blocks. Blocking.

    Costs one system call for each step that is occupied, whatever the size of the volume.

    Args:
      dir_fd: the replica directory.
      image: the layer's file in it.

    Raises:
      OSError, NativeError: a file cannot be read.
    """
    steps = set(_data_steps(dir_fd, image))
    steps.update(_discard_steps(dir_fd, ReplicaDirectory.discard_name(image)))
    return [step * MERGE_STEP_BYTES for step in sorted(steps)]


def _data_steps(dir_fd: int, image: str) -> Iterator[int]:
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        step = 0
        while (extent := next_extent(fd, step * MERGE_STEP_BYTES)) is not None:
            # One that began earlier reaches into this step.
            step = max(step, extent.offset_bytes // MERGE_STEP_BYTES)
            yield step
            step += 1
    finally:
        os.close(fd)


def _discard_steps(dir_fd: int, discard: str) -> Iterator[int]:
    try:
        fd = os.open(discard, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    try:
        step = 0
        while True:
            try:
                byte = os.lseek(fd, step * _DISCARD_BYTES_PER_STEP, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only holes from here on
                    return
                raise
            step = byte // _DISCARD_BYTES_PER_STEP
            yield step
            step += 1
    finally:
        os.close(fd)
