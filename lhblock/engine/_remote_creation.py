"""What is there at a replica process, and making a replica in one that has none. All blocking."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from lhblock.engine import wire
from lhblock.engine._config import RemoteLimits
from lhblock.engine._peer_client import EngineIdentity, PeerClient
from lhblock.replica import Generation
from lhblock.rpc.generated import peer_pb2 as pb
from lhblock.settings import RemoteAddress


@dataclass(frozen=True)
class RemoteReplica:
    """What a replica process says of itself.

    Attributes:
      state: ``initial``: it has no replica; ``closed``; ``open``: in use; or another of Longhorn's.
      size_bytes: 0 without a replica.
      blank: it has one that nobody has written to, or named a member of a set of several.
    """

    state: str
    size_bytes: int
    blank: bool


def greet_replica(place: RemoteAddress, *, volume: str) -> RemoteReplica:
    """Ask a process what it has.

    Raises:
      ReplicaUnreachable: nobody answers.
      ReplicaUnsupported: it is no replica process of ours.
      ReplicaForeign: it is another volume's.
    """
    with closing(_connect(place, volume)) as client:
        reply = client.call("Hello")
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
        client.call("Create", request)


def uncreate_replica(place: RemoteAddress) -> None:
    """Remove a replica that nobody has written to.

    Raises:
      ReplicaError: it is still there.
    """
    with closing(_connect(place, "")) as client:
        client.call("Uncreate")


def _connect(place: RemoteAddress, volume: str) -> PeerClient:
    return PeerClient(place, EngineIdentity(), RemoteLimits(), volume)
