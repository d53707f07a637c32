"""Snapshots of a volume on the real core: take, read, revert, remove, merge, expand, limit."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lhblock.engine import CloseReason, SnapshotLimits, Volume
from lhblock.errors import (
    SizeError,
    SnapshotBusy,
    SnapshotExists,
    SnapshotLimit,
    SnapshotNotFound,
    UsageError,
    VolumeBusy,
)
from tests.model.volumes import BLOCK, VolumeFiles, view_content

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK


@pytest.fixture(params=[1, 2])
async def files(request: pytest.FixtureRequest, tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(tmp_path, replicas=request.param, size_bytes=SIZE_BYTES)


def names(volume: Volume) -> list[str]:
    return [info.name for info in volume.snapshots()]


async def test_snapshot_keeps_its_content_whatever_is_written_and_discarded_later(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"a" * 4 * BLOCK)
        await volume.create_snapshot("s1", {"why": "test"})
        before = await volume.read(0, SIZE_BYTES)
        await volume.write(BLOCK + 5, b"b" * 100)
        await volume.trim(2 * BLOCK, 2 * BLOCK)
        assert await view_content(volume, "s1") == before
        assert await volume.read(2 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
        (info,) = volume.snapshots()
    assert (info.name, info.parent, info.children) == ("s1", "", ("volume-head",))
    assert info.labels == {"why": "test"}
    assert info.user_created
    assert not info.removed


async def test_snapshot_is_there_after_a_restart(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(7, b"old")
        await volume.create_snapshot("s1")
        await volume.write(7, b"new")
    async with files.open() as volume:
        assert (await view_content(volume, "s1"))[7:10] == b"old"
        assert await volume.read(7, 3) == b"new"


async def test_discard_bits_that_move_to_a_snapshot_by_a_merge_outlive_a_restart(
    files: VolumeFiles,
) -> None:
    # The upper layer never had a discard file before the merge gives it one.
    async with files.open() as volume:
        await volume.write(0, b"a" * 8 * BLOCK)
        await volume.create_snapshot("base")
        await volume.trim(0, 4 * BLOCK)
        await volume.create_snapshot("discards")
        await volume.write(6 * BLOCK, b"b" * 2 * BLOCK)
        await volume.create_snapshot("top")
        expected = await volume.read(0, SIZE_BYTES)
        await volume.remove_snapshot("discards")
        await volume.wait_merged()
        assert names(volume) == ["base", "top"]
        assert await volume.read(0, SIZE_BYTES) == expected
    async with files.open() as volume:
        assert await volume.read(0, SIZE_BYTES) == expected
        assert await view_content(volume, "top") == expected
        assert (await view_content(volume, "base"))[: 8 * BLOCK] == b"a" * 8 * BLOCK


@pytest.mark.parametrize(("below", "above"), [(1, 8), (8, 1)])
async def test_removed_snapshot_is_merged_with_its_child_in_either_direction(
    files: VolumeFiles, below: int, above: int
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"a" * BLOCK * below)
        await volume.create_snapshot("s1")
        await volume.write(BLOCK // 2, b"b" * BLOCK * above)
        await volume.create_snapshot("s2")
        await volume.write(0, b"c")
        content = await view_content(volume, "s2")
        await volume.remove_snapshot("s1")
        await volume.wait_merged()
        assert names(volume) == ["s2"]
        assert await view_content(volume, "s2") == content
        await volume.write(3, b"d")
    async with files.open() as volume:
        assert await view_content(volume, "s2") == content
        assert await volume.read(0, 5) == b"c" + b"a" * 2 + b"d" + b"a"


async def test_removed_snapshot_below_the_head_is_merged_into_it(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"a" * 8 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(BLOCK, b"b" * BLOCK)
        await volume.trim(4 * BLOCK, BLOCK)
        expected = await volume.read(0, SIZE_BYTES)
        await volume.remove_snapshot("s1")
        await volume.wait_merged()
        assert names(volume) == []
        assert volume.head().parent == ""
        assert await volume.read(0, SIZE_BYTES) == expected
    async with files.open() as volume:
        assert await volume.read(0, SIZE_BYTES) == expected


async def test_removed_leaf_of_a_side_branch_goes_away(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1")
        await volume.create_snapshot("s1")
        await volume.write(0, b"2")
        await volume.create_snapshot("s2")
        await volume.revert_snapshot("s1")
        assert await volume.read(0, 1) == b"1"
        await volume.remove_snapshot("s2")
        await volume.wait_merged()
        assert names(volume) == ["s1"]


async def test_removed_layer_in_a_side_branch_is_merged_there(files: VolumeFiles) -> None:
    async with files.open() as volume:
        for number, name in enumerate(["s1", "s2", "s3"]):
            await volume.write(number * BLOCK, name.encode())
            await volume.create_snapshot(name)
        content = await view_content(volume, "s3")
        await volume.revert_snapshot("s1")
        await volume.remove_snapshot("s2")
        await volume.wait_merged()
        assert names(volume) == ["s1", "s3"]
        assert await view_content(volume, "s3") == content
        await volume.revert_snapshot("s3")
        assert await volume.read(0, SIZE_BYTES) == content


async def test_removed_snapshot_with_two_children_waits_until_one_is_left(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
        await volume.revert_snapshot("s1")
        await volume.remove_snapshot("s1")
        await volume.wait_merged()
        assert names(volume) == ["s1", "s2"]
        await volume.remove_snapshot("s2")
        await volume.wait_merged()
        assert names(volume) == []
        assert await volume.read(0, BLOCK) == b"1" * BLOCK


async def test_merge_waits_for_an_open_view_and_goes_on_when_it_closes(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(BLOCK, b"2" * BLOCK)
        await volume.create_snapshot("s2")
        async with volume.open_view("s2") as view:
            await volume.remove_snapshot("s1")
            await volume.wait_merged()
            assert names(volume) == ["s1", "s2"]
            assert await view.read(0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
        await volume.wait_merged()
        assert names(volume) == ["s2"]


async def test_pending_removal_is_finished_by_the_next_open(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        async with volume.open_view("s1"):
            await volume.create_snapshot("s2")
        async with volume.open_view("s2"):
            await volume.remove_snapshot("s1")
            assert names(volume) == ["s1", "s2"]
    async with files.open() as volume:
        await volume.wait_merged()
        assert names(volume) == ["s2"]
        assert await volume.read(0, BLOCK) == b"1" * BLOCK


async def test_snapshot_that_is_exported_cannot_be_removed(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        async with volume.open_view("s1"):
            with pytest.raises(SnapshotBusy, match="'s1' is exported"):
                await volume.remove_snapshot("s1")
        assert not volume.snapshots()[0].removed


async def test_views_of_one_snapshot_share_one_volume(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        async with volume.open_view("s1") as one, volume.open_view("s1") as other:
            assert one is other
        assert volume.open_views() == ()


async def test_view_has_the_size_the_volume_had(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(SIZE_BYTES - 4, b"tail")
        await volume.create_snapshot("s1")
        await volume.expand(2 * SIZE_BYTES)
        async with volume.open_view("s1") as view:
            assert view.size_bytes == SIZE_BYTES
            assert await view.read(SIZE_BYTES - 4, 4) == b"tail"
            with pytest.raises(SizeError, match="not within"):
                await view.read(SIZE_BYTES, 1)


async def test_revert_is_refused_while_a_client_is_connected(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1")
        await volume.create_snapshot("s1")
        await volume.write(0, b"2")
        ours, theirs = socket.socketpair()
        connection = volume.attach(theirs.detach(), structured=False)
        with pytest.raises(VolumeBusy, match=r"clients are connected \(1\)"):
            await volume.revert_snapshot("s1")
        assert await volume.read(0, 1) == b"2"
        ours.close()
        assert await connection.closed() is CloseReason.EOF
        assert volume.connections == 0
        await volume.revert_snapshot("s1")
        assert await volume.read(0, 1) == b"1"


async def test_revert_is_refused_while_a_view_is_open(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        async with volume.open_view("s1"):
            with pytest.raises(VolumeBusy, match="'s1' is open"):
                await volume.revert_snapshot("s1")


async def test_revert_to_a_smaller_snapshot_keeps_the_size(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.expand(2 * SIZE_BYTES)
        await volume.write(SIZE_BYTES, b"2" * BLOCK)
        await volume.revert_snapshot("s1")
        assert volume.size_bytes == 2 * SIZE_BYTES
        assert await volume.read(0, BLOCK) == b"1" * BLOCK
        assert await volume.read(SIZE_BYTES, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("operation", ["revert_snapshot", "remove_snapshot", "open_view"])
async def test_unknown_snapshot_is_named_in_the_error(files: VolumeFiles, operation: str) -> None:
    async with files.open() as volume:
        call = getattr(volume, operation)("nope")
        with pytest.raises(SnapshotNotFound, match="no snapshot 'nope'"):
            await (call if operation != "open_view" else call.__aenter__())


async def test_snapshot_name_cannot_be_taken_twice(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        with pytest.raises(SnapshotExists, match="'s1' already exists"):
            await volume.create_snapshot("s1")
        assert names(volume) == ["s1"]


async def test_bad_snapshot_name_leaves_nothing_behind(files: VolumeFiles) -> None:
    async with files.open() as volume:
        with pytest.raises(UsageError, match="a/b"):
            await volume.create_snapshot("a/b")
        assert names(volume) == []
        assert volume.state == "healthy"
        await volume.create_snapshot("fine")


async def test_snapshot_without_a_name_gets_one(files: VolumeFiles) -> None:
    async with files.open() as volume:
        name = await volume.create_snapshot()
        assert names(volume) == [name]


async def test_snapshot_count_limit_counts_what_is_not_removed(files: VolumeFiles) -> None:
    async with files.open(limits=SnapshotLimits(count_max=2)) as volume:
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
        with pytest.raises(SnapshotLimit, match=r"usage 2 is equal or larger than .* 2"):
            await volume.create_snapshot("s3")
        await volume.remove_snapshot("s1")
        await volume.create_snapshot("s3")


async def test_snapshot_size_limit_refuses_a_head_that_is_too_full(files: VolumeFiles) -> None:
    async with files.open(limits=SnapshotLimits(size_bytes_max=4 * BLOCK)) as volume:
        await volume.write(0, b"1" * 3 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(0, b"2" * 2 * BLOCK)
        with pytest.raises(SnapshotLimit, match="is not enough for head file"):
            await volume.create_snapshot("s2")


async def test_limit_below_what_is_in_use_is_refused(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
        with pytest.raises(SnapshotLimit, match=r"snapshotMaxCount=1 smaller than .* usage=2"):
            await volume.set_limits(snapshot_max_count=1)
        await volume.set_limits(snapshot_max_count=2)
        assert volume.limits.count_max == 2


async def test_expanded_part_reads_as_zeros_and_can_be_written(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(SIZE_BYTES - BLOCK, b"1" * BLOCK)
        await volume.expand(2 * SIZE_BYTES)
        assert volume.size_bytes == 2 * SIZE_BYTES
        assert await volume.read(SIZE_BYTES, SIZE_BYTES) == bytes(SIZE_BYTES)
        await volume.write(2 * SIZE_BYTES - 4, b"tail")
        (info,) = volume.snapshots()
        assert info.name == f"expand-{2 * SIZE_BYTES}"
        assert not info.user_created
        assert info.labels == {"replica-expansion": str(2 * SIZE_BYTES)}
    async with files.open() as volume:
        assert volume.size_bytes == 2 * SIZE_BYTES
        assert await volume.read(2 * SIZE_BYTES - 4, 4) == b"tail"


async def test_expansion_to_the_present_size_changes_nothing(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.expand(SIZE_BYTES)
        assert names(volume) == []


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(SIZE_BYTES - BLOCK, "smaller size"), (SIZE_BYTES + 512, "not a multiple of 4096")],
)
async def test_impossible_expansion_is_refused(
    files: VolumeFiles, size_bytes: int, words: str
) -> None:
    async with files.open() as volume:
        with pytest.raises(SizeError, match=words):
            await volume.expand(size_bytes)
        assert volume.size_bytes == SIZE_BYTES


async def test_read_only_volume_refuses_changes_and_changes_nothing(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1")
        await volume.create_snapshot("s1")
    before = {path: path.stat().st_mtime_ns for path in files.paths[0].iterdir()}
    async with files.open(read_only=True) as volume:
        assert await volume.read(0, 1) == b"1"
        with pytest.raises(UsageError, match="read-only"):
            await volume.create_snapshot("s2")
    assert {path: path.stat().st_mtime_ns for path in files.paths[0].iterdir()} == before


async def test_pause_of_a_snapshot_is_measured(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.create_snapshot("s1")
        assert volume.statistics().snapshot_pause_ns_last > 0


async def test_error_in_the_callers_block_comes_out_as_it_is(files: VolumeFiles) -> None:
    with pytest.raises(ZeroDivisionError):
        async with files.open():
            raise ZeroDivisionError
    async with files.open() as volume:
        assert volume.state == "healthy"
