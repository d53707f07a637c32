"""TLS on TCP: who is let in, who is not, and what becomes of the nbdkit that speaks it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.activation import activated, listen_tcp
from tests.live.serving import (
    MIB,
    TIMEOUT_S,
    Serve,
    ToolFailed,
    cli,
    cli_json,
    nbdsh,
    serve,
    start,
    tool,
)
from tests.live.tls_keys import Authority, key_of, make_authority, make_psk

pytestmark = [pytest.mark.live, pytest.mark.interop]


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """Ours, and one that nobody here trusts."""
    root = tmp_path_factory.mktemp("tls")
    return make_authority(root / "ours", "ours"), make_authority(root / "other", "other")


@pytest.fixture(scope="module")
def psk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_psk(tmp_path_factory.mktemp("psk") / "keys", "alice", "bob")


def tls_uri(process: Serve, export: str = "db", user: str = "", **query: str) -> str:
    address = process.ready["listen"][0]
    return f"nbds://{user}{'@' if user else ''}{address}/{export}?{urlencode(query)}"


def psk_uri(process: Serve, psk: Path, export: str = "db", user: str = "alice") -> str:
    return tls_uri(process, export, user, **{"tls-psk-file": str(psk)})


def certified_uri(process: Serve, directory: Path) -> str:
    return tls_uri(process, **{"tls-certificates": str(directory)})


def refused(uri: str) -> str:
    with pytest.raises(ToolFailed) as failed:
        tool("nbdinfo", "--size", uri)
    return str(failed.value)


def tls_nbdsh(uri: str, *statements: str) -> str:
    """As `nbdsh`, which must be told that the address may name a file with a key."""
    connect = ("h.set_uri_allow_local_file(True)", f"h.connect_uri({uri!r})")
    words = [word for statement in (*connect, *statements) for word in ("-c", statement)]
    return tool("nbdsh", *words).stdout


def nbdkits(parent: int) -> list[int]:
    """Children of a process that are nbdkit."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, fields = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:
                continue
            if name == "nbdkit" and fields.split()[1] == str(parent):
                found.append(int(entry.name))
    return found


def wait_gone(pidfd: int) -> None:
    assert select.select([pidfd], [], [], TIMEOUT_S)[0], "the process is still there"
    os.close(pidfd)


def test_a_client_with_a_key_sees_and_does_everything(tmp_path: Path, psk: Path) -> None:
    data, source, target = tmp_path / "d", tmp_path / "in.img", tmp_path / "out.img"
    content = os.urandom(3 * MIB) + bytes(4 * MIB) + os.urandom(MIB)
    source.write_bytes(content)
    with serve(data, "db", "--size", "8M", "--tls-psk", str(psk)) as process:
        uri = psk_uri(process, psk)
        # The one that is shown works as it is, here, where the key is.
        assert process.ready["volumes"][0]["uris"][0] == uri.replace("%2F", "/")
        assert cli_json(data, "volume", "info", "db")["uris"][0] == uri.replace("%2F", "/")
        tool("nbdcopy", "--flush", str(source), uri)
        cli(data, "snapshot", "create", "db", "s1")
        tls_nbdsh(uri, "h.trim(1 << 20, 0)")
        tool("nbdcopy", psk_uri(process, psk, "db@s1", "bob"), str(target))
        assert target.read_bytes() == content
        assert nbdsh(process.uri(), "print(h.pread(1 << 20, 0) == bytes(1 << 20))") == "True\n"
        shown = json.loads(tool("nbdinfo", "--json", uri).stdout)
        assert shown["TLS"] is True
        (export,) = shown["exports"]
        assert export["contexts"] == ["base:allocation"]
        for ability in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache"):
            assert export[f"can_{ability}"] is True, ability
        listed = json.loads(tool("nbdinfo", "--list", "--json", uri).stdout)["exports"]
        assert [item["export-name"] for item in listed] == ["db", "db@s1"]


def test_without_the_key_nobody_is_let_in_and_no_secret_is_shown(tmp_path: Path, psk: Path) -> None:
    other = make_psk(tmp_path / "other", "alice", "mallory")
    with serve(tmp_path / "d", "db", "--size", "8M", "--tls-psk", str(psk)) as process:
        address = process.ready["listen"][0]
        refused(f"nbd://{address}/db")
        refused(psk_uri(process, other))
        refused(psk_uri(process, other, user="mallory"))
        # Everybody else is served on, TLS or not: the Unix socket is its owner's.
        assert tool("nbdinfo", "--size", psk_uri(process, psk)).stdout == f"{8 * MIB}\n"
        assert tool("nbdinfo", "--size", process.uri()).stdout == f"{8 * MIB}\n"
        assert Path(process.ready["sockets"][0]).stat().st_mode & 0o777 == 0o600
        (child,) = nbdkits(process.process.pid)
        words = Path(f"/proc/{child}/cmdline").read_bytes()
        status, log = process.stop()
    assert status == 0
    assert '"event": "nbdkit"' in log  # what it said of the strangers
    for user in ("alice", "bob"):
        assert key_of(psk, user) not in log
        assert key_of(psk, user).encode() not in words
    assert key_of(other, "alice") not in log


