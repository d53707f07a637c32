"""What volumes cost that nobody uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.activation import activated, listen_unix
from tests.bench.ours import serve_command
from tests.bench.settings import BenchSettings
from tests.bench.workload import cpu_seconds

VOLUMES = 100
VOLUME_BYTES = 1 << 30
WATCH_S = 10.0


def pss_bytes(pid: int) -> int:
    """Memory of a process, its share of what it shares included."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def idle_cost(settings: BenchSettings) -> dict[str, float]:
    """CPU and memory of one process with 100 idle volumes, and what each adds to one volume's."""
    settings.directory.mkdir(parents=True, exist_ok=True)
    names = [f"idle-{number:02}" for number in range(VOLUMES)]
    cpu_fraction, many_bytes = _watch(names, settings.directory)
    _, one_bytes = _watch(names[:1], settings.directory)
    return {
        "volumes": VOLUMES,
        "cpu_percent_of_a_core": 100 * cpu_fraction,
        "pss_mib": many_bytes / (1 << 20),
        "pss_mib_of_one_volume": one_bytes / (1 << 20),
        "pss_mib_per_volume": many_bytes / VOLUMES / (1 << 20),
        "pss_mib_per_added_volume": (many_bytes - one_bytes) / (VOLUMES - 1) / (1 << 20),
    }


def _watch(names: Sequence[str], parent: Path) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as scratch:
        root = Path(scratch)
        path = root / "socket"
        with listen_unix(path) as listener:
            command = serve_command(root / "data", names, VOLUME_BYTES)
            with activated(command, listener, root / "log") as server:
                # Answered when everything is up: the socket has listened all along.
                uri = f"nbd+unix:///{names[-1]}?socket={path}"
                subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True)
                begin_s = cpu_seconds(server.pid)
                time.sleep(WATCH_S)
                cpu_fraction = (cpu_seconds(server.pid) - begin_s) / WATCH_S
                return cpu_fraction, pss_bytes(server.pid)
