"""Faults at random while clients write: what they saw is one history, and replicas end up alike.

Each round has many requests in flight from three connections, one fault in the midst of them, and
its end some time later, sooner or later than the time-out of a replica. ``LHBLOCK_CLUSTER_SEEDS``
says how many seeds are run, or which one: ``LHBLOCK_CLUSTER_SEEDS==7``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from lhblock.replica import Generation
from tests.live.cluster import (
    Cluster,
    Node,
    keep_seed,
    seeds_to_run,
    start_cluster,
)
from tests.live.hosts import wait_modes
from tests.model import nbd_client
from tests.model.linearizability import BLOCK, History
from tests.model.nbd_client import open_client
from tests.model.served import CLIENTS, ServedVolume
from tests.model.test_volume_histories import REQUESTS, Load
from tests.model.volumes import VolumeFiles

pytestmark = [pytest.mark.live, pytest.mark.slow]

VARIABLE = "LHBLOCK_CLUSTER_SEEDS"
KEPT = Path(__file__).resolve().parents[2] / "build" / "cluster-seeds-that-failed"
SEEDS = 2
ROUNDS = 5
REPLICAS = 3
SIZE_BYTES = 16 * BLOCK
HOLD_S = (0.0, 0.3, 1.5, 2.5)  # the time-out is 1 s
LIMIT_S = 60.0

NODE_FAULTS: tuple[Callable[[Node], None], ...] = (
    Node.kill,
    Node.freeze,
    Node.cut,
    Node.cut_requests,
    Node.cut_replies,
    Node.slow_down,
    Node.fill,
)


class Round:
    """One fault, or the loss of the engine, under a load whose history is checked."""

    def __init__(self, cluster: Cluster, served: ServedVolume, seed: int, number: int) -> None:
        self.cluster = cluster
        self.served = served
        self.chance = random.Random(f"{seed} {number}")
        self.history = History()
        self.load = Load(served, seed * 100 + number, self.history)
        self.load.enough = self.chance.randrange(20, REQUESTS)
        self.engine_lost = False

    async def run(self, head: bytes) -> bytes:
        """Returns the content afterwards."""
        self.served.failures = []
        async with AsyncExitStack() as connections:
            await self._connect(connections)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.load.run)
                nursery.start_soon(self._befall)
        assert self.engine_lost or self.served.failures == []
        async with AsyncExitStack() as connections:
            await self._connect(connections)
            with trio.fail_after(LIMIT_S):
                after = await self._read_all()
        self.history.check(head)
        return after

    async def _connect(self, connections: AsyncExitStack) -> None:
        self.served.clients = [
            await connections.enter_async_context(open_client(self.cluster.connect()))
            for _ in range(CLIENTS)
        ]

    async def _read_all(self) -> bytes:
        request = self.history.begin_read(0)
        client = self.served.clients[0]
        error, content = await client.request(nbd_client.READ, 0, SIZE_BYTES)
        assert error == 0
        self.history.end(request, content)
        return content

    async def _befall(self) -> None:
        await self.load.reached.wait()
        kind = self.chance.choices(("one", "two", "engine", "both", "all"), (10, 3, 3, 2, 1))[0]
        victims = self.chance.sample(
            self.cluster.nodes, {"one": 1, "two": 2, "engine": 0, "both": 1, "all": REPLICAS}[kind]
        )
        self.engine_lost = kind in ("engine", "both", "all")
        faults = [self.chance.choice(NODE_FAULTS) for _ in victims]
        if kind == "all":
            faults = [Node.kill] * REPLICAS
        print(f"after {self.load.answers} answers: {kind}", [fault.__name__ for fault in faults])
        for node, fault in zip(victims, faults, strict=True):
            await trio.to_thread.run_sync(fault, node)
        if self.engine_lost:
            await trio.to_thread.run_sync(self.cluster.kill_engine)
        await trio.sleep(self.chance.choice(HOLD_S))
        self.chance.shuffle(victims)
        for node in victims:
            await trio.to_thread.run_sync(node.heal)
        if self.engine_lost:
            await trio.to_thread.run_sync(self.cluster.start_engine)


@contextmanager
def kept_if_it_fails(seed: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        keep_seed(KEPT, seed)
        print(f"repeat with {VARIABLE}=={seed}; it is kept in {KEPT}")
        raise


def check_generations(paths: list[Path]) -> None:
    """All replicas name the same last change, and all of them as its members."""
    found = [Generation.parse((path / "lhblock.generation").read_bytes()) for path in paths]
    assert len({(each.volume_id, each.counter, each.generation) for each in found}) == 1
    for each in found:
        assert set(each.members) == {other.replica_id for other in found}
        counters = [entry.counter for entry in each.history]
        assert counters == sorted(set(counters))


@pytest.mark.parametrize("seed", seeds_to_run(VARIABLE, KEPT, SEEDS))
async def test_what_clients_saw_while_a_cluster_failed_is_one_history(
    tmp_path: Path, seed: int
) -> None:
    with start_cluster(tmp_path, REPLICAS) as cluster, kept_if_it_fails(seed):
        files = VolumeFiles([node.path for node in cluster.nodes], SIZE_BYTES)
        served = ServedVolume(files)
        head = bytes(SIZE_BYTES)
        for number in range(ROUNDS):
            # A fault may hit any two: one that has everything has to be left.
            await trio.to_thread.run_sync(wait_modes, cluster.data, *["RW"] * REPLICAS)
            head = await Round(cluster, served, seed, number).run(head)
        await trio.to_thread.run_sync(wait_modes, cluster.data, *["RW"] * REPLICAS)
        cluster.stop_engine()
        for node in cluster.nodes:
            node.kill()
        check_generations([node.path for node in cluster.nodes])
        assert await files.contents() == [head] * REPLICAS
