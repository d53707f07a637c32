"""The methods our ``.proto`` files declare, found through their descriptors; no grpc here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from lhblock.rpc.generated import (
    controller_pb2,
    health_pb2,
    peer_pb2,
    replica_pb2,
    volume_pb2,
)

CONTROLLER = "ptypes.ControllerService"
REPLICA = "ptypes.ReplicaService"
PEER = "lhblock.v1.PeerService"
VOLUME = "lhblock.v1.VolumeService"
HEALTH = "grpc.health.v1.Health"

_FILES = {
    CONTROLLER: controller_pb2,
    REPLICA: replica_pb2,
    PEER: peer_pb2,
    VOLUME: volume_pb2,
    HEALTH: health_pb2,
}


@dataclass(frozen=True)
class Method:
    """One method: its path on the wire and the classes of its messages."""

    service: str
    name: str
    request: type[Message]
    reply: type[Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


@dataclass(frozen=True)
class Call:
    """What a handler may know of one call beside the request."""

    method: Method
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def value(self, key: str) -> str:
        """The metadata value of `key` if exactly one was sent, else an empty string."""
        values = self.metadata.get(key, ())
        return values[0] if len(values) == 1 else ""


class CallFailed(Exception):
    """A handler's answer that is an error with a code; ``str()`` is the message.

    The code is the name of a gRPC status: ``FAILED_PRECONDITION``, ``NOT_FOUND``, ...
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


# Requests and replies are of the classes the method declares; the descriptor, which only the
# runtime knows, says which.
Handler = Callable[[Any, Call], Awaitable[Message]]
Handlers = Mapping[str, Handler]


def methods(service: str) -> dict[str, Method]:
    """Return the methods of `service` by name."""
    descriptor = _FILES[service].DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    return {method.name: _method(service, method) for method in descriptor.methods}


def method(service: str, name: str) -> Method:
    """Return one method. KeyError: the service declares none of this name."""
    return methods(service)[name]


def _method(service: str, descriptor: MethodDescriptor) -> Method:
    return Method(
        service,
        descriptor.name,
        GetMessageClass(descriptor.input_type),
        GetMessageClass(descriptor.output_type),
    )


def unimplemented(method: Method) -> CallFailed:
    """The answer to a declared method nobody handles."""
    return CallFailed("UNIMPLEMENTED", f"method {method.name} not implemented")
