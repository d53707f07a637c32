"""Become another program, with listening sockets as systemd would pass them.

Run as a script, by path, with nothing of this package: between the fork and the exec there is no
better place to run Python. Arguments: how many files the program may have open; the descriptors of
the sockets, separated by commas; those of two pipes, which get the numbers after the sockets'; and
the command, perhaps with NAME=VALUE before it, as for env. The second pipe is the life line: the
server holds its other end, and never writes.

When the server ends, however that happens, the kernel closes that end and kills the program, so no
orphan keeps the port. The parent-death signal will not do: nbdkit, for one, replaces it with
SIGTERM, after which it waits for clients that say nothing.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import sys

FIRST_FD = 3  # SD_LISTEN_FDS_START


def main(arguments: list[str]) -> None:
    """Never returns: the program runs, or the reason why not is the exit status's text."""
    files_max, sockets, ready, life, *command = arguments
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = int(files_max) if hard == resource.RLIM_INFINITY else min(int(files_max), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    sources = [int(fd) for fd in [*filter(None, sockets.split(",")), ready, life]]
    # Out of the way first: a target may be the number of another source.
    above = FIRST_FD + len(sources)
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in sources]
    for fd, target in zip(parked, range(FIRST_FD, above), strict=True):
        os.dup2(fd, target)
    for fd in sources:
        if fd >= above:
            os.close(fd)
    _die_with(above - 1)
    if sockets:
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(sources) - 2))
    while "=" in command[0]:
        name, _, value = command.pop(0).partition("=")
        os.environ[name] = value
    os.execv(command[0], command)


def _die_with(life: int) -> None:
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have ended before the kernel was asked to watch it.
    if select.select([life], [], [], 0)[0]:
        sys.exit("the server that starts this has ended")


if __name__ == "__main__":
    main(sys.argv[1:])
