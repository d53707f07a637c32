"""Who has the one FUSE session of a process."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from lhblock.instance._fuse_session import FuseSession

TIMEOUT_S = 30.0
HERE, THERE = Path("/here"), Path("/there")


async def test_a_door_takes_back_what_was_lent() -> None:
    session = FuseSession()
    mounted, ended = trio.Event(), trio.Event()

    async def borrow() -> None:
        with session.lend() as loan:
            loan.mounted(THERE / ".serve-1", THERE)
            mounted.set()
            try:
                await trio.sleep_forever()
            finally:
                # Its end takes a while, and the door waits for it.
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                ended.set()

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            assert session.free
            nursery.start_soon(borrow)
            await mounted.wait()
            assert not session.free
            assert session.file("db") == "/there/db/volume"
            async with session.own(HERE):
                assert ended.is_set()
                assert session.directory == HERE
                assert not session.free
                assert session.file("db") == "/here/db/volume"
    assert session.free
    assert session.directory is None
    assert session.file("db") == ""


async def test_a_private_mount_shows_users_nothing() -> None:
    session = FuseSession()
    async with session.own(HERE, private=True):
        assert session.directory == HERE
        assert session.file("db") == ""
