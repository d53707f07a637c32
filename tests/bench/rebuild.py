"""What it takes to rebuild a replica, and what snapshots cost the clients meanwhile.

Three replica processes on the loopback address, all on one disk. The peer of a rebuild is ``dd`` of
the same image through a socket to a file on the same disk, synced at its end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.activation import activated, listen_unix
from tests.bench.contestants import EXPORT, nbd_engine
from tests.bench.ours import LHBLOCK, serve_command
from tests.bench.remote import replica
from tests.bench.settings import BenchSettings
from tests.bench.workload import run_fio

DATA_MIB = 4096
PIECES_MIB = 512  # of data, in blocks of 4 KiB with holes between
SPARSE_BYTES = 100 << 30
RESYNC_MIB_S = 100
RESYNC_S = 10
SNAPSHOTS = 10
SNAPSHOT_EVERY_S = 1.0  # so that clients are at full speed again before the next one
SNAPSHOT_LOAD_S = 20
LIMIT_S = 600.0
POLL_S = 0.2  # a log says nothing to whoever waits for a line of it


class _Volume:
    """A served volume on replica processes."""

    def __init__(self, directory: Path, engine: Sequence[str]) -> None:
        self._directory = directory
        self._engine = engine

    def fio(self, *options: str) -> dict[str, Any]:
        return run_fio([*self._engine, *options], timeout_s=LIMIT_S)

    def cli(self, *arguments: str) -> Any:
        command = [*LHBLOCK, *arguments, "--data-dir", str(self._directory / "data"), "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the engine has logged of an event, oldest first."""
        lines = (self._directory / "log").read_text().splitlines()
        found = (json.loads(line) for line in lines if line.startswith("{"))
        return [event for event in found if event.get("event") == name]

    def wait_rebuilt(self, count: int) -> dict[str, Any]:
        """What was logged of the last of so many rebuilds."""
        limit_s = time.monotonic() + LIMIT_S
        while len(done := self.events("replica rebuilt")) < count:
            if time.monotonic() > limit_s:
                raise RuntimeError((self._directory / "log").read_text())
            time.sleep(POLL_S)
        return done[-1]


@contextmanager
def _serve(directory: Path, addresses: Sequence[str], bytes_: int) -> Iterator[_Volume]:
    arguments = [word for address in addresses for word in ("--replica", address)] + ["--json"]
    with listen_unix(directory / "socket") as listener:
        command = serve_command(directory / "data", [EXPORT], bytes_, arguments)
        with activated(command, listener, directory / "log"):
            yield _Volume(directory, nbd_engine(listener, bytes_))


def _addresses(
    stack: ExitStack, directory: Path, count: int, bytes_: int
) -> tuple[list[str], list[subprocess.Popen[bytes]]]:
    served = [
        stack.enter_context(replica(directory / f"replica-{number}", bytes_))
        for number in range(count)
    ]
    return [each.address for each in served], [each.process for each in served]


def _largest_image(directory: Path) -> Path:
    return max(directory.glob("*.img"), key=lambda path: path.stat().st_blocks)


def _dd_s(source: Path, target: Path) -> float:
    """Seconds of ``dd | socket | dd`` with a sync at the end."""
    os.sync()
    begin_s = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def receive() -> None:
            with listener.accept()[0] as sock:
                arguments = ["dd", f"of={target}", "bs=1M", "iflag=fullblock", "conv=fsync"]
                subprocess.run(
                    arguments, stdin=sock.fileno(), check=True, stderr=subprocess.DEVNULL
                )

        thread = threading.Thread(target=receive)
        thread.start()
        with socket.create_connection(listener.getsockname()) as sock:
            arguments = ["dd", f"if={source}", "bs=1M"]
            subprocess.run(arguments, stdout=sock.fileno(), check=True, stderr=subprocess.DEVNULL)
        thread.join()
    return time.monotonic() - begin_s


