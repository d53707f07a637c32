"""TLS: an nbdkit that accepts clients on our TCP sockets and passes them on to our Unix socket.

The sockets are opened here and stay open here, so an address that cannot be had is our error, and
while an nbdkit that ended is started again its clients wait in the backlog. TLS is required from
every client; what is read and written is carried out by the server behind, as for any other client.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError
from lhblock.frontend._child import FIRST_FD, Child, keep_running

from ._listeners import Listener
from ._tls_keys import TlsKeys

# A client is a socket, a connection to us, and two pipes; the rest is nbdkit's own.
FILES_PER_CLIENT: Final = 6
FILES_BASE: Final = 64

_READ_BYTES: Final = 1 << 16

# Of `make nbdkit-plugin`.
_MODULE: Final = Path(__file__).with_name("nbdkit-lhblock-plugin.so")

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

    Started when it accepts clients; see `keep_running`. When this process ends, the kernel kills
    nbdkit.

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
    command = [
        program,
        "--foreground",
        # The pipe that says it is ready: nbdkit writes its pid once it listens.
        f"--pidfile=/dev/fd/{FIRST_FD + len(listeners)}",
        "--tls=require",
        *keys.options,
        *plugin_words(socket_path),
    ]
    child = Child(
        "nbdkit",
        command,
        files_max=FILES_BASE + FILES_PER_CLIENT * connections_max,
        sockets=[listener.fileno() for listener in listeners],
        log=_log,
    )
    await keep_running(child, _says_ready, problem="cannot serve with TLS", task_status=task_status)


def plugin_words(socket_path: str) -> list[str]:
    """The plugin in C where it is built, else nbdkit's own NBD client, which is slower."""
    if _MODULE.is_file():
        # No retries: the kernel ends nbdkit together with us.
        return [str(_MODULE), f"socket={socket_path}", "retry=0"]
    return ["nbd", f"socket={socket_path}", "dynamic-export=true"]


async def _says_ready(ready: trio.lowlevel.FdStream) -> bool:
    return bool(await ready.receive_some(_READ_BYTES))
