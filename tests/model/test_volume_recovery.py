"""What a crash leaves, and what the next open makes of it. The crash states are made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lhblock import _native
from lhblock.errors import ReplicaIO, VolumeFaulted
from lhblock.replica import UNSERVED, PendingHead, ReplicaDirectory, new_set
from tests.model.volumes import BLOCK, VolumeFiles, view_content, write_head

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK
CREATED = "2026-11-23T08:46:13Z"


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)


def snapshot_one(path: Path, name: str, *, settle: bool, size_bytes: int | None = None) -> None:
    """A snapshot that the crash met on one replica."""
    directory = ReplicaDirectory.open(path)
    pending = directory.prepare_snapshot(
        name, user_created=True, created=CREATED, labels={"a": "b"}, size_bytes=size_bytes
    )
    commit(directory, pending, settle=settle)


def commit(directory: ReplicaDirectory, pending: PendingHead, *, settle: bool = True) -> None:
    """Switch, and crash."""
    pending.commit()
    if settle:
        pending.settle()
    directory.close(clean=False)


def make_dirty(path: Path) -> None:
    """The other replica of the same crash."""
    ReplicaDirectory.open(path).close(clean=False)


async def test_replicas_are_equal_after_a_crash_that_wrote_to_one_only(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"flushed")
        await volume.create_snapshot("s1")
        await volume.write(BLOCK, b"also")
        await volume.trim(4 * BLOCK, BLOCK)
    write_head(files.paths[0], 2 * BLOCK, b"p" * BLOCK)
    write_head(files.paths[1], 3 * BLOCK, b"q" * BLOCK)
    # Zeros that are data on one and a hole on the other read alike but are not.
    write_head(files.paths[0], 10 * BLOCK, bytes(BLOCK))
    async with files.open() as volume:
        assert volume.state == "healthy"
        content = await volume.read(0, SIZE_BYTES)
        assert content[:7] == b"flushed"
        assert content[BLOCK : BLOCK + 4] == b"also"
        for _ in range(8):
            assert await volume.read(0, SIZE_BYTES) == content
    assert await files.contents() == [content, content]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("settle", [True, False])
async def test_snapshot_that_only_one_replica_took_is_finished_on_the_other(
    files: VolumeFiles, ahead: int, settle: bool
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"x" * BLOCK)
    snapshot_one(files.paths[ahead], "s1", settle=settle)
    make_dirty(files.paths[1 - ahead])
    async with files.open() as volume:
        assert volume.state == "healthy"
        (info,) = volume.snapshots()
        assert info.name == "s1"
        assert info.labels == {"a": "b"}
        assert (await view_content(volume, "s1"))[:BLOCK] == b"x" * BLOCK
        assert await volume.read(0, BLOCK) == b"x" * BLOCK
        await volume.write(0, b"y")
    contents = await files.contents()
    assert contents[0] == contents[1]


async def test_snapshot_that_was_cut_short_has_equal_data_on_both_replicas(
    files: VolumeFiles,
) -> None:
    # A power loss kept different unflushed writes on the two disks.
    write_head(files.paths[0], 0, b"p" * BLOCK)
    write_head(files.paths[1], BLOCK, b"q" * BLOCK)
    for path in files.paths:
        snapshot_one(path, "s1", settle=False)
    async with files.open() as volume:
        assert volume.state == "healthy"
        content = await view_content(volume, "s1")
    for only in ([0], [1]):
        async with files.open(only=only, read_only=True) as volume:
            assert await view_content(volume, "s1") == content


async def test_expansion_that_only_one_replica_did_is_finished(files: VolumeFiles) -> None:
    snapshot_one(files.paths[1], "expand-524288", settle=True, size_bytes=2 * SIZE_BYTES)
    make_dirty(files.paths[0])
    async with files.open() as volume:
        assert volume.state == "healthy"
        assert volume.size_bytes == 2 * SIZE_BYTES
        await volume.write(2 * SIZE_BYTES - 4, b"tail")
    contents = await files.contents()
    assert contents[0] == contents[1]


@pytest.mark.parametrize("ahead", [0, 1])
async def test_revert_that_only_one_replica_did_is_undone(files: VolumeFiles, ahead: int) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(0, b"2" * BLOCK)
        await volume.create_snapshot("s2")
        await volume.write(BLOCK, b"3" * BLOCK)
    directory = ReplicaDirectory.open(files.paths[ahead])
    commit(directory, directory.prepare_revert("s1", created=CREATED))
    make_dirty(files.paths[1 - ahead])
    async with files.open() as volume:
        assert volume.state == "healthy"
        assert await volume.read(0, 2 * BLOCK) == b"2" * BLOCK + b"3" * BLOCK
        assert volume.head().parent == "s2"
    contents = await files.contents()
    assert contents[0] == contents[1]


async def test_removal_that_only_one_replica_recorded_is_carried_through(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
    directory = ReplicaDirectory.open(files.paths[1])
    directory.mark_removed("s1")
    directory.close(clean=False)
    async with files.open() as volume:
        await volume.wait_merged()
        assert [info.name for info in volume.snapshots()] == ["s2"]
        assert volume.state == "healthy"
    for path in files.paths:
        assert not (path / "volume-snap-s1.img").exists()


async def test_half_done_merge_into_the_head_of_one_replica_loses_nothing(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"a" * 8 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(2 * BLOCK, b"b" * BLOCK)
        expected = await volume.read(0, SIZE_BYTES)
    for path in files.paths:
        with ReplicaDirectory.open(path) as directory:
            directory.mark_removed("s1")
            directory.close(clean=False)
    half_merge(files.paths[1])
    async with files.open() as volume:
        assert await volume.read(0, SIZE_BYTES) == expected
        assert volume.state == "healthy"
    assert await files.contents() == [expected, expected]


async def test_leaf_that_only_one_replica_deleted_does_not_make_heads_differ(
    files: VolumeFiles,
) -> None:
    # The leaf beside the head keeps its parent from being merged on one replica only.
    async with files.open() as volume:
        await volume.write(0, b"a" * 4 * BLOCK)
        await volume.create_snapshot("below")
        await volume.write(0, b"s" * BLOCK)
        await volume.create_snapshot("side")
        await volume.revert_snapshot("below")
        await volume.write(BLOCK, b"b" * BLOCK)
        expected = await volume.read(0, SIZE_BYTES)
    for path in files.paths:
        with ReplicaDirectory.open(path) as directory:
            directory.mark_removed("below")
            directory.mark_removed("side")
            if path == files.paths[1]:
                directory.unlink_disk("volume-snap-side.img")
            directory.close(clean=False)
    async with files.open() as volume:
        assert volume.state == "healthy"
        assert await volume.read(0, SIZE_BYTES) == expected
    assert await files.contents() == [expected, expected]


def half_merge(path: Path) -> None:
    """The first half of the range is merged up, then the process dies."""
    engine = _native.NativeEngine(queues=1, workers=1, driver=_native.Driver.POOL)
    directory = ReplicaDirectory.open(path)
    store = _native.NativeStore(engine, directory.dir_fd, SIZE_BYTES, 0)
    ids = [
        store.add_layer(disk.name, directory.discard_name(disk.name)) for disk in directory.chain
    ]
    store.start()
    assert store.merge_up(None, ids[0], ids[1], 0, 5 * BLOCK) > 0
    store.close()
    engine.close()
    directory.close(clean=False)


async def test_trees_that_no_crash_explains_are_refused_without_a_majority(
    files: VolumeFiles,
) -> None:
    snapshot_one(files.paths[0], "p1", settle=True)
    snapshot_one(files.paths[0], "p2", settle=True)
    make_dirty(files.paths[1])
    with pytest.raises(VolumeFaulted, match=r"no tree is in the majority: .*p1, p2"):
        async with files.open():
            pass


async def test_replica_whose_tree_differs_from_the_majority_is_left_out(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=3, size_bytes=SIZE_BYTES)
    snapshot_one(files.paths[0], "p1", settle=True)
    snapshot_one(files.paths[0], "p2", settle=True)
    async with files.open() as volume:
        assert [info.mode for info in volume.replicas()] == ["ERR", "RW", "RW"]
        assert "other snapshots" in volume.replicas()[0].error
    # It was named stale, so a later open does not depend on the majority.
    async with files.open(only=[0, 1]) as volume:
        assert [info.mode for info in volume.replicas()] == ["ERR", "RW"]


async def test_one_replica_written_by_another_program_opens(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await volume.write(0, b"ours")
    with (files.paths[0] / "volume-head-000.img").open("r+b") as image:
        image.write(b"else")
    async with files.open() as volume:
        assert await volume.read(0, 4) == b"else"


async def test_replica_on_a_full_disk_does_not_keep_the_others_from_opening(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_one(files.paths[0], "s1", settle=True)
    make_dirty(files.paths[1])
    prepare_snapshot = ReplicaDirectory.prepare_snapshot

    def refuse(directory: ReplicaDirectory, name: str, **how: Any) -> PendingHead:
        if directory.path == files.paths[1]:
            raise ReplicaIO(directory.path, "cannot prepare the head: No space left on device")
        return prepare_snapshot(directory, name, **how)

    monkeypatch.setattr(ReplicaDirectory, "prepare_snapshot", refuse)
    async with files.open() as volume:
        assert [info.mode for info in volume.replicas()] == ["RW", "ERR"]
        assert "No space left" in volume.replicas()[1].error
        assert [snapshot.name for snapshot in volume.snapshots()] == ["s1"]


async def test_first_generation_that_only_one_replica_has_is_begun_again(tmp_path: Path) -> None:
    paths = [tmp_path / "r0", tmp_path / "r1"]
    for path in paths:
        ReplicaDirectory.create(path, size_bytes=SIZE_BYTES)
    directory = ReplicaDirectory.open(paths[0])
    directory.write_generation(new_set(2, time=CREATED, counter=UNSERVED)[0])
    directory.close(clean=False)
    files = VolumeFiles(paths, SIZE_BYTES)
    for _ in range(2):
        async with files.open() as volume:
            assert volume.state == "healthy"


async def test_replica_that_was_closed_cleanly_is_the_one_the_others_are_made_equal_to(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"all of it")
    # Its disk refused the last sync, and lost what had not been flushed.
    write_head(files.paths[0], 0, bytes(BLOCK))
    async with files.open() as volume:
        for _ in range(8):
            assert await volume.read(0, 9) == b"all of it"
