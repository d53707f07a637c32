"""A served volume for guests that lives through being killed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.activation import LAUNCHER, listen_tcp
from tests.kernel.guest import HOST

VOLUME = "disk"
# xfs makes nothing smaller than 300 MiB.
VOLUME_MIB = 320


class Server:
    """``lhblock serve`` of one volume that can be killed and started again behind one socket.

    Args:
      arguments: of ``serve``, besides the size and the data directory.
    """

    def __init__(self, listener: socket.socket, data_dir: Path, *arguments: str) -> None:
        self._listener = listener
        self._arguments = arguments
        self.data_dir = data_dir
        self.port = listener.getsockname()[1]
        self.uri = f"nbd://{HOST}:{self.port}/{VOLUME}"
        self.local_uri = f"nbd://127.0.0.1:{self.port}/{VOLUME}"
        self.start()

    def start(self) -> None:
        fd = self._listener.fileno()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCHER, str(fd)),
                *(sys.executable, "-m", "lhblock", "serve", VOLUME, "--json"),
                *("--size", f"{VOLUME_MIB}M", "--data-dir", str(self.data_dir)),
                *self._arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[fd],
            text=True,
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline())["event"] == "ready"

    def kill(self) -> None:
        """SIGKILL, and everything of it is gone."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """SIGTERM, and it ended well."""
        self._process.terminate()
        assert self._process.wait() == 0

    def restart(self) -> None:
        self.kill()
        self.start()

    def run(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "lhblock", *arguments, "--data-dir", str(self.data_dir)]
        subprocess.run(command, check=True, capture_output=True)

    def allocated_mib(self) -> float:
        images = (self.data_dir / "volumes" / VOLUME / "replica").glob("*.img")
        return sum(path.stat().st_blocks * 512 for path in images) / (1 << 20)


@contextmanager
def start_server(data_dir: Path, *arguments: str) -> Iterator[Server]:
    """A server for the block, whatever happens to it there."""
    with listen_tcp() as listener:
        server = Server(listener, data_dir, *arguments)
        try:
            yield server
        finally:
            server.kill()
