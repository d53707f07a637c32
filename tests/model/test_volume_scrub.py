"""Checksums of snapshots: recorded when asked, verified, and repaired from a good replica."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lhblock.replica import change_time_text, read_checksum, write_checksum
from tests.model.volumes import BLOCK, VolumeFiles, view_content

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK
IMAGE = "volume-snap-s1.img"


def damage(path: Path) -> None:
    """Flip a byte as a failing disk would: the record stays valid although the ctime moved."""
    image = path / IMAGE
    dir_fd = os.open(path, os.O_RDONLY)
    record = read_checksum(dir_fd, IMAGE)
    assert record is not None
    with image.open("r+b") as file:
        file.seek(BLOCK + 7)
        file.write(b"!")
        file.flush()
        os.fsync(file.fileno())
    ctime_ns = image.stat().st_ctime_ns
    fields = {**vars(record), "change_time": change_time_text(ctime_ns)}
    write_checksum(dir_fd, IMAGE, type(record)(**fields))
    os.close(dir_fd)


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    files = await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await volume.write(0, b"x" * 3 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.hash_snapshot("s1")
    return files


async def test_sound_snapshot_is_verified_on_every_replica(files: VolumeFiles) -> None:
    async with files.open() as volume:
        report = await volume.scrub()
    assert (report.verified, report.without_record, report.mismatches) == (2, 0, ())


async def test_snapshot_without_a_record_is_counted_and_not_judged(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s2")
        report = await volume.scrub()
    assert (report.verified, report.without_record) == (2, 2)


async def test_damaged_layer_is_repaired_from_the_good_replica(files: VolumeFiles) -> None:
    damage(files.paths[1])
    async with files.open() as volume:
        report = await volume.scrub()
        (mismatch,) = report.mismatches
        assert mismatch.replica == str(files.places[1])
        assert mismatch.snapshot == "s1"
        assert mismatch.expected != mismatch.found
        assert mismatch.repaired_from == str(files.places[0])
        assert (await view_content(volume, "s1"))[: 3 * BLOCK] == b"x" * 3 * BLOCK
        assert (await volume.scrub()).verified == 2
    assert (files.paths[0] / IMAGE).read_bytes() == (files.paths[1] / IMAGE).read_bytes()


async def test_damage_on_every_replica_is_reported_and_left_alone(files: VolumeFiles) -> None:
    for path in files.paths:
        damage(path)
    async with files.open() as volume:
        report = await volume.scrub()
    assert [mismatch.repaired_from for mismatch in report.mismatches] == ["", ""]
    assert (files.paths[0] / IMAGE).read_bytes()[BLOCK + 7 : BLOCK + 8] == b"!"
