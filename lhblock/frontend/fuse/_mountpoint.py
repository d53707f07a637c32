"""The directory that is mounted on: made, looked at, and freed from a mount whose server died."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from lhblock.errors import FrontendError

_log = structlog.get_logger("lhblock.frontend.fuse")

# A server that answers does so at once; one that is stuck never does.
ANSWER_TIMEOUT_S = 5.0
_UNMOUNT_TIMEOUT_S = 30.0
_FUSE_DEVICE = "/dev/fuse"
_OPTIONS = "fsname=lhblock,subtype=lhblock,default_permissions"
# Standard input is the socket that fusermount3 sends the descriptor through; its end is ours.
# The option auto_unmount is no substitute: docs/internals/fuse.md.
_KEEPER = """\
fusermount3 -o "$1" -- "$2" || exit
read -r _
exec fusermount3 -u -q -z -- "$2"
"""
# As /proc/self/mountinfo calls our mounts.
FILE_SYSTEM = "fuse.lhblock"
_MOUNTS = Path("/proc/self/mountinfo")


def require_fuse() -> None:
    """FrontendError: this machine cannot mount; the sentence says what it lacks."""
    if shutil.which("fusermount3") is None:
        raise FrontendError("cannot mount: there is no fusermount3 here; install the package fuse3")
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        raise FrontendError(
            f"cannot mount: {_FUSE_DEVICE} is missing or may not be opened; load the module fuse,"
            " or give the device to the container"
        )


async def prepare_mountpoint(directory: Path) -> None:
    """Make the directory if it is missing; unmount what a dead server left on it.

    Raises:
      FrontendError: this machine cannot mount, the directory cannot be used, or something that is
        alive is mounted there.

    Cancelled: nothing was mounted.
    """
    require_fuse()
    await free_dead_mount(directory)
    await trio.to_thread.run_sync(_check, directory)


@asynccontextmanager
async def mounted(directory: Path) -> AsyncIterator[int]:
    """Mount for the block, and yield the descriptor of ``/dev/fuse``, which the caller closes.

    A shell stays as long as the mount does: it unmounts when this process has gone, however that
    happened, because it has the other end of a socket.

    Raises:
      FrontendError: fusermount3 refused; its words are in the sentence.

    Cancelled: it is unmounted. Files that are open then answer with errors, as soon as the
    descriptor is closed.
    """
    keeper, control, kernel_fd = await trio.to_thread.run_sync(_mount, directory)
    try:
        yield kernel_fd
    finally:
        control.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_wait_keeper, keeper, directory)


def _mount(directory: Path) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    ours, theirs = socket.socketpair()
    with theirs:
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", _OPTIONS, str(directory)],
            env={**os.environ, "_FUSE_COMMFD": "0"},
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
    assert keeper.stderr is not None
    with keeper.stderr:
        ours.settimeout(_UNMOUNT_TIMEOUT_S)
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            fds = []
        if fds:
            return keeper, ours, fds[0]
        ours.close()
        reason = " ".join(keeper.stderr.read().decode(errors="replace").split())
        keeper.wait()
    raise FrontendError(f"cannot mount on {directory}: {reason or 'fusermount3 says nothing'}")


def _wait_keeper(keeper: subprocess.Popen[bytes], directory: Path) -> None:
    try:
        keeper.wait(_UNMOUNT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _log.error("fusermount3 does not end", directory=str(directory), pid=keeper.pid)


async def release_mountpoint(directory: Path) -> None:
    """Unmount a directory, also while files are open: they answer with errors from now on.

    Raises:
      FrontendError: fusermount3 refused; its words are in the sentence.

    Cancelled: it may be mounted or not.
    """
    command = ["fusermount3", "-u", "-z", "--", str(directory)]
    with trio.move_on_after(_UNMOUNT_TIMEOUT_S):
        done = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode == 0:
            return
        reason = " ".join(done.stdout.decode(errors="replace").split())
        raise FrontendError(f"cannot unmount {directory}: {reason}")
    raise FrontendError(f"cannot unmount {directory}: fusermount3 does not end")


async def free_dead_mount(directory: Path) -> None:
    """Unmount what a dead server left on a directory.

    Raises:
      FrontendError: what is mounted there does not answer, or cannot be unmounted.
    """
    if await _is_dead(directory):
        await release_mountpoint(directory)


def mounted_type(directory: Path) -> str | None:
    """The type of the file system that is mounted on a directory, None if none is.

    The directory itself is not touched, so a server that stands still keeps nobody waiting.

    Args:
      directory: without links in its path.
    """
    found = None
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        if _unescaped(fields.split(" ")[4]) == str(directory):
            found = rest.split(" ")[0]
    return found


def _unescaped(path: str) -> str:
    """A path as mountinfo writes it: space, tab, newline and backslash are octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


async def _is_dead(directory: Path) -> bool:
    """Whether a mount is there whose server has gone."""
    with trio.move_on_after(ANSWER_TIMEOUT_S):
        return await trio.to_thread.run_sync(_is_disconnected, directory, abandon_on_cancel=True)
    raise FrontendError(
        f"what is mounted on {directory} does not answer; unmount it with"
        f" 'fusermount3 -u -z {directory}' or choose another directory"
    )


def _is_disconnected(directory: Path) -> bool:
    try:
        directory.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _check(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        taken = directory.is_mount()
        used = not taken and any(directory.iterdir())
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError):
            reason = "something that is not a directory is there"
        raise FrontendError(f"cannot mount on {directory}: {reason}") from error
    if taken:
        raise FrontendError(f"cannot mount on {directory}: something is mounted there already")
    if used:
        raise FrontendError(
            f"cannot mount on {directory}: it is not empty; choose an empty directory"
        )
