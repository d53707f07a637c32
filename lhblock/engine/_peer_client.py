"""Calls and data connections of an engine to one replica process.

Blocking; for worker threads. Every wait has a bound from :class:`RemoteLimits`. Whatever goes wrong
is an error about this replica: it does not answer, or it said what was wrong, or what it said makes
no sense.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from lhblock.engine import wire
from lhblock.engine._config import RemoteLimits
from lhblock.engine._unit_connection import receive
from lhblock.errors import (
    ControlError,
    LhblockError,
    ReplicaForeign,
    ReplicaIO,
    ReplicaUnreachable,
    ReplicaUnsupported,
)
from lhblock.replica import MalformedError
from lhblock.rpc import PEER
from lhblock.rpc.generated import peer_pb2 as pb
from lhblock.settings import Listen, RemoteAddress

_SILENT: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")

T = TypeVar("T")


class PlainReplica(ReplicaUnsupported):
    """The process answers Longhorn's calls and not ours."""


class EngineIdentity:
    """Who an engine is to the replicas of one volume.

    Attributes:
      id: made anew whenever a volume is opened.
      epoch: the one that it was granted; 0 before.
    """

    def __init__(self) -> None:
        self.id = str(uuid.uuid4())
        self.epoch = 0

    def metadata(self) -> dict[str, str]:
        """What every call carries."""
        return {wire.ENGINE_KEY: self.id}

    def hello(self, view: int) -> bytes:
        """What begins a data connection."""
        return wire.HELLO.pack(self.epoch, uuid.UUID(self.id).bytes, view)


class PeerClient:
    """The control connection to one replica process. Close it.

    Args:
      address: of the process.
      volume: what its replica should say it belongs to.
      pings: ask whether it is there while a call goes on; Longhorn's would take it amiss.
    """

    def __init__(
        self,
        address: RemoteAddress,
        identity: EngineIdentity,
        limits: RemoteLimits,
        volume: str,
        *,
        pings: bool = True,
    ) -> None:
        from lhblock.rpc import RpcClient

        self._address = address
        self._identity = identity
        self._limits = limits
        self._client = RpcClient(
            str(Listen(address.host, address.port)),
            metadata={**identity.metadata(), "volume-name": volume},
            reply_bytes_max=wire.MESSAGE_BYTES_MAX,
            ping_s=limits.ping_s if pings else 0,
        )

    def call(
        self,
        name: str,
        request: Message | None = None,
        *,
        service: str = PEER,
        timeout_s: float | None = None,
    ) -> Any:
        """Call one method and return its reply. Several threads may.

        Args:
          timeout_s: default ``limits.call_timeout_s``.

        Raises:
          ReplicaUnreachable: it did not answer in time; it may be done all the same.
          PlainReplica: the process there has no such service.
          LhblockError: what the replica said went wrong.
        """
        wait_s = self._limits.call_timeout_s if timeout_s is None else timeout_s
        try:
            return self._client.call(
                service, name, Empty() if request is None else request, timeout_s=wait_s
            )
        except ControlError as error:
            raise self._explain(name, error, wait_s) from error
        except ValueError as error:
            # grpcio's word for a channel that another thread has closed.
            raise ReplicaUnreachable(str(self._address), "its connection was closed") from error

    def _explain(self, name: str, error: ControlError, wait_s: float) -> LhblockError:
        address, text = str(self._address), str(error)
        if error.code == "ABORTED":
            return wire.decode_error(address, text)
        if error.code == "UNIMPLEMENTED":
            return PlainReplica(
                address, "speaks Longhorn's protocol only; this cannot be asked of it"
            )
        if error.code == "DEADLINE_EXCEEDED":
            return ReplicaUnreachable(address, f"did not answer {name} within {wait_s:g} s")
        if error.code in _SILENT:
            # grpcio tells every attempt; the last words are the system's.
            why = text.rpartition(": ")[2][: wire.TEXT_CHARS_MAX]
            return ReplicaUnreachable(address, f"does not answer: {why}")
        if error.code == "FAILED_PRECONDITION":
            return ReplicaForeign(address, text[: wire.TEXT_CHARS_MAX])
        return ReplicaIO(address, f"{name} failed: {text[: wire.TEXT_CHARS_MAX]}")

    def understand(self, decode: Callable[[], T]) -> T:
        """What a reply means.

        Raises:
          ReplicaIO: it makes no sense.
        """
        try:
            return decode()
        except MalformedError as error:
            raise ReplicaIO(str(self._address), f"sent a reply that {error}") from error

    def close(self) -> None:
        """Close the connection. A call that is going on fails."""
        self._client.close()

    # ---- Data connections.

    def connect(self, hello: pb.PeerHello, view: int | None) -> int:
        """Make a data connection, past its Hello; return its descriptor, the caller's.

        Args:
          hello: what the process said of itself.
          view: 0, or a view that was opened; None: without a Hello, as Longhorn's engines.

        Raises:
          ReplicaUnreachable: nobody answers there.
          ReplicaIO: it was refused.
        """
        address = str(self._address)
        try:
            sock = self._open_socket(hello)
        except OSError as error:
            raise ReplicaUnreachable(
                address, f"takes no data connections: {error.strerror or error}"
            ) from error
        try:
            if view is not None:
                self._say_hello(sock, view)
            return sock.detach()
        except OSError as error:
            raise ReplicaUnreachable(
                address, f"a data connection failed: {error.strerror or error}"
            ) from error
        finally:
            sock.close()

    def _open_socket(self, hello: pb.PeerHello) -> socket.socket:
        timeout_s = self._limits.connect_timeout_s
        if hello.data_protocol == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(hello.data_socket)
            except BaseException:
                sock.close()
                raise
            return sock
        if not 0 < hello.data_port < 65536:
            raise ReplicaIO(str(self._address), f"has the data port {hello.data_port}")
        sock = socket.create_connection((self._address.host, hello.data_port), timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _say_hello(self, sock: socket.socket, view: int) -> None:
        payload = self._identity.hello(view)
        header = wire.HEADER.pack(wire.MAGIC, 0, wire.HELLO_FRAME, 0, len(payload), len(payload))
        sock.sendall(header + payload)
        reply = receive(sock, wire.HEADER.size)
        magic, sequence, kind, _, _, payload_bytes = wire.HEADER.unpack(reply)
        if magic != wire.MAGIC or sequence != 0 or payload_bytes > wire.TEXT_CHARS_MAX:
            raise ReplicaIO(str(self._address), "does not speak the data protocol on its data port")
        text = receive(sock, payload_bytes).decode(errors="replace")
        if kind != wire.RESPONSE:
            raise ReplicaIO(str(self._address), f"refused a data connection: {text or kind}")
