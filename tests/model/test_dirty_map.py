"""What the core records for a replica that is away, as the engine reads it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lhblock._native import (
    DIRTY_GRANULE_BYTES,
    EXTENTS_MAX,
    Driver,
    Extent,
    NativeEngine,
    NativeVolume,
)
from lhblock.errors import NativeError, ReplicaIO
from lhblock.replica import PendingHead, ReplicaDirectory
from tests.model.volumes import BLOCK, VolumeFiles

pytestmark = pytest.mark.model

GRANULE = DIRTY_GRANULE_BYTES
TRACKERS_MAX = 16  # LHB_TRACKERS_MAX
# Every second granule is marked below: two whole batches of extents and one more. The last granule
# of the volume is short: 3 blocks.
MARKED = 2 * EXTENTS_MAX + 1
SIZE = (2 * MARKED - 2) * GRANULE + 3 * BLOCK


@pytest.fixture
def native() -> Iterator[NativeVolume]:
    with (
        NativeEngine(queues=1, workers=1, driver=Driver.POOL) as engine,
        NativeVolume(engine, SIZE, 0) as volume,
    ):
        yield volume


def test_extents_are_read_in_batches_and_end_with_the_volume(native: NativeVolume) -> None:
    tracker = native.track()
    for index in range(MARKED):
        native.mark_dirty(tracker, 2 * index * GRANULE, 1)
    extents = native.dirty_extents(tracker)
    assert extents == [
        *(Extent(2 * index * GRANULE, GRANULE) for index in range(MARKED - 1)),
        Extent(SIZE - 3 * BLOCK, 3 * BLOCK),
    ]
    assert native.dirty_extents(tracker, SIZE - 4 * BLOCK) == extents[-1:]


def test_only_whole_granules_are_cleared(native: NativeVolume) -> None:
    tracker = native.track()
    native.mark_dirty(tracker, 0, 4 * GRANULE)
    native.clear_dirty(tracker, 1, 3 * GRANULE - 1)
    assert native.dirty_extents(tracker) == [Extent(0, GRANULE), Extent(3 * GRANULE, GRANULE)]


def test_what_is_not_tracked_counts_as_changed(native: NativeVolume) -> None:
    tracker = native.track()
    native.untrack(tracker)
    assert native.dirty_extents(tracker) is None
    refusals: list[Callable[[], None]] = [
        lambda: native.untrack(tracker),
        lambda: native.mark_dirty(tracker, 0, 1),
        lambda: native.clear_dirty(tracker, 0, 1),
    ]
    for refused in refusals:
        with pytest.raises(NativeError) as caught:
            refused()
        assert caught.value.errno == errno.ENOENT


async def test_replica_that_python_takes_out_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=3, size_bytes=64 * BLOCK)
    prepare, track = ReplicaDirectory.prepare_snapshot, NativeVolume.track
    found: list[list[Extent] | None] = []
    trackers: list[int] = []

    def fail_on_one(directory: ReplicaDirectory, *args: Any, **kwargs: Any) -> PendingHead:
        if directory.path == files.paths[1]:
            raise ReplicaIO(directory.path, "failed on purpose")
        return prepare(directory, *args, **kwargs)

    def look(volume: NativeVolume, store_id: int = 0) -> int:
        tracker = track(volume, store_id)
        trackers.append(tracker)
        found.append(volume.dirty_extents(tracker))
        return tracker

    monkeypatch.setattr(ReplicaDirectory, "prepare_snapshot", fail_on_one)
    monkeypatch.setattr(NativeVolume, "track", look)
    async with files.open() as volume:
        await volume.write(5 * BLOCK, b"x")
        await volume.create_snapshot("s1")
        assert [info.mode for info in volume.replicas()] == ["RW", "ERR", "RW"]
        await volume.write(20 * BLOCK, b"y")
        (tracker,) = trackers
        assert volume._native.dirty_extents(tracker) == [Extent(16 * BLOCK, 16 * BLOCK)]
    # What it acknowledged before is no business of the map.
    assert found == [[]]


async def test_replica_that_is_removed_keeps_no_map(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=3, size_bytes=64 * BLOCK)
    async with files.open() as volume:
        await volume.remove_replica(files.paths[1])
        for _ in range(TRACKERS_MAX):
            volume._native.track()
        with pytest.raises(NativeError):
            volume._native.track()
