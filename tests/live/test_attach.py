"""``lhblock attach`` against real servers, up to where the kernel would take over."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lhblock.device import Attached, Host, Target, check_wishes, make
from lhblock.device._filesystem import signatures
from lhblock.device._nbd import check_size, say_hello
from lhblock.device._nbd_client import data_extents, open_export
from lhblock.errors import DeviceError, FrontendError, NotBlank
from lhblock.frontend.nbd import NbdUri
from tests.activation import activated, listen_unix
from tests.live.serving import MIB, cli, nbdsh, requires, serve

pytestmark = pytest.mark.live

SIZE_MIB = 16
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A volume with a MiB of data at 4 MiB and zeros that were written at 8 MiB."""
    with serve(tmp_path_factory.mktemp("d"), "db", "--size", f"{SIZE_MIB}M") as process:
        nbdsh(
            process.uri(),
            "h.pwrite(b'x' * (1 << 20), 4 << 20)",
            "h.pwrite(bytes(1 << 20), 8 << 20)",
        )
        yield process.uri()


@contextmanager
def answering(answer: bytes) -> Iterator[NbdUri]:
    """A server that says one thing and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            # A client that gives up leaves what it has not read, which resets the connection.
            with connection, suppress(OSError):
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        yield NbdUri(export="db", host="127.0.0.1", port=listener.getsockname()[1])
        thread.join()


def image(path: Path) -> Attached:
    """A file in the place of a device: mkfs and blkid know no difference."""
    path.touch()
    os.truncate(path, SIZE_MIB * MIB)
    return Attached(path, "nbd", "", SIZE_MIB * MIB)


def test_an_export_is_opened_for_the_kernel(uri: str) -> None:
    sock, export = open_export(Target.of_uri(uri).uri, timeout_s=TIMEOUT_S)
    with sock:
        assert export.size_bytes == SIZE_MIB * MIB
        assert sock.gettimeout() is None


def test_the_map_has_the_data_and_not_the_holes(uri: str) -> None:
    extents = list(data_extents(Target.of_uri(uri).uri, timeout_s=TIMEOUT_S))
    assert (4 * MIB, MIB) in extents
    assert all(not (offset < 4 * MIB or offset >= 9 * MIB) for offset, _ in extents)


def test_a_server_without_a_map_has_data_everywhere(tmp_path: Path) -> None:
    requires("nbdkit")
    path = tmp_path / "n.sock"
    with listen_unix(path) as listener:
        command = ["nbdkit", "--foreground", "--no-sr", "memory", "1M"]
        with activated(command, listener, tmp_path / "nbdkit.log"):
            uri = NbdUri(export="", socket_path=str(path))
            assert list(data_extents(uri, timeout_s=TIMEOUT_S)) == [(0, MIB)]


def test_an_export_that_is_refused_says_so(uri: str) -> None:
    wrong = Target.of_uri(uri.replace("/db?", "/no?"))
    with pytest.raises(DeviceError, match="the server refuses export 'no'"):
        say_hello(wrong)


def test_nobody_there_says_so(tmp_path: Path) -> None:
    nobody = Target.of_uri(f"nbd+unix:///db?socket={tmp_path}/none.sock")
    with pytest.raises(DeviceError, match=r"cannot connect to .*is it served\?"):
        say_hello(nobody)


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", b"NBDMAGICIHAVEOPT\0\0", b"NBDMAGIC"]
)
def test_a_stranger_is_no_server(answer: bytes) -> None:
    with answering(answer) as uri, pytest.raises(FrontendError):
        open_export(uri, timeout_s=TIMEOUT_S)


def test_another_volume_behind_the_same_address_is_refused(uri: str) -> None:
    with pytest.raises(DeviceError, match="another volume is served there"):
        check_size(Target.of_uri(uri), 8 * MIB, 4 * MIB)


def test_a_file_system_is_made_once_and_only_where_nothing_is(uri: str, tmp_path: Path) -> None:
    target = Target.of_uri(uri)
    device = image(tmp_path / "blank")
    assert make(Host(), device, target, "ext4")
    assert signatures(Host(), device.device)["TYPE"] == "ext4"
    assert not make(Host(), device, target, "ext4")
    before = device.device.read_bytes()
    with pytest.raises(NotBlank, match="holds ext4; nothing was formatted"):
        make(Host(), device, target, "xfs")
    assert device.device.read_bytes() == before


def test_data_without_a_signature_is_not_blank(uri: str, tmp_path: Path) -> None:
    device = image(tmp_path / "data")
    with device.device.open("r+b") as file:
        file.seek(4 * MIB + 5000)
        file.write(b"x")
    before = device.device.read_bytes()
    with pytest.raises(NotBlank, match=f"holds data at byte {4 * MIB}"):
        make(Host(), device, Target.of_uri(uri), "ext4")
    assert device.device.read_bytes() == before


def test_wishes_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no such directory"):
        check_wishes(Host(), kind=None, place=tmp_path / "none")
    with pytest.raises(DeviceError, match=r"mkfs\.xfs is not installed.*apt install xfsprogs"):
        check_wishes(Host(search_path=""), kind="xfs", place=None)


def test_a_volume_that_is_not_served_is_not_attached(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "db", "--size", "4M")
    assert "start it: lhblock serve db" in cli(data, "attach", "db", status=1).stderr
    assert "there is none" in cli(data, "attach", "web", status=1).stderr
    assert "db is not attached" in cli(data, "detach", "db", status=1).stderr
    said = cli(data, "attach", "db", "--mkfs", "ext4", "--read-only", status=2).stderr
    assert "--read-only forbids it" in said
    cli(data, "attach", "nbd+unix:///db", status=2)
