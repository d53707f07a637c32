"""Clients that keep many requests in flight, until the serving process is killed or a store fails.

Whatever they saw has to be linearizable for every block, and what they were told is done has to be
there afterwards. A killed process loses nothing that the kernel has.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from lhblock.engine import CacheMode, DriverChoice
from tests.model.linearizability import BLOCK, History, Request
from tests.model.nbd_client import NbdClient, open_client
from tests.model.served import CLIENTS, LIMIT_S, ServedVolume, Step, contents_of
from tests.model.volumes import VolumeFiles, fault, view_content

pytestmark = pytest.mark.model

REPOSITORY = Path(__file__).parents[2]
SEED_FILE = Path(__file__).with_name("seeds.txt")
BLOCKS = 10
DEPTH = 4  # requests in flight on each connection
REQUESTS = 400
ROUNDS = 3


def seeds() -> list[int]:
    """Those of the seed file, or the one of LHBLOCK_SEED, or two hundred in the nightly run."""
    if "LHBLOCK_SEED" in os.environ:
        return [int(os.environ["LHBLOCK_SEED"])]
    known = [int(line) for line in SEED_FILE.read_text().splitlines() if line[:1].isdigit()]
    nightly = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    return known + (list(range(1000, 1200)) if nightly else [])


def random_step(choose: random.Random) -> Step:
    """A request that meets others: most are in the first blocks."""
    blocks = choose.choice((2, 4, BLOCKS))
    offset = choose.randrange(blocks * BLOCK)
    if choose.random() < 0.4:
        offset -= offset % BLOCK
    length = choose.choice((1, 512, 700, BLOCK, BLOCK + 1, 3 * BLOCK))
    kind = choose.choices(("write", "read", "zero", "trim", "flush"), (10, 8, 2, 2, 1))[0]
    return Step(
        kind,  # type: ignore[arg-type]
        offset,
        min(length, BLOCKS * BLOCK - offset),
        choose.random() < 0.1,
        choose.randrange(CLIENTS),
    )


class Load:
    """Workers that take the steps of a seed one by one; each stops at its first failure."""

    def __init__(self, served: ServedVolume, seed: int, history: History) -> None:
        self.served = served
        self.history = history
        self.answers = 0
        self.reached = trio.Event()
        self.enough = REQUESTS
        self._left = iter([random_step(random.Random(seed * 7919 + n)) for n in range(REQUESTS)])

    async def run(self) -> None:
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                for _ in range(CLIENTS * DEPTH):
                    nursery.start_soon(self._work)
        self.reached.set()

    async def _work(self) -> None:
        for step in self._left:
            if await self.served.perform(step, self.history):
                return  # more writes of unknown fate would only blur the history
            self.answers += 1
            if self.answers >= self.enough:
                self.reached.set()


class ServerProcess:
    """A process of :mod:`tests.model.volume_server`, and its word about snapshots."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._text = b""

    async def line(self) -> str:
        """The next line it says, "" when it is gone."""
        assert self.process.stdout is not None
        while b"\n" not in self._text:
            chunk = await self.process.stdout.receive_some()
            if not chunk:
                return ""
            self._text += chunk
        line, self._text = self._text.split(b"\n", 1)
        return line.decode()

    async def take_snapshots(self, load: Load, prefix: str) -> dict[str, Request]:
        """Take one after the other until the load has ended or the process is gone."""
        assert self.process.stdin is not None
        taken: dict[str, Request] = {}
        while not load.reached.is_set():
            name = f"{prefix}{len(taken)}"
            taken[name] = load.history.begin_read(0)
            try:
                await self.process.stdin.send_all(f"{name}\n".encode())
            except trio.BrokenResourceError:
                break
            if await self.line() != name:
                break
            load.history.end(taken[name])
        return taken


