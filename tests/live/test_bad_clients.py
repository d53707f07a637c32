"""Clients that stop, send garbage or vanish, beside one that works."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from tests.live.serving import (
    TIMEOUT_S,
    TOOL_ENVIRONMENT,
    Serve,
    cli,
    cli_json,
    nbdsh,
    requires,
    serve,
)

pytestmark = pytest.mark.live

OPTION_MAGIC = 0x49484156454F5054
REQUEST_MAGIC = 0x25609513
EXPORT_NAME = 1
WRITE = 1
WORKS = ("h.pwrite(b'works' * 1000, 12345)", "h.flush()", "print(h.pread(5, 12345))")
WORKED = "bytearray(b'works')\n"


def connect(process: Serve) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect(process.ready["sockets"][0])
    return sock


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = sock.recv(length - len(data))
        assert chunk, "the server closed the connection"
        data += chunk
    return data


def enter(process: Serve) -> socket.socket:
    """A connection past its handshake, the old way."""
    sock = connect(process)
    receive(sock, 18)
    sock.sendall(struct.pack(">I", 3) + struct.pack(">QII", OPTION_MAGIC, EXPORT_NAME, 2) + b"db")
    receive(sock, 10)
    return sock


def wait_until_closed(sock: socket.socket) -> None:
    """Receive what comes until the server closes the connection, which it must."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass


def test_stopped_client_holds_nobody_up(tmp_path: Path) -> None:
    data = tmp_path / "d"
    # It reads far more than the socket's buffers hold, says when it has begun, and never receives.
    script = (
        "b = [nbd.Buffer(1 << 20) for _ in range(16)]\n"
        "for x in b: h.aio_pread(x, 0)\n"
        "print('begun', flush=True)\n"
        "import sys; sys.stdin.readline()\n"
    )
    with serve(data, "db", "--size", "4M") as process:
        stalled = subprocess.Popen(
            [requires("nbdsh"), "-u", process.uri(), "-c", script],
            env=TOOL_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert stalled.stdout is not None
            assert stalled.stdout.readline() == "begun\n"
            stalled.send_signal(signal.SIGSTOP)
            assert nbdsh(process.uri(), *WORKS) == WORKED
            cli(data, "snapshot", "create", "db", "s1")
            assert nbdsh(process.uri(), *WORKS) == WORKED
        finally:
            stalled.kill()
            stalled.communicate(timeout=TIMEOUT_S)
        assert nbdsh(process.uri(), *WORKS) == WORKED
        assert process.stop()[0] == 0


def test_stopped_client_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    with serve(tmp_path / "d", "db", "--size", "4M") as process, enter(process) as sock:
        # Sixteen reads whose answers nobody takes, and a write that never comes whole.
        for cookie in range(16):
            sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 0, cookie, 0, 1 << 20))
        sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 99, 0, 1 << 20) + b"half")
        assert process.stop()[0] == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_garbage_instead_of_a_handshake_harms_nobody(tmp_path: Path, seed: int) -> None:
    garbage = random.Random(seed).randbytes(100_000)
    with serve(tmp_path / "d", "db", "--size", "4M") as process:
        with connect(process) as sock:
            # It may be closed before all of it was sent, as it should be.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(garbage)
            wait_until_closed(sock)
        assert nbdsh(process.uri(), *WORKS) == WORKED
        assert process.stop()[0] == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_garbage_instead_of_requests_closes_that_connection_only(tmp_path: Path, seed: int) -> None:
    data = tmp_path / "d"
    garbage = random.Random(seed).randbytes(4096)
    with serve(data, "db", "--size", "4M") as process, enter(process) as good:
        with enter(process) as bad:
            bad.sendall(garbage)
            wait_until_closed(bad)
        # The one beside it goes on with the connection that it has.
        good.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 7, 100, 4) + b"good")
        assert receive(good, 16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        assert nbdsh(process.uri(), "print(h.pread(4, 100))") == "bytearray(b'good')\n"


def test_client_that_vanishes_inside_a_write_changes_nothing(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        with enter(process) as sock:
            header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, WRITE, 1, 0, 65536)
            sock.sendall(header + b"y" * 3000)
        # A later snapshot waits for everything in flight, so what would come has come.
        cli(data, "snapshot", "create", "db", "s1")
        assert nbdsh(process.uri("db@s1"), "print(set(h.pread(65536, 0)))") == "{0}\n"
        assert cli_json(data, "volume", "info", "db")["state"] == "healthy"
