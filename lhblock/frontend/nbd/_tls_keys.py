"""The keys of TLS: which files there are, looked at before anything starts.

What is in them is read by nbdkit alone, except the names in a file of pre-shared keys. No message
here shows a line of such a file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from lhblock.errors import UsageError

# What nbdkit looks for in a directory of certificates.
CERTIFICATE_FILES: Final = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
PSK_FILE_BYTES_MAX: Final = 1 << 20

_log = structlog.get_logger("lhblock.frontend.nbd")


@dataclass(frozen=True)
class TlsKeys:
    """Exactly one of ``certificates`` and ``psk`` is set.

    Attributes:
      certificates: absolute path of the directory with the X.509 files.
      psk: absolute path of a file of ``NAME:KEY`` lines, the key in hex.
      verify_clients: with certificates: let in only clients that have one of the same authority.
      user: the first name in the file of pre-shared keys, else empty.
    """

    certificates: Path | None
    psk: Path | None
    verify_clients: bool
    user: str

    @property
    def options(self) -> list[str]:
        """nbdkit's options: paths, never keys."""
        if self.psk is not None:
            return [f"--tls-psk={self.psk}"]
        verify = ["--tls-verify-peer"] if self.verify_clients else []
        return [f"--tls-certificates={self.certificates}", *verify]

    @property
    def client_files(self) -> tuple[str, str]:
        """The URI's parameter for a client on this machine that may read the same files."""
        if self.psk is not None:
            return ("tls-psk-file", str(self.psk))
        return ("tls-certificates", str(self.certificates))


def read_tls_keys(
    certificates: Path | None, psk: Path | None, *, verify_clients: bool
) -> TlsKeys | None:
    """Look at what was given; None if nothing was.

    A key that others than its owner may read is used, with a warning.

    Raises:
      UsageError: both were given, or files are missing or are not what they should be.
    """
    if certificates is not None and psk is not None:
        raise UsageError("--tls-certificates and --tls-psk exclude each other; give one")
    if verify_clients and certificates is None:
        raise UsageError(
            "--tls-verify-clients is for --tls-certificates; add that, or leave it out"
        )
    if certificates is not None:
        directory = Path.cwd() / certificates
        for name in CERTIFICATE_FILES:
            _check_file("--tls-certificates", directory / name)
        _warn_if_open(directory / "server-key.pem")
        return TlsKeys(directory, None, verify_clients, "")
    if psk is not None:
        path = Path.cwd() / psk
        _check_file("--tls-psk", path)
        _warn_if_open(path)
        return TlsKeys(None, path, False, _first_user(path))
    return None


def _check_file(option: str, path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{option}: {path} is not a file")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}") from error


def _warn_if_open(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        _log.warning(
            "a key can be read or written by others; use chmod 600",
            path=str(path),
            mode=f"{mode:o}",
        )


def _first_user(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(PSK_FILE_BYTES_MAX + 1)
    lines = [line for line in raw.splitlines() if line.strip() and not line.startswith(b"#")]
    if len(raw) > PSK_FILE_BYTES_MAX or not lines:
        raise UsageError(
            f"--tls-psk: {path} has no keys, or more than {PSK_FILE_BYTES_MAX} bytes;"
            " make one with 'psktool -u NAME -p FILE'"
        )
    for number, line in enumerate(lines, 1):
        name, _, key = line.strip().partition(b":")
        if not name or not key or key.strip(b"0123456789abcdefABCDEF"):
            raise UsageError(
                f"--tls-psk: key {number} of {path} is not NAME:KEY with the key in hex;"
                " make one with 'psktool -u NAME -p FILE'"
            )
    return os.fsdecode(lines[0].strip().partition(b":")[0])
