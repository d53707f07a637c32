"""The NBD front end: listening, the handshake on trio, and the hand-over to the C core.

The transmission phase never passes through here: once a client has chosen its export, the socket
is given to :meth:`Export.attach`. ``docs/reference/nbd.md`` says what of the protocol is spoken.

Names are imported when first used: whoever needs an address only must not load an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._exports import Connection, Export, ExportDescription, Exports, UnknownExport
    from ._listeners import (
        Listener,
        adopt_activation_listeners,
        open_tcp_listeners,
        open_unix_listener,
    )
    from ._negotiation import Agreement, ByteStream, HandshakeEnded, negotiate
    from ._protocol import NBD_DEFAULT_PORT
    from ._server import ClientInfo, NbdServer, serve_nbd
    from ._sockets import SocketBytes, detach, notice_loss, peer_credentials, peer_name, tune
    from ._stdio import serve_stdio
    from ._tls import serve_tls
    from ._tls_keys import TlsKeys, read_tls_keys
    from ._uri import NbdUri, parse_uri

_HOMES = {
    "NBD_DEFAULT_PORT": "_protocol",
    "Agreement": "_negotiation",
    "ByteStream": "_negotiation",
    "ClientInfo": "_server",
    "Connection": "_exports",
    "Export": "_exports",
    "ExportDescription": "_exports",
    "Exports": "_exports",
    "HandshakeEnded": "_negotiation",
    "Listener": "_listeners",
    "NbdServer": "_server",
    "NbdUri": "_uri",
    "SocketBytes": "_sockets",
    "TlsKeys": "_tls_keys",
    "UnknownExport": "_exports",
    "adopt_activation_listeners": "_listeners",
    "detach": "_sockets",
    "negotiate": "_negotiation",
    "open_tcp_listeners": "_listeners",
    "open_unix_listener": "_listeners",
    "parse_uri": "_uri",
    "notice_loss": "_sockets",
    "peer_credentials": "_sockets",
    "peer_name": "_sockets",
    "read_tls_keys": "_tls_keys",
    "serve_nbd": "_server",
    "serve_stdio": "_stdio",
    "serve_tls": "_tls",
    "tune": "_sockets",
}

__all__ = [
    "NBD_DEFAULT_PORT",
    "Agreement",
    "ByteStream",
    "ClientInfo",
    "Connection",
    "Export",
    "ExportDescription",
    "Exports",
    "HandshakeEnded",
    "Listener",
    "NbdServer",
    "NbdUri",
    "SocketBytes",
    "TlsKeys",
    "UnknownExport",
    "adopt_activation_listeners",
    "detach",
    "negotiate",
    "notice_loss",
    "open_tcp_listeners",
    "open_unix_listener",
    "parse_uri",
    "peer_credentials",
    "peer_name",
    "read_tls_keys",
    "serve_nbd",
    "serve_stdio",
    "serve_tls",
    "tune",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
