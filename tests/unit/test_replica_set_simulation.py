"""A replica set whose hosts fail at random, on a clock that costs nothing: one seed, one history.

The set is the real one, and so are its locks, fences and generations. The core and the replicas are
told here once more, as docs/internals/io-path.md and remote-replicas.md say it: which stores a
write goes to, who is dropped, what is held and what a freeze waits for. Nothing has a thread, so
the seed decides everything.

What has to hold: a write is acknowledged when everybody who would be believed after a crash at that
moment has it, and when everything is well again, everything is answered and all replicas are alike.
``LHBLOCK_SIMULATION_SEEDS`` says how many seeds are run.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import os
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from lhblock._native import StoreMode
from lhblock.engine import _replica_set
from lhblock.engine._member import MemberState
from lhblock.engine._replica_set import ReplicaSet
from lhblock.errors import LhblockError, NativeError, ReplicaIO, ReplicaUnreachable, VolumeFaulted
from lhblock.replica import Generation, choose, new_set

TIME = "2026-01-01T00:00:00Z"
SEEDS = int(os.environ.get("LHBLOCK_SIMULATION_SEEDS", "1200"))
PARTS = 6
REPLICAS = 3
CLIENTS = 4
CALL_TIMEOUT_S = 1.0
REPLY_TIMEOUT_S = 1.0
FAULTS = 8
SETTLED_S = 120.0


@dataclass(eq=False)
class Host:
    """A replica's process and disk."""

    label: str
    generation: Generation
    log: set[int] = field(default_factory=set)
    up: bool = True
    full: bool = False
    rebuilding: bool = False
    written_elsewhere: str = ""
    session: Store | None = None


@dataclass(eq=False)
class Store:
    """Data connections to a host, which are there, or have ended for good."""

    id: int
    host: Host
    ended: bool = False


class Member:
    """What the set sees of a host."""

    exclusive = False
    merges_itself = False

    def __init__(self, host: Host, store: Store, world: World) -> None:
        self.host = host
        self.address = self.name = self.key = host.label
        self.state = MemberState.USABLE
        self.error = ""
        self.dropped_by_core = False
        self.missed: Any = None
        self.world = world
        self.store = store
        self.opened = self.has_store = True
        self.generation = host.generation

    @property
    def records(self) -> Any:
        return SimpleNamespace(
            generation=self.generation, disks={}, head=SimpleNamespace(name="head")
        )

    @property
    def generation_counter(self) -> int:
        return self.generation.counter

    @property
    def store_ended(self) -> bool:
        return self.store.ended

    def witness(self) -> None:
        return None

    def serve(self, native: object) -> None:
        return None

    async def call(self, change: Callable[[], None], *, session: bool = True) -> None:
        """A call whose request, or whose answer, may be lost."""
        await self.world.pause()
        if not self.host.up:
            await trio.sleep(CALL_TIMEOUT_S)
            raise ReplicaUnreachable(self.address, "did not answer")
        if session and self.host.session is not self.store:
            raise ReplicaIO(self.address, "has another session")
        if self.host.full and self.world.often(0.7):
            raise ReplicaIO(self.address, "no space")
        change()
        await self.world.pause()
        if not self.host.up:
            await trio.sleep(CALL_TIMEOUT_S)
            raise ReplicaUnreachable(self.address, "did not answer")

    async def write_generation(self, generation: Generation) -> None:
        def change() -> None:
            self.host.generation = generation

        await self.call(change)
        self.generation = generation

    async def leave_behind(self, generation: Generation) -> None:
        def change() -> None:
            self.host.generation = replace(generation, replica_id=self.generation.replica_id)
            self.world.core.end_session(self.host)

        await self.call(change, session=False)

    async def note_repaired(self) -> None:
        await self.call(lambda: None)

    async def start_promotion(self) -> None:
        await self.call(lambda: None)

    def finish_promotion(self) -> None:
        return None

    async def set_rebuilding(self, rebuilding: bool) -> None:
        def change() -> None:
            self.host.rebuilding = rebuilding

        await self.call(change)

    def close(self) -> None:
        assert self.store not in self.world.core.states, "is published"
        self.opened = self.has_store = False
        if self.host.session is self.store:
            self.world.core.end_session(self.host)


