"""Who serves a volume: the holder of its replica's lock, and the socket it answers on.

`lhblock.replica` knows the lock too; this asks without importing that package, because
``volume ls`` asks for every volume and must answer at once.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from lhblock.errors import VolumeBusy
from lhblock.instance._registry import VolumeRecord
from lhblock.settings import DataDir

LOCK_FILE = "lhblock.lock"
_PID_CHARS_MAX = 20
# Control sockets, and those that take over mounts.
_KINDS = {".sock": socket.SOCK_STREAM, ".fuse": socket.SOCK_SEQPACKET}


@dataclass(frozen=True)
class Holder:
    """The process that has a replica directory open. `pid` is 0 if the lock does not tell."""

    pid: int

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "another process"


def lock_holder(replica: Path) -> Holder | None:
    """Return who holds the directory's lock, or None if nobody does.

    A directory that is missing or was never opened is held by nobody. The lock is asked for in
    shared mode and given back at once, which never makes a holder fail.
    """
    try:
        fd = os.open(
            replica / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(fd, _PID_CHARS_MAX).strip()
            return Holder(int(text) if text.isdigit() else 0)
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
    return None


def serving(data_dir: DataDir, record: VolumeRecord) -> Holder | None:
    """Return who serves the volume, or None.

    The lock of the first replica directory that can be looked into decides. A read-only process
    shares that lock, so one that answers on its control socket counts as well.
    """
    for path in record.paths:
        # Not Path.exists(), which raises for a directory that may not be searched.
        if os.path.exists(path / LOCK_FILE):  # noqa: PTH110
            holder = lock_holder(path)
            if holder is not None:
                return holder
            break
    address = answering_address(data_dir, record.name)
    if address is None:
        return None
    pid = address.removesuffix(".sock").rpartition("serve-")[2]
    return Holder(int(pid) if pid.isdigit() else 0)


def refuse_served(data_dir: DataDir, record: VolumeRecord, *, but_pid: int = 0) -> None:
    """Refuse to open a volume that is served.

    Args:
      but_pid: a process that answers for the volume without having it open.

    Raises:
      VolumeBusy: who serves it.
    """
    holder = serving(data_dir, record)
    if holder is not None and not (but_pid and holder.pid == but_pid):
        raise VolumeBusy(record.name, f"{holder} serves it already; stop that first")


def remove_dead_sockets(data_dir: DataDir) -> None:
    """Delete the sockets that killed processes left behind.

    Both must be true of a dead one: its process is not there, which alone could be a process of
    another container, and nobody answers, which alone could be one that is about to listen.
    """
    for path in data_dir.run.glob("serve-*"):
        if path.suffix not in _KINDS:
            continue
        pid = path.stem.removeprefix("serve-")
        if pid.isascii() and pid.isdecimal() and not _lives(int(pid)) and not _answers(str(path)):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")  # noqa: PTH110


def answering_address(data_dir: DataDir, volume: str) -> str | None:
    """Return `control_address` if somebody accepts connections there.

    The file of a process that was killed stays behind, so its presence says nothing.
    """
    address = control_address(data_dir, volume)
    if address is None or not _answers(address.removeprefix("unix:")):
        return None
    return address


def _answers(path: str) -> bool:
    kind = _KINDS[Path(path).suffix]
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(path)
        except BlockingIOError:
            return True  # its backlog is full, so somebody listens
        except OSError:
            return False
    return True


def control_address(data_dir: DataDir, volume: str) -> str | None:
    """Return where the process serving `volume` answers, or None if it left no link."""
    link = data_dir.control_link(volume)
    try:
        target = str(link.readlink())
    except OSError:
        return None
    # A link to a bare name, as this program makes it; anything else is not ours to follow.
    if "/" in target or not target.startswith("serve-"):
        return None
    path = data_dir.run / target
    return f"unix:{path}" if path.is_socket() else None
