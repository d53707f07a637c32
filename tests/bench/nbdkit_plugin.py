"""Contestants that are nbdkit in front of our server: in its Python and in C; and a disk in memory
in its Python, for what that language costs there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.activation import activated, listen_unix
from tests.bench import ramdisk
from tests.bench.contestants import EXPORT, Contestant, Running, nbd_engine
from tests.bench.ours import serve_command
from tests.bench.settings import REPOSITORY

PLUGIN = REPOSITORY / "plugins" / "nbdkit" / "lhblock.py"
MODULE = REPOSITORY / "lhblock" / "frontend" / "nbd" / "nbdkit-lhblock-plugin.so"


@dataclass(frozen=True)
class _BehindNbdkit(Contestant):
    """Our server, and nbdkit in front of it.

    Attributes:
      plugin: of nbdkit, with its parameters, but for ``socket=``.
    """

    plugin: Sequence[str | Path] = ()

    @contextmanager
    def start(self, directory: Path, bytes_: int, *, tcp: bool) -> Iterator[Running]:
        """Start both."""
        with (
            listen_unix(directory / "inner") as inner,
            listen_unix(directory / "outer") as outer,
            activated(
                serve_command(directory / "data", [EXPORT], bytes_), inner, directory / "inner.log"
            ),
            activated(
                ["nbdkit", "--foreground", *self.plugin, f"socket={inner.getsockname()}"],
                outer,
                directory / "outer.log",
            ) as nbdkit,
        ):
            yield Running(self.name, nbd_engine(outer, bytes_), nbdkit.pid)


def plugin_contestants() -> list[Contestant]:
    """The CPU time is nbdkit's alone; the server behind it is a process of its own."""

    def create(directory: Path, bytes_: int) -> None:
        with (
            listen_unix(directory / "create") as listener,
            activated(
                serve_command(directory / "data", [EXPORT], bytes_),
                listener,
                directory / "create.log",
            ),
        ):
            uri = f"nbd+unix:///{EXPORT}?socket={listener.getsockname()}"
            subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True)

    def ours(directory: Path, _bytes: int) -> Sequence[str | Path]:
        command = Path(sys.executable).with_name("lhblock")
        about = [f"volume={EXPORT}", f"data-dir={directory / 'data'}", f"lhblock={command}"]
        return ["nbdkit", "--foreground", "--threads=4", "python", PLUGIN, *about]

    return [
        Contestant(
            "nbdkit python",
            lambda _, bytes_: [
                "nbdkit",
                "--foreground",
                "python",
                ramdisk.__file__,
                f"size={bytes_}",
            ],
        ),
        Contestant("lhblock plugin", ours, create),
        _BehindNbdkit("lhblock plugin in C", None, plugin=[MODULE, f"volume={EXPORT}"]),
        _BehindNbdkit("nbdkit's nbd plugin", None, plugin=["nbd", f"export={EXPORT}"]),
    ]
