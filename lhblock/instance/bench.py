"""Measuring a volume as a client sees it: fio over the Unix socket of a serving process."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lhblock.errors import LhblockError
from lhblock.instance._creation import create_volume, uncreate_volume
from lhblock.instance._registry import Registry, VolumeRecord

SCRATCH_BYTES_MAX = 1 << 30
SCRATCH_BYTES_MIN = 64 << 20
# A scratch volume must not be what fills the disk under others.
FREE_SPACE_PARTS = 4
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.1
_MIB = 1 << 20


@dataclass(frozen=True)
class Pattern:
    """One measurement: what a client does, and how many requests it keeps in flight."""

    name: str
    rw: str
    block_bytes: int
    depth: int

    @property
    def writes(self) -> bool:
        return self.rw in ("write", "randwrite")


PATTERNS = (
    Pattern("random read 4 KiB, depth 1", "randread", 4096, 1),
    Pattern("random read 4 KiB, depth 32", "randread", 4096, 32),
    Pattern("sequential read 1 MiB, depth 8", "read", _MIB, 8),
    Pattern("random write 4 KiB, depth 1", "randwrite", 4096, 1),
    Pattern("random write 4 KiB, depth 32", "randwrite", 4096, 32),
    Pattern("sequential write 1 MiB, depth 8", "write", _MIB, 8),
)


@dataclass(frozen=True)
class Figure:
    """What one measurement found. Latencies are those fio saw, in microseconds.

    Attributes:
      server_cpu_us_per_io: CPU time of the serving process, user and system, per request.
    """

    pattern: Pattern
    iops: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    server_cpu_us_per_io: float


@dataclass(frozen=True)
class Target:
    """A served volume to measure: its address and the process that serves it."""

    uri: str
    pid: int
    size_bytes: int


def require_fio() -> str:
    """Return the path of a fio that speaks NBD. LhblockError: what to install."""
    path = shutil.which("fio")
    if path is None:
        raise LhblockError("bench needs fio; install it: apt-get install fio")
    found = subprocess.run([path, "--enghelp=nbd"], capture_output=True, check=False)
    if found.returncode != 0:
        raise LhblockError(
            f"{path} was built without its nbd engine; install one that has it, like Debian's"
        )
    return path


@contextlib.contextmanager
def scratch_volume(
    registry: Registry,
    beside: VolumeRecord,
    run: Callable[..., VolumeRecord],
    *,
    size_bytes: int | None = None,
) -> Iterator[VolumeRecord]:
    """Make a volume with a replica beside each of `beside`'s; it is removed with the block.

    Args:
      run: calls an async function and returns its result, like `trio.run`.
      size_bytes: None takes what the free space allows, `SCRATCH_BYTES_MAX` at most.

    Raises:
      LhblockError: there is too little space, or a directory cannot be made.
    """
    if not beside.paths:
        raise LhblockError(
            f"no scratch volume beside {beside.name}: none of its replicas is a directory of this"
            " host; --here measures reads of the volume itself"
        )
    free_bytes = min(shutil.disk_usage(path.parent).free for path in beside.paths)
    share = free_bytes // FREE_SPACE_PARTS // len(beside.paths)
    size_bytes = size_bytes or min(SCRATCH_BYTES_MAX, share // _MIB * _MIB)
    if size_bytes > share or size_bytes < SCRATCH_BYTES_MIN:
        raise LhblockError(
            f"no scratch volume of {size_bytes} bytes beside {beside.name}: it takes"
            f" {SCRATCH_BYTES_MIN} bytes at least and 1/{FREE_SPACE_PARTS} of the {free_bytes}"
            " free bytes at most; --here measures reads of the volume itself"
        )
    name = f"bench-{secrets.token_hex(4)}"
    paths = [path.parent / f"{name}.{index}" for index, path in enumerate(beside.paths)]

    async def create() -> VolumeRecord:
        return await create_volume(
            registry, name, size_bytes=size_bytes, replicas=paths, cache=beside.cache
        )

    record = run(create)
    try:
        yield record
    finally:
        uncreate_volume(registry, record)


@contextlib.contextmanager
def serving_child(data_dir: Path, volume: str, *, read_only: bool) -> Iterator[Target]:
    """Serve a stopped volume in a child process for as long as the block lasts.

    Raises:
      LhblockError: it did not come up; the sentence is the child's.
    """
    with tempfile.TemporaryDirectory(prefix="lhblock-bench-") as scratch:
        path = Path(scratch) / "nbd.sock"
        errors = Path(scratch) / "stderr"
        command = [sys.executable, "-m", "lhblock", "serve", volume, "--json", "--no-tcp"]
        command += ["--socket", str(path), "--data-dir", str(data_dir)]
        command += ["--read-only"] if read_only else []
        # A group of its own: Ctrl-C is for us, who then stop it.
        with (
            errors.open("wb") as sink,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=sink,
                process_group=0,
            ) as child,
        ):
            try:
                ready = _await_ready(child, errors)
                size_bytes = ready["volumes"][0]["size_bytes"]
                yield Target(ready["volumes"][0]["uris"][0], child.pid, size_bytes)
            finally:
                _stop(child)


def measure(
    target: Target,
    patterns: Sequence[Pattern],
    *,
    seconds: float,
    advance: Callable[[str, float], None],
) -> list[Figure]:
    """Run the patterns one after the other. Blocking.

    Args:
      seconds: of each.
      advance: told the name of what runs and the seconds that passed since the last call.

    Raises:
      LhblockError: fio failed; the sentence is its own.
    """
    fio = require_fio()
    figures = []
    for pattern in patterns:
        before = _cpu_s(target.pid)
        # In milliseconds, because fio cuts fractions of a second off.
        arguments = ["--time_based", f"--runtime={max(round(seconds * 1000), 1)}ms"]
        report = _fio(fio, target, pattern, arguments, partial(advance, pattern.name))
        cpu_s = _cpu_s(target.pid) - before
        side = report["jobs"][0]["write" if pattern.writes else "read"]
        percentiles = side["clat_ns"]["percentile"]
        figures.append(
            Figure(
                pattern,
                iops=side["iops"],
                bytes_per_s=side["bw_bytes"],
                p50_us=percentiles["50.000000"] / 1000,
                p99_us=percentiles["99.000000"] / 1000,
                server_cpu_us_per_io=cpu_s * 1e6 / max(side["total_ios"], 1),
            )
        )
    return figures


def fill(target: Target, advance: Callable[[str, float], None]) -> None:
    """Write the whole volume once, so that reads find data and writes no holes. Blocking."""
    pattern = Pattern("filling", "write", _MIB, 8)
    _fio(require_fio(), target, pattern, ["--end_fsync=1"], partial(advance, "filling"))


def _fio(
    fio: str,
    target: Target,
    pattern: Pattern,
    arguments: Sequence[str],
    advance: Callable[[float], None],
) -> Any:
    command = [fio, "--name=bench", "--ioengine=nbd", f"--uri={target.uri}", "--output-format=json"]
    command += [f"--rw={pattern.rw}", f"--bs={pattern.block_bytes}", f"--iodepth={pattern.depth}"]
    command += [f"--size={target.size_bytes // _MIB * _MIB}", "--randrepeat=0", "--norandommap=1"]
    # fio writes a state file where it runs.
    with tempfile.TemporaryDirectory(prefix="lhblock-fio-") as scratch:
        output = Path(scratch) / "report.json"
        command += [f"--output={output}", *arguments]
        with subprocess.Popen(
            command, cwd=scratch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                began = time.monotonic()
                while process.poll() is None:
                    time.sleep(_POLL_S)
                    now = time.monotonic()
                    advance(now - began)
                    began = now
                assert process.stderr is not None
                complaint = process.stderr.read().decode(errors="replace")
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0 or not output.exists():
            raise LhblockError(f"fio failed ({pattern.name}): {complaint.strip()[:500]}")
        text = output.read_text()
    # Notes of fio may stand before the document.
    return json.loads(text[text.index("{") :])


def _await_ready(child: subprocess.Popen[bytes], errors: Path) -> Any:
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], READY_TIMEOUT_S)
    line = child.stdout.readline() if readable else b""
    if line:
        return json.loads(line)
    child.kill()
    child.wait()
    lines = errors.read_text(errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("lhblock: ") if lines else "it said nothing"
    raise LhblockError(f"cannot serve the volume for the measurement: {said}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _cpu_s(pid: int) -> float:
    """CPU seconds a process used so far; 0 if it may not be looked at."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # The command's name, in brackets, may hold anything; utime and stime are fields 14 and 15.
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
