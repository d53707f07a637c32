"""Serving clients on real sockets, up to the hand-over."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import structlog
import trio

from lhblock._native import CloseReason
from lhblock.errors import VolumeError
from lhblock.frontend.nbd import (
    Listener,
    NbdServer,
    open_tcp_listeners,
    open_unix_listener,
    serve_nbd,
    serve_stdio,
)
from tests.unit import nbd_client as c
from tests.unit.nbd_client import Client, FakeExport, FakeExports, SocketStream

GO_SCRIPT = struct.pack(">I", 3) + c.option(c.STRUCTURED_REPLY) + c.option(c.GO, c.go_data("db"))


class Log(structlog.testing.LogCapture):
    """Log lines as they come, and a way to wait for the end of connections."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = trio.Event()

    def __call__(
        self, logger: object, method_name: str, event_dict: structlog.typing.EventDict
    ) -> NoReturn:
        self._changed.set()
        super().__call__(logger, method_name, event_dict)

    def ends(self) -> list[str]:
        return [e["reason"] for e in self.entries if e["event"] == "nbd connection ended"]

    def level(self, level: str) -> list[structlog.typing.EventDict]:
        return [e for e in self.entries if e["log_level"] == level]

    async def until_ended(self, count: int) -> None:
        while len(self.ends()) < count:
            self._changed = trio.Event()
            await self._changed.wait()


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    processors = structlog.get_config()["processors"]
    before = list(processors)
    # In place, for loggers that keep the list.
    processors[:] = [log]
    structlog.configure(processors=processors)
    yield log
    processors[:] = before
    structlog.configure(processors=processors)


class Running:
    """A server in the background; clients and descriptors are closed when the test is done."""

    def __init__(self, server: NbdServer, listener: Listener) -> None:
        self.server = server
        self.listener = listener
        self.clients: list[SocketStream] = []
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[NbdServer]) -> None:
        with self._scope:
            await self.server.serve([self.listener], task_status=task_status)
        self._stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    async def connect(self) -> Client:
        sock = trio.socket.socket(self.listener.socket.family)
        stream = SocketStream(sock)
        self.clients.append(stream)
        await sock.connect(self.listener.socket.getsockname())
        return Client(stream)


@asynccontextmanager
async def serving(
    exports: FakeExports,
    listener: Listener,
    *,
    connections_max: int = 10,
    handshakes_max: int = 10,
) -> AsyncIterator[Running]:
    server = NbdServer(
        exports,
        handshake_timeout_s=60,
        connections_max=connections_max,
        handshakes_max=handshakes_max,
    )
    running = Running(server, listener)
    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await nursery.start(running.run)
                yield running
                await running.stop()
    finally:
        for stream in running.clients:
            stream.close()
        for export in exports.exports.values():
            export.close()


async def tcp() -> Listener:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    return listener


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_pipelined_request_reaches_the_core_untouched(
    kind: str, tmp_path: Path, log: Log
) -> None:
    export = FakeExport()
    listener = await tcp() if kind == "tcp" else await open_unix_listener(tmp_path / "nbd.sock")
    async with serving(FakeExports(db=export), listener) as running:
        client = await running.connect()
        await client.stream.send_all(GO_SCRIPT + b"a first request")
        assert await client.receive(18) == c.GREETING
        await client.replies(c.STRUCTURED_REPLY)
        await client.replies(c.GO)
        await export.attached.wait()
        (connection,) = export.connections
        assert connection.structured
        assert await connection.read(15) == b"a first request"
        os.write(connection.fd, b"an answer")
        assert await client.receive(9) == b"an answer"

        (info,) = running.server.clients()
        assert info.export == "db"
        assert info.peer.startswith("127.0.0.1:" if kind == "tcp" else f"unix pid {os.getpid()}")
        assert export.closed == 0

        connection.end(CloseReason.CLIENT)
        await log.until_ended(1)
        assert running.server.clients() == ()
        assert export.closed == 1
    (line,) = (entry for entry in log.entries if entry["event"] == "nbd connection ended")
    assert (line["export"], line["reason"]) == ("db", "client disconnected")
    assert line["peer"] == info.peer


