"""What a member that left may lack, so that its rebuild compares that and no more.

docs/internals/rebuild.md, section "Only what changed", has the argument. In short: the core records
every range that changes from the moment it drops a replica. Layers that the replica had then can
differ in those ranges only, if it still has what it acknowledged before; layers made since are
copied as always. Whoever doubts any of it says why, and everything is compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from lhblock._native import UNIT_BYTES, Extent
from lhblock.engine._alignment import Alignment
from lhblock.replica import Disk

CLOCK_SLACK_S: Final = 2.0
"""How far two looks at another host's clock may differ by the time that the calls took."""
CLOCK_DRIFT: Final = 1e-4
"""How much slower than ours its clock may be; those of computers are right to 5e-5."""

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Witness:
    """What tells that a host has kept the page cache of a directory, and has not been set back.

    Attributes:
      boot_id: the kernel's, another one after every boot.
      place: the directory itself and the mount that it lies on; a copy is another one.
      up_s: the host's time since boot, suspended or not.
      seen_s: ours when it was asked.
    """

    boot_id: str
    place: str
    up_s: float
    seen_s: float

    @classmethod
    def of(cls, directory: Path) -> Self:
        """This host's. Blocking. Raises OSError."""
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            mount = "".join(line.split()[1] for line in lines if line.startswith("mnt_id:"))
            state = os.fstat(fd)
        finally:
            os.close(fd)
        return cls(
            _BOOT_ID.read_text().strip(), f"{state.st_dev}:{state.st_ino}:{mount}", now_s, now_s
        )

    def why_not(self, later: Witness) -> str:
        """Why a host of which this was true may have lost something since; "" if it has not."""
        if self.boot_id != later.boot_id:
            return "its host was started anew"
        if self.place != later.place:
            return "its directory is another one, or on another mount"
        passed_s = later.seen_s - self.seen_s
        if later.up_s - self.up_s < passed_s - CLOCK_SLACK_S - passed_s * CLOCK_DRIFT:
            return "its host's clock was set back or stood still"
        return ""


@dataclass
class Missed:
    """What is known of a member since it left; of one engine, and gone with it.

    Attributes:
      tracker_id: under which the core records changes.
      images: the frozen layers that the member had, and later what its head became.
      head: its head; "" once it has become one of the images.
      witness: of its host, while it took part; None if nobody can tell.
      doubt: why everything has to be compared all the same; "" if nothing speaks for it.
    """

    tracker_id: int
    images: frozenset[str]
    head: str
    witness: Witness | None
    doubt: str = ""

    def find_doubt(
        self,
        disks: Mapping[str, Disk],
        head: str,
        alignment: Alignment,
        witness: Witness | None,
        *,
        same_size: bool,
    ) -> str:
        """Why a member that came back may not have what it had; "" if nothing speaks for it.

        Args:
          disks: what it has now, before it is aligned.
          head: the one of them that is its head.
          alignment: what is about to become of them.
          witness: of its host now.
          same_size: it is as large as the volume.
        """
        if self.witness is None or witness is None:
            return "its process does not say whether its host was started anew"
        if why := self.witness.why_not(witness):
            return why
        if not same_size:
            return "the volume was expanded"
        if self.head and (self.head != head or self.images | {head} != disks.keys()):
            return "it has other layers than when it left"
        if not self.images <= alignment.kept:
            return "snapshots that it has are gone"
        return ""

    def aligned(self, alignment: Alignment) -> None:
        """Its head is one of the images now, or was given up."""
        if self.head:
            grown = {alignment.head_becomes} if alignment.head_becomes else set()
            self.images, self.head = self.images | grown, ""


def units_of(extents: Iterable[Extent]) -> Collection[int]:
    """Begins of the units that any extent touches."""
    return {
        unit * UNIT_BYTES
        for extent in extents
        for unit in range(
            extent.offset_bytes // UNIT_BYTES,
            -(-(extent.offset_bytes + extent.length_bytes) // UNIT_BYTES),
        )
    }
