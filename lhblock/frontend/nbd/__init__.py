"""The NBD front end: listening, the handshake on trio, and the hand-over to the C core.

The transmission phase never passes through here: once a client has chosen its export, the socket
is given to :meth:`Export.attach`. ``docs/reference/nbd.md`` says what of the protocol is spoken.
"""

from __future__ import annotations

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
from ._sockets import SocketBytes, detach, peer_name, tune
from ._stdio import serve_stdio
from ._uri import NbdUri, parse_uri

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
    "UnknownExport",
    "adopt_activation_listeners",
    "detach",
    "negotiate",
    "open_tcp_listeners",
    "open_unix_listener",
    "parse_uri",
    "peer_name",
    "serve_nbd",
    "serve_stdio",
    "tune",
]
