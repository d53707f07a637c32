"""Several replicas: who is believed, who is left behind, and what is written down before."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path

import pytest
import trio

from lhblock import _native
from lhblock.engine import Volume, VolumeConfig, open_engine
from lhblock.errors import (
    ReplicaIO,
    ReplicaStale,
    SizeError,
    UsageError,
    VolumeBusy,
    VolumeError,
    VolumeFaulted,
)
from lhblock.replica import Generation, PendingHead, ReplicaDirectory
from tests.model.volumes import BLOCK, UNTIL_S, VolumeFiles, fault, until

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(tmp_path, replicas=3, size_bytes=SIZE_BYTES)


def modes(volume: Volume) -> list[str]:
    return [info.mode for info in volume.replicas()]


def generation_of(path: Path) -> Generation:
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert directory.generation is not None
        return directory.generation


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()]


async def test_every_replica_gets_every_byte(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(1234, b"x" * 9000)
        assert volume.state == "healthy"
        expected = await volume.read(0, SIZE_BYTES)
    assert await files.contents() == [expected] * 3


async def test_absent_replica_is_named_stale_before_anything_is_written(
    files: VolumeFiles,
) -> None:
    absent = generation_of(files.paths[2]).replica_id
    async with files.open(only=[0, 1]):
        pass
    for path in files.paths[:2]:
        generation = generation_of(path)
        assert absent not in generation.members
        assert (absent,) in [entry.left for entry in generation.history]


async def test_replica_that_was_away_is_left_out_when_it_returns(files: VolumeFiles) -> None:
    async with files.open(only=[0, 1]) as volume:
        await volume.write(0, b"new")
    async with files.open() as volume:
        assert modes(volume) == ["RW", "RW", "ERR"]
        assert "stale" in volume.replicas()[2].error
        assert volume.state == "degraded"
        # Whatever replica answers.
        for _ in range(8):
            assert await volume.read(0, 3) == b"new"


@pytest.mark.parametrize("snapshot", [False, True])
async def test_old_copy_that_was_put_back_in_place_of_a_replica_is_stale(
    files: VolumeFiles, tmp_path: Path, *, snapshot: bool
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"old")
    copy = files.copy_of(0, tmp_path / "copy")
    async with files.open() as volume:
        await volume.write(0, b"new")
        if snapshot:
            await volume.create_snapshot("s1")
    shutil.rmtree(files.paths[0])
    copy.rename(files.paths[0])
    async with files.open() as volume:
        assert modes(volume) == ["ERR", "RW", "RW"]
        assert "stale" in volume.replicas()[0].error
        assert await volume.read(0, 3) == b"new"


async def test_replica_that_was_served_alone_is_never_taken_for_a_stale_one(
    files: VolumeFiles,
) -> None:
    async with files.open(only=[0]) as volume:
        await volume.write(0, b"one")
    async with files.open(only=[1, 2]) as volume:
        await volume.write(0, b"two")
    for _ in range(3):  # what the first one has is now one of many opens
        async with files.open(only=[1, 2]):
            pass
    with pytest.raises(ReplicaStale, match="each written without the other"):
        async with files.open():
            pass


async def test_replica_that_cannot_note_its_repair_is_named_stale(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: ReplicaDirectory) -> None:
        if directory.path == files.paths[0]:
            raise ReplicaIO(directory.path, "cannot write: No space left on device")

    lost = generation_of(files.paths[0]).replica_id
    with monkeypatch.context() as patch:
        patch.setattr(ReplicaDirectory, "note_repaired", refuse)
        async with files.open() as volume:
            assert modes(volume) == ["ERR", "RW", "RW"]
            await volume.write(0, b"new")
    assert lost not in generation_of(files.paths[1]).members
    async with files.open() as volume:
        assert modes(volume) == ["ERR", "RW", "RW"]


async def test_replicas_written_apart_from_each_other_are_refused(files: VolumeFiles) -> None:
    async with files.open(only=[0]) as volume:
        await volume.write(0, b"one")
    async with files.open(only=[1]) as volume:
        await volume.write(0, b"two")
    with pytest.raises(ReplicaStale, match="each written without the other"):
        async with files.open():
            pass
    async with files.open(only=[1]) as volume:
        assert await volume.read(0, 3) == b"two"


async def test_unusable_replica_among_good_ones_is_left_out_with_its_reason(
    files: VolumeFiles,
) -> None:
    (files.paths[1] / "volume.meta").write_text("{")
    async with files.open() as volume:
        assert modes(volume) == ["RW", "ERR", "RW"]
        assert "volume.meta" in volume.replicas()[1].error
        await volume.write(0, b"x")


async def test_missing_replica_directory_is_left_out(files: VolumeFiles) -> None:
    shutil.rmtree(files.paths[0])
    async with files.open() as volume:
        assert modes(volume) == ["ERR", "RW", "RW"]
    assert not files.paths[0].exists()


async def test_volume_without_a_usable_replica_lists_every_reason(files: VolumeFiles) -> None:
    (files.paths[0] / "volume.meta").write_text("{")
    shutil.rmtree(files.paths[1])
    shutil.rmtree(files.paths[2])
    files.paths[2].mkdir()
    with pytest.raises(VolumeFaulted, match=r"r0: .*; .*r1: .*; .*r2: "):
        async with files.open():
            pass


async def test_volume_that_is_open_elsewhere_is_busy_and_nothing_is_fenced(
    files: VolumeFiles,
) -> None:
    before = generation_of(files.paths[0]).counter
    with ReplicaDirectory.open(files.paths[2]), pytest.raises(VolumeBusy, match="is in use by"):
        async with files.open():
            pass
    assert generation_of(files.paths[0]).counter == before


async def test_size_that_was_not_asked_for_is_refused(files: VolumeFiles) -> None:
    config = VolumeConfig(name="db", replicas=files.paths, size_bytes=2 * SIZE_BYTES)
    async with open_engine() as engine:
        with pytest.raises(SizeError, match=f"has {SIZE_BYTES} bytes, not {2 * SIZE_BYTES}"):
            async with engine.open_volume(config):
                pass


async def test_replica_given_twice_is_refused(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    with pytest.raises(UsageError, match="given twice"):
        async with files.open(only=[0, 0]):
            pass


async def test_creation_leaves_nothing_behind_when_one_directory_cannot_be_made(
    tmp_path: Path,
) -> None:
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "something").write_text("else")
    with pytest.raises(Exception, match="r1"):
        await VolumeFiles.create(tmp_path, replicas=3, size_bytes=SIZE_BYTES)
    assert names_in(tmp_path) == ["r1"]
    assert names_in(tmp_path / "r1") == ["something"]


async def test_write_that_one_replica_missed_is_acknowledged_after_the_fence(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        opened_with = volume.replicas()[0].generation
        with fault("store.write", errno.EIO):
            await volume.write(0, b"x" * BLOCK)
        # The write has returned, so the others know already.
        (lost,) = [index for index, mode in enumerate(modes(volume)) if mode == "ERR"]
        assert volume.state == "degraded"
        kept = [path for index, path in enumerate(files.paths) if index != lost]
        counters = [info.generation for info in volume.replicas() if info.mode == "RW"]
        assert counters == [opened_with + 1] * 2
        assert volume.statistics().replicas_failed == 1
        assert await volume.read(0, BLOCK) == b"x" * BLOCK
        await volume.create_snapshot("s1")
        await volume.write(0, b"y")
    for path in kept:
        assert len(generation_of(path).members) == 2
    async with files.open() as volume:
        assert modes(volume).index("ERR") == lost
        assert await volume.read(0, 1) == b"y"


async def test_replica_that_fails_once_more_after_it_was_left_behind_holds_nothing_up(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python gave it up, and until I/O is frozen the core still writes to it, and fails."""
    real = _native.NativeVolume.freeze
    reached, goes_on = threading.Event(), threading.Event()

    def freeze(self: _native.NativeVolume) -> None:
        reached.set()
        assert goes_on.wait(UNTIL_S)
        real(self)

    async with files.open() as volume, trio.open_nursery() as nursery:
        member = volume._replicas.members[1]
        monkeypatch.setattr(_native.NativeVolume, "freeze", freeze)
        nursery.start_soon(volume.fail_replica, files.paths[1], "test")
        await until(reached.is_set)
        _native.arm_fault("store.write", errno.EIO, store_id=member.store.id)
        try:
            with trio.fail_after(UNTIL_S):
                await volume.write(0, b"x" * BLOCK)
        finally:
            _native.clear_faults()
            goes_on.set()
        assert modes(volume) == ["RW", "ERR", "RW"]


