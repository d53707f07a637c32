"""``lhblock.generation``: which writes a replica has seen, and which of several replicas to
believe.

A generation is a counter and a uuid. Whoever leaves a replica behind writes a new generation to the
others first, naming the one left, and only then acknowledges what that one missed; so of the
replicas found at start-up those with the newest generation have every acknowledged write.

The file is one JSON object ``{"crc32": n, "payload": {...}}``. The CRC is over the payload as
compact JSON with sorted keys, so that a damaged file is not taken for an old generation.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from lhblock.errors import ReplicaForeign, ReplicaStale
from lhblock.replica._metadata import MalformedError

GENERATION_NAME = "lhblock.generation"
HISTORY_MAX = 64
MEMBERS_MAX = 64
UNSERVED = 0
"""Counter of a generation under which nothing was served yet."""

OPENED = "opened"
"""Reason of a generation that changes no member."""

_VERSION = 1
_TEXT_CHARS_MAX = 1000
_NANOSECONDS = 1_000_000_000

_T = TypeVar("_T")


@dataclass(frozen=True)
class HeadFingerprint:
    """The head image as the last clean close left it."""

    name: str
    size: int
    mtime_ns: int
    blocks: int

    @classmethod
    def of(cls, name: str, state: os.stat_result) -> HeadFingerprint:
        """Take it from a file that has been synced: times and blocks move before that."""
        return cls(name, state.st_size, state.st_mtime_ns, state.st_blocks)

    def matches(self, now: HeadFingerprint) -> bool:
        """Whether nobody wrote in between. A copy that kept whole seconds only is no write."""
        same_time = self.mtime_ns == now.mtime_ns or (
            now.mtime_ns % _NANOSECONDS == 0
            and now.mtime_ns // _NANOSECONDS == self.mtime_ns // _NANOSECONDS
        )
        return same_time and (self.name, self.size, self.blocks) == (
            now.name,
            now.size,
            now.blocks,
        )


@dataclass(frozen=True)
class HistoryEntry:
    """One generation that was: the last entry is the present one.

    ``agreed`` are members of the one before that are not among those that go on, and that agreed
    to it all the same: a generation counts once enough of the members before it have it or agreed.
    """

    counter: int
    uuid: str
    time: str
    reason: str
    members: tuple[str, ...]
    left: tuple[str, ...]
    agreed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What one replica knows of its volume and of the others.

    ``members`` are the replica ids that have every write of this generation. ``head`` is None while
    the directory is open for writing. ``torn`` and ``written_elsewhere`` are what an open found and
    nobody has made good since; see ``ReplicaDirectory``. ``activity`` is the id of the activity log
    under which the volume was opened last; empty: there is none.
    """

    volume_id: str
    replica_id: str
    counter: int
    generation: str
    history: tuple[HistoryEntry, ...]
    members: tuple[str, ...]
    head: HeadFingerprint | None = None
    torn: bool = False
    written_elsewhere: str = ""
    activity: str = ""
    version: int = _VERSION

    def encode(self) -> bytes:
        """The bytes of the file."""
        payload = _canonical(asdict(self))
        return b'{"crc32":%d,"payload":%s}\n' % (zlib.crc32(payload), payload)

    @classmethod
    def parse(cls, data: bytes) -> Generation:
        """Read the file.

        Raises:
          MalformedError: says what cannot be.
        """
        try:
            outer = json.loads(data)
            payload = outer["payload"]
            if outer["crc32"] != zlib.crc32(_canonical(payload)):
                raise MalformedError("does not match its checksum")
            if payload["version"] != _VERSION:
                raise MalformedError(f"has version {payload['version']!r:.40}, not {_VERSION}")
            return cls._from_payload(payload)
        except MalformedError:
            raise
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise MalformedError("cannot be understood") from error

    @classmethod
    def _from_payload(cls, payload: Mapping[str, Any]) -> Generation:
        head = payload["head"]
        return cls(
            volume_id=_uuid(payload["volume_id"]),
            replica_id=_uuid(payload["replica_id"]),
            counter=_count(payload["counter"]),
            generation=_uuid(payload["generation"]),
            history=_several(payload["history"], _history_entry, HISTORY_MAX),
            members=_several(payload["members"], _uuid, MEMBERS_MAX),
            head=None
            if head is None
            else HeadFingerprint(
                _text(head["name"]),
                _count(head["size"]),
                _count(head["mtime_ns"]),
                _count(head["blocks"]),
            ),
            torn=payload["torn"] is True,
            written_elsewhere=_text(payload["written_elsewhere"]),
            activity=_uuid_or_none(payload.get("activity", "")),
        )

    def with_agreement(self, agreed: Collection[str]) -> Generation:
        """The same, saying who agreed to it beside those that have it."""
        last = replace(self.history[-1], agreed=tuple(sorted(agreed)))
        return replace(self, history=(*self.history[:-1], last))

    def knows(self, counter: int, generation: str) -> bool | None:
        """Whether that generation came before this one; None when it is too long ago to tell."""
        for entry in self.history:
            if entry.counter == counter:
                return entry.uuid == generation
        return None


