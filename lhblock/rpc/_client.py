"""The client side of grpcio: calls with a deadline, from a thread or a plain program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

# See lhblock.rpc._server.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.message import Message

from lhblock.errors import ControlError
from lhblock.rpc._methods import method

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Whether one server is there is nobody else's business.
    ("grpc.use_local_subchannel_pool", 1),
]


class RpcClient:
    """Calls to one server. Use as a context manager, or call `close`.

    Args:
      address: ``unix:/absolute/path`` or ``host:port``.
      metadata: sent with every call; empty values are left out.
      reply_bytes_max: a reply beyond this is an error; -1 is no limit.
      ping_s: while a call goes on the server is asked this often whether it is there, and one that
        does not say so in the same time again is gone; 0 never asks. Other servers than ours may
        take it amiss.
    """

    def __init__(
        self,
        address: str,
        *,
        metadata: Mapping[str, str] | None = None,
        reply_bytes_max: int = -1,
        ping_s: float = 0,
    ) -> None:
        options = [*_OPTIONS, ("grpc.max_receive_message_length", reply_bytes_max)]
        if ping_s:
            ping_ms = int(ping_s * 1000)
            options += [("grpc.keepalive_time_ms", ping_ms), ("grpc.keepalive_timeout_ms", ping_ms)]
            options += [("grpc.http2.max_pings_without_data", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._metadata = tuple((key, value) for key, value in (metadata or {}).items() if value)

    def call(self, service: str, name: str, request: Message, *, timeout_s: float) -> Any:
        """Call one method and return its reply. Blocking.

        Raises:
          ControlError: the server answered an error, or none answered in time; `code` is the
            name of the gRPC status, ``UNAVAILABLE`` and ``DEADLINE_EXCEEDED`` among them.
        """
        target = method(service, name)
        invoke = self._channel.unary_unary(
            target.path,
            request_serializer=target.request.SerializeToString,
            response_deserializer=target.reply.FromString,
        )
        try:
            return invoke(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            raise ControlError(code.name, details or code.name) from error

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> RpcClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