def _full(parent: Path, mib: int, write: Sequence[str], data_mib: int) -> tuple[float, float]:
    """Seconds of a rebuild onto a new replica, and of dd."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as scratch, ExitStack() as stack:
        directory, bytes_ = Path(scratch), mib << 20
        addresses, _ = _addresses(stack, directory, 3, bytes_)
        with _serve(directory, addresses[:2], bytes_) as volume:
            volume.fio(*write, f"--io_size={data_mib}M", "--end_fsync=1")
            os.sync()
            volume.cli("replica", "add", EXPORT, addresses[2])
            rebuild_s = float(volume.wait_rebuilt(1)["took_s"])
            source = _largest_image(directory / "replica-0")
            return rebuild_s, _dd_s(source, directory / "copy")


def _resync(parent: Path) -> dict[str, float]:
    """A replica is away for ten seconds of random writes to a large volume with little data."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as scratch, ExitStack() as stack:
        directory = Path(scratch)
        addresses, processes = _addresses(stack, directory, 3, SPARSE_BYTES)
        with _serve(directory, addresses, SPARSE_BYTES) as volume:
            volume.fio("--rw=write", "--bs=1M", "--iodepth=8", "--io_size=2048M")
            processes[2].send_signal(signal.SIGKILL)
            job = volume.fio(
                *("--rw=randwrite", "--bs=64k", "--iodepth=32", f"--rate={RESYNC_MIB_S}M"),
                *("--time_based", f"--runtime={RESYNC_S}", "--norandommap"),
            )
            processes[2].wait()
            again = addresses[2].removeprefix("tcp://")
            stack.enter_context(replica(directory / "replica-2", SPARSE_BYTES, listen=again))
            done = volume.wait_rebuilt(1)
            written_mib = job["write"]["io_bytes"] / (1 << 20)
            copied_mib = done["copied_bytes"] / (1 << 20)
            return {
                "resync_written_mib": written_mib,
                "resync_copied_mib": copied_mib,
                "resync_copied_to_written": copied_mib / written_mib,
                "resync_everything_compared": float(done["compared"] != "changes"),
                "resync_s": float(done["took_s"]),
            }


def _snapshots(parent: Path, mib: int) -> dict[str, float]:
    """Snapshots while clients write."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as scratch, ExitStack() as stack:
        directory, bytes_ = Path(scratch), mib << 20
        addresses, _ = _addresses(stack, directory, 3, bytes_)
        with _serve(directory, addresses, bytes_) as volume:
            volume.fio("--rw=write", "--bs=1M", "--iodepth=8")
            random = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap")
            quiet = volume.fio(*random, "--time_based", f"--runtime={SNAPSHOT_LOAD_S / 2}")
            jobs: list[dict[str, Any]] = []
            thread = threading.Thread(
                target=lambda: jobs.append(
                    volume.fio(*random, "--time_based", f"--runtime={SNAPSHOT_LOAD_S}")
                )
            )
            thread.start()
            for _ in range(SNAPSHOTS):
                volume.cli("snapshot", "create", EXPORT)
                time.sleep(SNAPSHOT_EVERY_S)
            thread.join()
            pauses_ms = [event["pause_us"] / 1000 for event in volume.events("snapshot taken")]
            return {
                "snapshot_pause_ms_median": statistics.median(pauses_ms),
                "snapshot_pause_ms_longest": max(pauses_ms),
                "write_ms_longest": jobs[0]["write"]["clat_ns"]["max"] / 1e6,
                "write_ms_longest_without": quiet["write"]["clat_ns"]["max"] / 1e6,
            }


def rebuild_cost(settings: BenchSettings) -> dict[str, float]:
    """Medians of the rounds; of the resync, one."""
    parent = settings.directory
    parent.mkdir(parents=True, exist_ok=True)
    whole, pieces = [], []
    for number in range(settings.rounds):
        whole.append(_full(parent, DATA_MIB, ["--rw=write", "--bs=1M", "--iodepth=8"], DATA_MIB))
        pieces.append(
            _full(parent, 2 * PIECES_MIB, ["--rw=write:4k", "--bs=4k", "--iodepth=32"], PIECES_MIB)
        )
        print(f"rebuild: round {number + 1} of {settings.rounds}", flush=True)
    return {
        "data_mib_s": statistics.median(DATA_MIB / ours_s for ours_s, _ in whole),
        "data_dd_mib_s": statistics.median(DATA_MIB / dd_s for _, dd_s in whole),
        "data_to_dd": statistics.median(dd_s / ours_s for ours_s, dd_s in whole),
        "alternating_mib_s": statistics.median(PIECES_MIB / ours_s for ours_s, _ in pieces),
        "alternating_dd_mib_s": statistics.median(PIECES_MIB / dd_s for _, dd_s in pieces),
        **_resync(parent),
        **_snapshots(parent, settings.image_mib // 3),
    }
