"""The guest itself, against a server known to be good: a failure here is not lhblock's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.activation import activated, listen_tcp
from tests.kernel.guest import HOST, Guest, GuestFailed

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


def test_guest_makes_and_checks_a_file_system_on_a_foreign_server(
    guest: Guest, tmp_path: Path
) -> None:
    with listen_tcp() as listener:
        port = listener.getsockname()[1]
        command = ["nbdkit", "--foreground", "memory", "64M"]
        with activated(command, listener, tmp_path / "nbdkit.log"):
            result = guest.run(f"""
                nbd-client {HOST} {port} /dev/nbd0 -N any
                result bytes $(blockdev --getsize64 /dev/nbd0)
                mkfs.ext4 -q /dev/nbd0
                mount /dev/nbd0 /mnt
                echo hello > /mnt/file
                umount /mnt
                e2fsck -f -n /dev/nbd0
                nbd-client -d /dev/nbd0
            """)
    assert result.values == {"bytes": str(64 << 20)}


def test_guest_failure_shows_the_console(guest: Guest) -> None:
    with pytest.raises(GuestFailed, match=r"status 3; console:(.|\n)*the last words"):
        guest.run("echo the last words; exit 3")
