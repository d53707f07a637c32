"""One point of a benchmark: what fio does, and what it and the server's clock said."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# fio connects, runs and prints within this, or the server hangs.
FIO_MARGIN_S = 60.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Point:
    """What is measured."""

    name: str
    rw: str  # fio's word
    block_bytes: int
    depth: int

    @property
    def is_write(self) -> bool:
        return "write" in self.rw

    @property
    def in_mib_s(self) -> bool:
        """Whether bandwidth is the figure to look at, not operations."""
        return self.block_bytes >= 1 << 20


POINTS = (
    Point("randread-4k-1", "randread", 4096, 1),
    Point("randread-4k-32", "randread", 4096, 32),
    Point("randwrite-4k-1", "randwrite", 4096, 1),
    Point("randwrite-4k-32", "randwrite", 4096, 32),
    Point("read-1m-8", "read", 1 << 20, 8),
    Point("write-1m-8", "write", 1 << 20, 8),
)


@dataclass(frozen=True)
class Sample:
    """One measurement. Latencies are fio's, from submission to completion."""

    iops: float
    mib_s: float
    p50_us: float
    p99_us: float
    cpu_us: float | None  # of the server, per operation; None when there is no server
    replicas_cpu_us: float | None = None  # of all replica processes together


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def measure(
    point: Point,
    engine: Sequence[str],
    *,
    seconds: float,
    server_pid: int | None,
    replica_pids: Sequence[int] = (),
) -> Sample:
    """Run fio for ``seconds`` and return what it saw.

    Args:
      engine: fio's options that say what to talk to.
      server_pid: whose CPU time is counted, over the whole run of fio.
      replica_pids: whose CPU time is counted apart from it.

    Raises:
      RuntimeError: fio failed; its own words are in the message.
    """
    before_s = cpu_seconds(server_pid) if server_pid is not None else 0.0
    replicas_before_s = sum(map(cpu_seconds, replica_pids))
    report = run_fio(
        [
            *engine,
            f"--rw={point.rw}",
            f"--bs={point.block_bytes}",
            f"--iodepth={point.depth}",
            "--time_based",
            f"--runtime={seconds}",
            "--norandommap",
            "--randrepeat=0",
            "--percentile_list=50:99",
        ],
        timeout_s=seconds + FIO_MARGIN_S,
    )
    after_s = cpu_seconds(server_pid) if server_pid is not None else 0.0
    replicas_s = sum(map(cpu_seconds, replica_pids)) - replicas_before_s
    side = report["write" if point.is_write else "read"]
    percentiles = side["clat_ns"]["percentile"]
    return Sample(
        iops=side["iops"],
        mib_s=side["bw_bytes"] / (1 << 20),
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        cpu_us=(after_s - before_s) * 1e6 / side["total_ios"] if server_pid is not None else None,
        replicas_cpu_us=replicas_s * 1e6 / side["total_ios"] if replica_pids else None,
    )


def fill(engine: Sequence[str], *, bytes_: int, write: bool = True) -> None:
    """Write the whole image once and read it once, so that it is allocated and in the cache."""
    for rw in ("write", "read") if write else ("read",):
        run_fio(
            [*engine, f"--rw={rw}", "--bs=1M", "--iodepth=8", f"--io_size={bytes_}"],
            timeout_s=600.0,
        )


def run_fio(options: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Run one job and return its part of fio's JSON."""
    command = ["fio", "--name=point", "--thread", "--output-format=json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio failed: {done.stderr}\n{done.stdout}")
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"] != 0:
        raise RuntimeError(f"fio saw error {job['error']}: {done.stderr}")
    return job