def test_certificates_are_checked_on_both_sides(
    tmp_path: Path, authorities: tuple[Authority, Authority]
) -> None:
    ours, other = authorities
    options = ("--tls-certificates", str(ours.server), "--tls-verify-clients")
    with serve(tmp_path / "d", "db", "--size", "8M", *options) as process:
        uri = certified_uri(process, ours.client)
        assert json.loads(tool("nbdinfo", "--json", uri).stdout)["TLS"] is True
        # The client does not trust the server, the server not the client, or neither is asked.
        assert "certificate" in refused(certified_uri(process, other.client))
        for directory in (ours.stranger, _mixed(tmp_path, ours, other)):
            refused(certified_uri(process, directory))
        refused(f"nbd://{process.ready['listen'][0]}/db")
        assert tool("nbdinfo", "--size", uri).stdout == f"{8 * MIB}\n"


def _mixed(tmp_path: Path, trusted: Authority, own: Authority) -> Path:
    """A client that trusts the server and shows a certificate of somebody else."""
    directory = tmp_path / "mixed"
    shutil.copytree(own.client, directory)
    shutil.copy(trusted.client / "ca-cert.pem", directory)
    return directory


def test_without_verification_a_client_needs_no_certificate(
    tmp_path: Path, authorities: tuple[Authority, Authority]
) -> None:
    ours, _ = authorities
    options = ("--tls-certificates", str(ours.server))
    with serve(tmp_path / "d", "db", "--size", "8M", *options) as process:
        uri = certified_uri(process, ours.stranger)
        assert tool("nbdinfo", "--size", uri).stdout == f"{8 * MIB}\n"


def test_a_killed_nbdkit_is_replaced_and_nothing_answered_is_lost(
    tmp_path: Path, psk: Path
) -> None:
    with serve(tmp_path / "d", "db", "--size", "8M", "--tls-psk", str(psk)) as process:
        uri = psk_uri(process, psk)
        (child,) = nbdkits(process.process.pid)
        kill = f"import os; h.pwrite(b'kept', 5); os.kill({child}, 9)"
        tls_nbdsh(uri, kill)
        # The next client waits in the backlog until the next nbdkit takes it.
        assert tls_nbdsh(uri, "print(h.pread(4, 5))") == "bytearray(b'kept')\n"
        assert nbdkits(process.process.pid) not in ([], [child])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_nbdkit_outlives_the_server(tmp_path: Path, psk: Path, number: signal.Signals) -> None:
    with serve(tmp_path / "d", "db", "--size", "8M", "--tls-psk", str(psk)) as process:
        (child,) = nbdkits(process.process.pid)
        pidfd = os.pidfd_open(child)
        host, port = process.ready["listen"][0].rsplit(":", 1)
        # One that says nothing keeps nbdkit from ending by itself.
        with socket.create_connection((host, int(port))) as idle:
            assert idle.recv(8) == b"NBDMAGIC"
            status, _ = process.stop(number)
            wait_gone(pidfd)
    assert status == (0 if number is signal.SIGTERM else -9)


def test_activated_sockets_speak_tls_too(tmp_path: Path, psk: Path) -> None:
    command = [sys.executable, "-m", "lhblock", "serve", "db", "--size", "8M"]
    command += ["--data-dir", str(tmp_path / "d"), "--tls-psk", str(psk)]
    with listen_tcp() as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with activated(command, listener, tmp_path / "log"):
            uri = f"nbds://alice@{address}/db?tls-psk-file={psk}"
            assert tool("nbdinfo", "--size", uri).stdout == f"{8 * MIB}\n"
            refused(f"nbd://{address}/db")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tls-psk", "{psk}", "--tls-certificates", "{empty}"], "exclude each other"),
        (["--tls-psk", "{psk}", "--no-tcp"], "TLS is for clients on TCP"),
        (["--tls-psk", "{psk}", "--stdio"], "TLS is for clients on TCP"),
        (["--tls-psk", "{empty}/none"], "cannot read"),
        (["--tls-psk", "{empty}"], "is not a file"),
        (["--tls-psk", "/dev/null"], "is not a file"),
        (["--tls-certificates", "{empty}"], "ca-cert.pem: No such file"),
        (["--tls-verify-clients"], "--tls-verify-clients is for --tls-certificates"),
    ],
)
def test_wrong_keys_are_said_before_anything_is_made(
    tmp_path: Path, psk: Path, options: list[str], sentence: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.format(psk=psk, empty=empty) for word in options]
    done = cli(tmp_path / "d", "serve", "db", "--size", "8M", *words, status=2)
    assert sentence in done.stderr
    assert not (tmp_path / "d").exists()


def test_keys_that_are_none_are_not_shown(tmp_path: Path) -> None:
    bad = tmp_path / "bad.psk"
    bad.write_text("alice:0011\nbob:hunter2\n")
    done = cli(tmp_path / "d", "serve", "db", "--size", "8M", "--tls-psk", str(bad), status=2)
    assert "key 2 of" in done.stderr
    assert "hunter2" not in done.stderr


def test_certificates_that_nbdkit_refuses_leave_nothing_half_made(
    tmp_path: Path, authorities: tuple[Authority, Authority]
) -> None:
    ours, _ = authorities
    wrong = tmp_path / "wrong"
    shutil.copytree(ours.server, wrong)
    (wrong / "server-cert.pem").write_text("not a certificate\n")
    process = start(
        tmp_path / "d", "db", "--size", "8M", "--listen", "127.0.0.1:0",
        "--tls-certificates", str(wrong),
    )  # fmt: skip
    _, log = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "cannot serve with TLS: nbdkit did not start" in log
    assert "Traceback" not in log
    assert not (tmp_path / "d" / "volumes" / "db").exists()
