"""What is there at a replica process, and making a replica in one that has none. All blocking."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from lhblock.engine import wire
from lhblock.engine._config import RemoteLimits
from lhblock.engine._peer_client import EngineIdentity, PeerClient, PlainReplica
from lhblock.replica import Generation
from lhblock.rpc import REPLICA
from lhblock.rpc.generated import peer_pb2 as pb
from lhblock.rpc.generated import replica_pb2
from lhblock.settings import RemoteAddress


@dataclass(frozen=True)
class RemoteReplica:
    """What a replica process says of itself.

    Attributes:
      state: ``initial``: it has no replica; ``closed``; ``open``: in use; or another of Longhorn's.
      size_bytes: 0 without a replica.
      blank: it has one that nobody has written to, or named a member of a set of several.
      plain: it speaks Longhorn's protocol only.
    """

    state: str
    size_bytes: int
    blank: bool
    plain: bool = False


def greet_replica(place: RemoteAddress, *, volume: str) -> RemoteReplica:
    """Ask a process what it has.

    Raises:
      ReplicaUnreachable: nobody answers.
      ReplicaForeign: it is another volume's.
    """
    with closing(_connect(place, volume)) as client:
        try:
            reply = client.call("Hello")
        except PlainReplica:
            return _look_at_plain(client)
        return client.understand(
            lambda: RemoteReplica(
                reply.state[: wire.TEXT_CHARS_MAX], wire.count(reply.size_bytes), reply.blank
            )
        )


def create_replica(
    place: RemoteAddress, generation: Generation, *, volume: str, size_bytes: int, encrypted: bool
) -> None:
    """Make a replica of zeros, or one of a blank one of the same size.

    Raises:
      ReplicaError: it cannot be made; nothing is left behind, or nobody knows.
    """
    request = pb.PeerCreate(
        size_bytes=size_bytes, generation=generation.encode(), encrypted=encrypted
    )
    with closing(_connect(place, volume)) as client:
        try:
            client.call("Create", request)
        except PlainReplica:
            plain = replica_pb2.ReplicaCreateRequest(size=str(size_bytes))
            client.call("ReplicaCreate", plain, service=REPLICA)


def uncreate_replica(place: RemoteAddress) -> None:
    """Remove a replica that nobody has written to.

    Raises:
      ReplicaError: it is still there.
    """
    with closing(_connect(place, "")) as client:
        client.call("Uncreate")


def _look_at_plain(client: PeerClient) -> RemoteReplica:
    info = client.call("ReplicaGet", service=REPLICA).replica
    size = info.size or "0"
    if not size.isascii() or not size.isdecimal():
        size = "0"
    return RemoteReplica(info.state[: wire.TEXT_CHARS_MAX], int(size), False, plain=True)


def _connect(place: RemoteAddress, volume: str) -> PeerClient:
    return PeerClient(place, EngineIdentity(), RemoteLimits(), volume)
