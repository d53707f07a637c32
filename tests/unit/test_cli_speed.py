"""``lhblock --help`` and ``lhblock volume ls`` answer at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 0.150
# CPU time and not the clock, because other work may go on here; the least of a few runs, because
# that work also takes caches away.
RUNS = 7

HEAVY = frozenset(
    {"pydantic", "grpc", "google", "trio", "_cffi_backend", "rich", "structlog", "asyncio"}
)

QUICK = [("--help",), ("--version",), ("volume", "ls"), ("volume", "ls", "--json")]


def lhblock(tmp_path: Path, *arguments: str, options: tuple[str, ...] = ()) -> tuple[float, str]:
    """Run the command and return its CPU seconds and what it wrote to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *options, "-m", "lhblock", *arguments],
        env=os.environ | {"LHBLOCK_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return seconds, done.stderr


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_import_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    _, log = lhblock(tmp_path, *arguments, options=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
    assert "lhblock" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_take_less_than_150_ms(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert min(lhblock(tmp_path, *arguments)[0] for _ in range(RUNS)) < LIMIT_S
