"""Replicas that were away while the engine lived: only what changed meanwhile is looked at."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio

from lhblock.engine import RebuildOptions, Volume, Witness
from lhblock.engine._remote_member import RemoteMember
from tests.model.test_volume_rebuild import assert_alike, contents_of, modes, patience, scribble
from tests.model.volumes import BLOCK, VolumeFiles, until

pytestmark = pytest.mark.model

MIB = 1 << 20
SIZE_BYTES = 48 * MIB
AUTOMATIC = RebuildOptions(automatic=True)


@pytest.fixture
async def files(tmp_path: Path) -> VolumeFiles:
    return await VolumeFiles.create(
        tmp_path, replicas=3, size_bytes=SIZE_BYTES, remote=frozenset({1})
    )


class Away:
    """The second replica, which goes away and comes back."""

    def __init__(self, files: VolumeFiles, volume: Volume, said: list[Any]) -> None:
        self.files = files
        self.volume = volume
        self.path = files.paths[1]
        self.said = said

    async def leave(self) -> None:
        assert await self.files.stop(self.path)
        await self.volume.write(0, b"it is gone")
        await until(lambda: modes(self.volume)[1] == "ERR")

    async def come_back(self) -> dict[str, Any]:
        """What the engine says of the rebuild."""
        await self.files.start(self.path)
        await self.volume.wait_rebuilt(self.files.places[1])
        assert modes(self.volume) == ["RW"] * 3
        begun = [line for line in self.said if line["event"] == "rebuilding a replica"][-1]
        done = [line for line in self.said if line["event"] == "replica rebuilt"][-1]
        return {**begun, **done}


@asynccontextmanager
async def away(files: VolumeFiles) -> AsyncIterator[Away]:
    """An open volume with 40 MiB in two layers; afterwards its replicas have to be alike."""
    with structlog.testing.capture_logs() as said:
        async with patience(), files.open(rebuild=AUTOMATIC) as volume:
            for offset in range(0, 40, 4):
                await volume.write(offset * MIB, bytes([1 + offset]) * (4 * MIB))
                if offset == 16:
                    await volume.create_snapshot("old")
            yield Away(files, volume, said)
            await volume.wait_merged()
            expected = await contents_of(volume)
    await assert_alike(files, expected)


async def test_only_what_changed_is_looked_at(files: VolumeFiles) -> None:
    async with away(files) as replica:
        await replica.leave()
        await replica.volume.write(9 * MIB, b"a" * 5000)
        await replica.volume.trim(20 * MIB + 100, 3 * BLOCK)
        await replica.volume.create_snapshot("meanwhile")
        await replica.volume.zero(30 * MIB, 2 * BLOCK)
        found = await replica.come_back()
        assert found["compares"] == "changes"
        assert found["why"] is None
        # Four blocks of data at most, and what they lie in was hidden: zeros or discards.
        assert found["copied_bytes"] <= 8 * BLOCK
        await scribble(replica.volume, 5)


async def test_what_did_not_change_is_not_read(files: VolumeFiles) -> None:
    """Damage elsewhere stays, and is a matter for the check of checksums."""
    async with files.open(rebuild=AUTOMATIC) as volume:
        await volume.write(0, b"x" * (8 * MIB))
        replica = Away(files, volume, [])
        await replica.leave()
        (head,) = replica.path.glob("volume-head-*.img")
        with head.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"damage")
        await files.start(replica.path)
        await volume.wait_rebuilt(files.places[1])
    async with files.open(only=[1], read_only=True) as volume:
        assert await volume.read(5 * MIB, 6) == b"damage"
        assert await volume.read(0, 10) == b"it is gone"


async def test_twice_in_a_row_and_with_merges(files: VolumeFiles) -> None:
    async with away(files) as replica:
        for number in range(3):
            await replica.leave()
            await replica.volume.write((3 + number) * MIB, b"b" * MIB)
            await replica.volume.create_snapshot(f"m{number}")
            assert (await replica.come_back())["compares"] == "changes"
            await replica.volume.wait_merged()


async def test_merge_on_a_replica_that_goes_away_is_the_business_of_the_others(
    files: VolumeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it is told of no failure: the replica is left behind, and gets it later."""
    step = RemoteMember.merge_step
    reached = threading.Event()

    def step_into_nothing(member: RemoteMember, *arguments: Any) -> bool:
        reached.set()
        assert gone.wait(10)
        return step(member, *arguments)

    gone = threading.Event()
    async with away(files) as replica:
        monkeypatch.setattr(RemoteMember, "merge_step", step_into_nothing)
        await replica.volume.create_snapshot("more")
        await replica.volume.remove_snapshot("old")
        await trio.to_thread.run_sync(reached.wait, 10)
        assert await files.stop(replica.path)
        gone.set()
        await replica.volume.wait_merged()
        assert [info.name for info in replica.volume.snapshots()] == ["more"]
        await replica.come_back()


@pytest.mark.parametrize(
    "what", ["reverted", "expanded", "snapshots", "booted", "replaced", "renamed"]
)
async def test_whoever_doubts_compares_everything(
    files: VolumeFiles, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = {
        "reverted": "was reverted",
        "expanded": "was expanded",
        "snapshots": "are gone",
        "booted": "started anew",
        "replaced": "another one",
        "renamed": "given again",
    }
    async with away(files) as replica:
        volume = replica.volume
        await replica.leave()
        if what == "reverted":
            await volume.revert_snapshot("old")
        elif what == "expanded":
            await volume.expand(SIZE_BYTES + MIB)
        elif what == "snapshots":
            await volume.remove_snapshot("old")
            await volume.wait_merged()
        elif what == "renamed":
            await volume.remove_snapshot("old")
            await volume.wait_merged()
            await volume.create_snapshot("old")
        elif what == "replaced":
            copy = files.copy_of(1, replica.path.with_name("copy"))
            shutil.rmtree(replica.path)
            copy.rename(replica.path)
        elif what == "booted":
            of = Witness.of
            monkeypatch.setattr(Witness, "of", lambda path: replace(of(path), boot_id="another"))
        await volume.write(3 * MIB, b"later")
        found = await replica.come_back()
        assert found["compares"] == "everything"
        assert why[what] in found["why"]


@pytest.mark.parametrize(
    ("boot_id", "place", "up_s", "why"),
    [
        ("a", "1:2", 1100.0, ""),
        ("a", "1:2", 1098.5, ""),
        ("a", "1:2", 1200.0, ""),
        ("a", "1:2", 1090.0, "set back"),
        ("b", "1:2", 1100.0, "anew"),
        ("a", "1:3", 1100.0, "mount"),
    ],
)
def test_witness(boot_id: str, place: str, up_s: float, why: str) -> None:
    before = Witness("a", "1:2", 1000.0, 50.0)
    found = before.why_not(Witness(boot_id, place, up_s, 150.0))
    assert why in found
    assert bool(why) == bool(found)
