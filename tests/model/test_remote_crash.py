"""Engine or replica end in the middle of a snapshot whose replicas are in other processes.

docs/internals/remote-replicas.md says what the next open makes of it. An engine that dies is one
that hangs up: nothing is closed, and the replicas' processes go on.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from lhblock._native import NativeEngine, NativeVolume
from lhblock.engine import EngineOptions, RemoteLimits, Volume, VolumeConfig, open_engine
from lhblock.engine._peer_client import EngineIdentity
from lhblock.engine._remote_member import RemoteMember
from lhblock.errors import ReplicaLocked
from lhblock.replica import PendingHead, ReplicaDirectory
from lhblock.settings import RemoteAddress
from tests.model.remote import open_replica, options_for
from tests.model.volumes import BLOCK, VolumeFiles, view_content

pytestmark = pytest.mark.model

SIZE_BYTES = 64 * BLOCK
CREATED = "2026-11-27T16:00:00Z"
PATIENCE_S = 60

Step = Callable[[RemoteMember], None]


def prepare(member: RemoteMember) -> None:
    member.prepare_snapshot(
        "s1", user_created=True, created=CREATED, labels={"a": "b"}, size_bytes=None
    )


def commit(member: RemoteMember) -> None:
    member.commit_snapshot(SIZE_BYTES)


def settle(member: RemoteMember) -> None:
    member.settle_snapshot()


def hang_up(member: RemoteMember) -> None:
    """Be dead."""
    assert member._client is not None
    member.store.close()
    member._client.close()


@asynccontextmanager
async def two_replicas(base: Path) -> AsyncIterator[tuple[VolumeFiles, list[RemoteAddress]]]:
    files = await VolumeFiles.create(base, replicas=2, size_bytes=SIZE_BYTES)
    async with (
        open_replica(options_for(files.paths[0])) as first,
        open_replica(options_for(files.paths[1])) as second,
    ):
        with trio.fail_after(PATIENCE_S):
            yield files, [first, second]


@asynccontextmanager
async def open_volume(places: list[RemoteAddress]) -> AsyncIterator[Volume]:
    config = VolumeConfig("db", places)
    async with (
        open_engine(EngineOptions(queues=1, workers=2)) as engine,
        engine.open_volume(config) as volume,
    ):
        yield volume


async def engine_that_dies(places: list[RemoteAddress], steps: list[tuple[Step, int]]) -> None:
    """Write to both, take some steps of a snapshot, and die.

    Unless I/O is frozen then, a last write has reached the first replica only.
    """
    committed = sum(step is commit for step, _ in steps)

    def live(engine: NativeEngine) -> None:
        identity = EngineIdentity()
        members = [RemoteMember(place, engine, identity, RemoteLimits()) for place in places]
        for member in members:
            member.open()
            member.open_store()
        with NativeVolume(engine, SIZE_BYTES, 0) as volume:
            volume.publish([member.store for member in members])
            volume.write(0, b"o" * 4 * BLOCK)
            for step, index in steps:
                if step is commit:
                    volume.freeze()
                step(members[index])
                if step is commit:
                    volume.thaw()
        if committed != 1:
            with NativeVolume(engine, SIZE_BYTES, 0) as volume:
                volume.publish([members[0].store])
                volume.write(BLOCK, b"n" * BLOCK)
        for member in members:
            hang_up(member)

    async with open_engine(EngineOptions(queues=1, workers=2)) as engine:
        await trio.to_thread.run_sync(live, engine.native)


@pytest.mark.parametrize(
    ("steps", "there"),
    [
        ([(prepare, 0)], False),
        ([(prepare, 0), (prepare, 1)], False),
        ([(prepare, 0), (prepare, 1), (commit, 0)], True),
        ([(prepare, 0), (prepare, 1), (commit, 1)], True),
        ([(prepare, 0), (prepare, 1), (commit, 0), (commit, 1)], True),
        ([(prepare, 0), (prepare, 1), (commit, 0), (commit, 1), (settle, 1)], True),
        ([(prepare, 0), (prepare, 1), (commit, 0), (commit, 1), (settle, 0)], True),
    ],
    ids=[
        "prepared one",
        "prepared",
        "committed one",
        "other",
        "committed",
        "settled one",
        "settled other",
    ],
)
async def test_engine_that_dies_in_a_snapshot_leaves_replicas_that_agree(
    tmp_path: Path, steps: list[tuple[Step, int]], there: bool
) -> None:
    async with two_replicas(tmp_path) as (files, places):
        await engine_that_dies(places, steps)
        async with open_volume(places) as volume:
            assert volume.state == "healthy"
            assert [info.name for info in volume.snapshots()] == (["s1"] if there else [])
            if there:
                assert volume.snapshots()[0].labels == {"a": "b"}
                assert (await view_content(volume, "s1"))[: 4 * BLOCK] == b"o" * 4 * BLOCK
            head = await volume.read(0, SIZE_BYTES)
            assert head[:BLOCK] == b"o" * BLOCK
            assert head[BLOCK : 2 * BLOCK] in (b"o" * BLOCK, b"n" * BLOCK)
            assert head[2 * BLOCK : 4 * BLOCK] == b"o" * 2 * BLOCK
    assert await files.contents() == [head, head]


async def test_engine_that_lives_keeps_its_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lhblock.instance._peer_service.GONE_WAIT_S", 0.1)
    async with two_replicas(tmp_path) as (_, places), open_volume(places) as volume:
        async with open_engine(EngineOptions(queues=1, workers=2)) as engine:
            other = RemoteMember(places[0], engine.native, EngineIdentity(), RemoteLimits())
            with pytest.raises(ReplicaLocked, match="is in use by engine"):
                await trio.to_thread.run_sync(other.open)
        await volume.write(0, b"x")
        assert volume.state == "healthy"


async def test_replica_that_ends_between_prepare_and_commit_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=2, size_bytes=SIZE_BYTES)
    real, ended = PendingHead.commit, threading.Event()
    scope = trio.CancelScope()

    def commit_if_alive(pending: PendingHead) -> None:
        if pending._path == files.paths[1]:
            trio.from_thread.run_sync(scope.cancel)
            ended.set()
            raise OSError(5, "the process is gone")
        real(pending)

    async with trio.open_nursery() as nursery, open_replica(options_for(files.paths[0])) as first:
        places = [first]

        async def serve_second(*, task_status: trio.TaskStatus[RemoteAddress]) -> None:
            with scope:
                async with open_replica(options_for(files.paths[1])) as address:
                    task_status.started(address)
                    await trio.sleep_forever()

        places.append(await nursery.start(serve_second))
        with trio.fail_after(PATIENCE_S):
            async with open_volume(places) as volume:
                await volume.write(0, b"o" * BLOCK)
                monkeypatch.setattr(PendingHead, "commit", commit_if_alive)
                await volume.create_snapshot("s1")
                assert ended.is_set()
                await volume.write(0, b"n" * BLOCK)
                assert [info.mode for info in volume.replicas()] == ["RW", "ERR"]
    monkeypatch.setattr(PendingHead, "commit", real)
    with ReplicaDirectory.open(files.paths[1]) as directory:
        assert "volume-snap-s1.img" not in directory.disks
    async with files.open() as volume:
        assert [info.mode for info in volume.replicas()] == ["RW", "ERR"]
        assert "is stale" in volume.replicas()[1].error
        assert (await volume.read(0, BLOCK)) == b"n" * BLOCK
