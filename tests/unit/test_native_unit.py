"""A unit on its way to another host."""

from __future__ import annotations

import os

import pytest

from lhblock._native import (
    BLOCK_BYTES,
    UNIT_BYTES,
    UNIT_MAP_BYTES,
    UNIT_PACKED_BYTES,
    NativeUnit,
)

# The first and the third block, and the last one.
HAS = bytes([0b101, *[0] * (UNIT_MAP_BYTES - 2), 0x80])
DISCARDED = bytes([0b10, *[0xFF] * 3, *[0] * (UNIT_MAP_BYTES - 4)])
EVERY = b"\xff" * UNIT_MAP_BYTES
NONE = bytes(UNIT_MAP_BYTES)


def memory_of(*parts: bytes) -> bytearray:
    return bytearray(b"".join(parts).ljust(UNIT_PACKED_BYTES, b"!"))


@pytest.mark.parametrize(
    ("has", "blocks"), [(HAS, 3), (EVERY, UNIT_BYTES // BLOCK_BYTES), (NONE, 0)]
)
def test_unit_is_the_same_at_the_other_end(has: bytes, blocks: int) -> None:
    packed = has + DISCARDED + os.urandom(blocks * BLOCK_BYTES)
    with NativeUnit() as here, NativeUnit() as there:
        here.unpack(memory_of(packed), len(packed))
        memory = bytearray(UNIT_PACKED_BYTES)
        assert here.pack(memory) == len(packed)
        assert memory[: len(packed)] == packed
        there.unpack(memory, len(packed))
        assert there.hash() == here.hash()


@pytest.mark.parametrize(
    "length_bytes",
    [
        0,
        2 * UNIT_MAP_BYTES - 1,
        2 * UNIT_MAP_BYTES + 3 * BLOCK_BYTES - 1,
        2 * UNIT_MAP_BYTES + 4 * BLOCK_BYTES,
        UNIT_PACKED_BYTES + BLOCK_BYTES,
    ],
)
def test_length_that_does_not_go_with_the_map_changes_nothing(length_bytes: int) -> None:
    right = HAS + DISCARDED + b"x" * 3 * BLOCK_BYTES
    with NativeUnit() as unit:
        unit.unpack(memory_of(right), len(right))
        before = unit.hash()
        with pytest.raises(ValueError, match="no unit"):
            unit.unpack(memory_of(HAS, DISCARDED), length_bytes)
        assert unit.hash() == before


def test_memory_of_another_size_is_refused() -> None:
    with NativeUnit() as unit, pytest.raises(ValueError, match="memory of 10 bytes"):
        unit.pack(bytearray(10))
