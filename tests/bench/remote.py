"""Volumes on replica processes over TCP on the loopback address."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.contestants import EXPORT, Contestant, Replicas
from tests.bench.ours import LHBLOCK, serve_command

REMOTE = "lhblock 3 remote"
STOP_TIMEOUT_S = 30.0


def lhblock_remote(name: str, *, replicas: int) -> Contestant:
    """One volume on ``replicas`` replica processes, all on the same disk."""

    @contextmanager
    def run(directory: Path, bytes_: int) -> Iterator[Replicas]:
        arguments: list[str] = []
        pids: list[int] = []
        with ExitStack() as stack:
            for number in range(replicas):
                path = directory / f"replica-{number}"
                served = stack.enter_context(replica(path, bytes_))
                arguments += ["--replica", served.address]
                pids.append(served.process.pid)
            yield Replicas(arguments, pids)

    return Contestant(
        name,
        lambda directory, bytes_: serve_command(directory / "data", [EXPORT], bytes_),
        replicas=run,
    )


@dataclass(frozen=True)
class ServedReplica:
    """A replica process, and where it listens: ``tcp://HOST:PORT``."""

    process: subprocess.Popen[bytes]
    address: str


@contextmanager
def replica(path: Path, bytes_: int, *, listen: str = "127.0.0.1:0") -> Iterator[ServedReplica]:
    """Serve a replica for the block; it may be killed meanwhile."""
    command = [*LHBLOCK, "replica", str(path), "--size", str(bytes_), "--listen", listen]
    with (
        path.with_suffix(".log").open("wb") as log,
        subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            assert process.stdout is not None
            control = json.loads(process.stdout.readline())["control"]
            yield ServedReplica(process, f"tcp://{control}")
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
