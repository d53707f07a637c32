"""Ends a process at the n-th system call that changes a directory, without a process.

``Cut(n)`` lets n changing calls through; the next one, and every one after it, raises ``Crash``, so
that no clean-up code of the dying operation has an effect: that is kill -9. What lay in the page
cache only is remembered, and ``lose_unsynced`` takes it away: that is a power loss. Names that were
not synced are lost from the tail on journalling file systems, and each such state is that of an
earlier n.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("link", "rename", "unlink", "mkdir", "rmdir")
_DATA = ("write", "pwrite", "ftruncate", "posix_fallocate")
_IRRELEVANT = ("lhblock.spare", "lhblock.lock")


class Crash(BaseException):
    """Not an Exception: nothing may handle it."""


class Cut:
    """Counts changing calls; see the module's text."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.calls = 0
        self.names_unsynced: list[str] = []
        self.files_unsynced: set[tuple[int, int]] = set()

    @property
    def happened(self) -> bool:
        return self.limit is not None and self.calls > self.limit

    def step(self) -> None:
        self.calls += 1
        if self.happened:
            raise Crash

    def _file(self, fd: int) -> tuple[int, int]:
        state = os.fstat(fd)
        return state.st_dev, state.st_ino

    @contextmanager
    def __call__(self) -> Iterator[Cut]:
        """Changes inside the block are counted, and cut off. Ends quietly by the crash."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _NAMES:
                patch.setattr(os, name, self._naming(name, getattr(os, name)))
            for name in _DATA:
                patch.setattr(os, name, self._writing(getattr(os, name)))
            patch.setattr(os, "open", self._opening(os.open))
            patch.setattr(os, "fsync", self._syncing)
            try:
                yield self
            except Crash:
                assert self.happened

    def _naming(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(name: str, *rest: Any, **keywords: Any) -> Any:
            self.step()
            if kind == "unlink":
                # Asking for a name that is not there changes nothing.
                os.stat(name, dir_fd=keywords.get("dir_fd"), follow_symlinks=False)
            result = real(name, *rest, **keywords)
            if str(name) not in _IRRELEVANT:
                self.names_unsynced.append(f"{kind} {name}")
            return result

        return call

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            self.step()
            result = real(fd, *rest)
            self.files_unsynced.add(self._file(fd))
            return result

        return call

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(name: str, flags: int, *rest: Any, **keywords: Any) -> int:
            creating = bool(flags & os.O_CREAT)
            if creating:
                self.step()
            fd = real(name, flags, *rest, **keywords)
            if creating and str(name) not in _IRRELEVANT:
                self.names_unsynced.append(f"create {name}")
                self.files_unsynced.add(self._file(fd))
            return fd

        return call

    def _syncing(self, fd: int) -> None:
        self.step()
        # The model does not need the disk, and the tests are faster without it.
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112
            self.names_unsynced.clear()
        else:
            self.files_unsynced.discard(self._file(fd))

    def lose_unsynced(self, path: Path) -> None:
        """Power loss: files that were not synced since they were written are empty."""
        for each in path.iterdir():
            state = each.stat(follow_symlinks=False)
            if (state.st_dev, state.st_ino) in self.files_unsynced:
                os.truncate(each, 0)

    def unsynced(self, path: Path) -> list[str]:
        """What a power loss now could take away again."""
        files = [
            each.name
            for each in path.iterdir()
            if (each.stat().st_dev, each.stat().st_ino) in self.files_unsynced
            and each.name not in _IRRELEVANT
        ]
        return self.names_unsynced + files
