"""The directory that is mounted on: made, looked at, and freed from a mount whose server died."""

from __future__ import annotations

import errno
import os
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
_OPTIONS = "fsname=lhblock,subtype=lhblock,default_permissions,auto_unmount"


async def prepare_mountpoint(directory: Path) -> None:
    """Make the directory if it is missing; unmount what a dead server left on it.

    Raises:
      FrontendError: this machine cannot mount, the directory cannot be used, or something that is
        alive is mounted there.

    Cancelled: nothing was mounted.
    """
    if shutil.which("fusermount3") is None:
        raise FrontendError("cannot mount: there is no fusermount3 here; install the package fuse3")
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        raise FrontendError(
            f"cannot mount: {_FUSE_DEVICE} is missing or may not be opened; load the module fuse,"
            " or give the device to the container"
        )
    if await _is_dead(directory):
        await release_mountpoint(directory)
    await trio.to_thread.run_sync(_check, directory)


@asynccontextmanager
async def mounted(directory: Path) -> AsyncIterator[int]:
    """Mount for the block, and yield the descriptor of ``/dev/fuse``, which the caller closes.

    ``fusermount3`` stays as long as the mount does: it unmounts when this process has gone, however
    that happened, because it holds the other end of a socket.

    Raises:
      FrontendError: fusermount3 refused; its words are in the sentence.

    Cancelled: it is unmounted. Files that are open then answer with errors.
    """
    helper, control, kernel_fd = await trio.to_thread.run_sync(_mount, directory)
    try:
        yield kernel_fd
    finally:
        control.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_wait_helper, helper, directory)


def _mount(directory: Path) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    ours, theirs = socket.socketpair()
    with theirs:
        helper = subprocess.Popen(
            ["fusermount3", "-o", _OPTIONS, "--", str(directory)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    assert helper.stderr is not None
    with helper.stderr:
        ours.settimeout(_UNMOUNT_TIMEOUT_S)
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            fds = []
        if fds:
            return helper, ours, fds[0]
        ours.close()
        reason = " ".join(helper.stderr.read().decode(errors="replace").split())
        helper.wait()
    raise FrontendError(f"cannot mount on {directory}: {reason or 'fusermount3 says nothing'}")


def _wait_helper(helper: subprocess.Popen[bytes], directory: Path) -> None:
    try:
        helper.wait(_UNMOUNT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _log.error("fusermount3 does not end", directory=str(directory), pid=helper.pid)


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
