"""The engine is killed and some hosts lose power; replicas are alike again, though only a part of
the volume was compared.

Each replica is on a file system of its own. One that loses power loses what was not synced there;
the others keep it.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog

from lhblock._native import BLOCK_BYTES
from lhblock.engine import EngineOptions, VolumeConfig, create_replicas, open_engine
from lhblock.settings import RemoteAddress, parse_replica
from tests.crash.activity_child import (
    BLOCKS_USED,
    PLACES,
    SIZE_BYTES,
    Batch,
    batches,
    place_of,
    read_all,
)
from tests.crash.child import run_until_killed
from tests.crash.test_power_loss import Disk
from tests.live.hosts import Host
from tests.loop import require_loop_devices

pytestmark = [pytest.mark.crash, pytest.mark.slow]

REPLICAS = 3
ROUNDS = 5


class Site:
    """Three replicas, each on a disk of its own, some of them in processes of their own."""

    def __init__(self, directory: Path, remote: int) -> None:
        self.disks = []
        for index in range(REPLICAS):
            (directory / f"host{index}").mkdir()
            disk = Disk(directory / f"host{index}")
            disk.mount()
            self.disks.append(disk)
        self.paths = [disk.path / "replica" for disk in self.disks]
        self.hosts: dict[int, Host] = {}
        for index in range(REPLICAS - remote, REPLICAS):
            self.hosts[index] = Host(self.paths[index])

    @property
    def places(self) -> list[Path | RemoteAddress]:
        return [
            parse_replica(self.hosts[index].address, Path("/")) if index in self.hosts else path
            for index, path in enumerate(self.paths)
        ]

    def stop(self) -> None:
        for host in self.hosts.values():
            host.kill()

    def lose_power(self, lost: list[int]) -> None:
        """Some hosts lose it, the processes of all end."""
        for index in lost:
            self.disks[index].cut()
        self.stop()
        for index in lost:
            self.disks[index].unmount()
            self.disks[index].mount()

    def start(self) -> None:
        for host in self.hosts.values():
            host.start()

    def close(self) -> None:
        self.stop()
        for disk in self.disks:
            if os.path.ismount(disk.path):
                disk.unmount()


@pytest.fixture(params=[0, 1, 3], ids=lambda remote: f"{remote} remote")
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    require_loop_devices()
    with ExitStack() as stack:
        site = Site(tmp_path, request.param)
        stack.callback(site.close)
        yield site


async def write_until_killed(seed: int, places: list[str], lines_max: int) -> tuple[int, int]:
    """Run the child; kill it after so many lines. The batch answered last, and the one flushed."""
    status, text = await run_until_killed(
        "tests.crash.activity_child", [str(seed), *places], lines_max
    )
    assert status == -9
    last = {"answered": -1, "flushed": -1}
    for line in text.splitlines():
        word, number = line.split()
        last[word] = int(number)
    return last["answered"], last["flushed"]


class Model:
    """What each block may hold."""

    def __init__(self) -> None:
        self.content = bytes(PLACES * BLOCKS_USED * BLOCK_BYTES)

    def allowed(self, history: list[Batch], flushed: int) -> dict[int, set[bytes]]:
        """Of the blocks that were changed, by where the content has them."""
        found: dict[int, set[bytes]] = {}
        for number, batch in enumerate(history):
            for offset, data in batch.blocks.items():
                at = place_of(offset)
                values = found.setdefault(at, {self.content[at : at + BLOCK_BYTES]})
                if number <= flushed:
                    values.clear()
                values.add(data)
        return found

    def check(self, content: bytes, allowed: dict[int, set[bytes]]) -> None:
        expected = bytearray(self.content)
        for at, values in allowed.items():
            data = content[at : at + BLOCK_BYTES]
            assert data in values, f"block at {at}: {data[:16]!r}"
            expected[at : at + BLOCK_BYTES] = data
        assert content == expected, "blocks changed that nobody wrote to"
        self.content = content


async def recover(site: Site) -> tuple[bytes, int]:
    """Open the volume; its content, and how much of it was compared."""
    with structlog.testing.capture_logs() as said:
        async with open_engine(EngineOptions(queues=1, workers=4)) as engine:
            config = VolumeConfig(name="db", replicas=site.places)
            async with engine.open_volume(config) as volume:
                assert volume.state == "healthy", volume.replicas()
                content = await read_all(volume)
    (line,) = [each for each in said if each["event"] == "comparing replicas after a crash"]
    assert line["compares"] == "hot extents", line
    return content, line["bytes"]


async def contents(site: Site) -> list[bytes]:
    """What each replica holds by itself."""
    found = []
    async with open_engine(EngineOptions(queues=1, workers=4)) as engine:
        for path in site.paths:
            config = VolumeConfig(name="db", replicas=[path], read_only=True, force=True)
            async with engine.open_volume(config) as volume:
                found.append(await read_all(volume))
    return found


@pytest.mark.parametrize("seed", [1, 2])
async def test_replicas_are_alike_though_only_hot_extents_are_compared(
    site: Site, seed: int
) -> None:
    await create_replicas("db", site.places, SIZE_BYTES)
    choose = random.Random(seed)
    model = Model()
    compared_bytes = []
    for round_ in range(ROUNDS):
        child_seed = seed * 100 + round_
        answered, flushed = await write_until_killed(
            child_seed, [str(place) for place in site.places], choose.randint(5, 120)
        )
        # The one after that may have been under way.
        history = list(itertools.islice(batches(child_seed), answered + 2))
        site.lose_power([index for index in range(REPLICAS) if choose.random() < 0.5])
        site.start()
        content, bytes_ = await recover(site)
        compared_bytes.append(bytes_)
        model.check(content, model.allowed(history, flushed))
        site.stop()
        assert await contents(site) == [content] * REPLICAS, "replicas differ"
        site.start()
    assert sum(compared_bytes) < ROUNDS * SIZE_BYTES // 2, compared_bytes
