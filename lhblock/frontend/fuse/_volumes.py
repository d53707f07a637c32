"""What the front end wants to know of volumes, whoever serves them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SnapshotFile:
    """A snapshot that can be read. One that was made anew under an old name differs in `created`.

    Attributes:
      created: UTC, RFC 3339.
      size_bytes: of the volume when it was taken.
    """

    name: str
    created: str
    size_bytes: int


@dataclass(frozen=True)
class VolumeFiles:
    """A volume as it is now."""

    name: str
    size_bytes: int
    read_only: bool
    snapshots: Sequence[SnapshotFile]


class Relay(Protocol):
    """A mount whose file I/O is answered elsewhere."""

    async def ended(self) -> None:
        """Wait until somebody has unmounted it."""
        ...


class Volumes(Protocol):
    """The volumes that are shown."""

    async def names(self) -> Sequence[str]:
        """Those that are served now."""
        ...

    async def find(self, name: str) -> VolumeFiles | None:
        """One of them; None if it is not served."""
        ...

    async def status(self, name: str) -> bytes:
        """The content of its ``status.json``.

        Raises:
          VolumeError: it is not served any more.
        """
        ...

    def open_relay(self, kernel_fd: int, server_fd: int) -> AbstractAsyncContextManager[Relay]:
        """Stand between ``/dev/fuse`` and the server, and answer I/O of files that are open.

        Args:
          server_fd: a ``SOCK_SEQPACKET`` socket; its peer is the server's. Both are taken over.
        """
        ...

    def open(
        self, name: str, snapshot: str | None, *, handle: int, writable: bool, fua: bool
    ) -> AbstractAsyncContextManager[None]:
        """Open it, or a snapshot of it: the relay answers I/O of `handle` until the block is left.

        Entered and left in different tasks.

        Raises:
          VolumeError: it cannot be opened now.
        """
        ...
