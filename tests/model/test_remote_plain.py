"""Volumes on replicas that speak Longhorn's protocol only: ours, told to hide what it knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lhblock.engine import EngineOptions, Volume, VolumeConfig, create_replicas, open_engine
from lhblock.errors import (
    ReplicaUnsupported,
    SnapshotExists,
    UsageError,
    VolumeBusy,
    VolumeError,
    VolumeFaulted,
)
from lhblock.settings import RemoteAddress
from tests.model.remote import open_replica, options_for
from tests.model.volumes import BLOCK, VolumeFiles, until

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)


@asynccontextmanager
async def processes(files: VolumeFiles, plain: list[bool]) -> AsyncIterator[list[RemoteAddress]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_replica(replace(options_for(path), plain=each)))
            for path, each in zip(files.paths, plain, strict=False)
        ]


@asynccontextmanager
async def opened(
    places: list[RemoteAddress | Path], *, read_only: bool = False
) -> AsyncIterator[Volume]:
    config = VolumeConfig("db", places, read_only=read_only)
    async with (
        open_engine(EngineOptions(queues=1, workers=2)) as engine,
        engine.open_volume(config) as volume,
    ):
        yield volume


async def test_snapshots_reverts_and_expansions(files: VolumeFiles) -> None:
    async with processes(files, [True, True]) as places:
        async with opened([*places]) as volume:
            await volume.write(3, b"a" * BLOCK)
            await volume.flush()
            assert await volume.create_snapshot("s1", {"k": "v"}) == "s1"
            with pytest.raises(SnapshotExists):
                await volume.create_snapshot("s1")
            await volume.write(0, b"b" * BLOCK)
            await volume.expand(2 * SIZE_BYTES)
            await volume.write(2 * SIZE_BYTES - 1, b"z")
            assert [info.mode for info in volume.replicas()] == ["RW", "RW"]
            assert next((info.name, dict(info.labels)) for info in volume.snapshots()) == (
                "s1",
                {"k": "v"},
            )
            await volume.revert_snapshot("s1")
            assert await volume.read(0, BLOCK + 3) == b"\0\0\0" + b"a" * BLOCK
        async with opened([*places]) as volume:
            assert volume.size_bytes == 2 * SIZE_BYTES
            assert await volume.read(3, BLOCK) == b"a" * BLOCK
            await volume.remove_snapshot(f"expand-{2 * SIZE_BYTES}")
            await volume.wait_merged()
            assert volume.state == "healthy"
    head, other = await files.contents()
    assert head == other
    assert head[3 : BLOCK + 3] == b"a" * BLOCK


async def test_discards_are_zeros_although_there_is_no_frame_for_them(files: VolumeFiles) -> None:
    async with processes(files, [True, True]) as places, opened([*places]) as volume:
        await volume.write(0, b"a" * 8 * BLOCK)
        await volume.create_snapshot("s1")
        await volume.trim(BLOCK, 2 * BLOCK)
        await volume.zero(5 * BLOCK + 7, BLOCK)
        data = await volume.read(0, 8 * BLOCK)
    expected = bytearray(b"a" * 8 * BLOCK)
    expected[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    expected[5 * BLOCK + 7 : 6 * BLOCK + 7] = bytes(BLOCK)
    assert data == expected


async def test_one_that_ends_is_dropped_and_stays_away(files: VolumeFiles) -> None:
    async with (
        open_replica(replace(options_for(files.paths[0]), plain=True)) as first,
        trio.open_nursery() as nursery,
    ):
        scope = trio.CancelScope()

        async def serve_second(*, task_status: trio.TaskStatus[RemoteAddress]) -> None:
            with scope:
                async with open_replica(replace(options_for(files.paths[1]), plain=True)) as place:
                    task_status.started(place)
                    await trio.sleep_forever()

        second = await nursery.start(serve_second)
        async with opened([first, second]) as volume:
            await volume.write(0, b"a" * BLOCK)
            scope.cancel()
            await volume.write(0, b"b" * BLOCK)
            await until(lambda: volume.state != "healthy")
            assert [info.mode for info in volume.replicas()] == ["RW", "ERR"]
            assert await volume.read(0, BLOCK) == b"b" * BLOCK


async def test_what_cannot_be_done_is_said_and_drops_nobody(files: VolumeFiles) -> None:
    async with processes(files, [True, True]) as places:
        async with opened([*places]) as volume:
            await volume.create_snapshot("s1")
            with pytest.raises((VolumeError, ReplicaUnsupported), match="snapshots cannot be read"):
                async with volume.open_view("s1"):
                    pass
            with pytest.raises(ReplicaUnsupported, match="cannot be hashed"):
                await volume.hash_snapshot("s1")
            assert volume.state == "healthy"
            with pytest.raises(VolumeBusy, match="another engine has it open"):
                async with opened([*places]):
                    pass
            await volume.write(0, b"still")
        with pytest.raises(VolumeFaulted, match="cannot open it read-only"):
            async with opened([*places], read_only=True):
                pass


async def test_no_other_replica_stands_beside_it(files: VolumeFiles) -> None:
    async with processes(files, [True, False]) as places:
        with pytest.raises(ReplicaUnsupported, match="cannot stand beside"):
            async with opened([*places]):
                pass
        with pytest.raises(ReplicaUnsupported, match="cannot stand beside"):
            async with opened([places[0], files.paths[1]]):
                pass
        async with opened([places[1]]) as volume:
            with pytest.raises(ReplicaUnsupported, match="Longhorn's protocol only"):
                await volume.add_replica(places[0])


async def test_a_new_volume_is_made_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / "r0", tmp_path / "r1"]
    files = VolumeFiles(paths, SIZE_BYTES)
    async with processes(files, [True, True]) as places:
        await create_replicas("db", places, SIZE_BYTES)
        async with opened([*places]) as volume:
            await volume.write(0, b"x")
            assert volume.state == "healthy"
        with pytest.raises(UsageError):
            VolumeConfig("db", [places[0], places[0]])
