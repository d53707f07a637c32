"""The FUSE front end, mounted: files of volumes and snapshots, loop devices, fio, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lhblock.device import (
    AttachOptions,
    Host,
    Target,
    attach,
    attached_devices,
    detach,
    make,
    mount,
)
from lhblock.errors import DeviceBusy, DeviceForeign, NotAttached
from tests.fuse import require_fuse
from tests.live.files import PUNCH_HOLE, ZERO_RANGE, extents, fallocate, write_and_verify
from tests.live.serving import MIB, Serve, cli, cli_json, nbdsh, requires, serve, tool
from tests.loop import require_loop_devices

pytestmark = [pytest.mark.live, pytest.mark.interop]

# 15 MiB and 3 blocks, so that the last read of a MiB is short.
SIZE = 15 * MIB + 3 * 4096


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A directory that is not mounted any more when the test is over."""
    require_fuse()
    requires("fusermount3")
    directory = tmp_path / "mnt"
    yield directory
    subprocess.run(["fusermount3", "-u", "-z", "-q", directory], check=False)


@contextmanager
def mounted(tmp_path: Path, mountpoint: Path, *options: str, size: int = SIZE) -> Iterator[Serve]:
    arguments = ("db", "--size", str(size), "--frontend", "nbd", "--frontend", "fuse")
    with serve(tmp_path / "data", *arguments, "--fuse-dir", str(mountpoint), *options) as served:
        yield served


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_tree_shows_the_volume_its_state_and_its_snapshots(
    tmp_path: Path, mountpoint: Path
) -> None:
    with mounted(tmp_path, mountpoint) as served:
        volume = mountpoint / "db" / "volume"
        assert served.ready["volumes"][0]["file"] == str(volume)
        assert names(mountpoint) == ["db"]
        assert names(mountpoint / "db") == ["snapshots", "status.json", "volume"]
        assert volume.stat().st_size == SIZE
        with volume.open("r+b", buffering=0) as file:
            file.write(b"old" * 5000)
            cli(served.data_dir, "snapshot", "create", "db", "s1")
            file.seek(0)
            file.write(b"new" * 5000)
        snapshot = mountpoint / "db" / "snapshots" / "s1"
        assert snapshot.stat().st_size == SIZE
        assert snapshot.read_bytes() == (b"old" * 5000).ljust(SIZE, b"\0")
        assert volume.read_bytes() == (b"new" * 5000).ljust(SIZE, b"\0")
        status = json.loads((mountpoint / "db" / "status.json").read_text())
        assert status["state"] == "healthy"
        assert [item["name"] for item in status["snapshots"]] == ["s1"]
        code, log = served.stop()
        assert code == 0, log
    assert not mountpoint.is_mount()
    assert names(mountpoint) == []


