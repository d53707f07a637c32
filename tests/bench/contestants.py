"""Who is measured: ourselves in several set-ups, the peers, and fio on a bare file.

Every server gets a socket that already listens, so all of them start the same way.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.activation import activated, listen_tcp, listen_unix

EXPORT = "bench"


@dataclass(frozen=True)
class Running:
    """A contestant that can be measured."""

    name: str
    engine: Sequence[str]  # fio's options
    pid: int | None
    replica_pids: Sequence[int] = ()


@dataclass(frozen=True)
class Replicas:
    """Replica processes: what the server is told of them, and their numbers."""

    arguments: Sequence[str] = ()
    pids: Sequence[int] = ()


@dataclass(frozen=True)
class Contestant:
    """A contestant to be started.

    Attributes:
      command: makes the server's command line from its directory and the image size in bytes;
        None for fio on a bare file.
      prepare: called before the server starts, with the same arguments.
      prefilled: `prepare` has written the whole image already; the warm-up only reads.
      replicas: runs replica processes for as long as the server; their arguments end its command.
      tcp: clients come over TCP also in a match that is over Unix sockets.
    """

    name: str
    command: Callable[[Path, int], Sequence[str | Path]] | None
    prepare: Callable[[Path, int], None] = field(default=lambda directory, bytes_: None)
    prefilled: bool = False
    replicas: Callable[[Path, int], AbstractContextManager[Replicas]] = field(
        default=lambda directory, bytes_: nullcontext(Replicas())
    )
    tcp: bool = False

    @contextmanager
    def start(self, directory: Path, bytes_: int, *, tcp: bool) -> Iterator[Running]:
        """Start the server in ``directory``, which is empty and its own."""
        self.prepare(directory, bytes_)
        if self.command is None:
            yield Running(
                self.name,
                [
                    "--ioengine=io_uring",
                    "--direct=1",
                    f"--filename={directory / 'image'}",
                    f"--size={bytes_}",
                ],
                None,
            )
            return
        with (
            _listen(directory, tcp=tcp or self.tcp) as listener,
            self.replicas(directory, bytes_) as replicas,
        ):
            command = [*self.command(directory, bytes_), *replicas.arguments]
            with activated(command, listener, directory / "log") as server:
                engine = nbd_engine(listener, bytes_)
                yield Running(self.name, engine, server.pid, replicas.pids)


def _listen(directory: Path, *, tcp: bool) -> socket.socket:
    return listen_tcp() if tcp else listen_unix(directory / "socket")


def nbd_engine(listener: socket.socket, bytes_: int) -> list[str]:
    """fio's options for the server behind ``listener``."""
    if listener.family == socket.AF_UNIX:
        uri = f"nbd+unix:///{EXPORT}?socket={listener.getsockname()}"
    else:
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}/{EXPORT}"
    return ["--ioengine=nbd", f"--uri={uri}", f"--size={bytes_}"]


def make_image(directory: Path, bytes_: int) -> None:
    """A sparse file; the warm-up allocates it."""
    with (directory / "image").open("wb") as image:
        os.truncate(image.fileno(), bytes_)


def nbdkit_file(*, tcp: bool = False) -> Contestant:
    """nbdkit's file plugin, as it comes."""
    return Contestant(
        "nbdkit file",
        lambda directory, _: ["nbdkit", "--foreground", "file", directory / "image"],
        make_image,
        tcp=tcp,
    )


def nbdkit_memory() -> Contestant:
    """nbdkit's memory plugin: what a server costs that has no disk at all."""
    return Contestant(
        "nbdkit memory",
        lambda _, bytes_: ["nbdkit", "--foreground", "memory", str(bytes_)],
    )


def qemu_nbd() -> Contestant:
    """qemu-nbd on a raw file with the write-back cache."""
    options = ("--format=raw", "--cache=writeback", "--persistent", "--shared=0")
    return Contestant(
        "qemu-nbd",
        lambda directory, _: ["qemu-nbd", *options, f"--export-name={EXPORT}", directory / "image"],
        make_image,
    )


def fio_direct() -> Contestant:
    """fio's io_uring with O_DIRECT on a plain file: what the disk gives without a server."""
    return Contestant("fio direct", None, make_image)