class Core:
    """The native volume: requests, what they wait for, and who is dropped."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.states: dict[Store, str] = {}
        self.frozen = self.given_up = False
        self.unfenced = self.in_flight = 0
        self.changed = trio.Event()
        self.events: list[Store] = []

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    # ---- What Python calls.

    async def freeze(self) -> None:
        self.frozen = True
        while self.in_flight and not self.given_up:
            await self.changed.wait()

    def thaw(self) -> None:
        self.frozen = False
        self.notify()

    def publish(self, stores: list[Store], modes: list[StoreMode]) -> None:
        assert self.frozen or not self.states
        if any(store.ended for store in stores) and not self.given_up:
            raise NativeError("publish", errno.ENOTCONN)
        self.states = {
            store: "RW" if mode is StoreMode.RW else "WO"
            for store, mode in zip(stores, modes, strict=True)
        }
        self.unfenced = 0
        self.notify()

    def fenced(self, store_id: int) -> None:
        for store, state in self.states.items():
            if store.id == store_id and state == "FAILED":
                self.states[store] = "GONE"
                self.unfenced -= 1
                self.notify()
                return
        raise NativeError("fenced", errno.ENOENT)

    def give_up(self) -> None:
        self.given_up = True
        self.notify()

    def track(self, store_id: int) -> None:
        return None

    def untrack(self, store_id: int) -> None:
        return None

    # ---- What happens to it.

    def drop(self, store: Store) -> bool:
        state = self.states.get(store)
        if state == "WO":
            self.states[store] = "GONE"
        elif state == "RW" and list(self.states.values()).count("RW") > 1:
            self.states[store] = "FAILED"
            self.unfenced += 1
        else:
            return False
        return True

    def end_session(self, host: Host) -> None:
        """The data connections of a host end; the core finds out, and then Python does."""
        store, host.session = host.session, None
        if store is None or store.ended:
            return
        self.world.nursery.start_soon(self.lose_peer, store)

    async def lose_peer(self, store: Store) -> None:
        await self.world.pause()
        if store.ended:
            return
        store.ended = True
        await self.world.pause(0.3)
        if self.drop(store) or self.states.get(store) == "RW":
            await self.post(store)

    async def post(self, store: Store) -> None:
        self.events.append(store)
        await self.world.pause(0.3)
        self.world.deliver()

    async def write(self, number: int) -> bool:
        """Whether it was acknowledged."""
        while self.frozen:
            await self.changed.wait()
        self.in_flight += 1
        try:
            targets = {s: state for s, state in self.states.items() if state in ("RW", "WO")}
            good: set[Store] = set()
            async with trio.open_nursery() as legs:
                for store in targets:
                    legs.start_soon(self.leg, store, number, good)
            if not any(targets[store] == "RW" for store in good):
                return False  # all stay that did the same, which is nothing here
            for store in targets:
                if store not in good and self.drop(store):
                    self.world.nursery.start_soon(self.post, store)
            left = [store for store in targets if self.states.get(store) == "RW"]
            failed = not left or any(store not in good for store in left)
            while self.unfenced and not self.given_up:
                await self.changed.wait()
            if self.given_up or failed:
                return False
            self.world.acknowledge(number)
            return True
        finally:
            self.in_flight -= 1
            self.notify()

    async def leg(self, store: Store, number: int, good: set[Store]) -> None:
        await self.world.pause()
        host = store.host
        begun_s = trio.current_time()
        while not host.up and not store.ended:
            await trio.sleep(0.05)
            if trio.current_time() - begun_s > REPLY_TIMEOUT_S:
                if host.session is store:
                    host.session = None
                await self.lose_peer(store)
        if store.ended or host.session is not store or host.full:
            return
        host.log.add(number)
        await self.world.pause()
        if not store.ended:
            good.add(store)


class World:
    """One volume, its hosts, its clients, and what befalls them."""

    def __init__(self, seed: int, nursery: trio.Nursery) -> None:
        self.random = random.Random(seed)
        self.nursery = nursery
        self.numbers = itertools.count(1)
        self.acknowledged: set[int] = set()
        self.core = Core(self)
        self.tree = trio.Lock()
        self.over = False
        self.hosts = [
            Host(f"host-{index}", generation)
            for index, generation in enumerate(new_set(REPLICAS, time=TIME))
        ]
        members = [Member(host, self.connect(host), self) for host in self.hosts]
        self.set = ReplicaSet(
            "db",
            members,  # type: ignore[arg-type]
            self.core,  # type: ignore[arg-type]
            read_only=False,
            quorum_wait_s=SETTLED_S,
            deliver_events=self.deliver,
            on_faulted=self.check_fault,
        )
        self.set.publish()
        self.members = members

    def often(self, chance: float) -> bool:
        return self.random.random() < chance

    async def pause(self, scale: float = 1.0) -> None:
        """Something takes a while: mostly little, and sometimes much."""
        if self.often(0.3):
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(scale * self.random.choice((0.0001, 0.001, 0.02)))

    def connect(self, host: Host) -> Store:
        host.session = Store(next(self.numbers), host)
        return host.session

    # ---- What the volume does with its set.

    def deliver(self) -> None:
        events, self.core.events = self.core.events, []
        for store in events:
            for member in self.members:
                if not member.has_store or member.store is not store:
                    continue
                known: Any = member
                if member.state is MemberState.USABLE and self.set.usable == [known]:
                    self.set.fault("its last replica failed")
                else:
                    self.set.note_failure(known, "lost", by_core=True, out_of_touch=True)
                    self.nursery.start_soon(self.set.withdraw)

    async def client(self) -> None:
        while not self.over:
            await self.core.write(next(self.numbers))
            await trio.sleep(self.random.choice((0.0, 0.05, 0.3)))

    async def rebuilder(self) -> None:
        while not self.set_faulted:
            await trio.sleep(0.2)
            away = [member for member in self.members if member.state is MemberState.LEFT]
            for member in away:
                try:
                    await self.rebuild(member)
                except LhblockError:
                    async with self.tree:
                        if member.state is MemberState.REBUILDING:
                            self.set.lose_rebuilding(member, "not rebuilt")  # type: ignore[arg-type]
                        if member.state is MemberState.LEFT:
                            await self.detach(member)

    async def detach(self, member: Member) -> None:
        await self.set.unpublish(member)  # type: ignore[arg-type]
        member.close()

    async def rebuild(self, member: Member) -> None:
        known: Any = member
        host = member.host
        await self.detach(member)
        if not host.up or host.full:
            return
        async with self.tree:
            self.set.check()
            source = self.set.usable[0]
            host.rebuilding, host.log = True, set()
            member.store, member.opened, member.has_store = self.connect(host), True, True
            member.generation = host.generation
            async with self.set.frozen():
                member.state, member.error, member.dropped_by_core = (
                    MemberState.REBUILDING,
                    "",
                    False,
                )
                behind = set(source.host.log)  # type: ignore[attr-defined]
            if source.state is not MemberState.USABLE:
                raise ReplicaIO(host.label, "its source failed")
        await self.pause(10)
        if not host.up:
            raise ReplicaUnreachable(host.label, "did not answer")
        host.log |= behind
        async with self.tree:
            if member.state is not MemberState.REBUILDING:
                raise ReplicaIO(host.label, "failed meanwhile")
            await self.set.join(known)
            async with self.set.frozen():
                if member.state is not MemberState.REBUILDING:
                    raise ReplicaIO(host.label, "failed meanwhile")
                await self.set.complete(known)

    async def snapshots(self) -> None:
        """Something that all do, frozen and not."""
        while not self.over:
            await self.pause(20)

            async def step(member: Any) -> None:
                await member.call(lambda: None)

            try:
                async with self.tree:
                    await self.set.each(step, members=self.set.writers, during="preparing")
                    async with self.set.frozen():
                        await self.set.each(step, members=self.set.writers, during="switching")
                    await self.set.withdraw()
            except LhblockError:
                pass

    # ---- What befalls it.

    async def fault(self) -> None:
        host = self.random.choice(self.hosts)
        if self.often(0.8) and any(not other.up or other.full for other in self.hosts):
            return  # two at once only sometimes
        kind = self.random.choice(("kill", "cut", "hang up", "full", "fail", "remove"))
        if kind == "kill":
            host.up = False
            self.core.end_session(host)
        elif kind == "cut":
            host.up = False
        elif kind == "hang up":
            self.core.end_session(host)
        elif kind == "full":
            host.full = True
        elif kind == "remove":
            self.nursery.start_soon(self.remove, host)
        else:
            (member,) = (m for m in self.members if m.host is host)
            known: Any = member
            if self.set.usable != [known] and self.set.note_failure(known, "by order"):
                self.nursery.start_soon(self.set.withdraw)
        await trio.sleep(self.random.choice((0.0, 0.01, 0.5, 1.5, 3.0)))
        host.up, host.full = True, False

    async def remove(self, host: Host) -> None:
        """Take a replica out, and in again."""
        (member,) = (m for m in self.members if m.host is host)
        known: Any = member
        async with self.tree:
            try:
                await self.set.remove(known)
            except LhblockError:
                return  # it is the last one, or the volume is faulted
            member.close()
            self.set.add(known)

    async def faults(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(FAULTS):
                await trio.sleep(self.random.choice((0.0, 0.002, 0.1, 1.0)))
                nursery.start_soon(self.fault)

    # ---- What has to hold.

    @property
    def set_faulted(self) -> bool:
        return self.set.state == "faulted"

    def check_fault(self) -> None:
        """It may be given up when all failed, and for nothing else."""
        with pytest.raises(VolumeFaulted) as raised:
            self.set.check()
        assert "cannot be changed" not in str(raised.value)

    def acknowledge(self, number: int) -> None:
        self.acknowledged.add(number)
        if self.often(0.2):
            self.check()

    def check(self) -> None:
        """Whoever would be believed after a crash of the engine now has what was acknowledged."""
        for count in range(1, REPLICAS + 1):
            for reached in itertools.combinations(self.hosts, count):
                present = [host for host in reached if not host.rebuilding]
                if not present:
                    continue
                choice = choose(present)
                believed = [present[index] for index in choice.newest]
                ids = {host.generation.replica_id for host in believed} | {
                    present[index].generation.replica_id for index in choice.lagging
                }
                # Of two, each may be served alone, with a warning: that may lose what one missed.
                if choice.doubt or 2 * len(ids.intersection(choice.members)) <= len(choice.members):
                    continue
                for host in believed:
                    missing = self.acknowledged - host.log
                    assert not missing, f"{host.label} of {ids} lacks {sorted(missing)[:5]}"

    @property
    def is_well(self) -> bool:
        return all(member.state is MemberState.USABLE for member in self.members)

    async def until(self, condition: Callable[[], bool]) -> None:
        limit_s = trio.current_time() + SETTLED_S / 2
        while not condition():
            states = [(each.address, each.state.name, each.error) for each in self.members]
            assert trio.current_time() < limit_s, (states, self.core.states, self.core.in_flight)
            await trio.sleep(0.1)

    async def run(self) -> bool:
        """Whether the volume came through; it may be faulted when all failed at once."""
        async with trio.open_nursery() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(self.client)
            clients.start_soon(self.snapshots)
            self.nursery.start_soon(self.rebuilder)
            try:
                await self.faults()
                await trio.sleep(3 * REPLY_TIMEOUT_S)  # the last of it is noticed
                await self.until(lambda: self.is_well or self.set_faulted)
                self.over = True
                await self.until(lambda: not clients.child_tasks)
            finally:
                self.core.give_up()  # what is held up, and shielded, would be so for good
        self.check()
        if self.set_faulted:
            return False
        for host in self.hosts:
            assert self.acknowledged <= host.log, host.label
            assert not host.rebuilding
        assert len({host.generation.counter for host in self.hosts}) == 1
        return True


async def simulate(seed: int) -> bool:
    async with trio.open_nursery() as nursery:
        through = await World(seed, nursery).run()
        nursery.cancel_scope.cancel()
    return through


def _uuid_of(chance: random.Random) -> uuid.UUID:
    return uuid.UUID(int=chance.getrandbits(128), version=4)


@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_acknowledged_is_lost_and_nothing_is_held_up(
    monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    async def run(function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        return await result if inspect.isawaitable(result) else result

    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(_replica_set, "run_metadata", run)
    monkeypatch.setattr(_replica_set, "run_fence", run)
    monkeypatch.setattr(
        _replica_set,
        "log",
        SimpleNamespace(
            **dict.fromkeys(("info", "warning", "error", "critical"), lambda *_, **__: None)
        ),
    )
    through = 0
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        chance = random.Random(seed)
        monkeypatch.setattr("trio._core._run._r", chance)
        monkeypatch.setattr("uuid.uuid4", partial(_uuid_of, chance))
        try:
            through += trio.run(simulate, seed, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    assert through > SEEDS // PARTS // 2
