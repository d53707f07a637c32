"""What a host has: where the kernel shows its devices, programs, and who uses a device."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lhblock.errors import DeviceBusy, DeviceError

# Administrators' directories are not in everybody's PATH.
SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OUTPUT_CHARS_MAX: Final = 500


@dataclass(frozen=True)
class Host:
    """The host as seen from this process; tests make one of their own.

    Attributes:
      run: directory for files that live until the host restarts.
    """

    sysfs: Path = Path("/sys")
    devices: Path = Path("/dev")
    run: Path = Path("/run/lhblock")
    mountinfo: Path = Path("/proc/self/mountinfo")
    search_path: str = field(
        default_factory=lambda: os.pathsep.join((os.environ.get("PATH", ""), SEARCH_PATH))
    )

    def program(self, name: str, package: str) -> str:
        """The path of a program. DeviceError: it is not there; says which package has it."""
        found = shutil.which(name, path=self.search_path)
        if found is None:
            raise DeviceError(f"{name} is not installed here; on Debian: apt install {package}")
        return found

    def run_program(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; its output is text. OSError: it cannot be started."""
        return subprocess.run(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def mounted_at(self, device: Path) -> tuple[str, ...]:
        """Where this process sees the device mounted. Partitions do not count."""
        status = device.stat()
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        found = []
        for line in self.mountinfo.read_text(errors="surrogateescape").splitlines():
            words = line.split()
            if len(words) > 4 and words[2] == number:
                found.append(_unescape(words[4]))
        return tuple(found)


@contextmanager
def unused(host: Host, device: Path) -> Iterator[None]:
    """Hold a device so that nothing can mount it, for as long as the block lasts.

    The kernel knows of mounts in every namespace, of swap, of LVM and of RAID; partitions count.

    Raises:
      DeviceBusy: something has it.
      DeviceError: it cannot be opened.
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusy(f"{device} is in use{_by_whom(host, device)}") from error
        raise DeviceError(f"cannot open {device}: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(fd)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a program had to say, as part of a sentence."""
    text = " ".join((done.stderr or done.stdout).split())
    return text[:OUTPUT_CHARS_MAX] or f"it ended with status {done.returncode} and said nothing"


def _by_whom(host: Host, device: Path) -> str:
    places = host.mounted_at(device)
    if places:
        return f", mounted at {', '.join(places)}; unmount it first"
    holders = host.sysfs / "block" / device.name / "holders"
    names = sorted(path.name for path in holders.iterdir()) if holders.is_dir() else []
    if names:
        return f" by {', '.join(names)}; take that away first"
    return ": as swap, by a partition of it, or in another namespace; see lsblk"


def _unescape(word: str) -> str:
    for code in ("040", "011", "012", "134"):
        word = word.replace(f"\\{code}", chr(int(code, 8)))
    return word
