"""``lhblock mount-fuse``: every served volume as a file, whichever process serves it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lhblock.device import AttachOptions, Host, Target, attach, detach
from lhblock.rpc.generated import controller_pb2 as pb
from tests.fuse import require_fuse
from tests.live.files import PUNCH_HOLE, ZERO_RANGE, extents, fallocate, write_and_verify
from tests.live.mounting import mount_fuse, mounts_below
from tests.live.serving import MIB, Serve, cli, cli_json, nbdsh, requires, serve, tool
from tests.live.test_controller import controller
from tests.loop import require_loop_devices

pytestmark = [pytest.mark.live, pytest.mark.interop]

# 15 MiB and 3 blocks, so that the last read of a MiB is short.
SIZE = 15 * MIB + 3 * 4096
# The least that mkfs.xfs takes.
XFS_BYTES = 320 * MIB


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory below which nothing is mounted any more when the test is over."""
    require_fuse()
    requires("fusermount3")
    yield tmp_path / "mnt"
    for left in mounts_below(tmp_path):
        subprocess.run(["fusermount3", "-u", "-z", "-q", left], check=False)


@contextmanager
def served(tmp_path: Path, *volumes: str, size: int = SIZE) -> Iterator[Serve]:
    options = ["--size", str(size), "--no-tcp", "--socket", str(tmp_path / f"{volumes[0]}.nbd")]
    with serve(tmp_path / "data", *volumes, *options) as process:
        yield process


def write(file: Path, data: bytes) -> None:
    with file.open("r+b", buffering=0) as opened:
        assert opened.write(data) == len(data)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def test_volumes_of_all_processes_are_files(tmp_path: Path, place: Path) -> None:
    data = tmp_path / "data"
    with served(tmp_path, "db", "logs") as first, mount_fuse(data, place) as shown:
        assert [item["name"] for item in shown.ready["volumes"]] == ["db", "logs"]
        assert names(place) == ["db", "logs"]
        assert names(place / "db") == ["snapshots", "status.json", "volume"]
        content = random.Random(3).randbytes(SIZE)
        with shown.file("db").open("r+b") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(content).hexdigest()
        nbdsh(
            first.uri(),
            "import hashlib",
            f"assert hashlib.sha256(h.pread({SIZE}, 0)).hexdigest() == {digest!r}",
        )
        cli(data, "snapshot", "create", "db", "s1")
        nbdsh(first.uri(), "h.pwrite(b'new' * 1000, 5000)", "h.flush()")
        assert (place / "db" / "snapshots" / "s1").read_bytes() == content
        assert shown.file("db").read_bytes()[5000:8000] == b"new" * 1000
        assert json.loads((place / "db" / "status.json").read_text())["state"] == "healthy"
        assert str(shown.file("db")) in cli_json(data, "volume", "info", "db")["uris"]
        # One that is served later.
        with served(tmp_path, "web") as second:
            shown.wait("mounted", volume="web")
            assert names(place) == ["db", "logs", "web"]
            write(shown.file("web"), b"hello")
            nbdsh(second.uri("web"), "assert h.pread(5, 0) == b'hello'")
            assert second.stop()[0] == 0
            shown.wait("unmounted", volume="web")
            assert names(place) == ["db", "logs"]
        assert shown.stop() == 0
        assert list(place.iterdir()) == []
        assert mounts_below(tmp_path) == []
        assert cli_json(data, "volume", "info", "db")["uris"] == [first.uri()]


def test_holes_are_made_and_found(tmp_path: Path, place: Path) -> None:
    with served(tmp_path, "db"), mount_fuse(tmp_path / "data", place) as shown:
        (head,) = (tmp_path / "data").glob("volumes/db/**/volume-head-*.img")
        fd = os.open(shown.file("db"), os.O_RDWR)
        try:
            os.pwrite(fd, b"x" * 3 * MIB, MIB)
            os.fsync(fd)
            full = head.stat().st_blocks * 512
            fallocate(fd, PUNCH_HOLE, 2 * MIB, MIB)
            assert extents(fd) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
            assert head.stat().st_blocks * 512 == full - MIB
        finally:
            os.close(fd)