async def test_flush_that_one_replica_cannot_do_drops_it(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"x")
        with fault("store.sync", errno.EIO):
            await volume.flush()
        assert sorted(modes(volume)) == ["ERR", "RW", "RW"]


async def test_last_replica_answers_the_error_and_goes_on(tmp_path: Path) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await volume.write(0, b"a" * BLOCK)
        with fault("store.write", errno.ENOSPC), pytest.raises(VolumeError, match="No space"):
            await volume.write(BLOCK, b"b" * BLOCK)
        assert volume.state == "healthy"
        await volume.write(BLOCK, b"c" * BLOCK)
        assert await volume.read(0, 2 * BLOCK) == b"a" * BLOCK + b"c" * BLOCK


async def test_survivor_that_cannot_record_the_fence_is_dropped_too(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ReplicaDirectory.write_generation
    refusing: list[Path] = []

    def write_generation(self: ReplicaDirectory, generation: Generation) -> None:
        if not refusing:
            refusing.append(self.path)
        if self.path in refusing:
            raise ReplicaIO(self.path, "cannot write its generation: test")
        real(self, generation)

    async with files.open() as volume:
        monkeypatch.setattr(ReplicaDirectory, "write_generation", write_generation)
        with fault("store.write", errno.EIO):
            await volume.write(0, b"x" * BLOCK)
        assert sorted(modes(volume)) == ["ERR", "ERR", "RW"]
        alive = modes(volume).index("RW")
        assert await volume.read(0, BLOCK) == b"x" * BLOCK
        await volume.write(0, b"y" * BLOCK)
    generation = generation_of(files.paths[alive])
    assert generation.members == (generation.replica_id,)


async def test_write_that_no_survivor_can_fence_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)

    def refuse(directory: ReplicaDirectory, generation: Generation) -> None:
        raise ReplicaIO(directory.path, "cannot write its generation: No space left on device")

    with trio.fail_after(30):
        async with files.open() as volume:
            monkeypatch.setattr(ReplicaDirectory, "write_generation", refuse)
            with fault("store.write", errno.EIO), pytest.raises(VolumeError, match="output error"):
                await volume.write(0, b"x" * BLOCK)
            assert volume.state == "faulted"
            # It is there on one replica, and a crash could take it back.
            with pytest.raises(VolumeError, match="output error"):
                await volume.read(0, BLOCK)


