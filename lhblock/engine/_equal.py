"""Making a layer of one replica equal to that of another before anything is served.

Two directories of this host are compared in C. Where one of them is elsewhere, both are hashed
unit by unit where they are, and only units that differ travel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from lhblock._native import UNIT_BYTES, Extent, NativeUnit
from lhblock.engine._local_member import LocalMember
from lhblock.engine._member import Member

BATCH_UNITS: Final = 16
"""Units that are hashed in one call."""


def make_equal(
    target: Member, image: str, source: Member, source_image: str, ranges: Sequence[Extent]
) -> int:
    """Make any layer of ``target``, the head too, equal to one of ``source``. Blocking.

    Nothing serves either. Return the bytes changed; ``target.reopen_store`` must follow.

    Args:
      ranges: where they may differ: in order, none overlaps another, each begins and ends at a
        multiple of ``RANGE_STEP_BYTES`` or ends at the end of the volume.

    Raises:
      NativeError, ReplicaError: they are not equal; it may be begun again.
    """
    if isinstance(target, LocalMember) and isinstance(source, LocalMember):
        return target.reconcile(image, source, source_image, ranges)
    source.lend_layer(source_image)
    target.lend_layer(image)
    try:
        return _copy_what_differs(target, image, source, source_image, ranges)
    finally:
        target.return_layers()
        source.return_layers()


def _copy_what_differs(
    target: Member, image: str, source: Member, source_image: str, ranges: Sequence[Extent]
) -> int:
    size_bytes = source.layer_sizes()[source_image].image_bytes
    target.begin_units(image, size_bytes)
    theirs, ours = source.occupied_units(source_image), target.occupied_units(image)
    inside = units_inside({*theirs, *ours}, ranges)
    offsets = [offset for offset in inside if offset < size_bytes]
    changed_bytes = 0
    with NativeUnit() as unit:
        for begin in range(0, len(offsets), BATCH_UNITS):
            batch = offsets[begin : begin + BATCH_UNITS]
            wanted = source.hash_units(source_image, batch, unit)
            found = target.hash_units(image, batch, unit)
            for offset, *hashes in zip(batch, wanted, found, strict=True):
                if hashes[0] != hashes[1]:
                    source.read_unit(source_image, offset, unit)
                    changed_bytes += target.write_unit(image, offset, unit, empty=False)
    target.sync_units(image)
    return changed_bytes


def units_inside(offsets: Iterable[int], ranges: Sequence[Extent]) -> list[int]:
    """Those of some units that touch a range, in order."""
    begins = [each.offset_bytes for each in ranges]

    def touches(offset: int) -> bool:
        index = bisect_left(begins, offset + UNIT_BYTES) - 1
        return index >= 0 and begins[index] + ranges[index].length_bytes > offset

    return sorted(filter(touches, offsets))
