"""A head that is ready but not yet the head.

The slow part comes before and after: ``commit`` is links and renames only, made while I/O is
frozen. docs/internals/replica-directory.md lists the state after each step and what an open makes
of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lhblock.errors import ReplicaIO
from lhblock.replica import _names as names
from lhblock.replica._atomic import (
    create_file,
    stat_file,
    sync_directory,
    unlink_if_there,
    write_durable,
    write_synced,
)
from lhblock.replica._metadata import Disk, VolumeMeta, encode_disk, encode_volume

_VOLUME_TMP = f"{names.VOLUME_META}.tmp"


@dataclass(frozen=True)
class Switch:
    """What a commit changes: the old head, the new one, and the snapshot the old one becomes.

    ``frozen`` is None for a revert, which gives the old head up.
    """

    old: Disk
    head: Disk
    frozen: Disk | None
    volume: VolumeMeta


class PendingHead:
    """Made by ``ReplicaDirectory.prepare_*``; ends with ``settle`` or ``abort``.

    ``image`` and ``discard`` are the names of the new head's files. The first exists, empty and of
    the right size; the second does not.
    """

    def __init__(
        self,
        path: Path,
        dir_fd: int,
        switch: Switch,
        *,
        committed: Callable[[Switch], None],
        ended: Callable[[], None],
    ) -> None:
        self.image = switch.head.name
        self.discard = names.discard_name(switch.head.name)
        self.size_bytes = switch.volume.size_bytes
        self._path = path
        self._dir_fd = dir_fd
        self._switch = switch
        self._committed = committed
        self._ended = ended
        self._state: Literal["new", "prepared", "committed", "ended"] = "new"

    def prepare(self) -> None:
        """Make the files, durable when it returns. I/O goes on. On failure nothing is left.

        Raises:
          OSError: the file system is full, or another failure of a system call.
        """
        assert self._state == "new"
        switch = self._switch
        try:
            fd = create_file(self._dir_fd, self.image)
            try:
                os.ftruncate(fd, self.size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
            record = names.record_name(self.image)
            write_durable(self._dir_fd, record, encode_disk(switch.head), spare=False)
            if switch.frozen is not None:
                write_synced(
                    self._dir_fd, self._frozen_record_tmp(switch.frozen), encode_disk(switch.frozen)
                )
            write_synced(self._dir_fd, _VOLUME_TMP, encode_volume(switch.volume))
            sync_directory(self._dir_fd)
        except OSError:
            with contextlib.suppress(OSError):
                self._remove_prepared()
            raise
        self._state = "prepared"

    @staticmethod
    def _frozen_record_tmp(frozen: Disk) -> str:
        return f"{names.record_name(frozen.name)}.tmp"

    def commit(self) -> None:
        """Make it the head: links and renames, nothing waits for a disk. Called with I/O frozen.

        Until ``settle`` a power loss may take it back, together with everything written since, so
        no flush may be acknowledged before that.

        Raises:
          ReplicaIO: the old head is still the head, and this is only good for ``abort``.
        """
        assert self._state == "prepared"
        try:
            if self._switch.frozen is not None:
                self._link_frozen(self._switch.frozen)
            self._rename(_VOLUME_TMP, names.VOLUME_META)
        except OSError as error:
            if self._switch.frozen is not None:
                with contextlib.suppress(OSError):
                    self._unlink_frozen(self._switch.frozen)
            raise ReplicaIO(
                self._path, f"cannot make {self.image} the head: {error.strerror}"
            ) from error
        self._state = "committed"
        self._committed(self._switch)

    def _link_frozen(self, frozen: Disk) -> None:
        old = self._switch.old.name
        self._link(old, frozen.name)
        # The record is complete before the commit, so a crash never leaves a snapshot that lost its
        # labels, nor one that Longhorn would take for its own and purge.
        self._rename(self._frozen_record_tmp(frozen), names.record_name(frozen.name))
        if stat_file(self._dir_fd, names.discard_name(old)) is not None:
            self._link(names.discard_name(old), names.discard_name(frozen.name))

    def _unlink_frozen(self, frozen: Disk) -> None:
        # The record first: an image without one that is the head's file is known for what it is.
        for name in (
            names.record_name(frozen.name),
            names.discard_name(frozen.name),
            frozen.name,
        ):
            unlink_if_there(self._dir_fd, name)

    def settle(self) -> None:
        """Make the commit durable and remove the old head's names. Flushes wait for this.

        Raises:
          ReplicaIO: it is not durable; may be called again.
        """
        assert self._state == "committed"
        old = self._switch.old.name
        try:
            sync_directory(self._dir_fd)
            for name in (
                old,
                names.record_name(old),
                names.checksum_name(old),
                names.discard_name(old),
            ):
                unlink_if_there(self._dir_fd, name)
            sync_directory(self._dir_fd)
        except OSError as error:
            raise ReplicaIO(
                self._path, f"cannot make the switch to {self.image} durable: {error.strerror}"
            ) from error
        self._end()

    def abort(self) -> None:
        """Remove what was prepared; after a commit it is too late.

        Raises:
          ReplicaIO: some of it is left; the next open removes it.
        """
        assert self._state == "prepared"
        self._end()
        try:
            self._remove_prepared()
        except OSError as error:
            raise ReplicaIO(
                self._path, f"cannot remove the unused head {self.image}: {error.strerror}"
            ) from error

    def _end(self) -> None:
        self._state = "ended"
        self._ended()

    def _remove_prepared(self) -> None:
        record = names.record_name(self.image)
        transients = [_VOLUME_TMP, f"{record}.tmp"]
        if self._switch.frozen is not None:
            transients.append(self._frozen_record_tmp(self._switch.frozen))
        for name in (*transients, record, self.discard, self.image):
            unlink_if_there(self._dir_fd, name)

    def _link(self, source: str, target: str) -> None:
        os.link(
            source,
            target,
            src_dir_fd=self._dir_fd,
            dst_dir_fd=self._dir_fd,
            follow_symlinks=False,
        )

    def _rename(self, source: str, target: str) -> None:
        os.rename(source, target, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