@asynccontextmanager
async def server_process(
    files: VolumeFiles,
) -> AsyncIterator[tuple[ServerProcess, list[NbdClient]]]:
    """Start a serving process with a connection for every client; it is killed on leaving."""
    pairs = [socket.socketpair() for _ in range(CLIENTS)]
    theirs = [pair[1].fileno() for pair in pairs]
    arguments = [
        # -P: not the working directory but PYTHONPATH says which build of the core is tested.
        *(sys.executable, "-P", "-m", "tests.model.volume_server", files.driver, files.cache),
        ",".join(map(str, theirs)),
        *map(str, files.paths),
    ]
    process = await trio.lowlevel.open_process(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=theirs,
        cwd=REPOSITORY,
    )
    server = ServerProcess(process)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout, AsyncExitStack() as stack:
            clients = []
            for ours, remote in pairs:
                remote.close()
                clients.append(await stack.enter_async_context(open_client(ours)))
            with trio.fail_after(LIMIT_S):
                assert await server.line() == "ready"
            yield server, clients
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


async def run_until_killed(
    files: VolumeFiles, seed: int, prefix: str, history: History
) -> dict[str, Request]:
    """Serve, load, kill. Returns the snapshots that were begun."""
    served = ServedVolume(files)
    load = Load(served, seed, history)
    load.enough = random.Random(seed).randrange(20, REQUESTS)
    taken: dict[str, Request] = {}
    async with server_process(files) as (server, served.clients):

        async def kill() -> None:
            await load.reached.wait()
            server.process.kill()

        async def snapshots() -> None:
            taken.update(await server.take_snapshots(load, prefix))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            nursery.start_soon(kill)
            nursery.start_soon(snapshots)
    assert load.answers >= load.enough
    return taken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "driver", "cache"),
    [(1, "auto", "writeback"), (3, "pool", "writeback"), (3, "auto", "none")],
)
@pytest.mark.parametrize("seed", seeds())
async def test_what_clients_saw_before_a_kill_is_there_after_it(
    tmp_path: Path, seed: int, replicas: int, driver: DriverChoice, cache: CacheMode
) -> None:
    files = await VolumeFiles.create(
        tmp_path, replicas=replicas, size_bytes=BLOCKS * BLOCK, driver=driver, cache=cache
    )
    head = bytes(BLOCKS * BLOCK)
    kept: dict[str, bytes] = {}
    for round_ in range(ROUNDS):
        history = History()
        taken = await run_until_killed(files, seed * 100 + round_, f"r{round_}s", history)
        killed = history.tick()
        async with files.open() as volume:
            assert volume.state == "healthy"
            names = {info.name for info in volume.snapshots()}
            for name, request in taken.items():
                if name in names:
                    request.data = kept[name] = await view_content(volume, name)
                    request.ended = min(request.ended, killed)
                else:
                    assert request.ended > killed, f"snapshot {name} is lost"
            after = history.begin_read(0)
            after.data = await volume.read(0, volume.size_bytes)
            history.end(after)
        history.check(head)
        head = after.data
    for index in range(replicas):
        assert await contents_of(files, index) == {"": head} | kept, f"replica {index}"


@pytest.mark.parametrize("point", ["store.write", "store.read", "store.sync"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("replicas", [1, 3])
async def test_clients_of_a_store_that_fails_see_one_history(
    tmp_path: Path, replicas: int, point: str, error: int
) -> None:
    files = await VolumeFiles.create(tmp_path, replicas=replicas, size_bytes=BLOCKS * BLOCK)
    served = ServedVolume(files)
    await served.open()
    history = History()
    load = Load(served, seed=replicas * 10 + error, history=history)
    with fault(point, error, skip=9, times=1):
        await load.run()
    if replicas > 1:
        assert served.failures == [], "another replica could have answered"
    else:
        assert set(served.failures) <= {-1, error, errno.EIO}
    usable = served.usable()
    await served.close()
    await served.open()
    head = await served.read_all(history)
    history.check(bytes(BLOCKS * BLOCK))
    await served.close()
    for index in usable:
        assert (await contents_of(files, index))[""] == head
