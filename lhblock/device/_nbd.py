"""Attaching with the kernel's NBD client.

Somebody has to hand new sockets to the kernel when a server went away and came back: the keeper,
a process of its own (`lhblock.device._keeper`). Without it the device works until then. The lock
that the keeper holds says whether there is one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from lhblock.device import _kernel_nbd as kernel
from lhblock.device._host import Host, unused
from lhblock.device._kind import Attached
from lhblock.device._nbd_client import Export, open_export
from lhblock.device._netlink import Family
from lhblock.device._target import IDENTITY_PREFIX, AttachOptions, Target, pack
from lhblock.errors import DeviceError, DeviceUnavailable, FrontendError

HANDSHAKE_TIMEOUT_S: Final = 10.0
# How long a keeper that ends, or a device that comes or goes, is waited for.
SETTLE_S: Final = 10.0
SETTLE_POLL_S: Final = 0.02
SECTOR_BYTES: Final = 512  # sysfs counts in these


class Nbd:
    """The kind ``nbd``."""

    name = "nbd"

    def lacks(self, target: Target) -> str | None:
        if target.nbd is not None:
            return None
        return f"nbd: {target.volume} is not served over NBD; add --frontend nbd there"

    def obstacle(self, host: Host) -> str | None:
        if (host.sysfs / "module" / "nbd").exists():
            return None
        with suppress(OSError, DeviceError):
            host.run_program([host.program("modprobe", "kmod"), "-q", "nbd"])
        if (host.sysfs / "module" / "nbd").exists():
            return None
        return (
            f"nbd: kernel {os.uname().release} has no nbd module; run 'modprobe nbd', or install"
            " a kernel that has it (on Debian: apt install linux-image-amd64)"
        )

    def devices(self, host: Host) -> list[Attached]:
        found = []
        for index, identity in sorted(kernel.identities(host.sysfs).items()):
            if identity.startswith(IDENTITY_PREFIX):
                with suppress(OSError):
                    found.append(attached(host, index, identity))
        return found

    def attach(self, host: Host, target: Target, options: AttachOptions) -> Attached:
        require_root()
        found = find(host, target.identity)
        if found is not None and keeper_runs(host, target.identity):
            refresh_size(found, target)
            return attached(host, device_number(found.device), target.identity)
        return _start_keeper(target, options)

    def detach(self, host: Host, attached: Attached) -> None:
        require_root()
        index = device_number(attached.device)
        with open_family() as family, unused(host, attached.device):
            kernel.disconnect(family, index)
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            gone = kernel.identities(host.sysfs).get(index) != attached.identity
            if gone and not keeper_runs(host, attached.identity):
                return
            time.sleep(SETTLE_POLL_S)
        raise DeviceError(f"{attached.device} did not go away within {SETTLE_S:.0f} s")


def require_root() -> None:
    """DeviceError: the kernel would refuse, and less clearly."""
    if os.geteuid() != 0:
        raise DeviceError("attaching and detaching need root; run it with sudo")


def open_family() -> Family:
    """Reach the kernel's NBD client. DeviceUnavailable: this process cannot."""
    try:
        return Family(kernel.FAMILY)
    except OSError as error:
        raise DeviceUnavailable(
            f"the kernel's NBD client cannot be reached: {error.strerror};"
            " it answers only in the host's own network namespace"
        ) from error


def find(host: Host, identity: str) -> Attached | None:
    for index, shown in kernel.identities(host.sysfs).items():
        if shown == identity:
            return attached(host, index, identity)
    return None


def attached(host: Host, index: int, identity: str) -> Attached:
    size = (host.sysfs / "block" / f"nbd{index}" / "size").read_text()
    device = host.devices / f"nbd{index}"
    return Attached(device, Nbd.name, identity, int(size) * SECTOR_BYTES)


def device_number(device: Path) -> int:
    return int(device.name.removeprefix("nbd"))


def say_hello(target: Target) -> tuple[int, Export]:
    """Open one connection, ready for the kernel, and return its descriptor.

    Raises:
      DeviceError: nobody answers, or the server refuses.
    """
    try:
        sock, export = open_export(target.uri, timeout_s=HANDSHAKE_TIMEOUT_S)
    except FrontendError as error:
        raise DeviceError(str(error)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DeviceError(f"cannot connect to {target.uri}: {reason}; is it served?") from error
    return sock.detach(), export


def refresh_size(found: Attached, target: Target) -> None:
    """Tell the kernel how large the volume is by now.

    Raises:
      DeviceError: it became smaller, so it is another one.
    """
    fd, export = say_hello(target)
    os.close(fd)
    check_size(target, found.size_bytes, export.size_bytes)
    if export.size_bytes != found.size_bytes:
        index = device_number(found.device)
        with open_family() as family:
            try:
                kernel.reconfigure(
                    family, index, (), size_bytes=export.size_bytes, identity=target.identity
                )
            except OSError as error:
                raise DeviceError(f"cannot resize {found.device}: {error.strerror}") from error


def check_size(target: Target, known_bytes: int, size_bytes: int) -> None:
    if size_bytes < known_bytes:
        raise DeviceError(
            f"{target.uri} has {size_bytes} bytes and its device {known_bytes}: another volume"
            " is served there; detach the device first"
        )


def lock_path(host: Host, identity: str) -> Path:
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return host.run / f"attach-{digest}.lock"


def keeper_runs(host: Host, identity: str) -> bool:
    """True if a keeper holds the lock of this volume."""
    try:
        fd = os.open(lock_path(host, identity), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _start_keeper(target: Target, options: AttachOptions) -> Attached:
    """Start the keeper and wait until it has the device. Its first line says what became of it."""
    command = [sys.executable, "-m", "lhblock.device", pack(target, options)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        line = keeper.stdout.readline()
        if not line:
            status = keeper.wait()
            trouble = keeper.stderr.read().strip().splitlines() or [f"status {status}"]
            raise DeviceError(f"the process that keeps the device ended: {trouble[-1]}")
        # It outlives us; without this the with statement would wait for its end.
        keeper.returncode = 0
    document = json.loads(line)
    if "error" in document:
        raise DeviceError(document["error"])
    return Attached(
        Path(document["device"]),
        Nbd.name,
        target.identity,
        document["size_bytes"],
        made=document["made"],
    )
