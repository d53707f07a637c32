"""A unit on its way to another host."""

from __future__ import annotations

import os

import pytest

from lhblock._native import BLOCK_BYTES, UNIT_BYTES, UNIT_MAP_BYTES, NativeUnit

# The first and the third block, and the last one.
HAS = bytes([0b101, *[0] * (UNIT_MAP_BYTES - 2), 0x80])
DISCARDED = bytes([0b10, *[0xFF] * 3, *[0] * (UNIT_MAP_BYTES - 4)])
EVERY = b"\xff" * UNIT_MAP_BYTES


@pytest.mark.parametrize(
    ("has", "blocks"), [(HAS, 3), (EVERY, UNIT_BYTES // BLOCK_BYTES), (bytes(UNIT_MAP_BYTES), 0)]
)
def test_unit_is_the_same_at_the_other_end(has: bytes, blocks: int) -> None:
    data = os.urandom(blocks * BLOCK_BYTES)
    with NativeUnit() as here, NativeUnit() as there:
        here.unpack(has, DISCARDED, data)
        assert here.pack() == (has, DISCARDED, data)
        there.unpack(*here.pack())
        assert there.hash() == here.hash()


@pytest.mark.parametrize(
    ("has", "discarded", "length"),
    [
        (HAS, DISCARDED, 3 * BLOCK_BYTES - 1),
        (HAS, DISCARDED, 4 * BLOCK_BYTES),
        (HAS[1:], DISCARDED, 2 * BLOCK_BYTES),
        (HAS, DISCARDED + b"\0", 3 * BLOCK_BYTES),
    ],
)
def test_parts_that_do_not_go_together_change_nothing(
    has: bytes, discarded: bytes, length: int
) -> None:
    with NativeUnit() as unit:
        unit.unpack(HAS, DISCARDED, b"x" * 3 * BLOCK_BYTES)
        before = unit.hash()
        with pytest.raises(ValueError, match="bytes"):
            unit.unpack(has, discarded, bytes(length))
        assert unit.hash() == before
