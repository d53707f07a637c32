"""pyfuse3 has one session in a process, so a process has one mount: who has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from lhblock.frontend.fuse import volume_file


class FuseSession:
    """A door of this process has it, a mount that was handed over, or nobody.

    Attributes:
      directory: where it is mounted, while it is.
    """

    def __init__(self) -> None:
        self._taken = trio.Lock()
        self._doors = 0
        self._loan: Loan | None = None
        self._shown: Path | None = None
        self.directory: Path | None = None

    @property
    def free(self) -> bool:
        """Whether `lend` would lend it."""
        return self._doors == 0 and self._loan is None

    def file(self, volume: str) -> str:
        """Where users find the file of a volume; "" if it is not mounted for them."""
        return "" if self._shown is None else str(volume_file(self._shown, volume))

    @asynccontextmanager
    async def own(self, directory: Path, *, private: bool = False) -> AsyncIterator[None]:
        """Have it for a door of this process. A mount that was handed over ends first.

        Args:
          private: the directory is not for users.
        """
        self._doors += 1
        try:
            if self._loan is not None:
                self._loan.scope.cancel()
            async with self._taken:
                self._mounted(directory, None if private else directory)
                try:
                    yield
                finally:
                    self._mounted(None, None)
        finally:
            self._doors -= 1

    @contextmanager
    def lend(self) -> Iterator[Loan]:
        """Have it for a mount that is handed over, until a door wants it: the block is cancelled
        then. Only while it is `free`."""
        self._taken.acquire_nowait()
        self._loan = Loan(self)
        try:
            with self._loan.scope:
                yield self._loan
        finally:
            self._loan = None
            self._mounted(None, None)
            self._taken.release()

    def _mounted(self, directory: Path | None, shown: Path | None) -> None:
        self.directory, self._shown = directory, shown


class Loan:
    """The session while it is lent."""

    def __init__(self, session: FuseSession) -> None:
        self.scope = trio.CancelScope()
        self._session = session

    def mounted(self, directory: Path, shown: Path) -> None:
        """Say where it is mounted, and below which directory users find the volumes."""
        self._session._mounted(directory, shown)
