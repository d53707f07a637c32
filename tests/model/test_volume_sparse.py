"""Work on a huge volume is proportional to what it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lhblock.engine._occupied import occupied_steps
from lhblock.replica import ReplicaDirectory
from tests.model.volumes import BLOCK, VolumeFiles

pytestmark = pytest.mark.model

STEP_BYTES = 64 << 20
TIB = 1 << 40


def test_only_steps_with_data_or_discards_are_walked(tmp_path: Path) -> None:
    with (tmp_path / "volume-snap-a.img").open("wb") as image:
        image.truncate(4 * TIB)
        for offset in (0, 5 * STEP_BYTES - BLOCK, 5 * STEP_BYTES, 3 * TIB):
            os.pwrite(image.fileno(), b"x" * BLOCK, offset)
        # One extent that reaches over a boundary of steps.
        os.pwrite(image.fileno(), b"y" * 2 * BLOCK, 9 * STEP_BYTES - BLOCK)
    # One bit is one block of 4 KiB: byte n is about the blocks from 8 n on.
    with (tmp_path / ReplicaDirectory.discard_name("volume-snap-a.img")).open("wb") as bits:
        os.pwrite(bits.fileno(), b"\x01", 2 * TIB // BLOCK // 8)
    dir_fd = os.open(tmp_path, os.O_RDONLY)
    try:
        steps = occupied_steps(dir_fd, "volume-snap-a.img")
    finally:
        os.close(dir_fd)
    found = {step // STEP_BYTES for step in steps}
    assert {0, 4, 5, 8, 9, 3 * TIB // STEP_BYTES, 2 * TIB // STEP_BYTES} <= found
    # The file system may report a hole of a few blocks of the bitmap as data.
    assert len(found) <= 9
    assert steps == sorted(steps)


async def test_a_snapshot_of_a_volume_of_terabytes_is_removed(tmp_path: Path) -> None:
    # 4 TiB are 65 536 steps: walked one by one this would take minutes.
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=4 * TIB)
    async with files.open() as volume:
        await volume.write(3 * TIB, b"a" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(TIB, b"b" * BLOCK)
        await volume.trim(3 * TIB, BLOCK)
        await volume.create_snapshot("s2")
        await volume.remove_snapshot("s1")
        await volume.wait_merged()
        assert [info.name for info in volume.snapshots()] == ["s2"]
        assert await volume.read(TIB, BLOCK) == b"b" * BLOCK
        assert await volume.read(3 * TIB, BLOCK) == bytes(BLOCK)
