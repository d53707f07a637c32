"""The wrapper of a remote replica: what it owns, what it refuses, what it tells."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest

from lhblock._native import (
    PEER_OURS,
    Driver,
    Event,
    EventType,
    NativeEngine,
    NativePeer,
    NativeVolume,
    PeerEnd,
    StoreMode,
)
from lhblock.errors import NativeError

SIZE_BYTES = 1 << 20


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    with NativeEngine(queues=2, workers=1, driver=Driver.POOL) as engine:
        yield engine


def connect(engine: NativeEngine, peer: NativePeer) -> list[socket.socket]:
    """The replica's ends of one connection for each queue."""
    ends = []
    for queue in range(engine.queues):
        ours, theirs = socket.socketpair()
        peer.add_connection(queue, ours.fileno())
        ours.detach()
        ends.append(theirs)
    return ends


def wait_event(engine: NativeEngine) -> Event:
    while (event := engine.next_event()) is None:
        select.select([engine.event_fd], [], [])
        os.read(engine.event_fd, 8)
    return event


def test_peer_that_hangs_up_says_so_and_is_not_published_again(engine: NativeEngine) -> None:
    with NativePeer(engine, SIZE_BYTES, PEER_OURS, 1000) as peer:
        ends = connect(engine, peer)
        with NativeVolume(engine, SIZE_BYTES, 0) as volume:
            volume.publish([peer])
            assert peer.statistics().connections == engine.queues
            ends[1].close()
            event = wait_event(engine)
            assert event.type == EventType.LAST_PEER_LOST
            assert event.subject_id == peer.id
            statistics = peer.statistics()
            assert statistics.ended == event.error == errno.ECONNRESET
            assert PeerEnd(statistics.end_reason) is PeerEnd.EOF
            with pytest.raises(NativeError) as caught:
                volume.publish([peer])
            assert caught.value.errno == errno.ENOTCONN
        assert ends[0].recv(1) == b""  # one is lost: all are closed
        ends[0].close()
    with pytest.raises(ValueError, match="closed"):
        peer.statistics()


def test_others_leave_the_set_of_a_volume_that_gave_up_though_the_last_peer_ended(
    engine: NativeEngine,
) -> None:
    with (
        NativePeer(engine, SIZE_BYTES, PEER_OURS, 1000) as one,
        NativePeer(engine, SIZE_BYTES, PEER_OURS, 1000) as last,
        NativeVolume(engine, SIZE_BYTES, 0) as volume,
    ):
        ends = [connect(engine, peer) for peer in (one, last)]
        volume.publish([one, last])
        for sockets, expected in zip(
            ends, (EventType.STORE_FAILED, EventType.LAST_PEER_LOST), strict=True
        ):
            for end in sockets:
                end.close()
            assert wait_event(engine).type == expected
        with pytest.raises(NativeError):
            volume.publish([last])
        volume.give_up()
        volume.publish([last])
        one.close()  # which it would not survive in the set


def test_set_needs_a_mode_for_each_store_and_one_that_is_read(engine: NativeEngine) -> None:
    with NativePeer(engine, SIZE_BYTES, 0, 1000) as peer:
        ends = connect(engine, peer)
        with NativeVolume(engine, SIZE_BYTES, 0) as volume:
            with pytest.raises(ValueError, match="1 stores, but 2 modes"):
                volume.publish([peer], [StoreMode.RW, StoreMode.WO])
            with pytest.raises(NativeError) as caught:
                volume.publish([peer], [StoreMode.WO])
            assert caught.value.errno == errno.EINVAL
        for end in ends:
            end.close()


def test_socket_that_is_refused_stays_with_its_owner(engine: NativeEngine) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, NativePeer(engine, SIZE_BYTES, 0, 1000) as peer:
        with pytest.raises(NativeError):
            peer.add_connection(engine.queues, ours.fileno())
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"
