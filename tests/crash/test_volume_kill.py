"""kill -9 in the middle of writes, snapshots, reverts and merges; then the volume opens again.

A killed process loses nothing that the kernel has, so every completed operation must be there, and
the one in the middle may be there in part: each block old or new.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lhblock._native import BLOCK_BYTES
from lhblock.engine import EngineOptions, VolumeConfig, create_replicas, open_engine
from tests.crash.child import run_until_killed
from tests.crash.volume_child import BLOCKS, Operation, fill, operations

pytestmark = pytest.mark.crash

SIZE_BYTES = BLOCKS * BLOCK_BYTES
ROUNDS = 6


@dataclass
class Model:
    """What must be there. ``maybe`` is what the operation in the middle would have made."""

    head: bytes = bytes(SIZE_BYTES)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def after(self, number: int, operation: Operation) -> Model:
        """The state once an operation is done."""
        kind, offset, length, name = operation
        snapshots = dict(self.snapshots)
        head = self.head
        if kind in ("write", "trim", "zero"):
            new = bytes([fill(number) if kind == "write" else 0]) * length
            head = head[:offset] + new + head[offset + length :]
        elif kind == "snapshot" and name not in snapshots:
            snapshots[name] = head
        elif kind == "remove":
            snapshots.pop(name, None)
        elif kind == "revert":
            head = snapshots.get(name, head)
        return Model(head, snapshots)


async def change_until_killed(
    seed: int, paths: list[Path], lines_max: int
) -> tuple[list[int], set[int], int | None]:
    """Run the child; kill it after so many lines. Returns done, passed over, and in the middle."""
    done: list[int] = []
    passed: set[int] = set()
    begun: int | None = None
    status, text = await run_until_killed(
        "tests.crash.volume_child", [str(seed), *map(str, paths)], lines_max
    )
    assert status in (0, -9)
    for line in text.splitlines():
        word, number = line.split()
        if word == "begin":
            begun = int(number)
        elif word == "done":
            done.append(int(number))
            begun = None
        else:
            passed.add(int(number))
    return done, passed, begun


async def check(paths: list[Path], before: Model, after: Model) -> Model:
    """The volume is what it was before or after the operation in the middle."""
    contents: list[bytes] = []
    async with open_engine(EngineOptions(queues=1, workers=2)) as engine:
        config = VolumeConfig(name="db", replicas=paths)
        async with engine.open_volume(config) as volume:
            assert volume.state == "healthy", volume.replicas()
            head = await volume.read(0, SIZE_BYTES)
            alive = {info.name for info in volume.snapshots() if not info.removed}
            assert alive in (set(before.snapshots), set(after.snapshots))
            snapshots = {}
            for name in alive:
                async with volume.open_view(name) as view:
                    snapshots[name] = await view.read(0, SIZE_BYTES)
            await volume.wait_merged()
            assert await volume.read(0, SIZE_BYTES) == head
        for path in paths:
            alone = VolumeConfig(name="db", replicas=[path], read_only=True, force=True)
            async with engine.open_volume(alone) as volume:
                contents.append(await volume.read(0, SIZE_BYTES))
    assert contents == [head] * len(paths), "replicas differ"
    for start in range(0, SIZE_BYTES, BLOCK_BYTES):
        block = head[start : start + BLOCK_BYTES]
        old, new = (model.head[start : start + BLOCK_BYTES] for model in (before, after))
        assert block in (old, new), f"block {start // BLOCK_BYTES}"
    for name, content in snapshots.items():
        wanted = before.snapshots.get(name, after.snapshots.get(name))
        assert content == wanted, f"snapshot {name}"
    return Model(head, snapshots)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_killed_process_loses_nothing_that_was_completed(
    tmp_path: Path, replicas: int, seed: int
) -> None:
    paths = [tmp_path / f"r{index}" for index in range(replicas)]
    await create_replicas("db", paths, SIZE_BYTES)
    choose = random.Random(seed)
    model = Model()
    for round_ in range(ROUNDS):
        history_seed = seed * 1000 + round_
        history = operations(history_seed)
        # Odd counts end in the middle of an operation, even ones between two.
        done, passed, begun = await change_until_killed(history_seed, paths, choose.randint(3, 300))
        for number in done:
            if number not in passed:
                model = model.after(number, history[number])
        after = model if begun is None else model.after(begun, history[begun])
        model = await check(paths, model, after)