def _canonical(payload: object) -> bytes:
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_CHARS_MAX:
        raise MalformedError(f"holds {value!r:.80} where a text belongs")
    return value


def _uuid(value: object) -> str:
    return str(uuid.UUID(_text(value)))


def _uuid_or_none(value: object) -> str:
    return _uuid(value) if value else ""


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise MalformedError(f"holds {value!r:.80} where a count belongs")
    return value


def _several(value: object, item: Callable[[Any], _T], maximum: int) -> tuple[_T, ...]:
    if not isinstance(value, list) or len(value) > maximum:
        raise MalformedError(f"holds {value!r:.80} where a list of up to {maximum} belongs")
    return tuple(item(each) for each in value)


def _history_entry(value: Mapping[str, Any]) -> HistoryEntry:
    return HistoryEntry(
        counter=_count(value["counter"]),
        uuid=_uuid(value["uuid"]),
        time=_text(value["time"]),
        reason=_text(value["reason"]),
        members=_several(value["members"], _uuid, MEMBERS_MAX),
        left=_several(value["left"], _uuid, MEMBERS_MAX),
        agreed=_several(value.get("agreed", []), _uuid, MEMBERS_MAX),
    )


def quorum(members: int) -> int:
    """How many of a generation's members have to be there, for a volume to be opened or to go on
    without the others: the majority of three and more, so that any two such sets have one in
    common. One of one and two, where a majority would be all of them."""
    return members // 2 + 1 if members > 2 else 1


def have_quorum(replica_ids: Collection[str], members: Collection[str]) -> bool:
    """Whether enough of some members are among these replicas."""
    return len(set(members).intersection(replica_ids)) >= quorum(len(members))


def new_set(count: int, *, time: str, counter: int = 1) -> tuple[Generation, ...]:
    """The first generation of a volume, one per replica.

    Args:
      counter: ``UNSERVED`` for directories that exist already: a crash may leave some of them
        without a generation, which is no harm as long as none was served with one.
    """
    assert 1 <= count <= MEMBERS_MAX, count
    volume_id, generation = str(uuid.uuid4()), str(uuid.uuid4())
    members = tuple(str(uuid.uuid4()) for _ in range(count))
    history = (HistoryEntry(counter, generation, time, "created", members, ()),)
    return tuple(
        Generation(volume_id, member, counter, generation, history, members) for member in members
    )


def supersede(
    survivors: Sequence[Generation],
    *,
    left: Collection[str],
    reason: str,
    time: str,
    joined: Collection[str] = (),
) -> tuple[Generation, ...]:
    """The generation that leaves replicas behind (or takes some in), one per survivor.

    Nothing that a replica in ``left`` missed may be acknowledged before all of these are durable.
    One that only says ``OPENED`` again takes the place of the last entry of the history, so that
    opening a volume often does not push out who was left behind.

    Args:
      survivors: the present generations of the replicas that go on, all the same one.
      left: replica ids left behind; none of a survivor.
      joined: replica ids that have become complete and belong to it from now on.
    """
    first = survivors[0]
    for other in survivors:
        assert (other.volume_id, other.counter, other.generation) == (
            first.volume_id,
            first.counter,
            first.generation,
        ), "survivors of different generations"
        assert other.replica_id not in left, "a survivor is left behind"
    generation = str(uuid.uuid4())
    members = tuple(dict.fromkeys([*(each for each in first.members if each not in left), *joined]))
    entry = HistoryEntry(
        first.counter + 1, generation, time, reason[:_TEXT_CHARS_MAX], members, tuple(left)
    )
    return tuple(
        replace(
            each,
            counter=entry.counter,
            generation=generation,
            members=members,
            history=(*_before(each.history, entry), entry)[-HISTORY_MAX:],
        )
        for each in survivors
    )