def test_what_cannot_be_done_says_so(tmp_path: Path, mountpoint: Path) -> None:
    with mounted(tmp_path, mountpoint) as served:
        volume = mountpoint / "db" / "volume"
        cli(served.data_dir, "snapshot", "create", "db", "s1")
        with pytest.raises(OSError, match="Read-only"):
            (mountpoint / "db" / "snapshots" / "s1").open("r+b")
        with pytest.raises(PermissionError):
            os.truncate(volume, 4096)
        with pytest.raises(FileNotFoundError):
            (mountpoint / "other" / "volume").open("rb")
        with volume.open("r+b", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                os.pwrite(file.fileno(), b"x", SIZE)
            assert os.pwrite(file.fileno(), b"xy", SIZE - 1) == 1
            assert os.pread(file.fileno(), 10, SIZE - 1) == b"x"
            # The content is not replaced under somebody who has it open.
            refused = cli(served.data_dir, "snapshot", "revert", "db", "s1", status=1)
            assert "file is open" in refused.stderr
        cli(served.data_dir, "snapshot", "revert", "db", "s1")
        cli(served.data_dir, "volume", "expand", "db", "32M")
        assert volume.stat().st_size == 32 * MIB


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_random_operations_agree_with_a_model(tmp_path: Path, mountpoint: Path, cache: str) -> None:
    chance = random.Random(41)
    model = bytearray(SIZE)
    with mounted(tmp_path, mountpoint, "--cache", cache):
        fd = os.open(mountpoint / "db" / "volume", os.O_RDWR)
        try:
            for _ in range(400):
                offset = chance.randrange(SIZE)
                length = min(chance.choice([1, 512, 4096, 70000, MIB]), SIZE - offset)
                if chance.random() < 0.5:
                    offset -= offset % 4096
                kind = chance.random()
                if kind < 0.2:
                    fallocate(fd, PUNCH_HOLE if kind < 0.1 else ZERO_RANGE, offset, length)
                    model[offset : offset + length] = bytes(length)
                elif kind < 0.6:
                    data = chance.randbytes(length)
                    assert os.pwrite(fd, data, offset) == length
                    model[offset : offset + length] = data
                else:
                    assert os.pread(fd, length, offset) == model[offset : offset + length]
            os.fsync(fd)
        finally:
            os.close(fd)
        assert (mountpoint / "db" / "volume").read_bytes() == model


def test_holes_are_made_and_found(tmp_path: Path, mountpoint: Path) -> None:
    with mounted(tmp_path, mountpoint) as served:
        fd = os.open(mountpoint / "db" / "volume", os.O_RDWR)
        try:
            os.pwrite(fd, b"x" * 3 * MIB, MIB)
            cli(served.data_dir, "snapshot", "create", "db", "s1")
            fallocate(fd, PUNCH_HOLE, 2 * MIB, MIB)
            assert extents(fd) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
            with pytest.raises(OSError, match="not supported"):
                fallocate(fd, 0, 0, MIB)
        finally:
            os.close(fd)
        fd = os.open(mountpoint / "db" / "snapshots" / "s1", os.O_RDONLY)
        try:
            assert extents(fd) == [(MIB, 4 * MIB)]
        finally:
            os.close(fd)
        fd = os.open(mountpoint / "db" / "status.json", os.O_RDONLY)
        try:
            with suppress(OSError):
                os.lseek(fd, 0, os.SEEK_HOLE)
        finally:
            os.close(fd)
        # What one file cannot do is not switched off for the others.
        copy = tmp_path / "copy"
        tool("cp", "--sparse=auto", str(mountpoint / "db" / "volume"), str(copy))
        assert copy.read_bytes() == (mountpoint / "db" / "volume").read_bytes()


def test_a_trimmed_file_system_gives_space_back(tmp_path: Path, mountpoint: Path) -> None:
    require_loop_devices()
    place = tmp_path / "fs"
    place.mkdir()
    with mounted(tmp_path, mountpoint, size=128 * MIB) as served:
        volume = mountpoint / "db" / "volume"
        (head,) = served.data_dir.glob("volumes/db/**/volume-head-*.img")
        device = tool("losetup", "--find", "--show", "--direct-io=on", str(volume)).stdout.strip()
        try:
            tool("mkfs.ext4", "-q", device)
            tool("mount", device, str(place))
            try:
                (place / "file").write_bytes(os.urandom(64 * MIB))
                os.sync()
                full = head.stat().st_blocks * 512
                assert full > 64 * MIB
                (place / "file").unlink()
                os.sync()  # what the journal may still need is not trimmed
                tool("fstrim", str(place))
                assert head.stat().st_blocks * 512 < full - 60 * MIB
            finally:
                tool("umount", str(place))
            tool("e2fsck", "-f", "-n", device)
        finally:
            tool("losetup", "--detach", device)


def test_fio_verifies_what_it_wrote_with_many_requests_in_flight(
    tmp_path: Path, mountpoint: Path
) -> None:
    with mounted(tmp_path, mountpoint):
        write_and_verify(mountpoint / "db" / "volume", 15 * MIB)


def test_a_killed_server_leaves_no_mount_and_what_was_flushed(
    tmp_path: Path, mountpoint: Path
) -> None:
    with mounted(tmp_path, mountpoint) as served:
        fd = os.open(mountpoint / "db" / "volume", os.O_RDWR)
        os.pwrite(fd, b"kept", 4096)
        os.fsync(fd)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.pread(fd, 4, 4096)
        with suppress(OSError):  # closing says it too
            os.close(fd)
    with mounted(tmp_path, mountpoint):
        assert (mountpoint / "db" / "volume").read_bytes()[4096:4100] == b"kept"


def test_an_unmount_by_somebody_else_is_survived(tmp_path: Path, mountpoint: Path) -> None:
    with mounted(tmp_path, mountpoint) as served:
        fd = os.open(mountpoint / "db" / "volume", os.O_RDWR)
        try:
            tool("fusermount3", "-u", "-z", str(mountpoint))
            # Whoever has it open goes on until the end.
            assert os.pwrite(fd, b"kept", 4096) == 4
        finally:
            os.close(fd)
        nbdsh(served.uri(), "assert h.pread(4, 4096) == b'kept'")
        code, log = served.stop()
        assert code == 0, log
        assert "unmounted by somebody else" in log
    assert not mountpoint.is_mount()


def test_a_loop_device_carries_a_file_system(tmp_path: Path, mountpoint: Path) -> None:
    require_loop_devices()
    size = 320 * MIB  # the least that mkfs.xfs takes
    with mounted(tmp_path, mountpoint, size=size) as served:
        volume = mountpoint / "db" / "volume"
        device = tool("losetup", "--find", "--show", "--direct-io=on", str(volume)).stdout.strip()
        try:
            for mkfs, check in (
                (("mkfs.ext4", "-q", "-F"), ("e2fsck", "-f", "-n")),
                (("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n")),
            ):
                tool(*mkfs, device)
                tool(*check, device)
        finally:
            tool("losetup", "--detach", device)
        code, log = served.stop()
        assert code == 0, log


def test_a_volume_is_attached_through_its_file(tmp_path: Path, mountpoint: Path) -> None:
    require_loop_devices()
    host = Host(run=tmp_path / "run")
    data, place = tmp_path / "data", tmp_path / "fs"
    place.mkdir()
    with mounted(tmp_path, mountpoint, size=64 * MIB):
        file = mountpoint / "db" / "volume"
        target = Target.of_volume(str(data), "db", [str(file)])
        found = attach(host, target, AttachOptions(), "fuse")
        try:
            assert (found.kind, found.size_bytes, found.made) == ("fuse", 64 * MIB, True)
            assert make(host, found, target, "ext4")
            assert not make(host, found, target, "ext4")
            mount(host, found, place)
            (place / "file").write_bytes(b"x" * 100_000)
            with pytest.raises(DeviceBusy, match="mounted at"):
                detach(host, identity=target.identity)
        finally:
            subprocess.run(["umount", place], check=False)
        tool("e2fsck", "-f", "-n", str(found.device))
        cli(data, "volume", "expand", "db", "96M")
        again = attach(host, target, AttachOptions())
        assert (again.device, again.size_bytes, again.made) == (found.device, 96 * MIB, False)
        assert detach(host, device=found.device).identity == target.identity
        with pytest.raises(NotAttached):
            detach(host, identity=target.identity)
        foreign = tool("losetup", "--find", "--show", str(file)).stdout.strip()
        try:
            with pytest.raises(DeviceBusy, match="did not make it"):
                attach(host, target, AttachOptions(), "fuse")
            with pytest.raises(DeviceForeign):
                detach(host, device=Path(foreign))
        finally:
            tool("losetup", "--detach", foreign)
        attach(host, target, AttachOptions(), "fuse")
    # The server is gone and its device is left; a new one takes its place.
    with mounted(tmp_path, mountpoint):
        found = attach(host, target, AttachOptions(read_only=True), "fuse")
        assert found.made
        with found.device.open("rb") as device:
            assert device.read(4096 << 4)[1080:1082] == b"\x53\xef"
        read_only = Path("/sys/block", found.device.name, "ro").read_text()
        assert read_only.strip() == "1"
        detach(host, identity=target.identity)
    assert attached_devices(host) == []


def test_directories_that_cannot_be_mounted_on(tmp_path: Path, mountpoint: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    options = ("serve", "db", "--size", "1M", "--no-tcp", "--frontend", "fuse")
    data = tmp_path / "data"
    refused = cli(data, *options, "--fuse-dir", str(tmp_path / "full"), status=1)
    assert "not empty" in refused.stderr
    assert "needs --fuse-dir" in cli(data, *options, status=2).stderr
    # Nothing half-made is left behind.
    assert cli_json(data, "volume", "ls")["volumes"] == []
    with mounted(tmp_path, mountpoint):
        second = ("serve", "db2", *options[2:])
        refused = cli(data, *second, "--fuse-dir", str(mountpoint), status=1)
        assert "mounted there already" in refused.stderr
