"""TLS: an nbdkit that accepts clients on our TCP sockets and passes them on to our Unix socket.

The sockets are opened here and stay open here, so an address that cannot be had is our error, and
while an nbdkit that ended is started again its clients wait in the backlog. TLS is required from
every client; what is read and written is carried out by the server behind, as for any other client.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError

from ._listeners import Listener
from ._tls_keys import TlsKeys

READY_TIMEOUT_S: Final = 10.0
# An idle client keeps nbdkit from ending by itself; its requests in progress have this long.
STOP_TIMEOUT_S: Final = 1.0
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 10.0
# One that ran for this long has nothing to do with the failure before.
BACKOFF_FORGET_S: Final = 60.0
LOG_LINES_PER_S: Final = 10
LOG_LINE_BYTES_MAX: Final = 1000
# A client is a socket, a connection to us, and two pipes; the rest is nbdkit's own.
FILES_PER_CLIENT: Final = 6
FILES_BASE: Final = 64

_STARTER: Final = Path(__file__).with_name("_tls_start.py")
_READ_BYTES: Final = 1 << 16
_FIRST_FD: Final = 3

_log = structlog.get_logger("lhblock.frontend.nbd")


async def serve_tls(
    keys: TlsKeys,
    listeners: Sequence[Listener],
    socket_path: str,
    *,
    connections_max: int,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep an nbdkit running that speaks TLS on ``listeners``, until cancelled.

    Started when it accepts clients. One that ends later is logged and started again after a wait
    that doubles up to ``BACKOFF_MAX_S``. When this process ends, the kernel kills nbdkit.

    Args:
      listeners: TCP sockets; they stay the caller's.
      socket_path: our Unix socket, which answers already.
      connections_max: bounds what nbdkit may have open.

    Raises:
      FrontendError: there is no nbdkit, or it does not start; its own words are in the sentence.

    Cancelled: nbdkit has ended.
    """
    program = shutil.which("nbdkit")
    if program is None:
        raise FrontendError("cannot serve with TLS: there is no nbdkit here; install that package")
    child = _Nbdkit(program, keys, listeners, socket_path, connections_max)
    wait_s = BACKOFF_FIRST_S
    while True:
        began_s = trio.current_time()
        ready, reason = await child.run(task_status)
        if not ready and not child.was_ready:
            raise FrontendError(f"cannot serve with TLS: nbdkit did not start: {reason}")
        if trio.current_time() - began_s > BACKOFF_FORGET_S:
            wait_s = BACKOFF_FIRST_S
        _log.error("nbdkit ended; TLS clients wait for the next one", reason=reason, wait_s=wait_s)
        await trio.sleep(wait_s)
        wait_s = min(2 * wait_s, BACKOFF_MAX_S)


class _Nbdkit:
    """How nbdkit is started. `was_ready`: one came up already."""

    def __init__(
        self,
        program: str,
        keys: TlsKeys,
        listeners: Sequence[Listener],
        socket_path: str,
        connections_max: int,
    ) -> None:
        self.was_ready = False
        self._listeners = listeners
        self._files_max = FILES_BASE + FILES_PER_CLIENT * connections_max
        self._command = [
            program,
            "--foreground",
            # The pipe that says it is ready: nbdkit writes its pid once it listens.
            f"--pidfile=/dev/fd/{_FIRST_FD + len(listeners)}",
            "--tls=require",
            *keys.options,
            "nbd",
            f"socket={socket_path}",
            "dynamic-export=true",
        ]

    async def run(self, task_status: trio.TaskStatus[None]) -> tuple[bool, str]:
        """Run one until it ends; return whether it was ready, and why it ended.

        Cancelled: it has ended.
        """
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        log_read, log_write = os.pipe2(os.O_CLOEXEC)
        life_read, life_write = os.pipe2(os.O_CLOEXEC)
        async with (
            trio.lowlevel.FdStream(ready_read) as ready,
            trio.lowlevel.FdStream(log_read) as log,
            trio.lowlevel.FdStream(life_write),
        ):
            try:
                process = self._start(ready_write, log_write, life_read)
            finally:
                # nbdkit's now: when it ends, so does what is read here.
                for fd in (ready_write, log_write, life_read):
                    os.close(fd)
            messages = _Messages()
            came_up = False
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(messages.drain, log)
                    try:
                        with trio.move_on_after(READY_TIMEOUT_S):
                            came_up = bool(await ready.receive_some(_READ_BYTES))
                        if came_up:
                            if not self.was_ready:
                                self.was_ready = True
                                task_status.started()
                            await _ended(process)
                    finally:
                        with trio.CancelScope(shield=True):
                            await _stop(process)
            finally:
                process.wait()
        if process.returncode >= 0:
            return came_up, messages.last or f"exit status {process.returncode}"
        if came_up:
            return True, f"it was killed by signal {-process.returncode}"
        return False, f"nothing was heard of it in {READY_TIMEOUT_S:g} s"

    def _start(self, ready_write: int, log_write: int, life_read: int) -> subprocess.Popen[bytes]:
        sockets = [listener.fileno() for listener in self._listeners]
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_STARTER)),
                *(str(self._files_max), ",".join(map(str, sockets))),
                *(str(ready_write), str(life_read)),
                *self._command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_write,
            pass_fds=[*sockets, ready_write, life_read],
            env=environment,
            cwd="/",
        )


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a child; it stays to be reaped.

    Cancelled: it goes on.
    """
    fd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


async def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    with trio.move_on_after(STOP_TIMEOUT_S):
        await _ended(process)
        return
    process.kill()
    await _ended(process)


class _Messages:
    """What nbdkit says, one line a client that misbehaves: logged, but never more than so much.

    Attributes:
      last: the last line, without nbdkit's name.
    """

    def __init__(self) -> None:
        self.last = ""
        self._second = 0
        self._in_second = 0
        self._dropped = 0

    async def drain(self, stream: trio.lowlevel.FdStream) -> None:
        """Read until nbdkit has ended. It is never made to wait for its log."""
        rest = b""
        async for chunk in stream:
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-LOG_LINE_BYTES_MAX:]
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        second = int(trio.current_time())
        if second != self._second:
            if self._dropped:
                _log.warning("nbdkit said more than is logged", lines=self._dropped)
            self._second, self._in_second, self._dropped = second, 0, 0
        text = line[:LOG_LINE_BYTES_MAX].decode(errors="replace").strip()
        self.last = text.removeprefix("nbdkit: ").removeprefix("error: ")
        self._in_second += 1
        if self._in_second > LOG_LINES_PER_S:
            self._dropped += 1
        else:
            _log.warning("nbdkit", message=self.last)
