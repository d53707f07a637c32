"""Keys of all kinds, made for one test run: pre-shared ones, and two certificate authorities."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.live.serving import requires, tool

SERVER = """
cn = localhost
dns_name = localhost
ip_address = 127.0.0.1
tls_www_server
signing_key
expiration_days = 2
"""
CLIENT = """
cn = a client
tls_www_client
signing_key
expiration_days = 2
"""
AUTHORITY = """
cn = {name}
ca
cert_signing_key
expiration_days = 2
"""


def make_psk(directory: Path, *users: str) -> Path:
    """A file with a key for each user, as psktool writes it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / "keys.psk"
    for user in users:
        tool("psktool", "-u", user, "-p", str(path))
    path.chmod(0o600)
    return path


def key_of(psk: Path, user: str) -> str:
    """One user's key, in hex."""
    lines = dict(line.split(":") for line in psk.read_text().split())
    return lines[user]


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and what it signed.

    Attributes:
      server: what the server is given.
      client: the authority's certificate, and one of a client.
      stranger: the authority's certificate only.
    """

    server: Path
    client: Path
    stranger: Path


def make_authority(directory: Path, name: str) -> Authority:
    """Make one below ``directory``."""
    made = Authority(*(directory / part for part in ("server", "client", "stranger")))
    for path in (directory, made.server, made.client, made.stranger):
        path.mkdir(mode=0o700)
    key, certificate = directory / "ca-key.pem", directory / "ca-cert.pem"
    _key(key)
    _certtool(
        *("--generate-self-signed", "--load-privkey", str(key), "--outfile", str(certificate)),
        template=AUTHORITY.format(name=name),
    )
    for place, part, template in ((made.server, "server", SERVER), (made.client, "client", CLIENT)):
        _key(place / f"{part}-key.pem")
        _certtool(
            *("--generate-certificate", "--load-ca-certificate", str(certificate)),
            *("--load-ca-privkey", str(key), "--load-privkey", str(place / f"{part}-key.pem")),
            *("--outfile", str(place / f"{part}-cert.pem")),
            template=template,
        )
    for place in (made.server, made.client, made.stranger):
        (place / "ca-cert.pem").write_bytes(certificate.read_bytes())
    return made


def _key(path: Path) -> None:
    tool("certtool", "--generate-privkey", "--key-type=ed25519", "--outfile", str(path))
    path.chmod(0o600)


def _certtool(*arguments: str, template: str) -> None:
    subprocess.run(
        [requires("certtool"), *arguments, "--template", "/dev/stdin"],
        input=template.encode(),
        capture_output=True,
        check=True,
    )
