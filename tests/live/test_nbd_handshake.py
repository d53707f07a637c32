"""Handshakes with real clients; the exports are fakes, so only the negotiation is on trial."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lhblock._native import CloseReason
from lhblock.frontend.nbd import (
    Listener,
    NbdServer,
    open_tcp_listeners,
    open_unix_listener,
)
from tests.unit.nbd_client import FakeConnection, FakeExport, FakeExports

pytestmark = pytest.mark.live

REQUEST_MAGIC = 0x25609513
NBD_CMD_DISC = 2


class LeavingExport(FakeExport):
    """An export whose clients are expected to leave without a request that needs an answer."""

    async def serve(self, connection: FakeConnection) -> None:
        while True:
            header = await connection.read(28)
            if len(header) < 28:
                connection.end(CloseReason.EOF)
                return
            magic, _, kind, _, _, _ = struct.unpack(">IHHQQI", header)
            assert magic == REQUEST_MAGIC
            assert kind == NBD_CMD_DISC
            connection.end(CloseReason.CLIENT)
            return

    async def serve_all(self) -> None:
        served = 0
        while True:
            await self.attached.wait()
            self.attached = trio.Event()
            for connection in self.connections[served:]:
                served += 1
                await self.serve(connection)


def make_exports() -> FakeExports:
    return FakeExports(
        db=LeavingExport(size_bytes=(5 << 20) + 1, description="the database"),
        db_at_s1=LeavingExport(size_bytes=5 << 20, read_only=True),
    )


@asynccontextmanager
async def serving(exports: FakeExports, listener: Listener) -> AsyncIterator[None]:
    server = NbdServer(exports, handshake_timeout_s=20, connections_max=10)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for export in exports.exports.values():
                assert isinstance(export, LeavingExport)
                nursery.start_soon(export.serve_all)
            await nursery.start(server.serve, [listener])
            yield
            nursery.cancel_scope.cancel()


async def run(*command: str, status: int = 0) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"requires {command[0]}")
    ran: subprocess.CompletedProcess[bytes] = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False
    )
    assert ran.returncode == status, ran.stderr.decode()
    return (ran.stdout if status == 0 else ran.stderr).decode()


async def nbdinfo(listener: Listener, export: str, *options: str) -> Any:
    return json.loads(await run("nbdinfo", "--json", *options, str(listener.uri(export))))


async def test_nbdinfo_finds_everything_an_export_can_do(tmp_path: Path) -> None:
    listener = await open_unix_listener(tmp_path / "nbd.sock")
    async with serving(make_exports(), listener):
        told = await nbdinfo(listener, "db", "--no-content")
    assert (told["protocol"], told["structured"]) == ("newstyle-fixed", True)
    (export,) = told["exports"]
    assert export["export-name"] == "db"
    assert export["description"] == "the database"
    assert export["export-size"] == (5 << 20) + 1
    assert export["contexts"] == ["base:allocation"]
    assert (export["is_read_only"], export["is_rotational"]) == (False, False)
    for feature in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{feature}"], feature
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 << 20


async def test_nbdinfo_lists_volumes_and_snapshots_over_tcp() -> None:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    async with serving(make_exports(), listener):
        told = await nbdinfo(listener, "", "--list")
    assert {(e["export-name"], e["is_read_only"]) for e in told["exports"]} == {
        ("db", False),
        ("db@s1", True),
    }


async def test_nbdinfo_is_told_that_an_export_is_unknown(tmp_path: Path) -> None:
    listener = await open_unix_listener(tmp_path / "nbd.sock")
    async with serving(make_exports(), listener):
        error = await run("nbdinfo", "--size", str(listener.uri("nosuch")), status=1)
    assert "server has no export named 'nosuch'" in error


async def test_nbdinfo_gets_the_only_volume_without_a_name(tmp_path: Path) -> None:
    listener = await open_unix_listener(tmp_path / "nbd.sock")
    async with serving(make_exports(), listener):
        assert int(await run("nbdinfo", "--size", str(listener.uri()))) == (5 << 20) + 1


async def test_qemu_nbd_lists_exports(tmp_path: Path) -> None:
    listener = await open_unix_listener(tmp_path / "nbd.sock")
    async with serving(make_exports(), listener):
        told = await run("qemu-nbd", "--list", "--socket", str(tmp_path / "nbd.sock"))
    assert "exports available: 2" in told
    assert "base:allocation" in told
    assert "the database" in told


async def test_nbd_client_lists_exports(tmp_path: Path) -> None:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    port = listener.socket.getsockname()[1]
    async with serving(make_exports(), listener):
        told = await run("nbd-client", "-l", "127.0.0.1", str(port))
    assert "db@s1" in told


async def test_handshake_of_a_client_without_go_and_structured_replies(tmp_path: Path) -> None:
    """The libnbd shell can be told to speak like an old client, with NBD_OPT_EXPORT_NAME."""
    listener = await open_unix_listener(tmp_path / "nbd.sock")
    exports = make_exports()
    script = (
        "h.set_handshake_flags(0); h.set_request_structured_replies(False); "
        "h.set_request_block_size(False); h.set_opt_mode(False); h.set_export_name('db'); "
        f"h.connect_unix({str(tmp_path / 'nbd.sock')!r}); "
        "print(h.get_size(), h.can_df(), h.get_protocol()); h.shutdown()"
    )
    async with serving(exports, listener):
        # The distribution's bindings belong to the distribution's interpreter.
        told = await run("/usr/bin/python3", "-m", "nbd", "-c", script)
    assert told.split() == [str((5 << 20) + 1), "False", "newstyle"]
    (connection,) = exports.exports["db"].connections
    assert not connection.structured
    assert connection.base_allocation_id is None