def _before(history: tuple[HistoryEntry, ...], entry: HistoryEntry) -> tuple[HistoryEntry, ...]:
    last = history[-1]
    again = entry.reason == last.reason == OPENED and last.members == entry.members
    return history[:-1] if again else history


class Candidate(Protocol):
    """A replica found at start-up; ``ReplicaDirectory`` is one."""

    @property
    def label(self) -> str:
        """What messages call it: its path or address."""

    @property
    def generation(self) -> Generation | None:
        """None: it was never ours."""

    @property
    def written_elsewhere(self) -> str:
        """Why another program must have written to it since the last close; empty: none did."""


@dataclass(frozen=True)
class Stale:
    """A replica that must not be read."""

    index: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """Which candidates (by index) to believe.

    ``newest`` have every acknowledged write. ``lagging`` have them too, but a fence that was under
    way at the crash did not reach them: they count as members and are to be made equal to a newest
    one before use. ``members`` are those of whom a quorum is needed. ``stale`` lack writes; it may
    be all of them, when those that have the writes are not there. ``doubt`` says why it cannot be
    known which generation counts; "" if it can.
    """

    newest: tuple[int, ...]
    lagging: tuple[int, ...]
    stale: tuple[Stale, ...]
    members: tuple[str, ...] = ()
    doubt: str = ""


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Decide which replicas of a volume to believe.

    Raises:
      ReplicaForeign: they are not of one volume, one lacks a generation, or two are copies of each
        other. ReplicaStale: they were written separately (split): no choice is right, the user has
        to make it.
    """
    assert candidates
    present = [(index, each.generation) for index, each in enumerate(candidates) if each.generation]
    begun = len(present) < len(candidates)
    if begun and all(generation.counter == UNSERVED for _, generation in present):
        _refuse_partly_written(candidates, range(len(candidates)))
        return Choice(tuple(range(len(candidates))), (), ())
    _refuse_strangers(candidates, present)
    generations = [generation for _, generation in present]
    # One that recorded that others go on without it does not speak for them.
    own = [each for each in generations if each.replica_id in each.members]
    best = max(own or generations, key=lambda each: each.counter)
    for generation in own:
        if _went_apart(best, generation) and _has_counted(generation, best, generations):
            best = generation
    members, doubt = _counting_members(best, generations)
    newest: list[int] = []
    lagging: list[int] = []
    stale: list[Stale] = []
    for index, generation in present:
        if generation.replica_id not in generation.members:
            reason = f"generation {generation.counter} goes on without it"
            stale.append(Stale(index, reason + _when_left(generation, generation.replica_id)))
            continue
        if _went_apart(best, generation) and never_counted(generation, best):
            reason = f"its generation {generation.counter} was agreed to by too few to count"
            stale.append(Stale(index, reason))
            continue
        if _went_apart(best, generation):
            other = next(i for i, each in present if each is best)
            raise ReplicaStale(
                candidates[index].label,
                f"and {candidates[other].label} were each written without the other since "
                f"generation {generation.counter - 1}; decide which to keep and open the volume "
                "without the other",
            )
        if generation.counter == best.counter:
            newest.append(index)
        elif generation.counter == best.counter - 1 and generation.replica_id in members:
            lagging.append(index)
        else:
            stale.append(
                Stale(
                    index,
                    f"has generation {generation.counter} while {best.counter} is the newest"
                    + _when_left(best, generation.replica_id),
                )
            )
    _refuse_partly_written(candidates, newest)
    return Choice(tuple(newest), tuple(lagging), tuple(stale), members, doubt)


def _counting_members(
    best: Generation, present: Sequence[Generation]
) -> tuple[tuple[str, ...], str]:
    """The members of the newest generation that counts, and why that is not certain.

    A generation counts when enough members of the one before it have it, or agreed to it. One that
    was cut short does not: nothing was acknowledged that those it leaves behind have missed. It is
    known to be one when the members without it leave too few others.
    """
    if len(best.history) < 2:
        return best.members, ""
    before, last = best.history[-2:]
    if _enough(before, last, present):
        return best.members, ""
    lacking = {
        each.replica_id for each in present if each.knows(last.counter, last.uuid) is not True
    }
    if not have_quorum(set(before.members) - lacking, before.members):
        return before.members, ""
    return best.members, (
        f"too few of the {len(before.members)} members of generation {before.counter} are there to "
        f"know whether {last.counter} counts"
    )


def _enough(before: HistoryEntry, entry: HistoryEntry, present: Sequence[Generation]) -> bool:
    have = {each.replica_id for each in present if each.knows(entry.counter, entry.uuid)}
    if have.intersection(entry.members) - set(before.members):
        return True  # who joins gets it last
    return have_quorum(have.union(entry.agreed), before.members)


def _branch(generation: Generation, other: Generation) -> tuple[HistoryEntry, HistoryEntry] | None:
    """The last generation that both come from, and the first of one's own; None: it is not kept."""
    for before, entry in pairwise(generation.history):
        if other.knows(before.counter, before.uuid) and not other.knows(entry.counter, entry.uuid):
            return before, entry
    return None


