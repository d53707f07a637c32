"""Replicas that are rebuilt: new ones, such that were away, such that failed.

Afterwards a replica is the same as the others: in the head and in every snapshot, read by itself.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lhblock.engine import RebuildOptions, Volume, _rebuild
from lhblock.errors import (
    ReplicaForeign,
    ReplicaStale,
    UsageError,
    VolumeBusy,
    VolumeFaulted,
)
from lhblock.replica import ReplicaDirectory
from tests.model.volumes import BLOCK, VolumeFiles, fault, until

pytestmark = pytest.mark.model

# Three units and a piece of a fourth.
SIZE_BYTES = (3 * 256 + 40) * BLOCK
PATIENCE_S = 60
AUTOMATIC = RebuildOptions(automatic=True)


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)


async def scribble(volume: Volume, seed: int, *, requests: int = 60) -> None:
    """Writes, trims and zeros of any alignment."""
    source = random.Random(seed)
    for _ in range(requests):
        offset = source.randrange(volume.size_bytes - 1)
        length = min(volume.size_bytes - offset, source.randrange(1, 40 * BLOCK))
        what = source.randrange(6)
        if what == 0:
            await volume.trim(offset, length)
        elif what == 1:
            await volume.zero(offset, length, no_hole=source.random() < 0.5)
        else:
            await volume.write(offset, source.randbytes(length))


async def contents_of(volume: Volume) -> dict[str, bytes]:
    """The head's and every snapshot's content."""
    found = {"": await volume.read(0, volume.size_bytes)}
    for info in volume.snapshots():
        if not info.removed and not info.name.startswith("rebuild-"):
            async with volume.open_view(info.name) as view:
                found[info.name] = await view.read(0, view.size_bytes)
    return found


async def assert_alike(files: VolumeFiles, expected: dict[str, bytes] | None = None) -> None:
    """Every replica, read by itself, has the same head and snapshots. Closes nothing down."""
    for index in range(len(files.paths)):
        async with files.open(only=[index], read_only=True) as volume:
            found = await contents_of(volume)
        if expected is None:
            expected = found
        assert found.keys() == expected.keys()
        for name, data in expected.items():
            assert found[name] == data, (index, name)


def modes(volume: Volume) -> list[str]:
    return [info.mode for info in volume.replicas()]


def is_marked(path: Path) -> bool:
    with ReplicaDirectory.open(path, read_only=True, unfinished=True) as directory:
        return directory.rebuilding


@asynccontextmanager
async def patience() -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_S):
        yield


async def test_new_replica_gets_head_and_snapshots(files: VolumeFiles, tmp_path: Path) -> None:
    new = tmp_path / "new"
    async with patience(), files.open() as volume:
        for number in range(3):
            await scribble(volume, number)
            await volume.create_snapshot(f"s{number}", {"n": str(number)})
        await scribble(volume, 3)
        await volume.add_replica(new)
        assert modes(volume) == ["RW", "RW", "ERR"]
        await volume.wait_rebuilt(new)
        assert modes(volume) == ["RW"] * 3
        assert volume.state == "healthy"
        assert volume.rebuilds() == ()
        await scribble(volume, 4)
        await volume.wait_merged()
        assert [info.name for info in volume.snapshots()] == ["s0", "s1", "s2"]
        expected = await contents_of(volume)
    files.paths.append(new)
    await assert_alike(files, expected)
    async with files.open() as volume:
        assert modes(volume) == ["RW"] * 3


async def test_who_waited_for_a_replica_finds_no_snapshot_of_its_rebuild(
    files: VolumeFiles, tmp_path: Path
) -> None:
    async with patience(), files.open() as volume:
        await scribble(volume, 0)
        await volume.add_replica(tmp_path / "new")
        assert [info.name for info in volume.snapshots()] == []
        await until(lambda: not volume.rebuilds())
        assert [info.name for info in volume.snapshots() if not info.removed] == []


async def test_side_branches_and_removed_layers_are_copied_too(
    files: VolumeFiles, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    async with patience(), files.open() as volume:
        for name in ("a", "b", "c"):
            await scribble(volume, ord(name))
            await volume.create_snapshot(name)
        await scribble(volume, 1)
        await volume.revert_snapshot("a")
        await scribble(volume, 2)
        async with volume.open_view("b"):  # its layers cannot be merged meanwhile
            await volume.remove_snapshot("a")
            await volume.add_replica(new)
            await volume.wait_rebuilt(new)
        await volume.wait_merged()
        expected = await contents_of(volume)
    assert expected.keys() == {"", "b", "c"}
    files.paths.append(new)
    await assert_alike(files, expected)


async def test_returning_replica_keeps_what_it_has(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await scribble(volume, 1, requests=200)
        await volume.create_snapshot("s1")
        await scribble(volume, 2)
    async with files.open(only=[0]) as volume:
        await volume.write(5 * BLOCK, b"n" * BLOCK)
        await volume.create_snapshot("s2")
        await volume.write(500 * BLOCK, b"m" * BLOCK)
    async with patience(), files.open(rebuild=AUTOMATIC) as volume:
        await volume.wait_rebuilt(files.places[1])
        assert modes(volume) == ["RW", "RW"]
        expected = await contents_of(volume)
    await assert_alike(files, expected)


async def test_returning_replica_has_only_what_differs_written(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, random.Random(1).randbytes(3 << 20))
        await volume.create_snapshot("s1")
    before = files.paths[1] / "volume-snap-s1.img"
    untouched = before.stat()
    async with files.open(only=[0]) as volume:
        await volume.write(7 * BLOCK, b"n" * BLOCK)
    async with patience(), files.open(rebuild=AUTOMATIC) as volume:
        await volume.wait_rebuilt(files.places[1])
    after = before.stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
    await assert_alike(files)


async def test_writes_of_any_alignment_during_a_rebuild(files: VolumeFiles, tmp_path: Path) -> None:
    new = tmp_path / "new"
    slow = RebuildOptions(rate_bytes_s=8 << 20)
    async with patience(), files.open(rebuild=slow) as volume:
        await scribble(volume, 1, requests=150)
        await volume.create_snapshot("s1")
        await scribble(volume, 2)
        await volume.add_replica(new)
        seed = 10
        await until(lambda: modes(volume)[2] != "ERR")
        seen = set(modes(volume))
        while modes(volume)[2] == "WO":
            await scribble(volume, seed, requests=5)
            await volume.flush()
            seed += 1
        assert "WO" in seen
        assert seed > 10
        assert modes(volume) == ["RW"] * 3
        expected = await contents_of(volume)
    files.paths.append(new)
    await assert_alike(files, expected)


async def test_snapshots_expansions_and_removals_during_a_rebuild(
    files: VolumeFiles, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    slow = RebuildOptions(rate_bytes_s=8 << 20)
    async with patience(), files.open(rebuild=slow) as volume:
        await scribble(volume, 1, requests=150)
        await volume.create_snapshot("s1")
        await volume.create_snapshot("s2")
        await volume.add_replica(new)
        await until(lambda: modes(volume)[2] == "WO")
        await scribble(volume, 2)
        await volume.create_snapshot("during")
        await scribble(volume, 3)
        await volume.remove_snapshot("s1")
        await volume.expand(SIZE_BYTES + (1 << 20))
        await scribble(volume, 4)
        with pytest.raises(VolumeBusy, match="being rebuilt"):
            await volume.revert_snapshot("during")
        assert modes(volume)[2] == "WO"
        await volume.wait_rebuilt(new)
        await scribble(volume, 5)
        await volume.wait_merged()
        expected = await contents_of(volume)
    assert "during" in expected
    assert "s1" not in expected
    files.paths.append(new)
    await assert_alike(files, expected)


async def test_half_built_replica_is_never_a_source(files: VolumeFiles, tmp_path: Path) -> None:
    new = tmp_path / "new"
    slow = RebuildOptions(rate_bytes_s=1 << 20)
    async with patience(), files.open(rebuild=slow) as volume:
        await scribble(volume, 1)
        await volume.add_replica(new)
        await until(lambda: modes(volume)[2] == "WO")
        expected = await contents_of(volume)
    files.paths.append(new)
    assert is_marked(new)
    with pytest.raises(VolumeFaulted, match="rebuild never finished"):
        async with files.open(only=[2]):
            pass
    async with patience(), files.open() as volume:
        assert modes(volume) == ["RW", "RW", "ERR"]
    async with patience(), files.open(rebuild=AUTOMATIC) as volume:
        await volume.wait_rebuilt(files.places[2])
        await volume.wait_merged()
        assert volume.snapshots() == ()
    assert not is_marked(new)
    await assert_alike(files, expected)


@pytest.mark.parametrize("point", ["unit.write", "unit.sync", "unit.read", "store.write"])
async def test_target_that_fails_is_tried_again(
    files: VolumeFiles, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    monkeypatch.setattr(_rebuild, "RETRY_S_MIN", 0.01)
    async with patience(), files.open() as volume:
        await scribble(volume, 1)
        await volume.create_snapshot("s1")
        with fault(point, errno.EIO if point != "unit.write" else errno.ENOSPC):
            await volume.add_replica(new)
            if point == "store.write":
                await until(lambda: modes(volume)[2] == "WO")
            await volume.wait_rebuilt(new)
        expected = await contents_of(volume)
        assert volume.state in ("healthy", "degraded")
    files.paths.append(new)
    await assert_alike(files, expected)


async def test_source_that_fails_makes_the_rebuild_begin_again(
    files: VolumeFiles, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    slow = RebuildOptions(rate_bytes_s=4 << 20)
    async with patience(), files.open(rebuild=slow) as volume:
        await scribble(volume, 1, requests=100)
        await volume.create_snapshot("s1")
        await volume.add_replica(new)
        await until(lambda: modes(volume)[2] == "WO")
        await volume.remove_replica(files.places[0])
        assert modes(volume)[0] == "RW"
        await volume.wait_rebuilt(new)
        expected = await contents_of(volume)
    files.paths = [files.paths[1], new]
    await assert_alike(files, expected)


async def test_replica_that_failed_while_serving_comes_back(files: VolumeFiles) -> None:
    async with patience(), files.open(rebuild=AUTOMATIC) as volume:
        await scribble(volume, 1)
        with fault("store.write", errno.EIO):
            await volume.write(0, b"x" * BLOCK)
            await until(lambda: modes(volume) != ["RW", "RW"])
        failed = modes(volume).index("ERR")
        await scribble(volume, 2)
        await volume.wait_rebuilt(files.places[failed])
        assert volume.state == "healthy"
        expected = await contents_of(volume)
    await assert_alike(files, expected)


async def test_damage_while_copying_is_found_before_anybody_believes_it(
    files: VolumeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lhblock.engine import _layer_copy

    new = tmp_path / "new"
    whole = _layer_copy.LayerCopy.copy
    spoiled: list[Path] = []

    async def copy_and_spoil(self: _layer_copy.LayerCopy, **arguments: object) -> None:
        await whole(self, **arguments)  # type: ignore[arg-type]
        if not spoiled:
            spoiled.append(new / self._image)
            with spoiled[0].open("r+b") as file:
                file.write(b"spoiled")

    monkeypatch.setattr(_layer_copy.LayerCopy, "copy", copy_and_spoil)
    async with patience(), files.open() as volume:
        await volume.write(0, b"x" * (2 << 20))
        await volume.add_replica(new)
        await until(lambda: volume.rebuilds()[0].error)
        assert "after it was copied" in volume.rebuilds()[0].error
        assert modes(volume)[2] == "ERR"
        assert is_marked(new)
        await volume.wait_rebuilt(new)
        expected = await contents_of(volume)
    files.paths.append(new)
    await assert_alike(files, expected)


async def test_diverged_replica_is_not_touched_without_force(files: VolumeFiles) -> None:
    async with files.open(only=[0]) as volume:
        await volume.write(0, b"one")
    lone = files.paths[1]
    async with files.open(only=[1]) as volume:
        await volume.write(0, b"other")
    async with patience(), files.open(only=[0], rebuild=AUTOMATIC) as volume:
        await volume.add_replica(lone)
        with pytest.raises(ReplicaStale, match="--force"):
            await volume.wait_rebuilt(lone)
        assert volume.rebuilds()[0].phase == "refused"
        assert not is_marked(lone)
        await volume.add_replica(lone, force=True)
        await volume.wait_rebuilt(lone)
        expected = await contents_of(volume)
    assert expected[""].startswith(b"one")
    await assert_alike(files, expected)


async def test_replica_of_another_volume_is_not_touched_without_force(
    files: VolumeFiles, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = await VolumeFiles.create(tmp_path / "elsewhere", replicas=1, size_bytes=SIZE_BYTES)
    async with other.open() as volume:
        await volume.write(0, b"precious")
    async with patience(), files.open() as volume:
        await volume.add_replica(other.paths[0])
        with pytest.raises(ReplicaStale, match="not a replica of this volume"):
            await volume.wait_rebuilt(other.paths[0])
        await volume.remove_replica(other.paths[0])
    async with other.open() as volume:
        assert await volume.read(0, 8) == b"precious"


async def test_directory_with_something_else_is_refused(files: VolumeFiles, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miau")
    async with files.open() as volume:
        with pytest.raises(ReplicaForeign, match=r"cat\.jpg"):
            await volume.add_replica(tmp_path / "photos")
        assert len(volume.replicas()) == 2
        with pytest.raises(UsageError, match="already"):
            await volume.add_replica(files.places[0])
        with pytest.raises(UsageError, match="no replica"):
            await volume.remove_replica(tmp_path / "photos")


async def test_removed_replica_is_stale_and_the_last_one_stays(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"before")
        await volume.remove_replica(files.places[1])
        assert modes(volume) == ["RW"]
        assert volume.state == "healthy"
        await volume.write(0, b"after!")
        with pytest.raises(VolumeBusy, match="last usable"):
            await volume.remove_replica(files.places[0])
    async with files.open() as volume:
        assert modes(volume) == ["RW", "ERR"]
        assert await volume.read(0, 6) == b"after!"
