"""Which units are compared where only some ranges of two layers may differ."""

from __future__ import annotations

from lhblock._native import UNIT_BYTES, Extent
from lhblock.engine._equal import units_inside

MIB = 1 << 20


def test_a_unit_counts_when_a_range_touches_any_of_it() -> None:
    assert UNIT_BYTES == MIB
    ranges = [Extent(4 * MIB, 4 * MIB), Extent(9 * MIB + 32768, 32768), Extent(20 * MIB, MIB)]
    units = [unit * MIB for unit in (22, 21, 20, 19, 10, 9, 8, 7, 5, 4, 3, 0)]
    assert units_inside(units, ranges) == [unit * MIB for unit in (4, 5, 7, 9, 20)]


def test_without_ranges_nothing_is_compared() -> None:
    assert units_inside([0, MIB], []) == []
    assert units_inside([0, MIB], [Extent(0, 1 << 40)]) == [0, MIB]
