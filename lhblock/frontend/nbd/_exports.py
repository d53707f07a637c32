"""What the front end needs from whoever owns the volumes."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from lhblock._native import CloseReason
from lhblock.errors import FrontendError


class UnknownExport(FrontendError):
    """No export of this name is served."""


@dataclass(frozen=True, slots=True)
class ExportDescription:
    """One line of ``NBD_OPT_LIST``.

    Attributes:
      name: what a client asks for; not empty.
      description: text for people; may be empty.
      snapshot: a read-only export of a snapshot. It is never the default export.
    """

    name: str
    description: str = ""
    snapshot: bool = False


class Connection(Protocol):
    """A socket in its transmission phase, in the hands of the C core."""

    async def closed(self) -> CloseReason:
        """Wait until the core has closed the socket; return why.

        Cancelled: the connection goes on, and its volume closes it.
        """
        ...


class Export(Protocol):
    """A volume, or a view of a snapshot, that is open for as long as its context is."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def description(self) -> str: ...

    def attach(self, fd: int, *, structured: bool, base_allocation_id: int | None) -> Connection:
        """Take over a connected, non-blocking socket whose handshake is done.

        On success the descriptor belongs to the export. When this raises, it still belongs to
        the caller.

        Args:
          structured: structured replies were negotiated.
          base_allocation_id: the id the client was told for ``base:allocation``, or None when
            it did not select that context.
        """
        ...


class Exports(Protocol):
    """All exports of a server."""

    def list(self) -> list[ExportDescription]:
        """What ``NBD_OPT_LIST`` shows now."""
        ...

    def open(self, name: str) -> AbstractAsyncContextManager[Export]:
        """Open an export by its full name for as long as the context lasts.

        Raises:
          UnknownExport: on entry; nothing of this name is served.
          LhblockError: on entry; it exists and cannot be used. The client is told the sentence.
        """
        ...


def canonical_name(exports: Exports, name: str) -> str:
    """The full name of what a client asks for: the empty name means the only volume.

    Raises:
      UnknownExport: the name is empty and there is no volume, or more than one.
    """
    if name:
        return name
    volumes = [export.name for export in exports.list() if not export.snapshot]
    if len(volumes) == 1:
        return volumes[0]
    raise UnknownExport(
        f"there is no default export because {len(volumes)} volumes are served; name one"
    )
