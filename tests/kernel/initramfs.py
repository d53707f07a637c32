"""The file system a guest boots from: busybox, a few real programs with their libraries, modules.

The archive is written here, in cpio's "newc" format, because that needs neither root (device nodes
are entries like others) nor a copy of the tree. Archives may be concatenated, which is how a run
adds its script to the base that all runs share.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

PROGRAMS = ("nbd-client", "mke2fs", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "blkid")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "xfs")
SEARCH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /mnt /tmp
/bin/busybox --install -s
export PATH=/programs:/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
result() { echo "LHB-RESULT $*"; }
# The script is sourced in a subshell, for its -e and for its exit status.
( set -eux; . /script )
echo "LHB-EXIT $?"
poweroff -f
"""


def program_path(name: str) -> Path:
    """Where the host keeps a program; administrators' directories may be outside ``PATH``."""
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed here")
    return Path(found)


def shared_libraries(program: Path) -> list[Path]:
    """Every library and the loader ``program`` needs, as ``ldd`` names them."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listing)]


def module_files(modules: Path, names: Iterable[str]) -> list[Path]:
    """The module files of ``names`` and all they depend on, in the order of loading.

    The unpacked package has no ``modules.dep``; each module names its own needs in ``.modinfo``.
    """
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files[name]
        needs = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for need in (needs[1].decode() if needs else "").split(","):
            if need:
                visit(need.replace("-", "_"))
        if path not in order:
            order.append(path)

    for name in names:
        visit(name)
    return order


class Archive:
    """A cpio archive in the making. Parent directories are added by themselves."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def add(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        device: tuple[int, int] = (0, 0),
        *,
        modified: int = 0,
    ) -> None:
        """Add one entry; ``name`` is relative to the root, ``mode`` includes the file type."""
        if name in self._names:
            return
        parent = name.rpartition("/")[0]
        if parent and parent not in self._names:
            self.add(parent, stat.S_IFDIR | 0o755)
        self._names.add(name)
        inode = len(self._parts) + 1
        raw_name = name.encode() + b"\0"
        # ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
        fields = (inode, mode, 0, 0, 1, modified, len(data), 0, 0, *device, len(raw_name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_pad4(header + raw_name) + _pad4(data))

    def add_file(self, name: str, source: Path) -> None:
        """Add a copy of a host file, executable, with its time: bytecode knows its source by it."""
        modified = int(source.stat().st_mtime)
        self.add(name, stat.S_IFREG | 0o755, source.read_bytes(), modified=modified)

    def add_program(self, name: str, source: Path) -> None:
        """Add a program of the host and every library it needs."""
        self.add_file(name, source)
        for library in shared_libraries(source):
            self.add_file(str(library).lstrip("/"), library)

    def finish(self) -> bytes:
        """The archive with its trailer."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def base_archive(modules: Path) -> bytes:
    """What every guest has; ``modules`` is the kernel's module directory."""
    archive = Archive()
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, INIT.encode())
    archive.add_file("bin/busybox", program_path("busybox"))
    for name in PROGRAMS:
        archive.add_program(f"programs/{name}", program_path(name))
    # mke2fs chooses its defaults by the name it is called by.
    archive.add("programs/mkfs.ext4", stat.S_IFLNK | 0o777, b"mke2fs")
    files = module_files(modules, MODULES)
    for path in files:
        archive.add_file(f"modules/{path.name}", path)
    order = "\n".join(path.name for path in files)
    archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
    return archive.finish()


def script_archive(script: str) -> bytes:
    """The part that differs from run to run."""
    archive = Archive()
    archive.add("script", stat.S_IFREG | 0o644, script.encode())
    return archive.finish()
