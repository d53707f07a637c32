"""``lhblock mount-fuse`` as a real process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.live.serving import TIMEOUT_S, command


class MountFuse:
    """A process that said it is ready. Its log is read as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.directory = directory
        line = process.stdout.readline()
        assert line, process.communicate(timeout=TIMEOUT_S)[1]
        self.ready = json.loads(line)
        self._rest = b""

    def file(self, volume: str) -> Path:
        return self.directory / volume / "volume"

    def wait(self, event: str, **values: str) -> dict[str, Any]:
        """Read the log up to the next line of this event with these values."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            entry: dict[str, Any] = json.loads(self._line(deadline))
            if entry["event"] == event and values.items() <= entry.items():
                return entry

    def _line(self, deadline: float) -> bytes:
        assert self.process.stderr is not None
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            assert select.select([self.process.stderr], [], [], max(left, 0))[0], "nothing comes"
            got = os.read(self.process.stderr.fileno(), 1 << 16)
            assert got, "it ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode


@contextmanager
def mount_fuse(data_dir: Path, directory: Path) -> Iterator[MountFuse]:
    process = subprocess.Popen(
        command("mount-fuse", str(directory), "--json"),
        env=os.environ | {"LHBLOCK_DATA_DIR": str(data_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield MountFuse(process, directory)
    finally:
        # It unmounts when it is asked to; kill -9 is for the tests that are about it.
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=TIMEOUT_S)


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [line.split(" ")[4] for line in lines]
    return [place for place in places if Path(place).is_relative_to(directory)]
