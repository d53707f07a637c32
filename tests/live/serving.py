"""``lhblock serve`` as a real process, the other commands beside it, and strangers' tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 60.0
MIB = 1 << 20


# nbdsh takes the first python3, which must be the one that python3-libnbd is for.
TOOL_ENVIRONMENT = os.environ | {"PATH": f"/usr/bin:{os.environ['PATH']}"}


class ToolFailed(Exception):
    """A client program ended with an error; what it said."""


class Serve:
    """A serving process that said it is ready."""

    def __init__(self, process: subprocess.Popen[str], data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=TIMEOUT_S)[1]
        self.ready = json.loads(line)

    def uri(self, export: str = "db") -> str:
        return f"nbd+unix:///{export}?socket={self.ready['sockets'][0]}"

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and return the exit status and the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, log


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lhblock", *arguments]


def start(data_dir: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*options.pop("prefix", []), *command("serve", *arguments, "--json")],
        env=os.environ | {"LHBLOCK_DATA_DIR": str(data_dir)} | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@contextmanager
def serve(data_dir: Path, *arguments: str, **options: Any) -> Iterator[Serve]:
    process = start(data_dir, *arguments, "--listen", "127.0.0.1:0", **options)
    try:
        yield Serve(process, data_dir)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)


def cli(data_dir: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments),
        env=os.environ | {"LHBLOCK_DATA_DIR": str(data_dir)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def cli_json(data_dir: Path, *arguments: str) -> Any:
    return json.loads(cli(data_dir, *arguments, "--json").stdout)


def requires(name: str) -> str:
    """The path of a program; the test is skipped without it, and says so."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"requires {name}: run `make packages`")
    return path


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [requires(name), *arguments],
        env=TOOL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ToolFailed(f"{name}: {done.stderr}")
    return done


def nbdsh(uri: str, *statements: str) -> str:
    words = [word for statement in statements for word in ("-c", statement)]
    return tool("nbdsh", "-u", uri, *words).stdout
