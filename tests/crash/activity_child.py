"""A process that writes to a volume until it is killed, saying what is answered and what flushed.

Run as ``python -m tests.crash.activity_child SEED PLACE...``. What comes follows from the seed
alone, so the parent knows it, too. Extents of the activity log turn cold and hot all the time.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from lhblock._native import BLOCK_BYTES
from lhblock.engine import EngineOptions, Volume, VolumeConfig, open_engine
from lhblock.settings import parse_replica

PLACES = 24
PLACE_BYTES = 1 << 30  # so far apart that no two are heated together
BLOCKS_USED = 48  # of each place
SIZE_BYTES = PLACES * PLACE_BYTES
BATCHES_OF_A_PLACE = 4


@dataclass(frozen=True)
class Batch:
    """Changes of different blocks that are made at the same time, and what follows.

    Attributes:
      blocks: offset in bytes to the new content.
      then: ``flush``, ``round``, ``snapshot`` or nothing.
    """

    blocks: dict[int, bytes]
    then: str


def batches(seed: int) -> Iterator[Batch]:
    """The history of a seed, without an end."""
    choose = random.Random(seed)
    number = 0
    while True:
        places = choose.sample(range(PLACES), 3)
        for _ in range(BATCHES_OF_A_PLACE):
            number += 1
            blocks = {}
            for _ in range(choose.randint(1, 24)):
                block = choose.randrange(BLOCKS_USED)
                offset = choose.choice(places) * PLACE_BYTES + block * BLOCK_BYTES
                data = struct.pack("<QQ", seed << 32 | number, offset) * (BLOCK_BYTES // 16)
                blocks[offset] = bytes(BLOCK_BYTES) if choose.random() < 0.1 else data
            kinds, weights = ("flush", "round", "snapshot", ""), (2, 3, 0.1, 5)
            yield Batch(blocks, choose.choices(kinds, weights)[0])


async def read_all(volume: Volume) -> bytes:
    """What is used of a volume, one place after the other."""
    return b"".join(
        [
            await volume.read(place * PLACE_BYTES, BLOCKS_USED * BLOCK_BYTES)
            for place in range(PLACES)
        ]
    )


def place_of(offset: int) -> int:
    """Where :func:`read_all` has what lies at an offset."""
    place, rest = divmod(offset, PLACE_BYTES)
    return place * BLOCKS_USED * BLOCK_BYTES + rest


def say(word: str, number: int) -> None:
    """One line in one write, so that a kill never tears it."""
    os.write(sys.stdout.fileno(), f"{word} {number}\n".encode())


async def carry_out(volume: Volume, number: int, batch: Batch) -> None:
    """One batch."""

    async def change(offset: int, data: bytes) -> None:
        if any(data):
            await volume.write(offset, data)
        else:
            await volume.trim(offset, len(data))

    async with trio.open_nursery() as nursery:
        for offset, data in batch.blocks.items():
            nursery.start_soon(change, offset, data)
    say("answered", number)
    if batch.then == "flush":
        await volume.flush()
        say("flushed", number)
    elif batch.then == "round":
        await volume._rounds.round()
    elif batch.then == "snapshot":
        await volume.create_snapshot()
        say("flushed", number)


async def main(seed: int, places: list[str]) -> None:
    config = VolumeConfig(name="db", replicas=[parse_replica(place, Path("/")) for place in places])
    async with (
        open_engine(EngineOptions(queues=2, workers=4)) as engine,
        engine.open_volume(config) as volume,
    ):
        for number, batch in enumerate(batches(seed)):
            await carry_out(volume, number, batch)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    trio.run(main, int(sys.argv[1]), sys.argv[2:])
