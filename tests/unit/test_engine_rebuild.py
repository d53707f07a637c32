"""Parts of a rebuild that need no volume: the plan of the tree, the pace, the note of progress."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lhblock.engine._alignment import parents_first, plan_alignment
from lhblock.engine._throttle import PAUSE_MAX_S, PAUSE_MIN_S, SAMPLE_INTERVAL_S, Throttle
from lhblock.replica import Disk, LayerStamp, RebuildProgress

HEAD = "volume-head-003.img"


def image(name: str) -> str:
    return f"volume-snap-{name}.img"


def tree(*pairs: str, created: str = "then") -> dict[str, Disk]:
    """``"a"`` is the oldest, ``"b<a"`` lies above a."""
    disks = {}
    for pair in pairs:
        name, _, parent = pair.partition("<")
        disks[image(name)] = Disk(
            image(name), parent=image(parent) if parent else "", created=created
        )
    return disks


def head_on(name: str) -> Disk:
    return Disk(HEAD, parent=image(name) if name else "")


def plan(
    source: dict[str, Disk], chain: str, target: dict[str, Disk], below_head: str
) -> tuple[str, str]:
    """What is kept, and what the head becomes, as single letters."""
    head = head_on(below_head)
    made = plan_alignment(source, [image(name) for name in chain], {**target, HEAD: head}, head)
    kept = "".join(sorted(source[name].snapshot for name in made.kept))
    return kept, source[made.head_becomes].snapshot if made.head_becomes else ""


def test_parents_come_first_whatever_the_order() -> None:
    disks = dict(reversed(tree("a", "b<a", "c<b", "x<a").items()))
    names = [disk.snapshot for disk in parents_first(disks)]
    assert names.index("a") < names.index("b") < names.index("c")
    assert names.index("a") < names.index("x")


@pytest.mark.parametrize(
    ("source", "chain", "target", "below_head", "expected"),
    [
        pytest.param(tree("r"), "r", {}, "", ("", "r"), id="new"),
        pytest.param(
            tree("a", "r<a"), "ar", tree("a"), "a", ("a", "r"), id="away while nothing was taken"
        ),
        pytest.param(
            tree("a", "b<a", "c<b", "r<c"), "abcr", tree("a"), "a", ("a", "b"), id="two taken"
        ),
        pytest.param(
            tree("a", "c<a", "r<c"), "acr", tree("a", "b<a"), "b", ("a", "c"), id="one merged away"
        ),
        pytest.param(
            tree("a", "b<a", "r<a"), "ar", tree("a", "b<a"), "b", ("ab", ""), id="reverted since"
        ),
        pytest.param(
            tree("a", "b<a", "r<b"),
            "abr",
            tree("a", created="another time"),
            "a",
            ("", "a"),
            id="a name given again",
        ),
        pytest.param(
            tree("a", "b<a", "r<b"), "abr", tree("b", "a<b"), "a", ("a", "b"), id="turned round"
        ),
    ],
)
def test_target_keeps_what_is_the_same_snapshot(
    source: dict[str, Disk],
    chain: str,
    target: dict[str, Disk],
    below_head: str,
    expected: tuple[str, str],
) -> None:
    assert plan(source, chain, target, below_head) == expected


async def test_rate_is_kept_over_all_streams(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle(1000, lambda: (0, 0))
    began_s = trio.current_time()

    async def stream() -> None:
        for _ in range(10):
            await throttle.admit(500)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream)
        nursery.start_soon(stream)
    # 10 000 bytes, of which one interval may come at once.
    assert 10 - SAMPLE_INTERVAL_S <= trio.current_time() - began_s <= 10


async def test_slow_clients_slow_the_rebuild_down_and_it_never_stops(
    autojump_clock: trio.testing.MockClock,
) -> None:
    totals = [0, 0]
    throttle = Throttle(0, lambda: (totals[0], totals[1]))

    async def interval(latency_s: float) -> None:
        totals[0] += 10
        totals[1] += round(10 * latency_s * 1e9)
        await trio.sleep(SAMPLE_INTERVAL_S)
        await throttle.admit(1)

    await interval(0.001)
    assert throttle.pause_s == 0
    await interval(0.0019)  # slower, and fast enough
    assert throttle.pause_s == 0
    await interval(0.010)
    assert throttle.pause_s == PAUSE_MIN_S
    for _ in range(12):
        await interval(0.010)
    assert throttle.pause_s == PAUSE_MAX_S
    await interval(0.001)
    assert throttle.pause_s == PAUSE_MAX_S / 2
    await trio.sleep(SAMPLE_INTERVAL_S)
    await throttle.admit(1)  # no client at all
    assert throttle.pause_s == 0


def test_progress_is_read_as_it_was_written() -> None:
    stamps = LayerStamp(1, 4096, 5), LayerStamp(2, 4096, 6)
    progress = RebuildProgress("me", {"a": stamps}, "b", stamps[0], 1 << 20)
    assert RebuildProgress.parse(progress.encode()) == progress
    assert RebuildProgress.parse(RebuildProgress().encode()) == RebuildProgress()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"crc32":1,"payload":{}}', b"\xff"])
def test_damaged_progress_is_none(damage: bytes) -> None:
    assert RebuildProgress.parse(damage) == RebuildProgress()


def test_progress_with_one_wrong_bit_is_none() -> None:
    data = RebuildProgress("me", partial="layer", partial_bytes=7).encode()
    wrong = data.replace(b"layer", b"later")
    assert RebuildProgress.parse(wrong) == RebuildProgress()
