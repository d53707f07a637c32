"""What a way to make a block device has to offer. Each way is one file beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lhblock.device._host import Host
from lhblock.device._target import AttachOptions, Target


@dataclass(frozen=True)
class Attached:
    """A device that shows a volume.

    Attributes:
      device: its path.
      kind: the way it was made.
      identity: of the volume, see `Target`.
      made: by the call that returned this; False when it was there.
    """

    device: Path
    kind: str
    identity: str
    size_bytes: int
    made: bool = False


class Kind(Protocol):
    """One way to make a block device of a served volume."""

    name: str

    def lacks(self, target: Target) -> str | None:
        """Why this way cannot reach the volume; None if it can."""
        ...

    def obstacle(self, host: Host) -> str | None:
        """What stands in the way on this host, and what to do about it; None if nothing does."""
        ...

    def devices(self, host: Host) -> list[Attached]:
        """Every device of this kind that one of our volumes is attached as."""
        ...

    def attach(self, host: Host, target: Target, options: AttachOptions) -> Attached:
        """Make the device, or mend the one that is there: connections, size, whoever keeps it.

        Raises:
          DeviceError: it cannot be done; nothing is left behind.
        """
        ...

    def detach(self, host: Host, attached: Attached) -> None:
        """Take the device away.

        Raises:
          DeviceBusy: something uses it.
        """
        ...