async def test_accepted_tcp_socket_is_tuned() -> None:
    export = FakeExport()
    async with serving(FakeExports(db=export), await tcp()) as running:
        client = await running.connect()
        await client.stream.send_all(GO_SCRIPT)
        await export.attached.wait()
        with socket.socket(fileno=os.dup(export.connections[0].fd)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_accepted_unix_socket_gets_larger_buffers(tmp_path: Path) -> None:
    export = FakeExport()
    with socket.socket(socket.AF_UNIX) as plain:
        usual = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        granted = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    async with serving(FakeExports(db=export), await open_unix_listener(tmp_path / "s")) as running:
        client = await running.connect()
        await client.stream.send_all(GO_SCRIPT)
        await export.attached.wait()
        with socket.socket(fileno=os.dup(export.connections[0].fd)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == granted >= usual


@pytest.mark.parametrize("length", [0, 1, 3, 4, 10, len(GO_SCRIPT) - 1])
async def test_peer_that_vanishes_harms_nobody_else(length: int, log: Log) -> None:
    export = FakeExport()
    async with serving(FakeExports(db=export), await tcp()) as running:
        stays = await running.connect()
        await stays.greet()
        vanishes = await running.connect()
        await vanishes.stream.send_all(GO_SCRIPT[:length])
        running.clients[1].close()
        await log.until_ended(1)
        assert (await stays.ask(c.GO, c.go_data("db")))[-1].kind == c.ACK
        await export.attached.wait()
    assert log.ends()[0].startswith(("client closed", "client vanished", "connection lost"))
    assert not log.level("error")


async def test_garbage_ends_only_its_own_connection(
    log: Log,
) -> None:
    async with serving(FakeExports(db=FakeExport()), await tcp()) as running:
        stays = await running.connect()
        await stays.greet()
        noisy = await running.connect()
        await noisy.stream.send_all(b"GET / HTTP/1.0\r\n\r\n" + bytes(100_000))
        await noisy.receive(18)
        assert await noisy.at_end()
        await log.until_ended(1)
        assert (await stays.ask(c.LIST))[-1].kind == c.ACK
    assert log.ends()[0].startswith("client set unknown flags")


async def test_handshake_that_stalls_is_cut_off_and_transmission_is_not(
    autojump_clock: trio.testing.MockClock, log: Log
) -> None:
    export = FakeExport()
    near, far = socket.socketpair()
    idle_near, idle_far = socket.socketpair()
    for sock in (near, far, idle_near, idle_far):
        sock.setblocking(False)
    server = NbdServer(FakeExports(db=export), handshake_timeout_s=10, connections_max=5)
    near.send(GO_SCRIPT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_socket, trio.socket.from_stdlib_socket(far), "worker")
        await export.attached.wait()
        began = trio.current_time()
        reason = await server.serve_socket(trio.socket.from_stdlib_socket(idle_far), "idler")
        assert reason == "handshake not done within 10 s"
        assert trio.current_time() - began == pytest.approx(10)
        await trio.sleep(1000)
        assert [info.peer for info in server.clients()] == ["worker"]
        export.connections[0].end(CloseReason.EOF)
    assert log.ends() == ["handshake not done within 10 s", "client vanished between requests"]
    assert idle_near.recv(100) == c.GREETING
    assert idle_near.recv(100) == b""
    near.close()
    idle_near.close()


async def test_newcomer_gets_in_although_stalled_handshakes_take_all_places(
    log: Log,
) -> None:
    export = FakeExport()
    async with serving(FakeExports(db=export), await tcp(), handshakes_max=3) as running:
        stalled = [await running.connect() for _ in range(3)]
        for client in stalled:
            await client.greet()
        newcomer = await running.connect()
        await newcomer.greet()
        assert (await newcomer.ask(c.GO, c.go_data("db")))[-1].kind == c.ACK
        assert await stalled[0].at_end()
        # The others of them still have their chance.
        assert (await stalled[1].ask(c.LIST))[-1].kind == c.ACK
    assert log.ends()[0] == "too many clients are in their handshake and this is the oldest"


async def test_client_over_the_limit_is_told_and_gets_in_once_a_place_is_free(
    log: Log,
) -> None:
    export = FakeExport()
    async with serving(FakeExports(db=export), await tcp(), connections_max=1) as running:
        first = await running.connect()
        await first.greet()
        await first.ask(c.GO, c.go_data("db"))
        await export.attached.wait()
        second = await running.connect()
        await second.greet()
        (reply,) = await second.ask(c.GO, c.go_data("db"))
        assert reply.kind == c.ERR_POLICY
        assert reply.data == b"all 1 connections are taken; try again later"
        export.connections[0].end(CloseReason.CLIENT)
        await log.until_ended(1)
        assert (await second.ask(c.GO, c.go_data("db")))[-1].kind == c.ACK


async def test_stopping_cuts_handshakes_and_leaves_connections_to_their_volume(
    tmp_path: Path, log: Log
) -> None:
    export = FakeExport()
    path = tmp_path / "nbd.sock"
    async with serving(FakeExports(db=export), await open_unix_listener(path)) as running:
        haggling = await running.connect()
        await haggling.greet()
        served = await running.connect()
        await served.stream.send_all(GO_SCRIPT)
        await export.attached.wait()
        await running.stop()
        assert await haggling.at_end()
        assert not path.exists()
        assert export.closed == 1
        # The descriptor is still open, and the volume's to close.
        os.write(export.connections[0].fd, b"last answer")
    assert log.ends() == ["server stopped", "server stopped"]


async def test_export_that_refuses_the_socket_ends_the_connection_and_keeps_none(
    log: Log,
) -> None:
    export = FakeExport(refuse=VolumeError("db", "is closing"))
    async with serving(FakeExports(db=export), await tcp()) as running:
        client = await running.connect()
        await client.greet()
        await client.ask(c.GO, c.go_data("db"))
        assert await client.at_end()
        await log.until_ended(1)
        assert running.server.clients() == ()
    assert log.ends() == ["volume db: is closing"]


async def test_defect_in_one_connection_is_logged_and_spares_the_others(
    log: Log,
) -> None:
    exports = FakeExports(db=FakeExport(refuse=ZeroDivisionError("a defect")), web=FakeExport())
    async with serving(exports, await tcp()) as running:
        client = await running.connect()
        await client.greet()
        await client.ask(c.GO, c.go_data("db"))
        assert await client.at_end()
        other = await running.connect()
        await other.greet()
        assert (await other.ask(c.GO, c.go_data("web")))[-1].kind == c.ACK
        await log.until_ended(1)
    assert log.ends()[0] == "internal error"
    assert [entry["event"] for entry in log.level("error")] == ["nbd connection failed"]


class StarvedSocket:
    """A listening socket whose accept fails with the given errors first."""

    def __init__(self, inner: trio.socket.SocketType, *errors: int) -> None:
        self.inner = inner
        self.errors = list(errors)

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        if self.errors:
            await trio.lowlevel.checkpoint()
            raise OSError(self.errors[0], os.strerror(self.errors.pop(0)))
        return await self.inner.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


async def test_accept_survives_want_of_descriptors_and_aborted_connections(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
) -> None:
    listener = await tcp()
    starved = StarvedSocket(
        listener.socket, errno.EMFILE, errno.EMFILE, errno.ENFILE, errno.ECONNABORTED
    )
    monkeypatch.setattr(listener, "socket", starved)
    server = NbdServer(FakeExports(db=FakeExport()), handshake_timeout_s=60, connections_max=5)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, [listener])
        sock = trio.socket.socket()
        await sock.connect(listener.socket.getsockname())
        client = Client(SocketStream(sock))
        await client.greet()
        assert trio.current_time() - began == pytest.approx(0.3)
        nursery.cancel_scope.cancel()
    sock.close()
    assert [entry["reason"] for entry in log.level("warning")] == [os.strerror(errno.EMFILE)]


async def test_serve_nbd_starts_with_the_server_and_closes_its_listeners() -> None:
    listener = await tcp()
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[NbdServer]) -> None:
            await serve_nbd(
                [listener],
                FakeExports(),
                handshake_timeout_s=1,
                connections_max=1,
                task_status=task_status,
            )

        server = await nursery.start(serve)
        assert server.clients() == ()
        nursery.cancel_scope.cancel()
    assert listener.socket.fileno() == -1


