"""A Debian kernel under qemu's own CPU emulation, driven by one shell script per boot.

KVM is not asked for: where it is missing or broken the test must still run, and a boot takes about
ten seconds without it. The guest reaches the host's loopback addresses as 10.0.2.2.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.initramfs import script_archive

HOST = "10.0.2.2"
MEMORY_MIB = 384
# Emulation on a loaded machine is slow; a run that hangs is still ended, with its console shown.
TIMEOUT_S = 300.0


class GuestFailed(AssertionError):
    """The script failed or did not end. The message holds the whole console."""

    def __init__(self, sentence: str, console: str) -> None:
        super().__init__(f"{sentence}; console:\n{console}")


@dataclass(frozen=True)
class GuestResult:
    """What a script that ended well left behind."""

    console: str
    values: dict[str, str]  # of every `result NAME VALUE` the script called

    def value(self, name: str) -> str:
        """What `result NAME` said; GuestFailed if it was not called or had nothing to say."""
        if name not in self.values:
            raise GuestFailed(f"no result {name!r}", self.console)
        return self.values[name]

    @classmethod
    def from_console(cls, console: str) -> GuestResult:
        """Read the result lines. Kernel messages may stand between them, never inside one."""
        return cls(
            console, dict(re.findall(r"^LHB-RESULT (\S+) (\S.*?)\s*$", console, re.MULTILINE))
        )


@dataclass(frozen=True)
class Guest:
    """Something to boot: a kernel and the archive all runs share."""

    kernel: Path
    base: bytes
    scratch: Path

    def run(self, script: str, *, timeout_s: float = TIMEOUT_S) -> GuestResult:
        """Boot, run ``script`` with ``sh -eux``, power off.

        In the script ``result NAME VALUE...`` hands a value back; ``nbd-client``, ``mkfs.ext4``,
        ``e2fsck``, ``resize2fs``, ``mkfs.xfs``, ``xfs_repair``, ``blkid`` and busybox are there,
        ``/dev/nbd0`` and on, and what else the base was given.

        Raises:
          GuestFailed: the script's status was not 0, or it did not end within ``timeout_s``.
        """
        return self.boot(script_archive(script), timeout_s=timeout_s)

    def boot(
        self, part: bytes, arguments: Sequence[str] = (), *, timeout_s: float = TIMEOUT_S
    ) -> GuestResult:
        """Boot with an archive unpacked over the base, and more arguments for qemu.

        What it boots says ``LHB-EXIT STATUS`` on the console before it powers off. Raises as `run`.
        """
        initramfs = self.scratch / "initramfs"
        initramfs.write_bytes(self.base + part)
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2"),
            *("-m", str(MEMORY_MIB), "-display", "none", "-monitor", "none", "-no-reboot"),
            *("-nodefaults", "-serial", "stdio"),
            *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
            *("-kernel", str(self.kernel), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off"),
            *arguments,
        ]
        try:
            finished = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise GuestFailed(f"no end after {timeout_s} s", _text(error.output or b"")) from None
        console = _text(finished.stdout)
        status = re.search(r"^LHB-EXIT (\d+)", console, re.MULTILINE)
        if status is None:
            raise GuestFailed("the guest died", console)
        if status[1] != "0":
            raise GuestFailed(f"the script ended with status {status[1]}", console)
        return GuestResult.from_console(console)


def _text(console: bytes) -> str:
    return console.decode(errors="replace").replace("\r", "")
