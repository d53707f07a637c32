"""The iSCSI front end, driven by libiscsi's tools and qemu: names, data, CHAP, kills, sizes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lhblock.frontend.tgt import choose_backing
from tests.live.serving import (
    MIB,
    TIMEOUT_S,
    Serve,
    ToolFailed,
    cli,
    nbdsh,
    requires,
    serve,
    start,
    tool,
)
from tests.live.tgt import PlainTgtd, conformance_failures, tgtd_pid, unit_uri

pytestmark = [pytest.mark.live, pytest.mark.interop]

SIZE = 64 * MIB
BACKINGS = ["module", "fuse"]
SECRET = "correct.horse.battery"


@contextmanager
def iscsi(
    tmp_path: Path, *options: str, volumes: tuple[str, ...] = ("db",), **how: Any
) -> Iterator[Serve]:
    arguments = (*volumes, "--size", str(SIZE), "--frontend", "nbd", "--frontend", "tgt-iscsi")
    portal = () if "--iscsi-listen" in options else ("--iscsi-listen", "127.0.0.1:0")
    with serve(tmp_path / "data", *arguments, *portal, *options, **how) as served:
        yield served


def qemu_io(uri: str, *commands: str) -> str:
    words = [word for each in commands for word in ("-c", each)]
    done = tool("qemu-io", "-f", "raw", *words, uri)
    if "error" in done.stderr or "failed" in done.stdout.lower():
        raise ToolFailed(done.stdout + done.stderr)
    return done.stdout


def wait_written(served: Serve, offset: int) -> None:
    """Wait until a client has written the first MiB after `offset` at least in part."""
    look = f"while not any(h.pread(1 << 20, {offset})): time.sleep(0.02)"
    nbdsh(served.uri(), "import time", look)


@pytest.mark.parametrize("backing", BACKINGS)
def test_what_initiators_write_is_in_the_volume(tmp_path: Path, backing: str) -> None:
    with iscsi(tmp_path, "--iscsi-backing", backing, volumes=("db", "web_1")) as served:
        # Two volumes: a target for each, and what goes to one does not show in the other.
        listed = tool("iscsi-ls", "-s", f"iscsi://{served.ready['portal']}").stdout
        assert set(re.findall(r"Target:(\S+)", listed)) == {
            "iqn.2019-10.io.longhorn:web:1",
            "iqn.2019-10.io.longhorn:db",
        }
        assert listed.count("DIRECT_ACCESS (Size:63M)") == 2
        qemu_io(unit_uri(served), "write -P 7 0 96k", "write -P 8 1M 2560", "flush")
        qemu_io(unit_uri(served, "web_1"), "write -P 9 512 512", "write -f -P 9 1k 512")
        parts = "h.pread(98304, 0), h.pread(2560, 1 << 20), h.pread(512, (1 << 20) + 2560)"
        assert nbdsh(served.uri(), f"print([set(part) for part in ({parts})])") == (
            "[{7}, {8}, {0}]\n"
        )
        assert nbdsh(served.uri("web_1"), "print(set(h.pread(1024, 512)))") == "{9}\n"
        code, log = served.stop()
        assert code == 0, log
    assert list((tmp_path / "data" / "run").glob("tgt-*")) == []


def test_discards_are_zeros_and_give_space_back(tmp_path: Path) -> None:
    with iscsi(tmp_path, "--iscsi-backing", "module") as served:
        uri = unit_uri(served)
        # 3 blocks of 512 more than 1 MiB on both sides of what is discarded.
        qemu_io(uri, "write -P 5 0 4M", "discard 1538k 1M", "write -z 3M 3k")
        assert "verification" not in qemu_io(
            uri, "read -P 5 0 1538k", "read -P 0 1538k 1M", "read -P 0 3M 3k", "read -P 5 3075k 5k"
        )
        extents = (
            "e = []; h.block_status(4 << 20, 0, lambda c, o, d, err: e.extend(d));"
            "print(sum(e[i] for i in range(0, len(e), 2) if e[i + 1] == 0))"
        )
        allocated = tool(
            "nbdsh", "--base-allocation", "-u", served.uri(), "-c", extents
        ).stdout.strip()
        # Whole blocks of 4096 inside the MiB are free; the two at its ends are not.
        assert int(allocated) == 4 * MIB - (MIB - 4096)


@pytest.mark.parametrize(("size", "exponent"), [("512", 3), ("4096", 0)])
def test_the_unit_says_what_is_true(tmp_path: Path, size: str, exponent: int) -> None:
    serials = []
    for _ in range(2):
        with iscsi(tmp_path, "--iscsi-backing", "module", "--iscsi-block-size", size) as served:
            uri = unit_uri(served)
            capacity = tool("iscsi-readcapacity16", uri).stdout
            assert f"LOGICAL BLOCK LENGTH IN BYTES:{size}" in capacity
            assert f"LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT:{exponent}" in capacity
            assert "LBPME:1 LBPRZ:1" in capacity
            assert f"Total size:{SIZE}" in capacity
            assert "Vendor:LHBLOCK" in tool("iscsi-inq", uri).stdout
            limits = tool("iscsi-inq", "-e", "1", "-c", str(0xB0), uri).stdout
            assert f"optimal unmap granularity:{4096 // int(size)}\n" in limits
            serials.append(tool("iscsi-inq", "-e", "1", "-c", str(0x80), uri).stdout)
    assert serials[0] == serials[1]
    assert re.search(r"[0-9a-f]{32}", serials[0])


def test_several_volumes_as_units_of_one_target(tmp_path: Path) -> None:
    volumes = ("db", "logs")
    with iscsi(tmp_path, "--iscsi-target", "all", volumes=volumes) as served:
        assert unit_uri(served, "db").endswith("/iqn.2019-10.io.longhorn:all/1")
        assert unit_uri(served, "logs").endswith("/iqn.2019-10.io.longhorn:all/2")
        qemu_io(unit_uri(served, "logs"), "write -P 3 0 4k")
        assert nbdsh(served.uri("logs"), "print(set(h.pread(4096, 0)))") == "{3}\n"


def test_chap_lets_in_who_knows_the_secret_which_nobody_sees(tmp_path: Path) -> None:
    secrets = tmp_path / "chap"
    secrets.write_text(f"# of the storage network\nalice {SECRET}\n")
    secrets.chmod(0o600)
    with iscsi(tmp_path, "--iscsi-chap", str(secrets)) as served:
        qemu_io(unit_uri(served, user=f"alice%{SECRET}@"), "write 0 4k")
        for user in ("", "alice%wrong.horse.battery@", f"bob%{SECRET}@"):
            with pytest.raises(ToolFailed):
                qemu_io(unit_uri(served, user=user), "write 0 4k")
        for pid in (served.process.pid, tgtd_pid(served)):
            assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        code, log = served.stop()
    assert code == 0
    assert SECRET not in log
    secrets.chmod(0o640)
    failed = start(tmp_path / "data", "db", "--frontend", "tgt-iscsi", "--iscsi-chap", str(secrets))
    _, words = failed.communicate(timeout=TIMEOUT_S)
    assert failed.returncode == 2
    assert f"chmod 600 {secrets}" in words


def test_only_initiators_of_the_list_are_let_in(tmp_path: Path) -> None:
    allowed = "iqn.2026-01.org.example:host-1"
    with iscsi(tmp_path, "--iscsi-allow", allowed, "--iscsi-allow", "10.1.2.0/24") as served:
        uri = unit_uri(served)
        tool("iscsi-inq", "-i", allowed, uri)
        with pytest.raises(ToolFailed):
            tool("iscsi-inq", "-i", f"{allowed}0", uri)
    with iscsi(tmp_path, "--iscsi-allow", "127.0.0.0/8") as served:
        tool("iscsi-inq", "-i", f"{allowed}0", unit_uri(served))


@pytest.mark.parametrize("backing", BACKINGS)
def test_tgtd_is_killed_again_and_again_and_no_write_is_lost(tmp_path: Path, backing: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(4).randbytes(SIZE))
    with iscsi(tmp_path, "--iscsi-backing", backing) as served:
        # libiscsi logs in again by itself and sends again what had no answer.
        copying = subprocess.Popen(
            [
                *(requires("qemu-img"), "convert", "-n", "-r", "16M", "-f", "raw", "-O", "raw"),
                *(str(image), unit_uri(served)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for begun in range(0, SIZE // 2, SIZE // 8):
            wait_written(served, begun)
            os.kill(tgtd_pid(served), signal.SIGKILL)
        assert copying.poll() is None
        said, _ = copying.communicate(timeout=TIMEOUT_S)
        assert copying.returncode == 0, said
        back = tmp_path / "back"
        tool("nbdcopy", served.uri(), str(back))
        assert hashlib.sha256(back.read_bytes()).digest() == (
            hashlib.sha256(image.read_bytes()).digest()
        )


def module() -> Path:
    found = choose_backing("module").module
    assert found is not None
    return found


def offer_volume(tgtd: PlainTgtd, served: Serve, *options: str) -> str:
    """Have a tgtd of others offer the volume through the module, as tgtadm is used by hand."""
    words = ";".join(("export=db", *options))
    socket = Path(served.ready["sockets"][0])
    return tgtd.offer(socket, "--bstype", "lhblock", "--bsopts", words)


def test_a_killed_engine_is_waited_for_and_no_write_is_lost(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(5).randbytes(SIZE))
    arguments = ("db", "--size", str(SIZE), "--socket", str(tmp_path / "socket"))
    with PlainTgtd(tmp_path, module()).running() as tgtd:
        with serve(tmp_path / "data", *arguments) as served:
            uri = offer_volume(tgtd, served)
            copying = subprocess.Popen(
                [
                    *(requires("qemu-img"), "convert", "-n", "-r", "16M", "-f", "raw", "-O", "raw"),
                    *(str(image), uri),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            wait_written(served, SIZE // 8)
            served.stop(signal.SIGKILL)
        with serve(tmp_path / "data", *arguments) as served:
            wait_written(served, SIZE // 2)
            served.stop(signal.SIGKILL)
        with serve(tmp_path / "data", *arguments) as served:
            said, _ = copying.communicate(timeout=TIMEOUT_S)
            assert copying.returncode == 0, said
            back = tmp_path / "back"
            tool("nbdcopy", served.uri(), str(back))
            assert back.read_bytes() == image.read_bytes()


def test_commands_are_answered_busy_when_the_engine_stays_away(tmp_path: Path) -> None:
    arguments = ("db", "--size", "1M", "--socket", str(tmp_path / "socket"))
    with PlainTgtd(tmp_path, module()).running() as tgtd:
        with serve(tmp_path / "data", *arguments) as served:
            uri = offer_volume(tgtd, served, "away=1")
            reading = subprocess.Popen(
                [requires("qemu-io"), "-f", "raw", uri],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert reading.stdin is not None
            assert reading.stdout is not None
            reading.stdin.write("read 0 4k\n")
            reading.stdin.flush()
            while "read 4096/4096" not in reading.stdout.readline():
                assert reading.poll() is None
            served.stop()
        reading.stdin.write("read 0 4k\n")
        reading.stdin.flush()
        assert reading.stderr is not None
        # qemu tells of each, and tries again.
        assert "BUSY" in reading.stderr.readline()
        with serve(tmp_path / "data", *arguments):
            said, _ = reading.communicate(timeout=TIMEOUT_S)
            assert "read 4096/4096" in said
            qemu_io(uri, "write -P 3 0 4k", "read -P 3 0 4k")


@pytest.mark.parametrize("backing", BACKINGS)
def test_an_expansion_is_seen(tmp_path: Path, backing: str) -> None:
    with iscsi(tmp_path, "--iscsi-backing", backing) as served:
        qemu_io(unit_uri(served), "write -P 6 0 64k")
        cli(served.data_dir, "volume", "expand", "db", str(2 * SIZE))
        pid = tgtd_pid(served)
        # The file is opened by another tgtd, which libiscsi waits for.
        for _ in range(100):
            try:
                if (
                    f"Total size:{2 * SIZE}"
                    in tool("iscsi-readcapacity16", unit_uri(served)).stdout
                ):
                    break
            except ToolFailed:
                continue
        qemu_io(unit_uri(served), f"write -P 8 {2 * SIZE - 65536} 64k", "read -P 6 0 64k")
        assert backing == "fuse" or tgtd_pid(served) == pid


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_running_tgtd_is_shared_and_left_as_it_was(tmp_path: Path, backing: str) -> None:
    file = tmp_path / "plain"
    file.touch()
    os.truncate(file, MIB)
    loaded = module() if backing == "module" else None
    with PlainTgtd(tmp_path, loaded).running() as other:
        other.offer(file)
        before = other.adm("--op", "show", "--mode", "target")
        environment = {"LHBLOCK_ISCSI_SOCKET": f"{other.socket}.0"}
        with iscsi(tmp_path, "--iscsi-shared", env=environment) as served:
            assert served.ready["portal"] == other.portal
            assert served.ready["backing"].startswith(backing)
            qemu_io(unit_uri(served), "write -P 7 0 64k", "flush", "read -P 7 0 64k")
            served.process.kill()
            served.process.communicate(timeout=TIMEOUT_S)
        assert "longhorn:db" in other.adm("--op", "show", "--mode", "target")
        # What a dead process left is taken over.
        with iscsi(tmp_path, "--iscsi-shared", env=environment) as served:
            qemu_io(unit_uri(served), "read -P 7 0 64k")
            code, log = served.stop()
            assert code == 0, log
        assert other.adm("--op", "show", "--mode", "target") == before


def test_an_address_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    with PlainTgtd(tmp_path).running() as other:
        arguments = ("db", "--size", "1M", "--no-tcp", "--frontend", "tgt-iscsi")
        process = start(tmp_path / "data", *arguments, "--iscsi-listen", other.portal)
        _, words = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert f"tgtd cannot listen on {other.portal}" in words.splitlines()[-1]
        assert not (tmp_path / "data" / "volumes" / "db").exists()


@pytest.mark.slow
def test_no_test_of_libiscsi_fails_that_stock_tgtd_passes(tmp_path: Path) -> None:
    file = tmp_path / "plain"
    file.touch()
    os.truncate(file, SIZE)
    with (
        PlainTgtd(tmp_path).running() as plain,
        iscsi(tmp_path, "--iscsi-backing", "module") as served,
        ThreadPoolExecutor(2) as both,
    ):
        uris = {"stock": plain.offer(file), "ours": unit_uri(served)}
        runs = [both.submit(conformance_failures, tmp_path / name, uris[name]) for name in uris]
        stock, ours = [run.result() for run in runs]
    assert ours <= stock


def test_a_device_of_this_host_or_a_warning_why_not(tmp_path: Path) -> None:
    arguments = ("db", "--size", str(SIZE), "--frontend", "nbd", "--frontend", "tgt-blockdev")
    with serve(tmp_path / "data", *arguments, "--iscsi-listen", "127.0.0.1:0") as served:
        qemu_io(unit_uri(served), "write -P 7 0 4k")
        device = served.ready["volumes"][0]["device"]
        code, log = served.stop()
        assert code == 0, log
        assert device or "iscsi_tcp" in log or "root" in log
