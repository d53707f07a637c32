"""Engine and replica processes are killed again and again: what was answered is there afterwards.

A client notes each write once it was answered. After a kill every block must hold a write of its
own that is no older than the last noted one, whole; and in the end all replicas are alike.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import trio

from tests.live.hosts import Host, options, wait_modes
from tests.live.serving import TIMEOUT_S, TOOL_ENVIRONMENT, Serve, command, nbdsh, serve
from tests.model.volumes import VolumeFiles

pytestmark = [pytest.mark.live, pytest.mark.slow]

BLOCKS = 256
ROUNDS = 4
WRITER = """
import random, struct
numbers, number = random.Random({seed}), {first}
with open({notes!r}, "a", buffering=1) as notes:
    while True:
        block, number = numbers.randrange({blocks}), number + 1
        h.pwrite(struct.pack("<QQ", block, number) * 256, block * 4096)
        if numbers.random() < 0.2:
            h.flush()
        print(block, number, file=notes)
"""
READER = """
import struct
for block in range({blocks}):
    data = h.pread(4096, block * 4096)
    print(block, struct.unpack_from("<QQ", data)[1], data == data[:16] * 256)
"""


class Writes:
    """What is known of each block."""

    def __init__(self) -> None:
        self.answered = dict.fromkeys(range(BLOCKS), 0)

    def note(self, notes: Path) -> None:
        for line in notes.read_text().split("\n")[:-1]:  # the last may be cut
            block, number = map(int, line.split())
            self.answered[block] = number

    def check(self, served: Serve) -> None:
        for line in nbdsh(served.uri(), READER.format(blocks=BLOCKS)).splitlines():
            block, number, whole = line.split()
            assert whole == "True", line
            assert int(number) >= self.answered[int(block)], line
            # A write without an answer may be there or not; once it was read it stays.
            self.answered[int(block)] = int(number)


def run_until_killed(served: Serve, statements: str) -> threading.Thread:
    """A client that ends when the server does."""

    def run() -> None:
        subprocess.run(
            ["nbdsh", "-u", served.uri(), "-c", statements],
            env=TOOL_ENVIRONMENT,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_for_lines(notes: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not notes.exists() or notes.read_text().count("\n") < count:
        assert time.monotonic() < deadline, count


@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_answered_survives_the_engine_and_a_replica(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data, local = tmp_path / "data", tmp_path / "local"
    hosts: list[Host] = []
    writes = Writes()
    try:
        hosts += [Host(tmp_path / "r0"), Host(tmp_path / "r1")]
        arguments = ["--size", "1M", *options(hosts, local)]
        for number in range(ROUNDS):
            with serve(data, "db", *arguments) as served:
                arguments = []
                writes.check(served)
                wait_modes(data, "RW", "RW", "RW")
                notes = tmp_path / f"notes{number}"
                first = 1_000_000 * (number + 1)
                thread = run_until_killed(
                    served,
                    WRITER.format(
                        seed=seed * 100 + number, first=first, blocks=BLOCKS, notes=str(notes)
                    ),
                )
                wait_for_lines(notes, 200)
                snapshot = subprocess.Popen(
                    command("snapshot", "create", "db", f"s{number}"),
                    env=os.environ | {"LHBLOCK_DATA_DIR": str(data)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                # Somewhere before, in or after the snapshot.
                wait_for_lines(notes, 200 + chance.randrange(3000))
                victim = chance.choice([None, hosts[0], hosts[1]])
                if victim is not None:
                    victim.kill()
                served.stop(signal.SIGKILL)
                thread.join(TIMEOUT_S)
                snapshot.wait(TIMEOUT_S)
                if victim is not None:
                    victim.start()
            writes.note(notes)
        with serve(data, "db") as served:
            writes.check(served)
            wait_modes(data, "RW", "RW", "RW")
            assert served.stop()[0] == 0
        for host in hosts:
            host.kill()
        one, two, three = trio.run(
            VolumeFiles([hosts[0].path, hosts[1].path, local], BLOCKS * 4096).contents
        )
        assert one == two == three
    finally:
        for host in hosts:
            host.kill()