def _has_counted(generation: Generation, other: Generation, present: Sequence[Generation]) -> bool:
    """Whether what sets a generation apart counts, and what sets the other one apart does not."""
    mine, theirs = _branch(generation, other), _branch(other, generation)
    if mine is None or theirs is None:
        return False
    return _enough(*mine, present) and not _enough(*theirs, present)


def never_counted(generation: Generation, served: Generation) -> bool:
    """Whether a generation that went apart from one that counts cannot have counted itself.

    Of one generation only one next one can, if any two quorums have a member in common and nobody
    was forced. Then nothing was acknowledged that only the replicas of the other one have.
    """
    mine, theirs = _branch(generation, served), _branch(served, generation)
    if mine is None or theirs is None or mine[0].uuid != theirs[0].uuid:
        return False
    before = set(mine[0].members)
    forced = any(before <= set(entry.agreed) for entry in (mine[1], theirs[1]))
    return 2 * quorum(len(before)) > len(before) and not forced


def _went_apart(best: Generation, other: Generation) -> bool:
    """Whether ``other`` has a generation that did not come before ``best``."""
    if best.knows(other.counter, other.generation) is False:
        return True
    # Its own generation may be too long ago for the history, or one of many opens.
    return any(
        best.replica_id in entry.left and best.knows(entry.counter, entry.uuid) is not True
        for entry in other.history
    )


def _when_left(best: Generation, replica_id: str) -> str:
    for entry in best.history:
        if replica_id in entry.left:
            return f"; left behind at {entry.time} ({entry.reason})"
    return ""


def _refuse_strangers(
    candidates: Sequence[Candidate], present: Sequence[tuple[int, Generation]]
) -> None:
    for candidate in candidates:
        if candidate.generation is None:
            raise ReplicaForeign(
                candidate.label,
                f"has no {GENERATION_NAME} while others of the volume have: what it missed is "
                "unknown",
            )
    first_index, first = present[0]
    seen: dict[str, int] = {}
    for index, generation in present:
        label = candidates[index].label
        if generation.volume_id != first.volume_id:
            raise ReplicaForeign(
                label,
                f"belongs to volume {generation.volume_id} and {candidates[first_index].label} to "
                f"{first.volume_id}",
            )
        twin = seen.setdefault(generation.replica_id, index)
        if twin != index:
            raise ReplicaForeign(label, f"is a copy of {candidates[twin].label}; give only one")


def _refuse_partly_written(candidates: Sequence[Candidate], among: Sequence[int]) -> None:
    written = [index for index in among if candidates[index].written_elsewhere]
    if written and len(written) < len(among):
        clean = next(index for index in among if index not in written)
        raise ReplicaStale(
            candidates[written[0]].label,
            f"{candidates[written[0]].written_elsewhere}, but not {candidates[clean].label}; "
            "decide which to keep and open the volume without the other",
        )
