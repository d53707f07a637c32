"""Attaching with a loop device on the file that the FUSE front end shows.

A loop device knows the path it was made with and nothing of our volumes, so each one that was made
here has a note in the run directory: whose it is. One without a note belongs to somebody else.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lhblock.device._host import Host, said, unused
from lhblock.device._kind import Attached
from lhblock.device._nbd import SECTOR_BYTES, require_root
from lhblock.device._target import AttachOptions, Target
from lhblock.errors import DeviceBusy, DeviceError, DeviceForeign

PROGRAM: Final = "losetup"
PACKAGE: Final = "mount"


@dataclass(frozen=True)
class _Note:
    """What is kept of a loop device that was made here."""

    identity: str
    file: Path
    device: str


class Loop:
    """The kind ``fuse``."""

    name = "fuse"

    def lacks(self, target: Target) -> str | None:
        if target.file is not None:
            return None
        return (
            f"fuse: {target.volume} is not shown as a file on this host; start 'lhblock"
            " mount-fuse DIR'"
        )

    def obstacle(self, host: Host) -> str | None:
        try:
            host.program(PROGRAM, PACKAGE)
        except DeviceError as error:
            return f"fuse: {error}"
        if (host.devices / "loop-control").exists():
            return None
        with suppress(OSError, DeviceError):
            host.run_program([host.program("modprobe", "kmod"), "-q", "loop"])
        if (host.devices / "loop-control").exists():
            return None
        return (
            f"fuse: {host.devices / 'loop-control'} is missing; run 'modprobe loop', or give the"
            " container the loop devices"
        )

    def devices(self, host: Host) -> list[Attached]:
        found = []
        for path in sorted(host.run.glob("loop-*.json")):
            note = _read(path)
            if note is not None and _is_ours(host, note):
                with suppress(OSError, ValueError):
                    found.append(_attached(host, note))
        return found

    def attach(self, host: Host, target: Target, options: AttachOptions) -> Attached:
        require_root()
        path = _note_path(host, target.identity)
        note = _read(path)
        if note is not None and _is_ours(host, note):
            if _answers(note.file) and _same_file(host, note):
                self._losetup(host, "--set-capacity", str(host.devices / note.device))
                return _attached(host, note)
            # Its server went away, and a loop device cannot be given another file.
            self._take_away(host, note, path)
        assert target.file is not None
        # The kernel follows links, and says where they led.
        file = target.file.resolve()
        _check_file(host, file)
        options_ = ["--read-only"] if options.read_only else []
        done = self._losetup(host, "--find", "--show", "--direct-io=on", *options_, "--", str(file))
        note = _Note(target.identity, file, Path(done.strip()).name)
        try:
            host.run.mkdir(mode=0o700, parents=True, exist_ok=True)
            words = {"identity": note.identity, "file": str(note.file), "device": note.device}
            path.write_text(json.dumps(words))
            return _attached(host, note, made=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            self._losetup(host, "--detach", str(host.devices / note.device))
            raise DeviceError(f"cannot note {note.device} in {host.run}: {error}") from error

    def detach(self, host: Host, attached: Attached) -> None:
        require_root()
        path = _note_path(host, attached.identity)
        note = _read(path)
        if note is None:
            raise DeviceForeign(f"{attached.device} was not attached by lhblock")
        self._take_away(host, note, path)

    def _take_away(self, host: Host, note: _Note, path: Path) -> None:
        device = host.devices / note.device
        # Not held meanwhile: the kernel would only take it away when it is let go.
        with unused(host, device):
            pass
        self._losetup(host, "--detach", str(device))
        path.unlink(missing_ok=True)

    def _losetup(self, host: Host, *arguments: str) -> str:
        done = host.run_program([host.program(PROGRAM, PACKAGE), *arguments])
        if done.returncode:
            raise DeviceError(f"losetup failed on {arguments[-1]}: {said(done)}")
        return done.stdout


def _check_file(host: Host, file: Path) -> None:
    """DeviceBusy: a loop device of somebody else is on it. DeviceError: it cannot be used."""
    try:
        file.stat()
    except PermissionError as error:
        raise DeviceError(
            f"{file} belongs to the user of the process that serves it, and nobody else may use"
            " it; serve it as root"
        ) from error
    except OSError as error:
        raise DeviceError(f"cannot use {file}: {error.strerror}") from error
    for backing in sorted(host.sysfs.glob("block/loop*/loop/backing_file")):
        with suppress(OSError):
            if backing.read_text().rstrip("\n") == str(file):
                device = host.devices / backing.parent.parent.name
                raise DeviceBusy(
                    f"{device} is on {file} already, and lhblock did not make it;"
                    f" 'losetup -d {device}' takes it away"
                )


def _note_path(host: Host, identity: str) -> Path:
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return host.run / f"loop-{digest}.json"


def _read(path: Path) -> _Note | None:
    try:
        words = json.loads(path.read_text())
        return _Note(words["identity"], Path(words["file"]), Path(words["device"]).name)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _backing(host: Host, note: _Note) -> str:
    path = host.sysfs / "block" / note.device / "loop" / "backing_file"
    try:
        return path.read_text().rstrip("\n")
    except OSError:
        return ""


def _is_ours(host: Host, note: _Note) -> bool:
    """Whether the device is still what the note says. Its path ends early once it is unmounted."""
    backing = _backing(host, note)
    return backing.startswith("/") and str(note.file).endswith(backing)


def _same_file(host: Host, note: _Note) -> bool:
    return _backing(host, note) == str(note.file)


def _answers(file: Path) -> bool:
    try:
        file.stat()
    except OSError:
        return False
    return True


def _attached(host: Host, note: _Note, *, made: bool = False) -> Attached:
    size = int((host.sysfs / "block" / note.device / "size").read_text())
    device = host.devices / note.device
    return Attached(device, Loop.name, note.identity, size * SECTOR_BYTES, made=made)