async def test_flush_is_not_answered_when_a_snapshot_could_not_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=SIZE_BYTES)
    settling, fail = threading.Event(), threading.Event()

    def refuse(pending: PendingHead) -> None:
        settling.set()
        fail.wait(30)
        raise ReplicaIO(files.paths[0], "cannot make the switch durable: Input/output error")

    monkeypatch.setattr(PendingHead, "settle", refuse)

    async def take_snapshot(volume: Volume) -> None:
        with pytest.raises(ReplicaIO, match="cannot make the switch durable"):
            await volume.create_snapshot("s1")

    async def flush(volume: Volume) -> None:
        with pytest.raises(VolumeError, match="output error"):
            await volume.flush()

    with trio.fail_after(30):
        async with files.open() as volume, trio.open_nursery() as nursery:
            nursery.start_soon(take_snapshot, volume)
            await trio.to_thread.run_sync(settling.wait)
            nursery.start_soon(flush, volume)
            await until(lambda: volume.statistics().io.in_flight != 0)
            fail.set()


async def test_snapshot_that_one_replica_cannot_take_drops_that_replica(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ReplicaDirectory.prepare_snapshot

    def prepare_snapshot(self: ReplicaDirectory, *args: object, **kwargs: object) -> object:
        if self.path == files.paths[1]:
            raise ReplicaIO(self.path, "cannot prepare the head: No space left on device")
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    async with files.open() as volume:
        await volume.write(0, b"1")
        monkeypatch.setattr(ReplicaDirectory, "prepare_snapshot", prepare_snapshot)
        await volume.create_snapshot("s1")
        assert modes(volume) == ["RW", "ERR", "RW"]
        assert "No space" in volume.replicas()[1].error
        await volume.write(0, b"2")
        before = (files.paths[1] / "volume-head-000.img").read_bytes()
        assert before[:1] == b"1"


async def test_snapshot_that_no_replica_can_take_changes_nothing(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_snapshot(self: ReplicaDirectory, *args: object, **kwargs: object) -> object:
        raise ReplicaIO(self.path, "cannot prepare the head: No space left on device")

    async with files.open() as volume:
        await volume.write(0, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(ReplicaDirectory, "prepare_snapshot", prepare_snapshot)
            with pytest.raises(ReplicaIO, match="No space"):
                await volume.create_snapshot("s1")
        assert volume.state == "healthy"
        assert volume.snapshots() == ()
        await volume.write(0, b"2")
        await volume.create_snapshot("s1")


async def test_merge_that_fails_on_one_replica_drops_that_replica(files: VolumeFiles) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * 4 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(0, b"2" * BLOCK)
        with fault("merge.copy", errno.EIO):
            await volume.remove_snapshot("s1")
            await volume.wait_merged()  # the others merge
        assert sorted(modes(volume)) == ["ERR", "RW", "RW"]
        (error,) = [info.error for info in volume.replicas() if info.error]
        assert "merging a removed snapshot failed" in error
        assert volume.snapshots() == ()
        assert await volume.read(0, 2 * BLOCK) == b"2" * BLOCK + b"1" * BLOCK


async def test_merge_without_space_keeps_the_replica_and_is_tried_again(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"1" * 4 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(0, b"2" * BLOCK)
        with fault("merge.copy", errno.ENOSPC, times=3):
            await volume.remove_snapshot("s1")
            with pytest.raises(VolumeError, match="No space"):
                await volume.wait_merged()
        assert modes(volume) == ["RW", "RW", "RW"]
        assert [info.removed for info in volume.snapshots()] == [True]
    async with files.open() as volume:
        await volume.wait_merged()
        assert volume.snapshots() == ()
        assert await volume.read(0, 2 * BLOCK) == b"2" * BLOCK + b"1" * BLOCK


async def test_read_only_volume_drops_a_replica_without_writing_anything(
    files: VolumeFiles,
) -> None:
    async with files.open() as volume:
        await volume.write(0, b"x" * BLOCK)
        await volume.create_snapshot("s1")
    before = [generation_of(path).counter for path in files.paths]
    async with files.open(read_only=True) as volume:
        with fault("store.fiemap", errno.EIO):
            async with volume.open_view("s1") as view:
                assert await view.read(0, BLOCK) == b"x" * BLOCK
        assert sorted(modes(volume)) == ["ERR", "RW", "RW"]
        assert await volume.read(0, BLOCK) == b"x" * BLOCK
    assert [generation_of(path).counter for path in files.paths] == before


async def test_cancelled_block_closes_cleanly(files: VolumeFiles) -> None:
    with trio.CancelScope() as scope:
        async with files.open() as volume:
            await volume.write(0, b"x")
            scope.cancel()
            await trio.sleep_forever()
    for path in files.paths:
        with ReplicaDirectory.open(path, read_only=True) as directory:
            assert not directory.was_dirty


async def test_closing_in_the_middle_of_a_merge_leaves_it_to_the_next_open(
    tmp_path: Path,
) -> None:
    # Three steps of a merge, sparse, so that the volume is closed between two of them.
    size_bytes = 3 * (64 << 20)
    files = await VolumeFiles.create(tmp_path, replicas=1, size_bytes=size_bytes)
    async with files.open() as volume:
        for place in range(0, size_bytes, 1 << 20):
            await volume.write(place, b"a" * BLOCK)
        await volume.create_snapshot("s1")
        await volume.write(BLOCK, b"b" * BLOCK)
        await volume.create_snapshot("s2")
        await volume.remove_snapshot("s1")
        await until(lambda: volume.jobs())
    async with files.open() as volume:
        await volume.wait_merged()
        assert [info.name for info in volume.snapshots()] == ["s2"]
        for place in range(0, size_bytes, 1 << 20):
            assert await volume.read(place, 1) == b"a"
        assert await volume.read(BLOCK, 1) == b"b"
