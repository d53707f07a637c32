"""gRPC: our ``.proto`` files, their generated messages, and the one wrapper of grpcio.

Importing the package imports protobuf; `serve_rpc` and `RpcClient` import grpcio when they are
first asked for, so that an offline command never pays for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lhblock.rpc._methods import (
    CONTROLLER,
    HEALTH,
    PEER,
    REPLICA,
    VOLUME,
    Call,
    CallFailed,
    Handler,
    Handlers,
    Method,
    method,
    methods,
    unimplemented,
)

if TYPE_CHECKING:
    from lhblock.rpc._client import RpcClient
    from lhblock.rpc._server import serve_rpc

__all__ = [
    "CONTROLLER",
    "HEALTH",
    "PEER",
    "REPLICA",
    "VOLUME",
    "Call",
    "CallFailed",
    "Handler",
    "Handlers",
    "Method",
    "RpcClient",
    "method",
    "methods",
    "serve_rpc",
    "unimplemented",
]


def __getattr__(name: str) -> object:
    if name == "RpcClient":
        from lhblock.rpc._client import RpcClient

        return RpcClient
    if name == "serve_rpc":
        from lhblock.rpc._server import serve_rpc

        return serve_rpc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
