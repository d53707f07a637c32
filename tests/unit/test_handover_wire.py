"""What serving processes and mount-fuse believe of each other's messages."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lhblock.errors import FrontendError
from lhblock.instance import _handover_wire as wire
from tests.fuse import require_fuse

Pair = tuple[trio.socket.SocketType, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Our end, and that of a stranger."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, trio.socket.from_stdlib_socket(ours) as wrapped:
        yield wrapped, theirs


@pytest.fixture
def null() -> Iterator[int]:
    with Path(os.devnull).open("rb") as file:
        yield file.fileno()


@pytest.fixture
def kernel() -> Iterator[int]:
    require_fuse()
    with Path("/dev/fuse").open("rb+", buffering=0) as file:
        yield file.fileno()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_states_arrive_as_they_were(pair: Pair) -> None:
    ours, theirs = pair
    with trio.socket.from_stdlib_socket(theirs.dup()) as sender:
        for state in (wire.Free(), wire.Mounted(Path("/mnt/x"), ("db", "logs"))):
            await wire.send_state(sender, state)
            assert await wire.receive_state(ours) == state
    theirs.close()
    assert await wire.receive_state(ours) is None


@pytest.mark.parametrize(
    "message",
    [
        b"garbage",
        b"\xff",
        b"[]",
        b"{}",
        b'{"state": "other"}',
        b'{"state": "mounted", "directory": "/x"}',
        b'{"state": "mounted", "directory": "x", "volumes": []}',
        b'{"state": "mounted", "directory": "/\\ud800", "volumes": []}',
        b'{"state": "mounted", "directory": "/\\u0000", "volumes": []}',
        b'{"state": "mounted", "directory": "/x", "volumes": "db"}',
        b'{"state": "mounted", "directory": "/x", "volumes": [1]}',
        b'{"state": "mounted", "directory": "/x", "volumes": ["../../etc"]}',
        b'{"state": "mounted", "directory": "/x", "volumes": [".serve-1"]}',
        json.dumps({"state": "mounted", "directory": "/" + "x" * 5000, "volumes": []}).encode(),
        json.dumps({"state": "mounted", "directory": "/x", "volumes": ["db"] * 1025}).encode(),
        b"[" * 100_000,
        b"1" * 5000,
        b'{"state": "free"}' + b" " * wire.MESSAGE_BYTES_MAX,
    ],
)
async def test_a_state_without_sense_is_refused(pair: Pair, message: bytes) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.send(message)
    with pytest.raises(FrontendError, match="makes no sense"):
        await wire.receive_state(ours)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
async def test_descriptors_of_something_else_are_closed(pair: Pair, count: int, null: int) -> None:
    ours, theirs = pair
    before = open_descriptors()
    message = json.dumps({"directory": "/x", "shown": "/x"}).encode()
    socket.send_fds(theirs, [message], [null] * count)
    with pytest.raises(FrontendError):
        await wire.receive_handover(ours)
    assert open_descriptors() == before
    # Where none is expected.
    socket.send_fds(theirs, [b'{"state": "free"}'], [null] * min(count, 2))
    assert await wire.receive_state(ours) == wire.Free()
    assert open_descriptors() == before


async def test_a_mount_arrives_with_its_descriptor(pair: Pair, kernel: int) -> None:
    ours, theirs = pair
    handover = wire.Handover(Path("/mnt/.serve-1"), Path("/mnt"))
    with trio.socket.from_stdlib_socket(theirs.dup()) as sender:
        await wire.send_handover(sender, handover, kernel)
    received = await wire.receive_handover(ours)
    assert received is not None
    assert received[0] == handover
    assert os.fstat(received[1]).st_rdev == os.fstat(kernel).st_rdev
    assert not os.get_inheritable(received[1])
    os.close(received[1])
