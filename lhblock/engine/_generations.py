"""New generations for the members of an open volume."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lhblock.engine._clock import utc_now
from lhblock.engine._member import Member
from lhblock.replica import Generation, supersede


def leave_behind(
    survivors: Sequence[Member], left: Collection[str], reason: str, *, joined: Collection[str] = ()
) -> dict[Member, Generation]:
    """The generation that each survivor has to make durable before ``left`` counts as stale.

    Args:
      survivors: members that go on; all hold the same generation.
      left: replica ids.
      reason: kept in the history, for people.
      joined: replica ids of survivors that were left behind before and are believed again.
    """
    present = [member.generation for member in survivors]
    made = supersede(present, left=left, joined=joined, reason=reason, time=utc_now())
    return dict(zip(survivors, made, strict=True))


def let_in(
    survivors: Sequence[Member], joined: Collection[str], reason: str
) -> dict[Member, Generation]:
    """The generation that each survivor has to make durable before ``joined`` count as members.

    Args: as :func:`leave_behind`.
    """
    present = [member.generation for member in survivors]
    made = supersede(present, left=[], joined=joined, reason=reason, time=utc_now())
    return dict(zip(survivors, made, strict=True))
