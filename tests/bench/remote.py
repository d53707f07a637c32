"""Volumes on replica processes over TCP on the loopback address."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
                process = stack.enter_context(_replica(path, bytes_))
                assert process.stdout is not None
                control = json.loads(process.stdout.readline())["control"]
                arguments += ["--replica", f"tcp://{control}"]
                pids.append(process.pid)
            yield Replicas(arguments, pids)

    return Contestant(
        name,
        lambda directory, bytes_: serve_command(directory / "data", [EXPORT], bytes_),
        replicas=run,
    )


@contextmanager
def _replica(path: Path, bytes_: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [*LHBLOCK, "replica", str(path), "--size", str(bytes_), "--listen", "127.0.0.1:0"]
    with (
        path.with_suffix(".log").open("wb") as log,
        subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            yield process
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
