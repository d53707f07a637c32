"""Attaching with the kernel's iSCSI initiator, through open-iscsi.

The kernel knows sessions by the name of their target and nothing of our volumes, so each session
that was made here has a note in the run directory: whose it is. A session without one belongs to
somebody else and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lhblock.device._host import Host, said, unused
from lhblock.device._iscsi_uri import IscsiUri, parse_iscsi_uri
from lhblock.device._kind import Attached
from lhblock.device._nbd import SECTOR_BYTES, SETTLE_POLL_S, SETTLE_S, require_root
from lhblock.device._target import AttachOptions, Target
from lhblock.errors import DeviceError, DeviceForeign, UsageError

ISCSI_DEVICE: Final = "iscsi"
PACKAGE: Final = "open-iscsi"
# Exit status of iscsiadm that says: it is so already.
EXISTS: Final = 15


@dataclass(frozen=True)
class _Note:
    """What is kept of a session that was made here."""

    identity: str
    uri: IscsiUri


class Iscsi:
    """The kind ``iscsi``."""

    name = ISCSI_DEVICE

    def lacks(self, target: Target) -> str | None:
        if target.iscsi is not None:
            return None
        return f"iscsi: {target.volume} is not served over iSCSI; add --frontend tgt-iscsi there"

    def obstacle(self, host: Host) -> str | None:
        try:
            host.program("iscsiadm", PACKAGE)
        except DeviceError as error:
            return f"iscsi: {error}"
        module = host.sysfs / "module" / "iscsi_tcp"
        if not module.exists():
            with suppress(OSError, DeviceError):
                host.run_program([host.program("modprobe", "kmod"), "-q", "iscsi_tcp"])
        if module.exists():
            return None
        return (
            f"iscsi: kernel {os.uname().release} has no iscsi_tcp module; run 'modprobe"
            " iscsi_tcp', or install a kernel that has it (on Debian: apt install"
            " linux-image-amd64)"
        )

    def devices(self, host: Host) -> list[Attached]:
        found = []
        for path in sorted(host.run.glob("iscsi-*.json")):
            note = _read(path)
            device = note and _find(host, note.uri)
            if note and device:
                found.append(_attached(host, device, note.identity))
        return found

    def attach(self, host: Host, target: Target, options: AttachOptions) -> Attached:
        require_root()
        assert target.iscsi is not None
        path = _note_path(host, target.identity)
        note = _read(path)
        uri = note.uri if note else target.iscsi
        if _session(host, uri) is not None:
            if note is None:
                raise DeviceForeign(
                    f"this host has a session to {uri.target} that lhblock did not make;"
                    " log out of it first, or use it"
                )
            _iscsiadm(host, uri, "--rescan")
            return _attached(host, _wait(host, uri), target.identity)
        uri = target.iscsi
        self._log_in(host, uri, path, target.identity, options)
        try:
            device = _wait(host, uri)
        except DeviceError:
            self._log_out(host, uri, path)
            raise
        if options.read_only:
            _set_read_only(host, device)
        return _attached(host, device, target.identity, made=True)

    def detach(self, host: Host, attached: Attached) -> None:
        require_root()
        path = _note_path(host, attached.identity)
        note = _read(path)
        if note is None:
            raise DeviceForeign(f"{attached.device} was not attached by lhblock")
        # Not held meanwhile: the kernel waits for whoever has a device open.
        with unused(host, attached.device):
            pass
        self._log_out(host, note.uri, path)

    def _log_in(
        self, host: Host, uri: IscsiUri, path: Path, identity: str, options: AttachOptions
    ) -> None:
        host.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps({"identity": identity, "uri": str(uri)}))
        try:
            _iscsiadm(host, uri, "--op", "new")
            for name, value in (
                ("node.startup", "manual"),
                ("node.session.timeo.replacement_timeout", str(options.away_s)),
            ):
                _iscsiadm(host, uri, "--op", "update", "--name", name, "--value", value)
            _iscsiadm(host, uri, "--login")
        except DeviceError:
            with suppress(DeviceError):
                _iscsiadm(host, uri, "--op", "delete")
            path.unlink(missing_ok=True)
            raise

    def _log_out(self, host: Host, uri: IscsiUri, path: Path) -> None:
        _iscsiadm(host, uri, "--logout")
        with suppress(DeviceError):
            _iscsiadm(host, uri, "--op", "delete")
        path.unlink(missing_ok=True)


def rescan(host: Host, attached: Attached) -> None:
    """Have the kernel look at the size of a device again. DeviceError: it cannot."""
    note = _read(_note_path(host, attached.identity))
    if note is not None:
        _iscsiadm(host, note.uri, "--rescan")


def _iscsiadm(host: Host, uri: IscsiUri, *arguments: str) -> None:
    command = [host.program("iscsiadm", PACKAGE), "--mode", "node"]
    command += ["--targetname", uri.target, "--portal", str(uri.portal), *arguments]
    done = host.run_program(command)
    if done.returncode not in (0, EXISTS):
        raise DeviceError(f"iscsiadm cannot use {uri}: {said(done)}")


def _note_path(host: Host, identity: str) -> Path:
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return host.run / f"iscsi-{digest}.json"


def _read(path: Path) -> _Note | None:
    try:
        words = json.loads(path.read_text())
        return _Note(words["identity"], parse_iscsi_uri(words["uri"]))
    except (OSError, ValueError, KeyError, UsageError):
        return None


def _session(host: Host, uri: IscsiUri) -> Path | None:
    """The session to a target, whoever made it."""
    for session in sorted((host.sysfs / "class" / "iscsi_session").glob("session*")):
        with suppress(OSError):
            if (session / "targetname").read_text().strip() == uri.target:
                return session
    return None


def _find(host: Host, uri: IscsiUri) -> str | None:
    """The name of the kernel's device for a unit, once it is there."""
    session = _session(host, uri)
    if session is None:
        return None
    for block in (session / "device").glob(f"target*/*:{uri.lun}/block/*"):
        return block.name
    return None


def _wait(host: Host, uri: IscsiUri) -> str:
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        name = _find(host, uri)
        if name is not None and (host.devices / name).exists():
            return name
        time.sleep(SETTLE_POLL_S)
    raise DeviceError(f"unit {uri.lun} of {uri.target} did not appear within {SETTLE_S:.0f} s")


def _attached(host: Host, name: str, identity: str, *, made: bool = False) -> Attached:
    size = (host.sysfs / "block" / name / "size").read_text()
    return Attached(host.devices / name, Iscsi.name, identity, int(size) * SECTOR_BYTES, made=made)


def _set_read_only(host: Host, name: str) -> None:
    done = host.run_program(
        [host.program("blockdev", "util-linux"), "--setro", host.devices / name]
    )
    if done.returncode:
        raise DeviceError(f"cannot make {name} read-only: {said(done)}")