def test_a_process_that_is_killed_and_returns(tmp_path: Path, place: Path) -> None:
    with served(tmp_path, "db") as first, mount_fuse(tmp_path / "data", place) as shown:
        fd = os.open(shown.file("db"), os.O_RDWR)
        os.pwrite(fd, b"kept", 4096)
        os.fsync(fd)
        first.process.kill()
        shown.wait("unmounted", volume="db")
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.pread(fd, 4, 4096)
        with suppress(OSError):  # closing says it, too
            os.close(fd)
        assert names(place) == []
        with served(tmp_path, "db"):
            shown.wait("mounted", volume="db")
            assert shown.file("db").read_bytes()[4096:4100] == b"kept"


def test_a_killed_mount_fuse_leaves_no_mount_and_the_volume_served(
    tmp_path: Path, place: Path
) -> None:
    data = tmp_path / "data"
    with served(tmp_path, "db") as process:
        with mount_fuse(data, place) as shown:
            fd = os.open(shown.file("db"), os.O_RDWR)
            os.pwrite(fd, b"kept", 4096)
            keepers = children(shown.process.pid)
            shown.kill()
            # They unmount, and end.
            for keeper in keepers:
                wait_end(keeper)
        assert mounts_below(tmp_path) == []
        wait_failure(fd)
        with suppress(OSError):  # closing says it, too
            os.close(fd)
        nbdsh(process.uri(), "assert h.pread(4, 4096) == b'kept'")
        with mount_fuse(data, place) as shown:
            # The process may not have noticed at once that the first one is gone.
            if not shown.ready["volumes"]:
                shown.wait("mounted", volume="db")
            assert shown.file("db").read_bytes()[4096:4100] == b"kept"
        code, log = process.stop()
        assert code == 0, log
        assert "Traceback" not in log


def wait_failure(fd: int) -> None:
    """Read until the process has noticed that the mount has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.pread(fd, 4, 4096)
        except OSError:
            return
    raise AssertionError("it is still read")


def children(pid: int) -> list[int]:
    """pidfds of the children of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    text = " ".join((thread / "children").read_text() for thread in threads)
    found = [os.pidfd_open(int(word)) for word in text.split()]
    assert found
    return found


def wait_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_an_unmount_by_somebody_else_is_undone(tmp_path: Path, place: Path) -> None:
    with served(tmp_path, "db") as process, mount_fuse(tmp_path / "data", place) as shown:
        shown.wait("mounted", volume="db")
        (mounted,) = mounts_below(place)
        tool("fusermount3", "-u", mounted)
        shown.wait("mounted", volume="db")
        assert shown.file("db").stat().st_size == SIZE
        assert process.process.poll() is None


def test_what_is_mounted_already_is_linked_to(tmp_path: Path, place: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    with (
        served(tmp_path, "db"),
        mount_fuse(data, other) as first,
        mount_fuse(data, place) as second,
    ):
        assert second.wait("mounted elsewhere")["directory"].startswith(str(other))
        assert second.file("db").stat().st_size == SIZE
        first.stop()
        # Now it is this one's turn.
        second.wait("unmounted", volume="db")
        second.wait("mounted", volume="db")
        assert len(mounts_below(place)) == 1
        assert second.file("db").stat().st_size == SIZE
    own = tmp_path / "own"
    arguments = ("db", "--frontend", "fuse", "--fuse-dir", str(own))
    with serve(data, *arguments), mount_fuse(data, place) as shown:
        assert mounts_below(place) == []
        assert shown.file("db").resolve() == own / "db" / "volume"


def test_a_controllers_volume_comes_and_goes(tmp_path: Path, place: Path) -> None:
    data, replica = tmp_path / "data", tmp_path / "replica"
    options = ("--size", "16M", "--frontend", "nbd", "--replica", str(replica))
    with controller(data, *options) as engine, mount_fuse(data, place) as shown:
        write(shown.file("db"), b"kept")
        engine.call("VolumeShutdown")
        shown.wait("unmounted", volume="db")
        engine.call("VolumeStart", pb.VolumeStartRequest(replicaAddresses=[str(replica)]))
        shown.wait("mounted", volume="db")
        assert shown.file("db").read_bytes()[:4] == b"kept"


def test_a_door_of_the_process_comes_first(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires("tgtd")
    monkeypatch.setenv("LHBLOCK_ISCSI_BACKING", "fuse")
    data, replica = tmp_path / "data", tmp_path / "replica"
    options = ("--size", "16M", "--frontend", "nbd", "--replica", str(replica))
    listen = ("--iscsi-listen", "127.0.0.1:0")
    with controller(data, *options, *listen) as engine, mount_fuse(data, place) as shown:
        assert len(mounts_below(place)) == 1
        engine.call("VolumeFrontendShutdown")
        shown.wait("unmounted", volume="db")
        # tgtd's files need the one session that there is.
        engine.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="tgt-iscsi"))
        shown.wait("mounted", volume="db")
        assert mounts_below(place) == []
        assert shown.file("db").resolve().is_relative_to(data / "run")
        engine.call("VolumeFrontendShutdown")
        shown.wait("unmounted", volume="db")
        engine.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="nbd"))
        shown.wait("mounted", volume="db")
        assert len(mounts_below(place)) == 1
        assert shown.file("db").stat().st_size == 16 * MIB


