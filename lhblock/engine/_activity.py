"""The activity log of a volume: what replicas may differ in after a crash, and who lets it shrink.

docs/internals/activity-log.md has the rule and the reasons. The core writes the log; here it is
read at an opening, and every round extents turn cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lhblock._native import ActivityMap, ActivityState, Extent, NativeVolume
from lhblock.engine._member import Member
from lhblock.engine._threads import run_io
from lhblock.errors import NativeError, ReplicaError

ROUND_S: Final = 30.0
"""Extents that were not written for so long turn cold."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Differences:
    """Where replicas may differ.

    Attributes:
      ranges: of the volume, in order.
      why: everything is to be compared; "" if the activity logs say where.
    """

    ranges: Sequence[Extent]
    why: str

    @property
    def length_bytes(self) -> int:
        """Of all ranges together."""
        return sum(each.length_bytes for each in self.ranges)


def find_differences(members: Sequence[Member], size_bytes: int) -> Differences:
    """Read the activity logs of replicas that are believed and were not closed cleanly. Blocking.

    Args:
      members: open, of generations that say who was served with which log.
      size_bytes: of the volume.
    """
    hot = ActivityMap(size_bytes)
    why = _read_logs(members, hot)
    return Differences([Extent(0, size_bytes)] if why else hot.ranges(), why)


def _read_logs(members: Sequence[Member], hot: ActivityMap) -> str:
    """Why the logs cannot be believed; "" if they can."""
    for member in members:
        if member.records.written_elsewhere:
            return f"another program has written to {member.address}"
    ids = {member.generation.activity for member in members}
    if len(ids) > 1:
        return "the replicas were not opened with one activity log"
    log_id = ids.pop()
    if not log_id:
        return "the volume was opened without an activity log"
    states: list[ActivityState] = []
    for member in members:
        try:
            state = hot.add(member.read_activity(), log_id)
        except ReplicaError as error:
            return f"the activity log of {member.address} cannot be read: {error.sentence}"
        if state.pages_lost == state.pages:
            return f"{member.address} has no activity log of its last opening"
        states.append(state)
    sequences = [state.sequence for state in states]
    if (
        max(sequences) - min(sequences) > 1  # nobody is further behind than one that is written
        and len({state.coolings for state in states}) > 1
    ):
        return "the activity logs of the replicas are of different moments"
    return ""


class ActivityRounds:
    """Lets extents of one open volume turn cold.

    Args:
      name: the volume's, for messages.
      native: records changes in an activity log.
    """

    def __init__(self, name: str, native: NativeVolume) -> None:
        self._name = name
        self._native = native
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def run(self) -> None:
        """Have a round every ``ROUND_S`` seconds until :meth:`stop`."""
        try:
            with self._scope:
                while True:
                    await trio.sleep(ROUND_S)
                    await self.round()
        finally:
            self._stopped.set()

    async def round(self) -> int:
        """Let extents turn cold that were not written since the last round; return how many.

        Cancelled before its thread starts: nothing was done. After that it is carried through.
        """
        try:
            return await run_io(self._native.cool_activity)
        except NativeError as error:
            # They stay hot: a crash would have more to compare.
            log.warning("activity log", volume=self._name, reason=str(error))
            return 0

    async def stop(self) -> None:
        """End :meth:`run`, which was started, and wait until its last round is over."""
        self._scope.cancel()
        await self._stopped.wait()
