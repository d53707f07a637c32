"""Requests, snapshots, merges and failing replicas at the same time."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from lhblock.engine import CacheMode, DriverChoice, Volume
from tests.model.volumes import BLOCK, VolumeFiles, fault, view_content

pytestmark = pytest.mark.model

WRITERS = 6
# Each writer owns two blocks and a bit, so that neighbours share a block.
REGION_BYTES = 2 * BLOCK + 700
SIZE_BYTES = 16 * BLOCK
ROUNDS = 25


async def write_rounds(volume: Volume, writer: int, rounds: int, reached: list[int]) -> None:
    """Fill the region with the number of the round, again and again."""
    for number in range(1, rounds + 1):
        await volume.write(writer * REGION_BYTES, bytes([number]) * REGION_BYTES)
        reached[writer] = number
        if number % 5 == 0:
            await volume.flush()


async def check_regions(content: bytes, at_least: list[int]) -> None:
    """Every region is of one round, and none is older than what was acknowledged before."""
    for writer, number in enumerate(at_least):
        region = content[writer * REGION_BYTES : (writer + 1) * REGION_BYTES]
        assert len(set(region)) == 1, f"writer {writer} is torn: {sorted(set(region))}"
        assert region[0] >= number, f"writer {writer}"


@pytest.mark.parametrize("driver", ["auto", "pool"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("replicas", [1, 3])
async def test_snapshots_taken_under_load_are_moments_of_the_volume(
    tmp_path: Path, replicas: int, cache: CacheMode, driver: DriverChoice
) -> None:
    files = await VolumeFiles.create(
        tmp_path, replicas=replicas, size_bytes=SIZE_BYTES, driver=driver, cache=cache
    )
    reached = [0] * WRITERS
    async with files.open() as volume:
        async with trio.open_nursery() as nursery:
            for writer in range(WRITERS):
                nursery.start_soon(write_rounds, volume, writer, ROUNDS, reached)
            for number in range(8):
                before = list(reached)
                await volume.create_snapshot(f"s{number}")
                after = list(reached)
                content = await view_content(volume, f"s{number}")
                await check_regions(content, before)
                for writer, last in enumerate(after):
                    # One write may be done although its writer did not run since.
                    assert content[writer * REGION_BYTES] <= last + 1
                if number >= 2:
                    await volume.remove_snapshot(f"s{number - 2}")
        assert reached == [ROUNDS] * WRITERS
        await volume.wait_merged()
        await check_regions(await volume.read(0, SIZE_BYTES), reached)
        assert [info.name for info in volume.snapshots()] == ["s6", "s7"]
        content = await volume.read(0, SIZE_BYTES)
    assert await files.contents() == [content] * replicas


@pytest.mark.parametrize("skip", [0, 3, 10, 31])
async def test_replica_that_fails_under_load_delays_but_never_loses_anything(
    tmp_path: Path, skip: int
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=3, size_bytes=SIZE_BYTES)
    reached = [0] * WRITERS
    async with files.open() as volume:
        with fault("store.write", errno.EIO, skip=skip), trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for writer in range(WRITERS):
                    nursery.start_soon(write_rounds, volume, writer, ROUNDS, reached)
                for number in range(5):
                    await volume.create_snapshot(f"s{number}")
                    before = list(reached)
                    await check_regions(await volume.read(0, SIZE_BYTES), before)
        assert sorted(info.mode for info in volume.replicas()) == ["ERR", "RW", "RW"]
        lost = [info.mode for info in volume.replicas()].index("ERR")
        content = await volume.read(0, SIZE_BYTES)
        await check_regions(content, [ROUNDS] * WRITERS)
    contents = await files.contents()
    assert [found for index, found in enumerate(contents) if index != lost] == [content] * 2
    async with files.open() as volume:
        assert volume.replicas()[lost].mode == "ERR"
        assert await volume.read(0, SIZE_BYTES) == content


async def test_many_snapshots_leave_a_chain_that_opens(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        for number in range(60):
            await volume.write((number % 16) * BLOCK, bytes([number + 1]) * BLOCK)
            await volume.create_snapshot(f"s{number}")
        for number in range(0, 60, 2):
            await volume.remove_snapshot(f"s{number}")
        await volume.wait_merged()
        content = await volume.read(0, SIZE_BYTES)
        assert len(volume.snapshots()) == 30
    async with files.open() as volume:
        assert await volume.read(0, SIZE_BYTES) == content
        assert (await view_content(volume, "s31"))[15 * BLOCK] == 32
