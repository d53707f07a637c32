"""A file system in a guest, on a volume whose replicas die, stall and come back meanwhile."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests.kernel.guest import HOST, Guest
from tests.kernel.orders import taking_orders
from tests.kernel.server import VOLUME, VOLUME_MIB, start_server
from tests.live.hosts import options, start_hosts, wait_modes
from tests.model.volumes import VolumeFiles

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

CONNECTIONS = 4
WRITERS = 2


def test_a_file_system_does_not_notice_that_replicas_go_and_come(
    guest: Guest, tmp_path: Path
) -> None:
    local, data_dir = tmp_path / "local", tmp_path / "data"
    with ExitStack() as stack:
        hosts = stack.enter_context(start_hosts(tmp_path, 2))
        arguments = [*options(hosts, local), "--replica-timeout", "1"]
        server = stack.enter_context(start_server(data_dir, *arguments))

        def wait(*modes: str) -> None:
            wait_modes(data_dir, *modes, volume=VOLUME)

        def kill() -> None:
            hosts[0].kill()
            wait("ERR", "RW", "RW")

        def start() -> None:
            hosts[0].start()
            wait("RW", "RW", "RW")

        def stall() -> None:
            hosts[1].signal(signal.SIGSTOP)
            wait("RW", "ERR", "RW")

        def go_on() -> None:
            hosts[1].signal(signal.SIGCONT)
            wait("RW", "RW", "RW")

        actions = {"kill": kill, "start": start, "stall": stall, "go-on": go_on}
        with taking_orders(actions) as orders:
            result = guest.run(f"""
                {orders.shell}
                nbd-client {HOST} {server.port} /dev/nbd0 -N {VOLUME} -C {CONNECTIONS}
                mkfs.ext4 -q /dev/nbd0
                mount /dev/nbd0 /mnt
                dd if=/dev/urandom of=/tmp/piece bs=64k count=1
                write() {{ ( set +x
                  i=0
                  while [ ! -e /tmp/stop ]; do
                    i=$((i+1))
                    (echo $1.$i; cat /tmp/piece) |
                      dd of=/mnt/file$1.$i bs=128k iflag=fullblock conv=fsync 2>/dev/null ||
                        {{ touch /tmp/broken; exit 1; }}
                    echo $i > /tmp/written$1
                  done ) }}
                # Every writer has begun and ended a file after this was called.
                written() {{ ( set +x; for round in 1 2; do for one in $(seq {WRITERS}); do
                  rm -f /tmp/written$one
                  while [ ! -s /tmp/written$one ]; do [ ! -e /tmp/broken ]; usleep 10000; done
                done; done ) }}
                writers=
                for one in $(seq {WRITERS}); do write $one & writers="$writers $!"; done
                for name in kill start stall go-on; do
                  written
                  order $name
                done
                written
                touch /tmp/stop
                for one in $writers; do wait $one; done
                umount /mnt
                e2fsck -f -n /dev/nbd0
                mount -r /dev/nbd0 /mnt
                wrong=0
                set +x
                for one in $(seq {WRITERS}); do for i in $(seq $(cat /tmp/written$one)); do
                  (echo $one.$i; cat /tmp/piece) | cmp -s - /mnt/file$one.$i || wrong=$((wrong+1))
                done; done
                set -x
                result wrong $wrong
                result files $(ls /mnt | grep -c file)
                umount /mnt
                nbd-client -d /dev/nbd0
                dmesg | grep -iE 'i/o error|ext4-fs (error|warning)' && exit 1 || true
            """)
        server.stop()
    assert orders.done == ["kill", "start", "stall", "go-on"]
    assert result.value("wrong") == "0"
    assert int(result.value("files")) > 2 * WRITERS * len(orders.done)
    paths = [hosts[0].path, hosts[1].path, local]
    first, *others = trio.run(VolumeFiles(paths, VOLUME_MIB << 20).contents)
    assert others == [first, first]
