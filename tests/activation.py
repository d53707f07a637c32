"""Start servers with a socket that already listens, the way systemd does.

Clients may connect before the server has come up, so nothing needs to wait for its start, and the
kernel chooses the TCP port before the server exists, so nothing needs to read it from a log.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BACKLOG = 64
STOP_TIMEOUT_S = 30.0

# LISTEN_PID has to be the pid of the server, which only the process that becomes it can know.
LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def listen_tcp() -> socket.socket:
    """A listening socket on a free port of the IPv4 loopback address."""
    return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    return listener


@contextmanager
def activated(
    command: Sequence[str | Path], listener: socket.socket, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` with ``listener`` as its activation socket; SIGTERM on leaving.

    A server that ends early takes the socket with it, so that clients fail instead of waiting for
    somebody to accept them. After a clean stop the socket can be given to the next server.

    Args:
      log: receives standard output and error, and is shown when the server ends early.
    """
    launched = [sys.executable, "-c", LAUNCHER, str(listener.fileno()), *map(str, command)]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            launched,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
        ) as server,
    ):
        stopping = threading.Event()
        watcher = threading.Thread(target=_refuse_when_dead, args=(server, listener, stopping))
        watcher.start()
        try:
            yield server
            stopping.set()
            server.terminate()
            server.wait(STOP_TIMEOUT_S)
        finally:
            early = not stopping.is_set() and server.poll() is not None
            stopping.set()
            server.kill()
            watcher.join()
            if early:
                print(f"{command[0]} ended early:\n{log.read_text()}", file=sys.stderr)


def _refuse_when_dead(
    server: subprocess.Popen[bytes], listener: socket.socket, stopping: threading.Event
) -> None:
    server.wait()
    if not stopping.is_set():
        with contextlib.suppress(OSError):  # the test may have closed it by now
            listener.shutdown(socket.SHUT_RDWR)
