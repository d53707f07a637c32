"""Replicas in processes of their own, which are started, stopped and killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.live.serving import TIMEOUT_S, cli_json
from tests.live.test_replica_process import ReplicaProcess, start

SIZE = "32M"
POLL_S = 0.05


class Host:
    """A directory, and the process that serves the replica in it."""

    def __init__(self, path: Path, *arguments: str, listen: str = "127.0.0.1:0") -> None:
        self.path = path
        self._arguments = arguments
        self.process = self._start(listen)
        self.address = f"tcp://{self.process.ready['control']}"

    def _start(self, listen: str) -> ReplicaProcess:
        return ReplicaProcess(start(self.path, "--listen", listen, *self._arguments))

    def start(self) -> None:
        """Again, where it was."""
        self.process = self._start(self.address.removeprefix("tcp://"))

    def signal(self, number: int) -> None:
        self.process.process.send_signal(number)

    def kill(self) -> None:
        if self.process.process.poll() is None:
            self.process.process.kill()
            self.process.process.send_signal(signal.SIGCONT)
        self.process.client.close()
        self.process.process.communicate(timeout=TIMEOUT_S)


@contextmanager
def start_hosts(directory: Path, count: int, *arguments: str) -> Iterator[list[Host]]:
    """Processes for as long as the block lasts, each with a directory of its own."""
    made: list[Host] = []
    try:
        for index in range(count):
            made.append(Host(directory / f"r{index}", *arguments))
        yield made
    finally:
        for host in made:
            host.kill()


def options(hosts: list[Host], *local: Path) -> list[str]:
    places = [*(host.address for host in hosts), *map(str, local)]
    return [word for place in places for word in ("--replica", place)]


def rows(data_dir: Path, volume: str = "db") -> dict[str, Any]:
    return {row["path"]: row for row in cli_json(data_dir, "replica", "ls", volume)["replicas"]}


def wait_modes(data_dir: Path, *wanted: str, volume: str = "db") -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        found = rows(data_dir, volume)
        if [row["mode"] for row in found.values()] == list(wanted):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(POLL_S)
