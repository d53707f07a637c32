"""Memory of the block map, asked of the map itself (`map_memory.c`)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.bench.settings import REPOSITORY

_NATIVE = REPOSITORY / "native"
_PROGRAM = Path(__file__).with_suffix(".c")
# The map and what it stands on.
_SOURCES = [*sorted((_NATIVE / "src").glob("map*.c")), _NATIVE / "src" / "lock.c"]
_SOURCES += [_NATIVE / "src" / "fault.c"]


def map_memory() -> dict[str, float]:
    """MiB for a TiB that is untouched, sequentially written, and fragmented in every block."""
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory, "map_memory")
        subprocess.run(
            [
                *(
                    "cc",
                    "-std=gnu11",
                    "-O2",
                    "-pthread",
                    f"-I{_NATIVE}",
                    f"-I{_NATIVE / 'include'}",
                ),
                *map(str, (_PROGRAM, *_SOURCES)),
                *("-o", str(binary)),
            ],
            check=True,
        )
        lines = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    return {
        f"{name}_mib_per_tib": int(bytes_) / (1 << 20)
        for name, bytes_ in map(str.split, lines.splitlines())
    }