@pytest.mark.parametrize("end", ["kill", "stop", "unmount"])
def test_a_mount_that_ends_under_load_leaves_the_volume_served(
    tmp_path: Path, place: Path, end: str
) -> None:
    with served(tmp_path, "db") as process:
        with mount_fuse(tmp_path / "data", place) as shown:
            load = subprocess.Popen(
                [
                    *(requires("fio"), "--name=job", f"--filename={shown.file('db')}"),
                    *("--ioengine=libaio", "--direct=1", "--rw=randrw", "--bsrange=4k-256k"),
                    *("--iodepth=16", "--time_based", "--runtime=60", f"--size={15 * MIB}"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_writes(tmp_path / "data", 100)
            if end == "kill":
                shown.kill()
            elif end == "stop":
                assert shown.stop() == 0
            else:
                # Whoever has it open goes on until mount-fuse ends.
                tool("fusermount3", "-u", "-z", mounts_below(place)[0])
                shown.kill()
            assert load.wait(60) != 0
        nbdsh(process.uri(), "h.pwrite(b'kept', 4096)", "assert h.pread(4, 4096) == b'kept'")
        code, log = process.stop()
        assert code == 0, log
        assert "Traceback" not in log
        assert '"error"' not in log


def wait_writes(data: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while cli_json(data, "volume", "info", "db")["statistics"]["writes"] < count:
        assert time.monotonic() < deadline


def test_directories_that_cannot_be_mounted_in(tmp_path: Path, place: Path) -> None:
    data = tmp_path / "data"
    place.mkdir()
    (place / "file").touch()
    refused = cli(data, "mount-fuse", str(place), status=1)
    assert "file is in it" in refused.stderr
    (place / "file").unlink()
    with mount_fuse(data, place):
        assert "does already" in cli(data, "mount-fuse", str(place), status=1).stderr
    (tmp_path / "plain").touch()
    refused = cli(data, "mount-fuse", str(tmp_path / "plain"), status=1)
    assert "not a directory" in refused.stderr


def test_what_a_killed_one_left_is_removed(tmp_path: Path, place: Path) -> None:
    place.mkdir()
    (place / ".serve-1").mkdir()
    (place / ".serve-2").symlink_to(tmp_path)
    (place / "db").symlink_to(".serve-1/db")
    with mount_fuse(tmp_path / "data", place):
        assert list(place.iterdir()) == []


def test_strangers_at_the_socket_change_nothing(tmp_path: Path, place: Path) -> None:
    data = tmp_path / "data"
    with served(tmp_path, "db") as process:
        (path,) = data.glob("run/serve-*.fuse")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for message in (
            b"garbage",
            b"[]",
            b"{}",
            b"[" * 100_000,
            b'{"directory": "/", "shown": 1}',
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(path))
                assert json.loads(sock.recv(1000)) == {"state": "free"}
                sock.send(message)
                assert sock.recv(1000) == b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            assert json.loads(sock.recv(1000)) == {"state": "free"}
            handover = json.dumps({"directory": "/x", "shown": "/x"}).encode()
            with Path("/dev/null").open("rb") as null:
                socket.send_fds(sock, [handover], [null.fileno()])
            assert sock.recv(1000) == b""
        with mount_fuse(data, place) as shown:
            assert shown.file("db").stat().st_size == SIZE
        code, log = process.stop()
        assert code == 0, log
        assert "not /dev/fuse" in log
    assert not path.exists()


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    device = tool("losetup", "--find", "--show", "--direct-io=on", str(file)).stdout.strip()
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)


@pytest.mark.parametrize(
    ("mkfs", "check"),
    [
        (("mkfs.ext4", "-q", "-F", "-E", "nodiscard"), ("e2fsck", "-f", "-n")),
        (("mkfs.xfs", "-q", "-f", "-K"), ("xfs_repair", "-n")),
    ],
    ids=["ext4", "xfs"],
)
def test_a_loop_device_carries_a_file_system_that_is_trimmed(
    tmp_path: Path, place: Path, mkfs: tuple[str, ...], check: tuple[str, ...]
) -> None:
    require_loop_devices()
    there = tmp_path / "fs"
    there.mkdir()
    with served(tmp_path, "db", size=XFS_BYTES), mount_fuse(tmp_path / "data", place) as shown:
        (head,) = (tmp_path / "data").glob("volumes/db/**/volume-head-*.img")
        with loop_device(shown.file("db")) as device:
            tool(*mkfs, device)
            tool("mount", device, str(there))
            try:
                (there / "file").write_bytes(os.urandom(64 * MIB))
                os.sync()
                full = head.stat().st_blocks * 512
                assert full > 64 * MIB
                (there / "file").unlink()
            finally:
                tool("umount", str(there))
            # What the journal may still need is not trimmed, and xfs frees in the background.
            tool("mount", device, str(there))
            try:
                tool("fstrim", str(there))
                assert head.stat().st_blocks * 512 < full - 60 * MIB
            finally:
                tool("umount", str(there))
            tool(*check, device)


def test_random_operations_on_a_loop_device_agree_with_a_model(tmp_path: Path, place: Path) -> None:
    require_loop_devices()
    chance = random.Random(51)
    size = 8 * MIB
    model = bytearray(size)
    with (
        served(tmp_path, "db", size=size) as process,
        mount_fuse(tmp_path / "data", place) as shown,
    ):
        with loop_device(shown.file("db")) as device:
            fd = os.open(device, os.O_RDWR)
            try:
                for _ in range(600):
                    offset = chance.randrange(size)
                    length = min(chance.choice([1, 512, 4096, 70000, 300_000]), size - offset)
                    kind = chance.random()
                    if kind < 0.2:
                        # A device discards and zeroes whole sectors.
                        offset, length = offset & ~511, max(length & ~511, 512)
                        length = min(length, size - offset)
                        fallocate(fd, PUNCH_HOLE if kind < 0.1 else ZERO_RANGE, offset, length)
                        model[offset : offset + length] = bytes(length)
                    elif kind < 0.6:
                        data = chance.randbytes(length)
                        assert os.pwrite(fd, data, offset) == length
                        model[offset : offset + length] = data
                    elif kind < 0.97:
                        assert os.pread(fd, length, offset) == model[offset : offset + length]
                    else:
                        os.fsync(fd)
                        # Not what the page cache of the device has.
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.fsync(fd)
            finally:
                os.close(fd)
        assert shown.file("db").read_bytes() == model
        (tmp_path / "model").write_bytes(model)
        tool(
            "qemu-img", "compare", "-f", "raw", "-F", "raw", process.uri(), str(tmp_path / "model")
        )


def test_fio_verifies_what_it_wrote_with_many_requests_in_flight(
    tmp_path: Path, place: Path
) -> None:
    with served(tmp_path, "db"), mount_fuse(tmp_path / "data", place) as shown:
        write_and_verify(shown.file("db"), 15 * MIB)


def test_a_volume_is_attached_through_its_file(tmp_path: Path, place: Path) -> None:
    require_loop_devices()
    data, host = tmp_path / "data", Host(run=tmp_path / "run")
    with served(tmp_path, "db", size=16 * MIB), mount_fuse(data, place):
        target = Target.of_volume(str(data), "db", cli_json(data, "volume", "info", "db")["uris"])
        found = attach(host, target, AttachOptions(), "fuse")
        assert (found.kind, found.size_bytes, found.made) == ("fuse", 16 * MIB, True)
        assert not attach(host, target, AttachOptions(), "fuse").made
        detach(host, identity=target.identity)
