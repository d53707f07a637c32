"""A unit on its way to another host."""

from __future__ import annotations

import pytest

from lhblock._native import BLOCK_BYTES, UNIT_BYTES, UNIT_MAP_BYTES, NativeUnit

# The first and the third block, and the last one.
HAS = bytes([0b101, *[0] * (UNIT_MAP_BYTES - 2), 0x80])
EVERY = b"\xff" * UNIT_MAP_BYTES
NONE = bytes(UNIT_MAP_BYTES)
HALF = b"\xf0" * UNIT_MAP_BYTES


@pytest.mark.parametrize(
    ("has", "blocks"),
    [
        (HAS, [1, 1, 1]),
        (EVERY, [UNIT_BYTES // BLOCK_BYTES]),
        (NONE, []),
        (HALF, [4] * UNIT_MAP_BYTES),
    ],
)
def test_runs_are_what_the_map_says(has: bytes, blocks: list[int]) -> None:
    with NativeUnit() as unit:
        unit.maps[:] = has + NONE
        assert [len(run) for run in unit.runs()] == [count * BLOCK_BYTES for count in blocks]


def test_unit_that_was_filled_elsewhere_is_the_same() -> None:
    with NativeUnit() as here, NativeUnit() as there:
        here.maps[:] = HAS + EVERY
        for number, run in enumerate(here.runs()):
            run[:] = bytes([number]) * len(run)
        assert there.hash() != here.hash()
        there.maps[:] = here.maps
        for mine, theirs in zip(there.runs(), here.runs(), strict=True):
            mine[:] = theirs
        assert there.hash() == here.hash()
