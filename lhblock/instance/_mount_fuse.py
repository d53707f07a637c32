"""The process of ``lhblock mount-fuse``: it mounts, and serving processes answer.

No I/O passes through here: the descriptor of ``/dev/fuse`` goes to the process that has the volumes
(docs/internals/fuse.md).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError, LhblockError
from lhblock.frontend.fuse import MountRoot, mounted, open_mount_root, prepare_mountpoint
from lhblock.frontend.nbd import peer_credentials
from lhblock.instance._channel import first_sentence
from lhblock.instance._handover_wire import (
    Free,
    Handover,
    Mounted,
    is_socket_name,
    receive_state,
    send_handover,
)
from lhblock.instance._notify import Notifier
from lhblock.instance._signals import run_until_signal
from lhblock.settings import DataDir

# Between two looks at which processes serve.
LOOK_S: Final = 1.0
# A process that does not mount, for whatever reason, is asked again after this.
RETRY_S: Final = 5.0
# A process that can answer does so at once.
ANSWER_S: Final = 10.0

_log = structlog.get_logger("lhblock.instance")


@dataclass(frozen=True)
class ShownVolume:
    """A volume and its file."""

    name: str
    file: str


@dataclass(frozen=True)
class MountFuseReady:
    """What is shown once every process that served at the start was asked."""

    pid: int
    data_dir: str
    directory: str
    volumes: tuple[ShownVolume, ...]


async def run_mount_fuse(
    data_dir: DataDir, directory: Path, *, on_ready: Callable[[MountFuseReady], None]
) -> None:
    """Show the volumes that are served from a data directory, until SIGINT or SIGTERM.

    Args:
      directory: see `lhblock.frontend.fuse.open_mount_root`.
      on_ready: called once, when what was served at the start is shown.

    Raises:
      FrontendError: this machine cannot mount, or not there.
      LhblockError: the data directory is somebody else's.

    Cancelled: everything is unmounted. Files that are open answer with errors from then on.
    """
    notifier = Notifier()
    await run_until_signal(partial(_run, data_dir, directory, on_ready, notifier))


async def _run(
    data_dir: DataDir,
    directory: Path,
    on_ready: Callable[[MountFuseReady], None],
    notifier: Notifier,
) -> None:
    async with open_mount_root(directory) as root, trio.open_nursery() as nursery:
        servers = _Servers(data_dir, root, nursery)
        for settled in servers.look():
            await settled.wait()
        volumes = tuple(ShownVolume(name, str(file)) for name, file in root.volumes.items())
        on_ready(MountFuseReady(os.getpid(), str(data_dir.path), str(directory), volumes))
        notifier.ready(f"shows volumes in {directory}")
        while True:
            await trio.sleep(LOOK_S)
            servers.look()


class _Servers:
    """The serving processes: a task for each, as long as it is connected."""

    def __init__(self, data_dir: DataDir, root: MountRoot, nursery: trio.Nursery) -> None:
        self._data_dir = data_dir
        self._root = root
        self._nursery = nursery
        self._known: set[str] = set()
        self._failed: set[str] = set()

    def look(self) -> list[trio.Event]:
        """Start with those that are new; each sets its event when it is shown, or is not to be."""
        settled = []
        for path in _sockets(self._data_dir):
            if path.stem not in self._known:
                self._known.add(path.stem)
                settled.append(trio.Event())
                self._nursery.start_soon(self._attend, path, settled[-1])
        return settled

    async def _attend(self, path: Path, settled: trio.Event) -> None:
        key = path.stem
        try:
            await _Server(key, path, self._root, settled).show()
            self._failed.discard(key)
        except* (FrontendError, OSError) as group:
            settled.set()
            if key not in self._failed:
                _log.warning("not mounted", process=key, reason=str(first_sentence(group)))
            self._failed.add(key)
            await trio.sleep(RETRY_S)
        finally:
            settled.set()
            self._known.discard(key)


def _sockets(data_dir: DataDir) -> list[Path]:
    """Where processes take over mounts. LhblockError: nobody may look."""
    try:
        paths = sorted(data_dir.run.iterdir())
    except FileNotFoundError:
        return []  # nothing was served yet
    except OSError as error:
        raise LhblockError(
            f"cannot look for served volumes in {data_dir.run}: {error.strerror}"
        ) from error
    return [path for path in paths if path.suffix == ".fuse" and is_socket_name(path.stem)]


class _Server:
    """One serving process, and what it shows."""

    def __init__(self, key: str, path: Path, root: MountRoot, settled: trio.Event) -> None:
        self._key = key
        self._path = path
        self._root = root
        self._settled = settled

    async def show(self) -> None:
        """Show its volumes until it ends the connection.

        Raises:
          FrontendError, OSError: it cannot be mounted, or went wrong.
        """
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            with _answer_in_time():
                try:
                    await sock.connect(os.fspath(self._path))
                except (ConnectionRefusedError, FileNotFoundError):
                    return  # it has gone, or was killed and left its socket
                _, uid = peer_credentials(sock)
                if os.geteuid() and uid not in (0, os.geteuid()):
                    raise FrontendError(f"it belongs to user {uid}")
                state = await receive_state(sock)
            if isinstance(state, Free):
                await self._mount(sock)
            elif state is not None and state.directory != self._root.mountpoint(self._key):
                # Otherwise it has not noticed yet that the mount-fuse before this one has gone.
                await self._point(sock, state)

    async def _mount(self, sock: trio.socket.SocketType) -> None:
        directory = self._root.mountpoint(self._key)
        try:
            await prepare_mountpoint(directory)
            async with mounted(directory) as kernel_fd:
                await self._hand_over(sock, directory, kernel_fd)
        finally:
            await self._root.remove(self._key)

    async def _hand_over(
        self, sock: trio.socket.SocketType, directory: Path, kernel_fd: int
    ) -> None:
        handover = Handover(directory, self._root.path)
        try:
            await send_handover(sock, handover, kernel_fd)
        finally:
            os.close(kernel_fd)
        with _answer_in_time():
            state = await receive_state(sock)
        if state is None:
            raise FrontendError("it did not take the mount over; its log says why")
        await self._follow(sock, state, directory)

    async def _point(self, sock: trio.socket.SocketType, state: Mounted) -> None:
        _log.info("mounted elsewhere", process=self._key, directory=str(state.directory))
        try:
            self._root.point(self._key, state.directory)
            await self._follow(sock, state, state.directory)
        finally:
            await self._root.remove(self._key)

    async def _follow(
        self, sock: trio.socket.SocketType, state: Free | Mounted | None, directory: Path
    ) -> None:
        try:
            while isinstance(state, Mounted) and state.directory == directory:
                self._root.show(self._key, state.volumes)
                self._settled.set()
                state = await receive_state(sock)
        finally:
            self._root.hide(self._key)


@contextmanager
def _answer_in_time() -> Iterator[None]:
    """FrontendError: it stands still."""
    try:
        with trio.fail_after(ANSWER_S):
            yield
    except trio.TooSlowError as error:
        raise FrontendError(f"it does not answer within {ANSWER_S:.0f} s") from error
