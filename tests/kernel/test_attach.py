"""``lhblock attach`` in a guest, on a volume the host serves, restarts and snapshots meanwhile."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.kernel.conftest import KERNEL_DIRECTORY
from tests.kernel.guest import HOST, Guest
from tests.kernel.initramfs import program_path
from tests.kernel.interpreter import interpreter_archive
from tests.kernel.orders import taking_orders
from tests.kernel.server import VOLUME, VOLUME_MIB, Server

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

# An unanswered request is tried again after this, so it is how long a restart is felt.
TIMEOUT_S = 2
FILE_MIB = 16
# What of a file's blocks may stay after it is gone: logs and metadata written besides.
LEFT_MIB_MAX = 8


@pytest.fixture(scope="module")
def python_base(guest_base: bytes) -> bytes:
    return guest_base + interpreter_archive()


@pytest.fixture
def python_guest(python_base: bytes, tmp_path: Path) -> Guest:
    """A guest that can run ``lhblock attach``."""
    return Guest(KERNEL_DIRECTORY / "vmlinuz", python_base, tmp_path)


def check_copy(image: Path, command: list[str]) -> None:
    done = subprocess.run([program_path(command[0]), *command[1:], image], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_a_file_system_lives_through_a_killed_server_and_a_snapshot(
    python_guest: Guest, server: Server, tmp_path: Path
) -> None:
    def snapshot() -> None:
        server.run("snapshot", "create", VOLUME, "live")

    with taking_orders({"restart": server.restart, "snapshot": snapshot}) as orders:
        result = python_guest.run(f"""
            {orders.shell}
            attach="lhblock attach {server.uri} --connections 4 --timeout {TIMEOUT_S}"
            $attach --mkfs ext4 --mount /mnt --json | tr -d '\\n' > /tmp/first
            result first $(cat /tmp/first)
            result second $($attach --mkfs ext4 --mount /mnt --json | tr -d '\\n')
            result refused $(lhblock detach /dev/nbd0 2>&1)
            dd if=/dev/urandom of=/tmp/piece bs=64k count=1
            ( set +x
              i=0
              while [ ! -e /tmp/stop ]; do
                i=$((i+1))
                (echo $i; cat /tmp/piece) |
                  dd of=/mnt/file$i bs=128k iflag=fullblock conv=fsync 2>/dev/null &&
                  echo $i > /tmp/written || break
              done
              echo $i > /tmp/ended ) &
            writer=$!
            # The second file was begun after this was called.
            written() {{ ( set +x; for round in 1 2; do
              while [ ! -s /tmp/written ]; do [ ! -e /tmp/ended ]; usleep 10000; done
              rm /tmp/written
            done ) }}
            written
            order restart
            written
            echo early > /mnt/early
            sync
            order snapshot
            written
            order restart
            written
            touch /tmp/stop
            wait $writer
            result count $(ls /mnt | grep -c file)
            result ended $(cat /tmp/ended)
            umount /mnt
            e2fsck -f -n /dev/nbd0
            mount -r /dev/nbd0 /mnt
            ( set +x; for i in $(seq $(cat /tmp/ended)); do
                (echo $i; cat /tmp/piece) | cmp -s - /mnt/file$i || echo $i
              done ) > /tmp/wrong
            result wrong $(wc -l < /tmp/wrong)
            umount /mnt
            result live $(blockdev --getro $(lhblock attach {server.uri}@live))
            lhblock detach {server.uri}@live
            lhblock detach /dev/nbd0
            result left $(cat /sys/block/nbd*/backend 2>&1 | grep -c lhblock)
            dmesg | grep -iE 'i/o error|ext4-fs (error|warning)' && exit 1 || true
        """)
    assert orders.done == ["restart", "snapshot", "restart"]
    first = json.loads(result.value("first"))
    assert first == {
        "volume": server.uri,
        "device": "/dev/nbd0",
        "kind": "nbd",
        "size_bytes": VOLUME_MIB << 20,
        "attached": True,
        "formatted": True,
        "mounted": "/mnt",
    }
    assert json.loads(result.value("second")) == first | {
        "attached": False,
        "formatted": False,
    }
    assert "/dev/nbd0 is in use, mounted at /mnt" in result.value("refused")
    assert result.value("count") == result.value("ended")
    assert result.value("wrong") == "0"
    assert result.value("live") == "1"
    assert result.value("left") == "0"

    image = tmp_path / "live.img"
    subprocess.run(["nbdcopy", f"{server.local_uri}@live", image], check=True)
    # As a mount would; what was synced before may be in the journal only.
    check_copy(image, ["e2fsck", "-p"])
    check_copy(image, ["e2fsck", "-f", "-n"])
    early = subprocess.run(
        [program_path("debugfs"), "-R", "cat early", image], capture_output=True, check=True
    )
    assert early.stdout == b"early\n"


def test_what_a_device_goes_through(python_guest: Guest, server: Server) -> None:
    allocated: list[float] = []
    grown_mib = VOLUME_MIB + 64
    # The file is there when it is measured, and its blocks are gone after the file is.
    fill = "dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\0' x > /tmp/piece"
    copies = f"for i in $(seq {FILE_MIB}); do cat /tmp/piece; done > /mnt/file; sync"
    actions = {
        "restart": server.restart,
        "measure": lambda: allocated.append(server.allocated_mib()),
        "expand": lambda: server.run("volume", "expand", VOLUME, f"{grown_mib}M"),
    }
    with taking_orders(actions) as orders:
        result = python_guest.run(f"""
            {orders.shell}
            attach="lhblock attach {server.uri} --timeout {TIMEOUT_S}"
            {fill}

            device=$($attach --mkfs xfs)
            mount -o discard $device /mnt
            {copies}
            order measure
            rm /mnt/file
            sync
            umount /mnt
            order measure
            xfs_repair -n $device
            result other $($attach --mkfs ext4 2>&1)

            blkdiscard $device
            dd if=/tmp/piece of=$device bs=1M seek=100
            result data $($attach --mkfs ext4 2>&1)
            blkdiscard $device
            $attach --mkfs ext4
            mount -o discard $device /mnt
            {copies}
            order measure
            rm /mnt/file
            sync
            umount /mnt
            order measure
            e2fsck -f -n $device

            order expand
            result grown $($attach --json | tr -d '\\n')
            result sectors $(cat /sys/block/${{device#/dev/}}/size)

            kill -9 $(cat /run/lhblock/attach-*.lock)
            order restart
            mount $device /mnt &
            result mended $($attach)
            wait $!
            echo written > /mnt/after
            umount /mnt
            kill $(cat /run/lhblock/attach-*.lock)
            ( set +x; while grep lhblock /sys/block/nbd*/backend; do usleep 10000; done )

            $attach --foreground --mount /mnt > /tmp/device 2> /tmp/said &
            keeper=$!
            ( set +x; while [ ! -s /tmp/device ]; do kill -0 $keeper; usleep 10000; done )
            echo still > /mnt/after
            kill $keeper
            wait $keeper && exit 1
            result stayed $(cat /tmp/said)
            umount /mnt
            lhblock detach $(cat /tmp/device)

            nbd-client {HOST} {server.port} /dev/nbd5 -N {VOLUME}
            result foreign $(lhblock detach /dev/nbd5 2>&1)
            nbd-client -d /dev/nbd5
        """)
    assert "holds xfs; nothing was formatted" in result.value("other")
    assert f"holds data at byte {100 << 20}; nothing was formatted" in result.value("data")
    assert json.loads(result.value("grown"))["size_bytes"] == grown_mib << 20
    assert result.value("sectors") == str(grown_mib << 11)
    assert result.value("mended").startswith("/dev/nbd0")
    assert "is in use, mounted at /mnt; unmount it first" in result.value("stayed")
    assert "was not attached by lhblock; nothing was done" in result.value("foreign")
    for full_mib, trimmed_mib in (allocated[:2], allocated[2:]):
        assert full_mib >= FILE_MIB
        assert trimmed_mib <= full_mib - FILE_MIB + LEFT_MIB_MAX
