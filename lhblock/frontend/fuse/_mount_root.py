"""The directory of ``mount-fuse``: a mount for each serving process, a link for each volume.

DIR/.serve-PID    what process PID shows: a mountpoint, or a link to where it is mounted already
DIR/VOLUME        a link to .serve-PID/VOLUME

Nothing here looks into a mount, whose server may stand still.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError
from lhblock.frontend.fuse._mountpoint import (
    FILE_SYSTEM,
    free_dead_mount,
    mounted_type,
    release_mountpoint,
    require_fuse,
)
from lhblock.frontend.fuse._tree import volume_file

_log = structlog.get_logger("lhblock.frontend.fuse")

_SERVER: Final = re.compile(r"\.serve-[0-9]+")


class MountRoot:
    """See `open_mount_root`. A server is known by a key, ``serve-PID``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # In the order of their coming: who came first shows a volume that several have.
        self._offers: dict[str, Sequence[str]] = {}
        self._links: dict[str, str] = {}

    @property
    def volumes(self) -> Mapping[str, Path]:
        """The files of the volumes that are shown now, by name."""
        return {name: volume_file(self.path, name) for name in sorted(self._links)}

    def mountpoint(self, key: str) -> Path:
        return self.path / f".{key}"

    def point(self, key: str, elsewhere: Path) -> None:
        """A server is mounted already; show what is there. OSError: it cannot be."""
        self.mountpoint(key).symlink_to(elsewhere)

    def show(self, key: str, volumes: Sequence[str]) -> None:
        """Show these volumes of a server, and no others of it. OSError: it cannot be."""
        self._offers[key] = volumes
        self._relink()

    def hide(self, key: str) -> None:
        """Show nothing of a server any more."""
        if self._offers.pop(key, None) is not None:
            self._relink()

    async def remove(self, key: str) -> None:
        """Remove the mountpoint of a server; it is unmounted if it still is mounted.

        Raises:
          OSError, FrontendError: it stays.
        """
        await _remove_server(self.mountpoint(key))

    def _relink(self) -> None:
        wanted: dict[str, str] = {}
        for key, volumes in self._offers.items():
            for name in volumes:
                wanted.setdefault(name, key)
        for name in [name for name, key in self._links.items() if wanted.get(name) != key]:
            del self._links[name]
            if _is_link(self.path / name):
                (self.path / name).unlink(missing_ok=True)
            _log.info("unmounted", volume=name)
        for name in [name for name in wanted if name not in self._links]:
            (self.path / name).symlink_to(f".{wanted[name]}/{name}")
            self._links[name] = wanted[name]
            _log.info("mounted", volume=name, file=str(volume_file(self.path, name)))


@asynccontextmanager
async def open_mount_root(directory: Path) -> AsyncIterator[MountRoot]:
    """Have a directory for the block. It is made if it is missing.

    What another one left there that was killed is removed first; at the end nothing is left.

    Raises:
      FrontendError: this machine cannot mount, another one has the directory, it cannot be used,
        or something else is in it.

    Cancelled: nothing is left in it.
    """
    require_fuse()
    await free_dead_mount(directory)
    lock = _claim(directory)
    try:
        root, servers = _take(directory)
        for path in servers:
            try:
                await _remove_server(path)
            except OSError as error:
                raise _unusable(directory, error) from error
        yield root
    finally:
        os.close(lock)


def _claim(directory: Path) -> int:
    """A descriptor that keeps others out until it is closed, or this process has gone."""
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise FrontendError(
                f"cannot mount in {directory}: another 'lhblock mount-fuse' does already"
            ) from error
        raise _unusable(directory, error) from error
    return lock


def _unusable(directory: Path, error: OSError) -> FrontendError:
    reason = error.strerror or str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "something that is not a directory is there"
    return FrontendError(f"cannot mount in {directory}: {reason}")


def _take(directory: Path) -> tuple[MountRoot, list[Path]]:
    """Remove the links that a killed one left; its mountpoints are returned. FrontendError: there
    is something else, and nothing was removed."""
    root = MountRoot(directory.resolve())
    servers, links = [], []
    for path in sorted(root.path.iterdir()):
        if _SERVER.fullmatch(path.name):
            servers.append(path)
        elif _is_link(path):
            links.append(path)
        else:
            raise FrontendError(
                f"cannot mount in {directory}: {path.name} is in it, which 'lhblock mount-fuse'"
                " did not make; choose an empty directory"
            )
    try:
        for path in links:
            path.unlink()
    except OSError as error:
        raise _unusable(directory, error) from error
    return root, servers


def _is_link(path: Path) -> bool:
    """Whether it is the link of a volume, as it is made here."""
    try:
        server, _, volume = os.fspath(path.readlink()).partition("/")
    except OSError:
        return False
    return volume == path.name and _SERVER.fullmatch(server) is not None


async def _remove_server(path: Path) -> None:
    """Unmount and remove a mountpoint, or remove the link in its place."""
    with trio.CancelScope(shield=True):
        # More than one, if an unmount went wrong before.
        while (kind := await trio.to_thread.run_sync(mounted_type, path)) is not None:
            if kind != FILE_SYSTEM:
                raise FrontendError(f"{path} has a mount of type {kind}; unmount that")
            await release_mountpoint(path)
    _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_symlink():
            path.unlink()
        else:
            path.rmdir()
