"""A process that works on a volume until it is killed, saying what it begins and what is done.

Run as ``python -m tests.crash.volume_child SEED DIRECTORY...``. Which operations come follows from
the seed alone, so the parent knows them, too.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import structlog
import trio

from lhblock._native import BLOCK_BYTES
from lhblock.engine import EngineOptions, Volume, VolumeConfig, open_engine
from lhblock.errors import SnapshotExists, SnapshotNotFound

BLOCKS = 48
OPERATIONS = 400
NAMES = ("a", "b", "c")

Operation = tuple[str, int, int, str]  # kind, offset or fill, length, name


def operations(seed: int) -> list[Operation]:
    """The history of a seed."""
    choose = random.Random(seed)
    history: list[Operation] = []
    for _ in range(OPERATIONS):
        kind = choose.choices(
            ("write", "trim", "zero", "snapshot", "remove", "revert", "merge", "flush"),
            (12, 3, 2, 3, 3, 1, 1, 1),
        )[0]
        offset = choose.randrange(BLOCKS * BLOCK_BYTES)
        if choose.random() < 0.5:
            offset -= offset % BLOCK_BYTES
        length = min(choose.choice((1, 700, 4096, 9000, 40960)), BLOCKS * BLOCK_BYTES - offset)
        history.append((kind, offset, length, choose.choice(NAMES)))
    return history


def fill(number: int) -> int:
    """The byte that the operation of this number writes; never zero."""
    return number % 255 + 1


async def carry_out(volume: Volume, number: int, operation: Operation) -> None:
    """One operation; snapshots that cannot be are passed over."""
    kind, offset, length, name = operation
    if kind == "write":
        await volume.write(offset, bytes([fill(number)]) * length)
    elif kind == "trim":
        await volume.trim(offset, length)
    elif kind == "zero":
        await volume.zero(offset, length)
    elif kind == "flush":
        await volume.flush()
    elif kind == "merge":
        await volume.wait_merged()
    else:
        alive = {info.name for info in volume.snapshots() if not info.removed}
        try:
            if kind == "snapshot":
                await volume.create_snapshot(name)
            elif name in alive and kind == "remove":
                await volume.remove_snapshot(name)
            elif name in alive and kind == "revert":
                await volume.revert_snapshot(name)
        except (SnapshotExists, SnapshotNotFound):
            say("passed", number)


def say(word: str, number: int) -> None:
    """One line in one write, so that a kill never tears it."""
    os.write(sys.stdout.fileno(), f"{word} {number}\n".encode())


async def main(seed: int, replicas: list[Path]) -> None:
    config = VolumeConfig(name="db", replicas=replicas)
    async with (
        open_engine(EngineOptions(queues=1, workers=4)) as engine,
        engine.open_volume(config) as volume,
    ):
        for number, operation in enumerate(operations(seed)):
            say("begin", number)
            await carry_out(volume, number, operation)
            say("done", number)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    trio.run(main, int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
