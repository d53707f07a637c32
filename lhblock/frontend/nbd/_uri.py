"""NBD URIs, after ``doc/uri.md`` of the reference server.

With TLS they are only written, never read: no client of ours speaks TLS.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from lhblock.errors import UsageError

from ._protocol import NBD_DEFAULT_PORT, NBD_MAX_STRING

_PATH_SAFE = "/@:-._~"
_QUERY_SAFE = "/-._~"


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is found. Exactly one of ``host`` and ``socket_path`` is set.

    ``str()`` is the URI. The port is left out when it is the one IANA assigned.

    Attributes:
      export: may be empty: the default export.
      tls: over TCP, TLS is spoken.
      user: whose pre-shared key is used; empty with certificates.
      tls_files: parameter and path of what libnbd needs to trust, or be trusted by, the server.
    """

    export: str = ""
    host: str | None = None
    port: int = NBD_DEFAULT_PORT
    socket_path: str | None = None
    tls: bool = False
    user: str = ""
    tls_files: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        assert (self.host is None) != (self.socket_path is None)
        assert self.host is not None or not self.tls
        assert self.tls or not (self.user or self.tls_files)

    def __str__(self) -> str:
        path = "/" + quote(self.export, safe=_PATH_SAFE)
        if self.socket_path is not None:
            return f"nbd+unix://{path}?socket={quote(self.socket_path, safe=_QUERY_SAFE)}"
        assert self.host is not None
        address = format_address(self.host, self.port, omit_default=True)
        if not self.tls:
            return f"nbd://{address}{path}"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        query = ""
        if self.tls_files is not None:
            parameter, file = self.tls_files
            query = f"?{parameter}={quote(file, safe=_QUERY_SAFE)}"
        return f"nbds://{user}{address}{path}{query}"


def format_address(host: str, port: int, *, omit_default: bool = False) -> str:
    """``host:port`` with brackets around an IPv6 host, percent signs of its zone encoded."""
    shown = f"[{host.replace('%', '%25')}]" if ":" in host else quote(host, safe="-._~")
    return shown if omit_default and port == NBD_DEFAULT_PORT else f"{shown}:{port}"


def parse_uri(text: str) -> NbdUri:
    """Read an ``nbd://`` or ``nbd+unix://`` URI.

    Raises:
      UsageError: not such a URI, or one with parts that mean nothing to us.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
        export = unquote(parts.path.removeprefix("/"), errors="strict")
        query = parse_qsl(
            # "+" is a plus sign in a URI; only HTML forms make it a space.
            parts.query.replace("+", "%2B"),
            keep_blank_values=True,
            strict_parsing=bool(parts.query),
            errors="strict",
        )
    except ValueError as error:
        raise UsageError(f"{text!r} is not a URI: {error}") from None
    if "\0" in export or len(export.encode()) > NBD_MAX_STRING:
        raise UsageError(
            f"{text[:200]!r}: an export name has at most {NBD_MAX_STRING} bytes, no zero"
        )
    if parts.fragment:
        raise UsageError(f"{text!r}: an NBD URI has no fragment (#); write %23 in a name")
    if parts.scheme == "nbd":
        if query:
            raise UsageError(f"{text!r}: nbd:// takes no parameter {query[0][0]!r}")
        if not parts.hostname:
            raise UsageError(f"{text!r} names no host; write nbd://HOST/EXPORT")
        host = unquote(parts.hostname)
        return NbdUri(export=export, host=host, port=NBD_DEFAULT_PORT if port is None else port)
    if parts.scheme == "nbd+unix":
        unknown = [key for key, _ in query if key != "socket"]
        if unknown:
            raise UsageError(f"{text!r}: nbd+unix:// takes no parameter {unknown[0]!r}")
        paths = [value for _, value in query]
        if parts.netloc or len(paths) != 1 or not paths[0]:
            raise UsageError(f"{text!r}: write nbd+unix:///EXPORT?socket=PATH")
        return NbdUri(export=export, socket_path=paths[0])
    raise UsageError(f"{text!r}: the scheme must be nbd or nbd+unix (TLS is not supported)")
