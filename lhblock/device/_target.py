"""What is attached: the name for people, where it is served, and how its device is recognised."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from lhblock.device._iscsi_uri import SCHEME, IscsiUri, parse_iscsi_uri
from lhblock.errors import DeviceError
from lhblock.frontend.nbd._uri import NbdUri, parse_uri

IDENTITY_PREFIX: Final = "lhblock:"


@dataclass(frozen=True)
class Target:
    """A volume that is served.

    Attributes:
      volume: what the user called it: a name, or the URI.
      identity: the same for every attach of this volume on this host, whatever the address.
      nbd: where it is served over NBD, if it is.
      iscsi: where it is served over iSCSI, if it is.
      file: what the FUSE front end of this host shows it as, if it does.
    """

    volume: str
    identity: str
    nbd: NbdUri | None
    iscsi: IscsiUri | None = None
    file: Path | None = None

    @property
    def uri(self) -> NbdUri:
        """Where it is served over NBD. DeviceError: it is not."""
        if self.nbd is None:
            raise DeviceError(f"{self.volume} is not served over NBD, which this needs")
        return self.nbd

    @classmethod
    def of_volume(cls, data_dir: str, name: str, uris: list[str]) -> Target:
        """A volume of a data directory. The Unix socket, whose path is fixed, is preferred.

        Addresses with TLS, which the kernel does not speak, are passed over.
        """
        plain = [parse_uri(uri) for uri in uris if uri.startswith(("nbd:", "nbd+unix:"))]
        found = sorted(plain, key=lambda uri: uri.socket_path is None)
        units = [parse_iscsi_uri(uri) for uri in uris if uri.startswith(SCHEME)]
        files = [Path(uri) for uri in uris if uri.startswith("/")]
        return cls(
            name,
            volume_identity(data_dir, name),
            found[0] if found else None,
            units[0] if units else None,
            files[0] if files else None,
        )

    @classmethod
    def of_uri(cls, text: str) -> Target:
        """An export found by its address. UsageError: not such a URI."""
        if text.startswith(SCHEME):
            return cls(text, uri_identity(text), None, parse_iscsi_uri(text))
        return cls(text, uri_identity(text), parse_uri(text))


@dataclass(frozen=True)
class AttachOptions:
    """How a device behaves.

    Attributes:
      connections: to the server.
      timeout_s: after which a request without a reply is tried on another connection.
      away_s: how long requests wait for a server that went away before they fail.
      read_only: nothing can be written through this device.
    """

    connections: int = 2
    timeout_s: int = 60
    away_s: int = 600
    read_only: bool = False


def volume_identity(data_dir: str, name: str) -> str:
    """The same for every way to write the path of the data directory."""
    return f"{IDENTITY_PREFIX}{os.path.realpath(data_dir)}/volumes/{name}"


def uri_identity(text: str) -> str:
    uri = parse_iscsi_uri(text) if text.startswith(SCHEME) else parse_uri(text)
    return f"{IDENTITY_PREFIX}{uri}"


def pack(target: Target, options: AttachOptions) -> str:
    """Both as one line, for the process that keeps the device."""
    words = {"volume": target.volume, "identity": target.identity, "uri": str(target.uri)}
    return json.dumps({"target": words, "options": asdict(options)})


def unpack(line: str) -> tuple[Target, AttachOptions]:
    document = json.loads(line)
    words = document["target"]
    target = Target(words["volume"], words["identity"], parse_uri(words["uri"]))
    return target, AttachOptions(**document["options"])
