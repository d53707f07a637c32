"""The checker itself: histories that are known to be good, and ones that must be refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.linearizability import (
    BLOCK,
    NEVER,
    Access,
    History,
    NotLinearizable,
    is_linearizable,
)

pytestmark = pytest.mark.model

EMPTY = bytes(BLOCK)


def write(begun: int, ended: float, byte: int, start: int = 0, length: int = BLOCK) -> Access:
    return Access(begun, ended, True, start, bytes([byte]) * length)


def read(begun: int, ended: float, byte: int, start: int = 0, length: int = BLOCK) -> Access:
    return Access(begun, ended, False, start, bytes([byte]) * length)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="nothing"),
        pytest.param([read(1, 2, 0)], id="initial content"),
        pytest.param([write(1, 2, 7), read(3, 4, 7)], id="one after the other"),
        pytest.param([write(1, 4, 7), read(2, 3, 0)], id="a read that overlaps sees old"),
        pytest.param([write(1, 4, 7), read(2, 3, 7)], id="or new"),
        pytest.param([write(1, 4, 7), write(2, 3, 8), read(5, 6, 7)], id="overlapping writes"),
        pytest.param([write(1, 4, 7), write(2, 3, 8), read(5, 6, 8)], id="in either order"),
        pytest.param([write(1, NEVER, 7), read(2, 3, 0), read(4, 5, 7)], id="unknown, late"),
        pytest.param([write(1, NEVER, 7), read(2, 3, 0)], id="unknown, never"),
        pytest.param([read(1, NEVER, 9)], id="a read without an answer"),
        pytest.param(
            [write(1, 2, 7, 0, 100), write(3, 4, 8, 100, 100), read(5, 6, 7, 50, 50)],
            id="parts of a block",
        ),
    ],
)
def test_history_that_some_order_explains_is_accepted(history: list[Access]) -> None:
    assert is_linearizable(EMPTY, history)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([read(1, 2, 1)], id="out of thin air"),
        pytest.param([write(1, 2, 7), read(3, 4, 0)], id="a stale read"),
        pytest.param([write(1, 2, 7), write(3, 4, 8), read(5, 6, 7)], id="a lost write"),
        pytest.param([write(1, 6, 7), read(2, 3, 7), read(4, 5, 0)], id="back to the old"),
        pytest.param(
            [write(1, 8, 7), write(2, 9, 8), read(3, 4, 7), read(5, 6, 8), read(7, 10, 7)],
            id="an order that changes its mind",
        ),
        pytest.param(
            [
                write(1, 2, 7),
                Access(3, 4, False, 0, bytes([7]) * 2048 + bytes(2048)),
            ],
            id="a torn block",
        ),
        pytest.param(
            [
                write(1, 9, 7),
                write(2, 10, 8),
                Access(11, 12, False, 0, bytes([7]) * 2048 + bytes([8]) * 2048),
            ],
            id="halves of two writes",
        ),
        pytest.param(
            [write(1, NEVER, 7), read(2, 3, 7), read(4, 5, 0)], id="unknown, once seen, gone"
        ),
        pytest.param(
            [write(1, 2, 7, 0, 100), write(3, 4, 8, 50, 100), read(5, 6, 7, 0, 100)],
            id="an overlap of parts that is lost",
        ),
    ],
)
def test_history_that_no_order_explains_is_refused(history: list[Access]) -> None:
    assert not is_linearizable(EMPTY, history)


def by_trying_every_order(history: list[Access]) -> bool:
    """The definition, for histories of a few requests without unknown ones."""
    for order in itertools.permutations(history):
        if any(b.ended < a.begun for a, b in itertools.combinations(order, 2)):
            continue
        content = EMPTY
        for access in order:
            if access.writes:
                content = access.applied(content)
            elif not access.fits(content):
                break
        else:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 2), st.sampled_from([(0, BLOCK), (0, 9), (5, 9)])),
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_checker_says_what_the_definition_says(
    kinds: list[tuple[bool, int, tuple[int, int]]], random: object
) -> None:
    moments = [number for number in range(len(kinds)) for _ in range(2)]
    random.shuffle(moments)  # type: ignore[attr-defined]
    history = []
    for number, (writes, byte, (start, length)) in enumerate(kinds):
        begun = moments.index(number)
        ended = moments.index(number, begun + 1)
        history.append(
            Access(begun, ended, writes, start, bytes([byte if writes else byte - 1]) * length)
        )
    assert is_linearizable(EMPTY, history) == by_trying_every_order(history)


def test_long_history_of_many_clients_is_checked_quickly() -> None:
    # Eight writes at a time overlap all others of their round; a wrong order is found only by
    # remembering visited states, since 8! orders in each of 12 rounds are too many.
    history = []
    for round_ in range(12):
        base = round_ * 100
        history += [write(base + n, base + 50 + n, (round_ * 8 + n) % 251 + 1) for n in range(8)]
        history.append(read(base + 60, base + 61, (round_ * 8 + round_ % 8) % 251 + 1))
    assert is_linearizable(EMPTY, history)
    assert not is_linearizable(EMPTY, [*history, read(6000, 6001, 252)])


def test_request_over_several_blocks_is_judged_block_by_block() -> None:
    history = History()
    request = history.begin_write(BLOCK - 1, b"ab")
    history.end(request)
    for offset, data in ((BLOCK - 1, b"a"), (BLOCK, b"b")):
        seen = history.begin_read(offset)
        history.end(seen, data)
    history.check(bytes(2 * BLOCK))
    seen = history.begin_read(BLOCK)
    history.end(seen, b"x")
    with pytest.raises(NotLinearizable, match="block 1"):
        history.check(bytes(2 * BLOCK))
