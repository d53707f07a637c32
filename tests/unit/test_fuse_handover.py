"""Where a serving process takes over mounts: who is let in, and who has the session."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from lhblock.frontend.fuse import Volumes
from lhblock.instance import _fuse_handover as handover
from lhblock.instance._fuse_session import FuseSession

TIMEOUT_S = 30.0
FREE = {"state": "free"}


class _Names:
    """Of volumes, what `serve_handover` asks while it has no mount."""

    async def names(self) -> list[str]:
        return ["logs", "db"]


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[FuseSession]:
    session = FuseSession()
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(
                handover.serve_handover, path, session, lambda: cast("Volumes", _Names())
            )
            yield session
            nursery.cancel_scope.cancel()


async def connect(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await sock.connect(os.fspath(path))
    return sock


async def said(sock: trio.socket.SocketType) -> Any:
    """The next message; None at the end."""
    data = await sock.recv(1 << 16)
    return json.loads(data) if data else None


async def test_the_session_goes_from_one_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with served(path) as session:
        with await connect(path) as first:
            assert await said(first) == FREE
            assert not session.free
            with await connect(path) as second:
                await trio.testing.wait_all_tasks_blocked(0.05)  # it is being answered
                first.close()
                # Told nothing, because there was no mount: it asks again.
                assert await said(second) is None
        with await connect(path) as third:
            assert await said(third) == FREE


async def test_who_comes_later_is_told_where_the_mount_is(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with served(path) as session:
        async with session.own(Path("/mnt/own")):
            with await connect(path) as sock:
                mounted = {"state": "mounted", "directory": "/mnt/own", "volumes": ["db", "logs"]}
                assert await said(sock) == mounted
        assert session.free


async def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "socket"
    async with served(path) as session:
        monkeypatch.setattr(handover, "peer_credentials", lambda _: (1, os.geteuid() + 1))
        with await connect(path) as sock:
            assert await said(sock) is None
        monkeypatch.setattr(handover, "peer_credentials", lambda _: (1, 0))
        assert session.free
        with await connect(path) as sock:
            assert await said(sock) == FREE


async def test_more_than_enough_connections_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with served(path):
        held = [await connect(path) for _ in range(handover.CONNECTIONS_MAX)]
        assert await said(held[0]) == FREE
        with await connect(path) as sock:
            assert await said(sock) is None
        for sock in held:
            sock.close()


async def test_a_mount_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setattr(handover, "HANDOVER_S", 0.0)
    async with served(path) as session:
        with await connect(path) as sock:
            assert await said(sock) == FREE
            assert await said(sock) is None
        assert session.free
