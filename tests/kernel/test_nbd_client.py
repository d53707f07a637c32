"""The kernel's own NBD client and a file system on top, against a real ``lhblock serve``."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.activation import activated, listen_tcp
from tests.kernel.guest import HOST, Guest

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

VOLUME = "disk"
# xfs makes nothing smaller than 300 MiB.
VOLUME_MIB = 320
FILE_MIB = 32
# What of the file's blocks may stay after fstrim: the journal and metadata written besides.
LEFT_MIB_MAX = 16
# Random bytes and digests are slow under emulation: one random MiB again and again, each copy with
# its number in front so that no two blocks of the file are at the same place of equal copies.
MAKE_FILE = f"""
    dd if=/dev/urandom of=/tmp/piece bs=1M count=1
    ( set +x; for i in $(seq {FILE_MIB}); do echo $i; cat /tmp/piece; done ) |
        dd of=/mnt/file bs=1M iflag=fullblock conv=fsync
    result sum $(md5sum < /mnt/file)
"""


@contextmanager
def serving(directory: Path, listener: socket.socket) -> Iterator[Path]:
    """Serve one volume; yields its replica directory."""
    data_dir = directory / "data"
    command: list[str | Path] = [
        *(sys.executable, "-c", "from lhblock.cli import main; main()", "serve", VOLUME),
        *("--size", f"{VOLUME_MIB}M", "--data-dir", data_dir),
    ]
    with activated(command, listener, directory / "serve.log"):
        yield data_dir / "volumes" / VOLUME / "replica"


def attach(listener: socket.socket, *, connections: int) -> str:
    """The guest's command that attaches the volume by name."""
    port = listener.getsockname()[1]
    return f"nbd-client {HOST} {port} /dev/nbd0 -N {VOLUME} -C {connections}"


def allocated_mib(replica: Path) -> float:
    """What the images of a replica take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in replica.glob("*.img")) / (1 << 20)


@pytest.mark.parametrize(
    ("kind", "check"), [("ext4", "e2fsck -f -n"), ("xfs", "xfs_repair -n")], ids=["ext4", "xfs"]
)
def test_file_system_survives_detach_and_its_discards_give_space_back(
    guest: Guest, tmp_path: Path, kind: str, check: str
) -> None:
    with listen_tcp() as listener, serving(tmp_path, listener) as replica:
        attach_command = attach(listener, connections=2)
        written = guest.run(f"""
            {attach_command}
            result bytes $(blockdev --getsize64 /dev/nbd0)
            mkfs.{kind} -q /dev/nbd0
            mount -t {kind} /dev/nbd0 /mnt
            {MAKE_FILE}
            umount /mnt
            {check} /dev/nbd0
            nbd-client -d /dev/nbd0
        """)
        assert written.value("bytes") == str(VOLUME_MIB << 20)
        full_mib = allocated_mib(replica)
        assert full_mib >= FILE_MIB

        # Another kernel, so nothing of it can come from a cache. Mounted anew before it is trimmed,
        # because xfs frees what was removed in the background.
        trimmed = guest.run(f"""
            {attach_command}
            mount -t {kind} /dev/nbd0 /mnt
            result sum $(md5sum < /mnt/file)
            rm /mnt/file
            umount /mnt
            mount -t {kind} /dev/nbd0 /mnt
            fstrim /mnt
            umount /mnt
            {check} /dev/nbd0
            nbd-client -d /dev/nbd0
        """)
        assert trimmed.value("sum") == written.value("sum")
        assert allocated_mib(replica) <= full_mib - FILE_MIB + LEFT_MIB_MAX


def test_volume_written_by_a_guest_is_whole_after_the_service_restarts(
    guest: Guest, tmp_path: Path
) -> None:
    with listen_tcp() as listener:
        with serving(tmp_path, listener):
            written = guest.run(f"""
                {attach(listener, connections=1)}
                mkfs.ext4 -q /dev/nbd0
                mount /dev/nbd0 /mnt
                {MAKE_FILE}
                umount /mnt
                nbd-client -d /dev/nbd0
            """)
        with serving(tmp_path, listener):
            read = guest.run(f"""
                {attach(listener, connections=1)}
                e2fsck -f -n /dev/nbd0
                mount -r /dev/nbd0 /mnt
                result sum $(md5sum < /mnt/file)
                umount /mnt
                nbd-client -d /dev/nbd0
            """)
        assert read.value("sum") == written.value("sum")
