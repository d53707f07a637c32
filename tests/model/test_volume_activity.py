"""After a crash replicas are compared where the activity log says that they may differ."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import structlog

from lhblock._native import ACTIVITY_EXTENT_BYTES as EXTENT
from lhblock.engine import RebuildOptions, Volume, _local_member
from lhblock.engine._opening import Opening
from lhblock.errors import ReplicaIO, VolumeError
from lhblock.replica import ACTIVITY_NAME, ReplicaDirectory
from tests.model.volumes import BLOCK, VolumeFiles, until, view_content, write_head

pytestmark = pytest.mark.model

EXTENTS = 12
SIZE_BYTES = EXTENTS * EXTENT
COLD, HOT = 2, 9
CREATED = "2026-11-23T08:46:13Z"


@pytest.fixture(params=[frozenset(), frozenset({0, 1}), frozenset({1})], ids=str)
async def files(tmp_path: Path, request: pytest.FixtureRequest) -> VolumeFiles:
    return await VolumeFiles.create(
        tmp_path, replicas=2, size_bytes=SIZE_BYTES, remote=request.param
    )


async def heat(volume: Volume, extent: int) -> None:
    """Write to an extent. Others are heated with it, and turn cold with the next round."""
    await volume.write(extent * EXTENT, b"x" * BLOCK)


async def cool(volume: Volume) -> None:
    """Let everything turn cold."""
    for _ in range(2):
        await volume._rounds.round()
    assert volume._native.hot_extents == 0


async def use(files: VolumeFiles) -> None:
    """A session after which one extent is hot and all others are cold."""
    async with files.open() as volume:
        for extent in (COLD, HOT):
            await heat(volume, extent)
        await cool(volume)
        await heat(volume, HOT)
        await volume._rounds.round()
        assert volume._native.hot_extents == 1


def crash(files: VolumeFiles) -> None:
    """The replicas differ, where they may and where they may not."""
    write_head(files.paths[0], COLD * EXTENT + BLOCK, b"p" * BLOCK)
    write_head(files.paths[1], HOT * EXTENT + BLOCK, b"q" * BLOCK)


@asynccontextmanager
async def recovered(files: VolumeFiles, **options: Any) -> AsyncIterator[tuple[Volume, Any]]:
    """Open the volume after a crash, with what it says of the comparison."""
    with structlog.testing.capture_logs() as said:
        async with files.open(**options) as volume:
            (line,) = [x for x in said if x["event"] == "comparing replicas after a crash"]
            yield volume, line


async def differs_at(files: VolumeFiles) -> set[int]:
    """Extents in which the replicas are not alike."""
    one, other = await files.contents()
    return {
        extent
        for extent in range(EXTENTS)
        if one[extent * EXTENT :][:EXTENT] != other[extent * EXTENT :][:EXTENT]
    }


async def test_hot_extents_are_compared_and_no_others(files: VolumeFiles) -> None:
    await use(files)
    crash(files)
    async with recovered(files) as (volume, line):
        assert volume.state == "healthy"
        assert line["compares"] == "hot extents"
        assert line["bytes"] == EXTENT
        assert line["why"] is None
    # What only damage can do stays, and shows that it was not looked at.
    assert await differs_at(files) == {COLD}


async def test_volume_that_is_opened_anew_has_nothing_hot(files: VolumeFiles) -> None:
    await use(files)
    crash(files)
    async with recovered(files):
        pass
    crash(files)
    async with recovered(files) as (_, line):
        assert line["bytes"] == 0
    assert await differs_at(files) == {COLD, HOT}


async def test_clean_replicas_are_not_compared(files: VolumeFiles) -> None:
    await use(files)
    with structlog.testing.capture_logs() as said:
        async with files.open():
            pass
    assert "comparing replicas after a crash" not in {line["event"] for line in said}


async def test_writes_trims_and_zeros_are_recorded(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(3 * EXTENT - 1, b"ab")
        await volume.trim(5 * EXTENT, BLOCK)
        await volume.zero(8 * EXTENT + 5, 100)
        await volume._rounds.round()
    for extent in (2, 3, 5, 8):
        for path in files.paths:
            write_head(path, extent * EXTENT + BLOCK, path.name.encode() * (BLOCK // 2))
    async with recovered(files) as (_, line):
        assert line["bytes"] == 4 * EXTENT
    assert await differs_at(files) == set()


async def test_snapshots_reverts_and_expansions_change_nothing_of_it(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await heat(volume, COLD)
        await cool(volume)
        await volume.create_snapshot("s1")
        await volume.expand(SIZE_BYTES + EXTENT)
        await heat(volume, HOT)
        await volume.revert_snapshot("s1")
        await heat(volume, EXTENTS)
        await volume._rounds.round()
        await volume.create_snapshot("s2")
        await volume.remove_snapshot("s1")
        await volume.wait_merged()
    crash(files)
    async with recovered(files) as (volume, line):
        assert volume.state == "healthy"
        assert line["compares"] == "hot extents"
        assert await volume.read(EXTENTS * EXTENT, BLOCK) == b"x" * BLOCK
        assert await volume.read(COLD * EXTENT, BLOCK) == b"x" * BLOCK
        assert (await view_content(volume, "s2"))[COLD * EXTENT :][:BLOCK] == b"x" * BLOCK
    assert await differs_at(files) == {COLD}


async def test_rebuilt_replica_has_the_log(files: VolumeFiles, tmp_path: Path) -> None:
    new = tmp_path / "new"
    async with files.open() as volume:
        await heat(volume, COLD)
        await heat(volume, HOT)
        await cool(volume)
        await heat(volume, 5)
        place = await files.place_of(new)
        await volume.add_replica(place)
        await volume.wait_rebuilt(place)
        await volume._rounds.round()
        await heat(volume, 5)
        await heat(volume, HOT)
        await volume._rounds.round()
    files.paths.append(new)
    write_head(files.paths[0], COLD * EXTENT + BLOCK, b"p" * BLOCK)
    write_head(new, HOT * EXTENT + BLOCK, b"q" * BLOCK)
    write_head(new, 5 * EXTENT + BLOCK, b"r" * BLOCK)
    async with recovered(files) as (volume, line):
        assert volume.state == "healthy"
        assert line["compares"] == "hot extents"
    contents = await files.contents()
    assert contents[1] == contents[2]
    assert contents[0] != contents[1]  # in a cold extent


async def test_what_one_replica_got_alone_is_compared_after_another_one_came(
    files: VolumeFiles,
) -> None:
    """While one is alone nothing is recorded."""
    async with files.open(rebuild=RebuildOptions(automatic=True)) as volume:
        await volume.fail_replica(files.places[1], "for a test")
        await until(lambda: volume.replicas()[1].mode != "RW")
        await heat(volume, HOT)
        await volume.wait_rebuilt(files.places[1])
        assert volume._native.hot_extents == EXTENTS
    crash(files)
    async with recovered(files) as (_, line):
        assert line["bytes"] == SIZE_BYTES
        assert line["compares"] == "hot extents"
    assert await differs_at(files) == set()


# ---- Everything is compared.


def change_generation(path: Path, **changes: Any) -> None:
    with ReplicaDirectory.open(path) as directory:
        assert directory.generation is not None
        directory.write_generation(replace(directory.generation, **changes))
        directory.close(clean=False)


def spoil(path: Path) -> None:
    log = path / ACTIVITY_NAME
    data = bytearray(log.read_bytes())
    for at in range(100, len(data), 4096):
        data[at] ^= 1
    log.write_bytes(data)


def lose(files: VolumeFiles) -> None:
    (files.paths[1] / ACTIVITY_NAME).unlink()


def spoil_one(files: VolumeFiles) -> None:
    spoil(files.paths[0])


def put_a_link(files: VolumeFiles) -> None:
    log = files.paths[0] / ACTIVITY_NAME
    log.rename(files.paths[0] / "kept")
    log.symlink_to("kept")


def have_been_opened_by_an_older_lhblock(files: VolumeFiles) -> None:
    for path in files.paths:
        change_generation(path, activity="")


def have_been_opened_in_part(files: VolumeFiles) -> None:
    change_generation(files.paths[0], activity=str(uuid4()))


def have_another_id(files: VolumeFiles) -> None:
    log_id = str(uuid4())
    for path in files.paths:
        change_generation(path, activity=log_id)


NO_LOG = "has no activity log of its last opening"
DOUBTS: list[tuple[Callable[[VolumeFiles], None], str]] = [
    (lose, NO_LOG),
    (spoil_one, NO_LOG),
    (put_a_link, "cannot be read"),
    (have_been_opened_by_an_older_lhblock, "was opened without an activity log"),
    (have_been_opened_in_part, "were not opened with one activity log"),
    (have_another_id, NO_LOG),
]


@pytest.mark.parametrize(("harm", "why"), DOUBTS)
async def test_everything_is_compared_in_doubt(
    files: VolumeFiles, harm: Callable[[VolumeFiles], None], why: str
) -> None:
    await use(files)
    crash(files)
    harm(files)
    async with recovered(files) as (volume, line):
        assert volume.state == "healthy"
        assert line["compares"] == "everything"
        assert line["bytes"] == SIZE_BYTES
        assert why in line["why"]
    assert await differs_at(files) == set()


async def test_logs_of_different_moments_are_not_believed(files: VolumeFiles) -> None:
    kept = b""
    async with files.open() as volume:
        kept = (files.paths[0] / ACTIVITY_NAME).read_bytes()
        await heat(volume, COLD)
        await cool(volume)
        await heat(volume, HOT)
        await volume._rounds.round()
    crash(files)
    (files.paths[0] / ACTIVITY_NAME).write_bytes(kept)
    async with recovered(files) as (_, line):
        assert "different moments" in line["why"]
    assert await differs_at(files) == set()


async def test_another_program_knows_of_no_log(files: VolumeFiles) -> None:
    await use(files)
    for path in files.paths:
        (head,) = path.glob("volume-head-*.img")
        with head.open("r+b") as file:
            file.seek(COLD * EXTENT + BLOCK)
            file.write(path.name.encode() * (BLOCK // 2))
            os.fsync(file.fileno())
    async with recovered(files) as (_, line):
        assert "another program" in line["why"]
    assert await differs_at(files) == set()


async def test_force_believes_no_log(files: VolumeFiles) -> None:
    await use(files)
    crash(files)
    async with recovered(files, force=True) as (_, line):
        assert line["compares"] == "everything"
    assert await differs_at(files) == set()


async def test_head_that_a_revert_gave_up_is_filled_although_the_filling_was_cut_off(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with files.open() as volume:
        await heat(volume, 1)
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
        await heat(volume, COLD)
        await cool(volume)
    directory = ReplicaDirectory.open(files.paths[1])
    pending = directory.prepare_revert("s1", created=CREATED)
    pending.commit()
    pending.settle()
    directory.close(clean=False)
    ReplicaDirectory.open(files.paths[0]).close(clean=False)

    async def cut_off(*_: object) -> None:
        raise VolumeError("db", "cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Opening, "_make_equal", cut_off)
        with pytest.raises(VolumeError, match="cut off"):
            async with files.open():
                pass
    async with recovered(files) as (volume, line):
        assert line["compares"] == "everything"
        assert await volume.read(COLD * EXTENT, BLOCK) == b"x" * BLOCK
    assert await differs_at(files) == set()


async def test_volume_opens_without_a_log_when_none_can_be_made(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await use(files)

    def refuse(self: _local_member.LocalMember, _log_id: str) -> None:
        raise ReplicaIO(self.path, "cannot write lhblock.activity: no space")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as said:
        patch.setattr(_local_member.LocalMember, "make_activity", refuse)
        async with files.open() as volume:
            assert volume.state == "healthy"
            await heat(volume, 4)
            assert volume._native.hot_extents == 0
        assert "no activity log" in {line["event"] for line in said}
    crash(files)
    async with recovered(files) as (_, line):
        assert "without an activity log" in line["why"]
    assert await differs_at(files) == set()


async def test_one_replica_has_no_log(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await heat(volume, 1)
        assert volume._native.hot_extents == 0
    assert not (files.paths[0] / ACTIVITY_NAME).exists()


async def test_log_of_a_volume_that_is_now_one_replica_is_not_believed_later(
    tmp_path: Path,
) -> None:
    """It is opened alone, gets a second replica, and nothing was recorded."""
    files = await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)
    await use(files)
    async with files.open() as volume:
        await volume.remove_replica(files.paths[1])
    async with files.open(only=[0], force=False) as volume:
        await volume.add_replica(files.paths[1])
        await volume.wait_rebuilt(files.paths[1])
        await heat(volume, COLD)
    crash(files)
    async with recovered(files) as (volume, line):
        assert volume.state == "healthy"
        assert line["compares"] == "everything"
    assert await differs_at(files) == set()
