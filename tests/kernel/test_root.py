"""A machine whose root file system is a volume, through qemu's own NBD client and virtio."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.kernel.guest import Guest
from tests.kernel.initramfs import Archive, program_path
from tests.kernel.orders import taking_orders
from tests.kernel.server import VOLUME, Server

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

# qemu waits this long for a server that went away before the guest sees an error.
AWAY_S = 120

# The modules are loaded and the root is changed; all the rest comes from the volume.
INITIAL = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /dev /root
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t ext4 /dev/vda /root
mount --move /dev /root/dev
exec switch_root -c /dev/console /root /init
"""


def installed(directory: Path, init: str) -> Path:
    """An ext4 image of a system as small as it can be."""
    tree = directory / "tree"
    for name in ("bin", "dev", "proc", "tmp"):
        (tree / name).mkdir(parents=True)
    shutil.copy(program_path("busybox"), tree / "bin" / "busybox")
    script = tree / "init"
    script.write_text(f"#!/bin/busybox sh\n{init}")
    script.chmod(0o755)
    image = directory / "system.img"
    command: list[str | Path] = [program_path("mkfs.ext4"), "-q", "-d", tree, image, "64M"]
    subprocess.run(command, check=True, capture_output=True)
    return image


def test_a_machine_boots_from_a_volume_and_lives_through_a_killed_server(
    guest: Guest, server: Server, tmp_path: Path
) -> None:
    with taking_orders({"restart": server.restart}) as orders:
        image = installed(
            tmp_path,
            f"""
            /bin/busybox --install -s /bin
            mount -t proc proc /proc
            ip link set eth0 up
            ip addr add 10.0.2.15/24 dev eth0
            {orders.shell}
            body() {{
              echo "LHB-RESULT boots $(cat /boots)x"
              echo -n x >> /boots
              for i in 1 2 3 4 5 6 7 8; do
                dd if=/dev/zero of=/file$i bs=64k count=4 conv=fsync || return
                [ $i != 4 ] || order restart || return
              done
              fstrim / && ! dmesg | grep -iE 'i/o error|ext4-fs (error|warning)'
            }}
            body
            echo "LHB-EXIT $?"
            mount -o remount,ro /
            poweroff -f
            """,
        )
        subprocess.run(["nbdcopy", image, server.local_uri], check=True)
        archive = Archive()
        archive.add("init", stat.S_IFREG | 0o755, INITIAL.encode())
        blockdev = (
            f"driver=nbd,node-name=volume,server.type=inet,server.host=127.0.0.1,"
            f"server.port={server.port},export={VOLUME},reconnect-delay={AWAY_S},discard=unmap"
        )
        disk = "virtio-blk-pci,drive=volume,discard=on"
        arguments = ["-blockdev", blockdev, "-device", disk]
        for boots in ("x", "xx"):
            result = guest.boot(archive.finish(), arguments)
            assert result.value("boots") == boots
    assert orders.done == ["restart", "restart"]

    copy = tmp_path / "after.img"
    subprocess.run(["nbdcopy", server.local_uri, copy], check=True)
    done = subprocess.run([program_path("e2fsck"), "-f", "-n", copy], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