async def test_stdio_on_a_socket_hands_over_that_socket() -> None:
    export = FakeExport()
    near, far = socket.socketpair()
    near.setblocking(False)
    near.send(GO_SCRIPT + b"a request")
    reasons: list[str] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                reasons.append(
                    await serve_stdio(
                        FakeExports(db=export),
                        handshake_timeout_s=60,
                        stdin_fd=far.fileno(),
                        stdout_fd=far.fileno(),
                    )
                )

            nursery.start_soon(serve)
            await export.attached.wait()
            assert await export.connections[0].read(9) == b"a request"
            export.connections[0].end(CloseReason.CLIENT)
    assert reasons == ["client disconnected"]
    # Ours was a duplicate: standard input itself is still open.
    assert far.fileno() != -1
    near.close()
    far.close()


@pytest.mark.parametrize("source", ["pipe", "file"])
async def test_stdio_on_pipes_and_files_carries_both_ways(source: str, tmp_path: Path) -> None:
    export = FakeExport()
    payload = os.urandom(300_000)
    if source == "pipe":
        stdin, feed = os.pipe()
    else:
        (tmp_path / "in").write_bytes(GO_SCRIPT + payload)
        stdin = os.open(tmp_path / "in", os.O_RDONLY)
    out, stdout = os.pipe()
    reasons: list[str] = []

    async def serve() -> None:
        reasons.append(
            await serve_stdio(
                FakeExports(db=export), handshake_timeout_s=60, stdin_fd=stdin, stdout_fd=stdout
            )
        )

    def feed_all() -> None:
        view = memoryview(GO_SCRIPT + payload)
        while view:
            view = view[os.write(feed, view) :]

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            if source == "pipe":
                nursery.start_soon(trio.to_thread.run_sync, feed_all)
            await export.attached.wait()
            connection = export.connections[0]
            assert await connection.read(len(payload)) == payload
            if source == "file":
                # The end of the file is the client closing its side.
                assert await connection.read(1) == b""
            os.write(connection.fd, b"the answer")
            # With the pipe, standard input stays open and is not waited for.
            connection.end(CloseReason.EOF)
    os.close(stdout)
    with os.fdopen(out, "rb") as reader:
        sent = reader.read()
    assert sent.startswith(c.GREETING)
    assert sent.endswith(b"the answer")
    assert reasons == ["client vanished between requests"]
    os.close(stdin)
    if source == "pipe":
        os.close(feed)


async def test_stdio_without_a_reader_of_the_output_ends() -> None:
    stdin, feed = os.pipe()
    out, stdout = os.pipe()
    os.close(out)
    with trio.fail_after(10):
        reason = await serve_stdio(
            FakeExports(), handshake_timeout_s=60, stdin_fd=stdin, stdout_fd=stdout
        )
    assert reason == "client closed the connection before its flags"
    for fd in (stdin, feed, stdout):
        os.close(fd)
