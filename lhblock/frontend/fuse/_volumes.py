"""What the front end wants to know of volumes, whoever serves them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview


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


class OpenFile(Protocol):
    """A volume or a snapshot that is open. A failure is an error of ours or an `OSError`."""

    @property
    def size_bytes(self) -> int: ...

    async def read(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill block-aligned memory from a range within the file."""
        ...

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool) -> None: ...

    async def flush(self) -> None: ...


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

    def open(self, name: str, snapshot: str | None) -> AbstractAsyncContextManager[OpenFile]:
        """Open it, or a snapshot of it. Entered and left in different tasks.

        Raises:
          VolumeError: it cannot be opened now.
        """
        ...
