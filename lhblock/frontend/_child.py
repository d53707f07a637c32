"""A program of somebody else that a front end needs: started, watched, started again.

When this process ends, however that happens, the kernel kills the program, so no orphan keeps an
address. What it says on standard error is logged, but never more than so much.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from lhblock.errors import FrontendError

READY_TIMEOUT_S: Final = 10.0
# Idle clients keep some programs from ending by themselves; requests in progress have this long.
STOP_TIMEOUT_S: Final = 1.0
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 10.0
# One that ran for this long has nothing to do with the failure before.
BACKOFF_FORGET_S: Final = 60.0
LOG_LINES_PER_S: Final = 10
LOG_LINE_BYTES_MAX: Final = 1000

_STARTER: Final = Path(__file__).with_name("_child_start.py")
_READ_BYTES: Final = 1 << 16
FIRST_FD: Final = 3

ComeUp = Callable[[trio.lowlevel.FdStream], Awaitable[bool]]


class Child:
    """How a program is started.

    Args:
      name: of the program, for the log.
      command: its path and arguments. No secrets: everybody can read them.
      files_max: how many files it may have open.
      sockets: listening sockets it gets as systemd would pass them; they stay the caller's.
        The write end of the pipe that `ready` reads follows them.
      environment: variables it gets besides ours.
      log: where its words go, a structlog logger.
      level: of its words in the log.
      stop_signal: what asks it to end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        files_max: int,
        log: Any,
        sockets: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        stop_signal: int = signal.SIGTERM,
        level: str = "warning",
    ) -> None:
        self.name = name
        self.log = log
        self._level = level
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._files_max = files_max
        self._sockets = sockets
        self._environment = dict(environment or {})

    async def run(self, come_up: ComeUp, on_up: Callable[[], None]) -> tuple[bool, str]:
        """Run one until it ends; return whether it came up, and why it ended.

        Args:
          come_up: waits until it works and says whether it does, or raises FrontendError; it has
            ``READY_TIMEOUT_S``. Gets the reading end of a pipe that the program holds.
          on_up: called when it works.

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
                # The program's now: when it ends, so does what is read here.
                for fd in (ready_write, log_write, life_read):
                    os.close(fd)
            self._process = process
            messages = Messages(self.name, getattr(self.log, self._level))
            came_up, failure = False, ""
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(messages.drain, log)
                    try:
                        with trio.move_on_after(READY_TIMEOUT_S):
                            try:
                                came_up = await come_up(ready)
                            except FrontendError as error:
                                failure = str(error)
                        if came_up:
                            on_up()
                            await _ended(process)
                    finally:
                        with trio.CancelScope(shield=True):
                            await _stop(process, self._stop_signal)
            finally:
                process.wait()
                self._process = None
        if failure:
            return False, failure
        if process.returncode >= 0:
            return came_up, messages.last or f"exit status {process.returncode}"
        if came_up:
            return True, f"it was killed by signal {-process.returncode}"
        return False, messages.last or f"nothing was heard of it in {READY_TIMEOUT_S:g} s"

    def kill(self) -> None:
        """Kill the one that runs, if one does."""
        if self._process is not None:
            self._process.kill()

    def _start(self, ready_write: int, log_write: int, life_read: int) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_STARTER)),
                *(str(self._files_max), ",".join(map(str, self._sockets))),
                *(str(ready_write), str(life_read)),
                *(f"{key}={value}" for key, value in self._environment.items()),
                *self._command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_write,
            pass_fds=[*self._sockets, ready_write, life_read],
            env=environment,
            cwd="/",
        )


async def keep_running(
    child: Child,
    come_up: ComeUp,
    *,
    problem: str,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a program running until cancelled; started when it came up for the first time.

    One that ends later is logged and started again after a wait that doubles up to
    ``BACKOFF_MAX_S``.

    Args:
      problem: what cannot be done without it, for the sentence.

    Raises:
      FrontendError: it does not come up the first time; its own words are in the sentence.

    Cancelled: it has ended.
    """
    was_up = False

    def on_up() -> None:
        nonlocal was_up
        if not was_up:
            was_up = True
            task_status.started()
        else:
            child.log.info(f"{child.name} runs again")

    wait_s = BACKOFF_FIRST_S
    while True:
        began_s = trio.current_time()
        _, reason = await child.run(come_up, on_up)
        if not was_up:
            raise FrontendError(f"{problem}: {child.name} did not start: {reason}")
        if trio.current_time() - began_s > BACKOFF_FORGET_S:
            wait_s = BACKOFF_FIRST_S
        child.log.error(
            f"{child.name} ended; its clients wait for the next one", reason=reason, wait_s=wait_s
        )
        await trio.sleep(wait_s)
        wait_s = min(2 * wait_s, BACKOFF_MAX_S)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a child; it stays to be reaped.

    Cancelled: it goes on.
    """
    fd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


async def _stop(process: subprocess.Popen[bytes], ask: int) -> None:
    if process.poll() is not None:
        return
    process.send_signal(ask)
    with trio.move_on_after(STOP_TIMEOUT_S):
        await _ended(process)
        return
    process.kill()
    await _ended(process)


class Messages:
    """What a program says: logged, but never more than so much.

    Args:
      say: a method of a logger.

    Attributes:
      last: the last line, without the program's name.
    """

    def __init__(self, name: str, say: Callable[..., Any]) -> None:
        self.last = ""
        self._name = name
        self._say = say
        self._second = 0
        self._in_second = 0
        self._dropped = 0

    async def drain(self, stream: trio.lowlevel.FdStream) -> None:
        """Read until the program has ended. It is never made to wait for its log."""
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
                self._say(f"{self._name} said more than is logged", lines=self._dropped)
            self._second, self._in_second, self._dropped = second, 0, 0
        text = line[:LOG_LINE_BYTES_MAX].decode(errors="replace").strip()
        self.last = text.removeprefix(f"{self._name}: ").removeprefix("error: ")
        self._in_second += 1
        if self._in_second > LOG_LINES_PER_S:
            self._dropped += 1
        else:
            self._say(self._name, message=self.last)
