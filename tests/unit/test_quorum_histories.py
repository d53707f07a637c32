"""Engines that open, write, fence, rebuild and die, over replicas that come and go: who is right.

The rules of `lhblock.replica` are the real ones; what an engine does with them is told here once
more, as docs/internals/remote-replicas.md says it, step by step and with everything that may fail
failing at random. An engine that acknowledges, or opens, has everything that was ever acknowledged.

Two members may each go on alone, which is what two replicas are for, so here they may not: the
quorum is the majority of any number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from lhblock.errors import ReplicaError
from lhblock.replica import OPENED, Generation, choose, never_counted, new_set, supersede

TIME = "2026-01-01T00:00:00Z"
SEEDS = 3000
STEPS = 60


def majority(members: int) -> int:
    return members // 2 + 1


@dataclass(eq=False)
class Disk:
    """A replica. `owner`: the engine that has its session."""

    label: str
    generation: Generation
    log: set[int] = field(default_factory=set)
    owner: Engine | None = None
    written_elsewhere: str = ""

    @property
    def id(self) -> str:
        return self.generation.replica_id


@dataclass(eq=False)
class Engine:
    """One that opened the volume."""

    usable: list[Disk] = field(default_factory=list)
    committed: frozenset[str] = frozenset()
    alive: bool = True

    def agreed(self, ids: set[str]) -> bool:
        return len(self.committed & ids) >= majority(len(self.committed))


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        count = self.random.randint(3, 5)
        self.disks = [Disk(g.replica_id, g) for g in new_set(count, time=TIME)]
        self.engines: list[Engine] = []
        self.acknowledged: set[int] = set()
        self.writes = 0
        self.opened = 0

    def often(self, chance: float) -> bool:
        return self.random.random() < chance

    def some(self, disks: list[Disk]) -> list[Disk]:
        return self.random.sample(disks, self.random.randint(0, len(disks)))

    # ---- What an engine does.

    def open(self) -> None:
        reached = self.some(self.disks)
        connected = {disk for each in self.engines if each.alive for disk in each.usable}
        if not reached or connected.intersection(reached):
            return
        choice = choose(reached)  # never a split: nobody is forced
        believed = [reached[index] for index in (*choice.newest, *choice.lagging)]
        engine = Engine(believed, frozenset(choice.members))
        if not choice.newest or choice.doubt or not engine.agreed({disk.id for disk in believed}):
            return
        source = believed[0]
        for disk in believed:
            disk.owner = engine
            disk.log = set(source.log)
        if self.record(engine) and self.record(engine):
            self.engines.append(engine)
            self.opened += 1
            self.check(engine)

    def record(self, engine: Engine) -> bool:
        """The generation that an opening makes. False: it gave up, or died."""
        while True:
            best = max((d.generation for d in engine.usable), key=lambda g: g.counter)
            for disk in list(engine.usable):
                if disk.generation.counter != best.counter:
                    if self.often(0.1):
                        engine.usable.remove(disk)
                        continue
                    disk.generation = replace(best, replica_id=disk.id)
            present = {disk.id for disk in engine.usable}
            if not engine.agreed(present):
                return False
            left = [each for each in best.members if each not in present]
            joined = [each for each in present if each not in best.members]
            made = supersede(
                [disk.generation for disk in engine.usable],
                left=left,
                joined=joined,
                reason="missing" if left or joined else OPENED,
                time=TIME,
            )
            if self.write_generations(engine, list(made), set()):
                return True
            if not engine.alive or not engine.usable:
                return False

    def write_generations(self, engine: Engine, made: list[Generation], agreed: set[str]) -> bool:
        """Whether all usable have it; those that have not are none any more."""
        have = set(agreed)
        members = made[0].members
        whole = True
        for generation in made:
            if self.often(0.03):
                engine.alive = False
                return False
            disk = next(d for d in engine.usable if d.id == generation.replica_id)
            if disk.owner is not engine or self.often(0.1):
                engine.usable.remove(disk)
                whole = False
                continue
            disk.generation = generation
            have.add(disk.id)
        if engine.agreed(have):
            engine.committed = frozenset(members)
        return whole

    def write(self, engine: Engine) -> None:
        self.writes += 1
        failing = [disk for disk in engine.usable if disk.owner is not engine or self.often(0.15)]
        for disk in engine.usable:
            if disk.owner is engine and (disk not in failing or self.often(0.5)):
                disk.log.add(self.writes)
        if self.fence(engine, failing):
            self.acknowledged.add(self.writes)
            self.check(engine)

    def fence(self, engine: Engine, failing: list[Disk]) -> bool:
        while failing:
            before = list(engine.usable)
            engine.usable = survivors = [disk for disk in before if disk not in failing]
            if not survivors:
                engine.alive = False
                return False
            made = supersede(
                [disk.generation for disk in survivors],
                left=[disk.id for disk in failing],
                reason="failed",
                time=TIME,
            )
            agreed: set[str] = set()
            going_on = {disk.id for disk in survivors}
            if not engine.agreed(going_on):
                agreed = self.ask(engine, failing, made[0])
            if not engine.agreed(going_on | agreed):
                engine.alive = False  # it waited long enough, and is faulted
                return False
            made = tuple(each.with_agreement(agreed) for each in made)
            whole = self.write_generations(engine, list(made), agreed)
            if not engine.alive:
                return False
            failing = failing + [disk for disk in survivors if disk not in engine.usable]
            if whole:
                return True
            engine.usable = [disk for disk in survivors if disk in engine.usable]
        return True

    def ask(self, engine: Engine, failing: list[Disk], made: Generation) -> set[str]:
        agreed = set()
        for disk in failing:
            if self.often(0.5):
                continue  # it is not there
            if disk.owner not in (engine, None) or not made.knows(
                disk.generation.counter, disk.generation.generation
            ):
                return set()  # another engine has it: the end of this one
            disk.owner = None
            disk.generation = replace(made, replica_id=disk.id)
            agreed.add(disk.id)
        return agreed

    def rebuild(self, engine: Engine) -> None:
        away = [disk for disk in self.disks if disk not in engine.usable]
        connected = {disk for each in self.engines if each.alive for disk in each.usable}
        away = [disk for disk in away if disk not in connected]
        if not away or any(disk.owner is not engine for disk in engine.usable):
            return
        target = self.random.choice(away)
        like = engine.usable[0].generation
        theirs = target.generation
        if not never_counted(theirs, like) and not like.knows(theirs.counter, theirs.generation):
            return
        target.owner = engine
        target.log = set(engine.usable[0].log)
        made = supersede(
            [disk.generation for disk in engine.usable],
            left=[],
            joined=[target.id],
            reason="rebuilt",
            time=TIME,
        )
        survivors = list(engine.usable)
        whole = self.write_generations(engine, list(made), set())
        if not engine.alive:
            return
        lost = [disk for disk in survivors if disk not in engine.usable]
        if not engine.usable:
            engine.alive = False
            return
        newest = engine.usable[0].generation
        if whole:
            target.generation = replace(newest, replica_id=target.id)
            engine.usable.append(target)
        else:
            engine.usable = survivors
            self.fence(engine, lost)

    # ---- What has to hold.

    def check(self, engine: Engine) -> None:
        for disk in engine.usable:
            assert self.acknowledged <= disk.log, (self.acknowledged - disk.log, disk.label)

    def step(self) -> None:
        alive = [engine for engine in self.engines if engine.alive]
        if not alive or self.often(0.2):
            self.open()
            return
        engine = self.random.choice(alive)
        if self.often(0.1):
            engine.alive = False
        elif self.often(0.15):
            # Its connection to some is cut: others may open those.
            lost = self.some(engine.usable)
            if len(lost) < len(engine.usable):
                self.fence(engine, lost)
        elif self.often(0.25):
            self.rebuild(engine)
        else:
            self.write(engine)


@pytest.mark.parametrize("part", range(6))
def test_whoever_acknowledges_has_everything(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr("lhblock.replica._generation.quorum", majority)
    opened = 0
    for seed in range(part * SEEDS // 6, (part + 1) * SEEDS // 6):
        world = World(seed)
        for step in range(STEPS):
            try:
                world.step()
            except (AssertionError, ReplicaError) as error:
                raise AssertionError(f"seed {seed}, step {step}: {error}") from error
        opened += world.opened
    assert opened > SEEDS // 6  # it is about engines that open
