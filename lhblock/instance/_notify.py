"""What systemd wants to hear (``sd_notify``): one datagram, best effort."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends states to the socket in ``NOTIFY_SOCKET``; does nothing without one.

    The variable stays set: a clean-up helper started by the same unit may need it.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        if self._address[:1] not in ("/", "@"):
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        # Nobody listening is no reason to stop serving.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto(message.encode(), address)
