"""Is a history of concurrent requests one that a block device may produce?

Every block of 4096 bytes is a register of its own: its history must agree with some order of the
requests on it in which no request comes before one that had ended when it began (Herlihy and Wing).
The search is that of Wing and Gong with Lowe's memory of visited states; reads are placed as soon
as they fit, which loses nothing because they change nothing.

A write that failed, or whose answer was lost, may have taken effect at any time or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK = 4096
NEVER = math.inf
WRONG_BYTES_LOOKED_AT = 8  # two tags: enough that another write has them by chance only seldom


class NotLinearizable(AssertionError):
    """No order of the requests explains what was read."""


@dataclass(frozen=True, slots=True)
class Access:
    """What one request did to one block.

    Attributes:
      begun: before this moment it cannot have taken effect.
      ended: after this moment it must have; ``NEVER`` when its fate is unknown.
      writes: it stored ``data``; otherwise it found ``data``.
      start: where in the block.
      data: the bytes.
    """

    begun: int
    ended: float
    writes: bool
    start: int
    data: bytes

    def fits(self, content: bytes) -> bool:
        """A read that may happen in this state."""
        return content[self.start : self.start + len(self.data)] == self.data

    def applied(self, content: bytes) -> bytes:
        """The state after a write."""
        return content[: self.start] + self.data + content[self.start + len(self.data) :]

    def __str__(self) -> str:
        kind = "write" if self.writes else "read "
        when = f"{self.begun}..{'?' if self.ended == NEVER else self.ended}"
        return f"{when:>12} {kind} [{self.start}+{len(self.data)}] {shorten(self.data)}"


def shorten(data: bytes) -> str:
    """Runs of equal 4-byte tags, so that a torn block shows where it is torn."""
    runs: list[tuple[str, int]] = []
    for place in range(0, len(data), 4):
        word = data[place : place + 4].hex()
        if runs and runs[-1][0] == word:
            runs[-1] = (word, runs[-1][1] + 1)
        else:
            runs.append((word, 1))
    shown = " ".join(f"{word}*{count}" for word, count in runs[:6])
    return shown + (" ..." if len(runs) > 6 else "")


def is_linearizable(initial: bytes, history: Iterable[Access]) -> bool:
    """Say whether some order of the accesses of one block explains every read."""
    # A read without an answer saw nothing, so nothing has to explain it.
    accesses = sorted(
        (access for access in history if access.writes or access.ended != NEVER),
        key=lambda access: access.begun,
    )
    required = sum(1 << number for number, access in enumerate(accesses) if access.ended != NEVER)
    visited: set[tuple[int, bytes]] = set()
    left = [(0, initial)]
    while left:
        placed, content = left.pop()
        placed, open_ = _place_reads(accesses, placed, content)
        if placed & required == required:
            return True
        if (placed, content) in visited or not _has_a_future(accesses, placed, content, open_):
            continue
        visited.add((placed, content))
        candidates = [number for number in open_ if accesses[number].writes]
        # The last one pushed is tried first: the one that had to end first is the best guess.
        candidates.sort(key=lambda number: -accesses[number].ended)
        left += [(placed | 1 << number, accesses[number].applied(content)) for number in candidates]
    return False


def _place_reads(accesses: list[Access], placed: int, content: bytes) -> tuple[int, list[int]]:
    """Place every read that may be next and fits; return what else may be next."""
    while True:
        horizon = NEVER
        open_: list[int] = []
        for number, access in enumerate(accesses):
            if access.begun > horizon:
                break
            if not placed >> number & 1:
                open_.append(number)
                horizon = min(horizon, access.ended)
        open_ = [number for number in open_ if accesses[number].begun <= horizon]
        fitting = [
            number
            for number in open_
            if not accesses[number].writes and accesses[number].fits(content)
        ]
        if not fitting:
            return placed, open_
        for number in fitting:
            placed |= 1 << number


def _has_a_future(accesses: list[Access], placed: int, content: bytes, open_: list[int]) -> bool:
    """Whether every read that may be next could still be made to fit.

    A byte that it found and that is not there must come from a write that is not placed yet.
    Without this, a wrong guess is refuted only after every order of the writes of unknown fate.
    """
    for number in open_:
        read = accesses[number]
        if read.writes:
            continue
        wrong = [
            (read.start + place, byte)
            for place, byte in enumerate(read.data)
            if content[read.start + place] != byte
        ][:WRONG_BYTES_LOOKED_AT]
        for place, byte in wrong:
            if not any(
                write.writes
                and not placed >> other & 1
                and write.begun < read.ended
                and 0 <= place - write.start < len(write.data)
                and write.data[place - write.start] == byte
                for other, write in enumerate(accesses)
            ):
                return False
    return True


@dataclass
class Request:
    """A request of a history, not yet cut into blocks."""

    begun: int
    writes: bool
    offset: int
    data: bytes
    ended: float = NEVER


@dataclass
class History:
    """Requests on a device in the order in which their client saw them begin and end.

    The clock counts those moments. All clients share the thread that reads it, so a request that
    ended before another began has the smaller number.
    """

    requests: list[Request] = field(default_factory=list)
    _now: int = 0

    def tick(self) -> int:
        """The next moment."""
        self._now += 1
        return self._now

    def begin_write(self, offset: int, data: bytes) -> Request:
        """Call before the first byte is sent; zeroing and trimming are writes of zeroes."""
        request = Request(self.tick(), True, offset, data)
        self.requests.append(request)
        return request

    def begin_read(self, offset: int) -> Request:
        """Call before the request is sent."""
        request = Request(self.tick(), False, offset, b"")
        self.requests.append(request)
        return request

    def end(self, request: Request, data: bytes | None = None) -> None:
        """Call when the request succeeded; one that failed is left as it is."""
        request.ended = self.tick()
        if data is not None:
            request.data = data

    def accesses(self, block: int) -> list[Access]:
        """What happened to one block."""
        first, last = block * BLOCK, (block + 1) * BLOCK
        found = []
        for request in self.requests:
            start = max(request.offset, first)
            end = min(request.offset + len(request.data), last)
            if start < end:
                data = request.data[start - request.offset : end - request.offset]
                found.append(
                    Access(request.begun, request.ended, request.writes, start - first, data)
                )
        return found

    def check(self, initial: bytes) -> None:
        """Check every block against the content before the first request.

        Raises:
          NotLinearizable: with the history of the first block that cannot be explained.
        """
        for block in range(math.ceil(len(initial) / BLOCK)):
            content = initial[block * BLOCK : (block + 1) * BLOCK]
            accesses = self.accesses(block)
            if not is_linearizable(content, accesses):
                lines = "\n".join(str(access) for access in accesses)
                raise NotLinearizable(
                    f"block {block}, at first {shorten(content)}, has no order of\n{lines}"
                )
