"""``lhblock attach --device iscsi`` in a guest, with open-iscsi, while tgtd is killed."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from tests.kernel.conftest import KERNEL_DIRECTORY
from tests.kernel.guest import HOST, Guest
from tests.kernel.initramfs import Archive, module_files, program_path
from tests.kernel.interpreter import interpreter_archive
from tests.kernel.orders import taking_orders
from tests.live.serving import MIB, cli, serve, tool
from tests.live.tgt import tgtd_pid, unit_uri

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

SIZE = 64 * MIB
FILES = 40


def initiator_archive() -> bytes:
    """The initiator: its modules, its two programs, its name."""
    archive = Archive()
    files = module_files(KERNEL_DIRECTORY / "modules", ["sd_mod", "iscsi_tcp"])
    for path in files:
        archive.add_file(f"iscsi-modules/{path.name}", path)
    order = "\n".join(path.name for path in files)
    archive.add("iscsi-modules/order", stat.S_IFREG | 0o644, order.encode())
    for name in ("iscsid", "iscsiadm"):
        archive.add_program(f"programs/{name}", program_path(name))
    identity = b"InitiatorName=iqn.2026-01.org.example:guest\n"
    archive.add("etc/iscsi/initiatorname.iscsi", stat.S_IFREG | 0o600, identity)
    # iscsid wants its callers to be called root.
    archive.add("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/:/bin/sh\n")
    archive.add("etc/iscsi/iscsid.conf", stat.S_IFREG | 0o600, b"# defaults\n")
    return archive.finish()


@pytest.fixture
def initiator_guest(guest_base: bytes, tmp_path: Path) -> Guest:
    base = guest_base + interpreter_archive() + initiator_archive()
    return Guest(KERNEL_DIRECTORY / "vmlinuz", base, tmp_path)


def test_a_file_system_lives_through_a_killed_tgtd_and_an_expansion(
    initiator_guest: Guest, tmp_path: Path
) -> None:
    arguments = ("db", "--size", str(SIZE), "--frontend", "nbd", "--frontend", "tgt-iscsi")
    with serve(tmp_path / "data", *arguments, "--iscsi-listen", "127.0.0.1:0") as served:
        uri = unit_uri(served).replace("127.0.0.1", HOST)

        def kill() -> None:
            os.kill(tgtd_pid(served), signal.SIGKILL)

        def expand() -> None:
            cli(served.data_dir, "volume", "expand", "db", str(2 * SIZE))

        with taking_orders({"kill": kill, "expand": expand}) as orders:
            result = initiator_guest.run(f"""
                {orders.shell}
                mkdir -p /run/lock/iscsi
                for module in $(cat /iscsi-modules/order); do
                  insmod /iscsi-modules/$module 2>/dev/null || true
                done
                iscsid
                attach="lhblock attach {uri} --device iscsi"
                $attach --json | tr -d '\\n' > /tmp/first
                result first $(cat /tmp/first)
                disk=/dev/sda
                result cache $(cat /sys/block/sda/device/scsi_disk/*/cache_type)
                result thin $(cat /sys/block/sda/device/scsi_disk/*/provisioning_mode)
                result vendor $(cat /sys/block/sda/device/vendor)
                mkfs.ext4 -q $disk
                mount -t ext4 -o errors=remount-ro $disk /mnt
                result refused $(lhblock detach $disk 2>&1)
                ( set +x
                  for i in $(seq {FILES}); do
                    byte="\\\\$(printf %o $i)"
                    dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\\0' $byte > /tmp/f
                    dd if=/tmp/f of=/mnt/file$i bs=64k conv=fsync 2>/dev/null || exit 1
                    [ $i = 10 ] && order kill
                    [ $i = 20 ] && order kill
                  done; true ) && result written all
                order expand
                $attach --json | tr -d '\\n' > /tmp/second
                result second $(cat /tmp/second)
                resize2fs $disk
                result megabytes $(df -m /mnt | tail -n 1 | awk '{{print $2}}')
                umount /mnt
                result errors $(dmesg | grep -c -E 'I/O error|EXT4-fs error|Aborting' || true)
                lhblock detach $disk
                result gone $(ls /sys/class/iscsi_session | wc -l)
            """)
        assert orders.done == ["kill", "kill", "expand"]
        first, second = json.loads(result.value("first")), json.loads(result.value("second"))
        assert (first["device"], first["kind"], first["size_bytes"]) == ("/dev/sda", "iscsi", SIZE)
        assert (second["attached"], second["size_bytes"]) == (False, 2 * SIZE)
        assert result.value("cache") == "write back"
        assert result.value("thin") in ("unmap", "writesame_16")
        assert result.value("vendor") == "LHBLOCK"
        assert "mounted at /mnt" in result.value("refused")
        assert result.value("written") == "all"
        assert int(result.value("megabytes")) > SIZE / MIB
        assert (result.value("errors"), result.value("gone")) == ("0", "0")
        image = tmp_path / "image"
        tool("nbdcopy", served.uri(), str(image))
    tool("e2fsck", "-fn", str(image))
    for number in range(1, FILES + 1):
        dumped = tool("debugfs", "-R", f"dump /file{number} {tmp_path / 'file'}", str(image))
        assert (tmp_path / "file").read_bytes() == bytes([number]) * (64 << 10), dumped.stderr
