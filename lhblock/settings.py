"""What a user may set and how it is read: the data directory, names, sizes, addresses.

Only the standard library is imported, because every command needs this module and the quick
ones must answer at once. The settings of a serving process, which come from options and
``LHBLOCK_*`` variables and are checked together, are in `lhblock.instance`.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from lhblock.errors import LhblockError, UsageError

DATA_DIR_VARIABLE = "LHBLOCK_DATA_DIR"
DEBUG_VARIABLE = "LHBLOCK_DEBUG"
BLOCK_BYTES = 4096
NAME_CHARS_MAX = 64
# The kernel's sun_path has 108 bytes with the final zero.
SOCKET_PATH_BYTES_MAX = 107
# One PiB; the engine refuses more.
VOLUME_BYTES_MAX = 1 << 50
NBD_PORT = 10809
ISCSI_PORT = 3260
# How long a volume that lost the quorum of its replicas waits for them before it is faulted.
QUORUM_WAIT_S = 30.0
# Pieces that a rebuild copies at a time.
REBUILD_STREAMS = 4
REMOTE_SCHEME = "tcp://"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
# run/<name>.sock must not be the NBD socket or a control socket.
_RESERVED = re.compile(r"nbd|serve-[0-9]+")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([a-zA-Z]*)")
_UNIT_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_SNAPSHOT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_SNAPSHOT_CHARS_MAX = 200


@dataclass(frozen=True)
class Listen:
    """A TCP address to listen on. Port 0 lets the kernel choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class RemoteAddress:
    """Where a replica process answers control calls: ``tcp://HOST:PORT``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{REMOTE_SCHEME}{Listen(self.host, self.port)}"


@dataclass(frozen=True)
class DataDir:
    """The directory that holds everything of one installation, and the paths inside it."""

    path: Path

    @property
    def volumes(self) -> Path:
        return self.path / "volumes"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def nbd_socket(self) -> Path:
        return self.run / "nbd.sock"

    def volume(self, name: str) -> Path:
        return self.volumes / name

    def control_link(self, volume: str) -> Path:
        """The link that leads to the control socket of the process serving `volume`."""
        return self.run / f"{volume}.sock"

    def control_socket(self, pid: int) -> Path:
        return self.run / f"serve-{pid}.sock"

    def handover_socket(self, pid: int) -> Path:
        """Where a serving process takes over mounts of `lhblock mount-fuse`."""
        return self.run / f"serve-{pid}.fuse"

    def prepare(self) -> None:
        """Make the directory and its two subdirectories, each 0700.

        Raises:
          LhblockError: something that is not a directory is in the way, or the file system
            refuses.
        """
        for path in (self.path, self.volumes, self.run):
            try:
                path.mkdir(mode=0o700, parents=path == self.path, exist_ok=True)
            except OSError as error:
                reason = error.strerror or str(error)
                if isinstance(error, FileExistsError):
                    reason = "something that is not a directory is there"
                raise LhblockError(
                    f"cannot make the data directory {path}: {reason}; choose another with"
                    f" --data-dir or {DATA_DIR_VARIABLE}"
                ) from error


def data_dir(option: str | os.PathLike[str] | None = None) -> DataDir:
    """Return the data directory: the option, else the environment, else the default.

    Nothing is created. The default is ``/var/lib/lhblock`` for root and
    ``$XDG_DATA_HOME/lhblock`` (``~/.local/share/lhblock``) for others.

    Raises:
      UsageError: the path exists and is not a directory.
    """
    chosen = os.fspath(option) if option else os.environ.get(DATA_DIR_VARIABLE, "")
    if not chosen:
        if os.geteuid() == 0:
            chosen = "/var/lib/lhblock"
        else:
            home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
            chosen = os.fspath(Path(home) / "lhblock")
    path = Path.cwd() / chosen
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return DataDir(path)
    except OSError as error:
        raise UsageError(f"cannot use the data directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise UsageError(f"the data directory {path} is not a directory")
    return DataDir(path)


def check_volume_name(name: str) -> str:
    """Return `name` if a volume may be called so: 2 to 64 of ``a-z A-Z 0-9 _ . -``.

    Raises:
      UsageError: with the name and the rule.
    """
    if len(name) > NAME_CHARS_MAX or _NAME.fullmatch(name) is None:
        raise UsageError(
            f"invalid volume name {name!r}: use 2 to {NAME_CHARS_MAX} letters, digits,"
            " '_', '.' or '-', beginning with a letter or digit"
        )
    if _RESERVED.fullmatch(name):
        raise UsageError(
            f"invalid volume name {name!r}: a socket in the data directory is called so"
        )
    return name


def check_snapshot_name(name: str) -> str:
    """Return `name` if a snapshot may be called so; it becomes part of a file name.

    Raises:
      UsageError: with the name and the rule.
    """
    if len(name) > _SNAPSHOT_CHARS_MAX or _SNAPSHOT.fullmatch(name) is None:
        raise UsageError(
            f"invalid snapshot name {name!r}: use 1 to {_SNAPSHOT_CHARS_MAX} letters, digits,"
            " '_', '.' or '-', beginning with a letter or digit"
        )
    if "volume-head" in name:
        raise UsageError(f"invalid snapshot name {name!r}: 'volume-head' names the live head")
    return name


def parse_size(text: str) -> int:
    """Return the bytes that `text` means: ``100G``, ``1.5m``, ``4KiB``, ``4096``.

    Units are ``b k m g t p`` with an optional ``b`` or ``ib``, in any case, and always powers
    of 1024. The result is whole bytes; a fraction of a byte is an error.

    Raises:
      UsageError: with the text and what a size looks like.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"invalid size {text!r}: give a number with a unit, like 100G or 512MiB")
    number, suffix = match.groups()
    unit = suffix.lower()
    for ending in ("ib", "b"):
        if len(unit) > len(ending) and unit.endswith(ending):
            unit = unit.removesuffix(ending)
            break
    if unit not in _UNIT_SHIFTS:
        raise UsageError(f"invalid size {text!r}: the units are K, M, G, T and P (powers of 1024)")
    whole, _, fraction = number.partition(".")
    scale: int = 1 << _UNIT_SHIFTS[unit]
    numerator = int(f"{whole}{fraction}") * scale
    size_bytes, rest = divmod(numerator, int(10 ** len(fraction)))
    if rest:
        raise UsageError(f"invalid size {text!r}: it is not a whole number of bytes")
    return size_bytes


def parse_volume_size(text: str) -> int:
    """Return the bytes of a volume size: positive and a multiple of 4096.

    Raises:
      UsageError: with the nearest size that is possible.
    """
    size_bytes = parse_size(text)
    if size_bytes < BLOCK_BYTES:
        raise UsageError(f"size {text} is too small: a volume has at least {BLOCK_BYTES} bytes")
    if size_bytes > VOLUME_BYTES_MAX:
        raise UsageError(f"size {text} is too large: a volume has at most {VOLUME_BYTES_MAX} bytes")
    if size_bytes % BLOCK_BYTES:
        rounded = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        raise UsageError(
            f"size {text} ({size_bytes} bytes) is not a multiple of {BLOCK_BYTES};"
            f" the next one is {rounded}"
        )
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` for people: ``100 GiB``, ``1.5 MiB``, ``4096 B``."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or (unit == "B" and size_bytes < 10240):
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def parse_listen(text: str) -> Listen:
    """Return the address in ``HOST:PORT``, ``[V6]:PORT`` or ``:PORT`` (all interfaces).

    Raises:
      UsageError: no port, or one outside 0..65535.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"invalid address {text!r}: give HOST:PORT, like 127.0.0.1:{NBD_PORT} or"
            f" [::1]:{NBD_PORT}"
        )
    return Listen(host, int(port))


def parse_replica(text: str, directory: Path) -> Path | RemoteAddress:
    """Return where a replica is: a directory, or ``tcp://HOST:PORT`` of a replica process.

    Args:
      directory: what relative paths are taken from.

    Raises:
      UsageError: an address without a host or a port, or of another kind.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        return directory / text
    if f"{scheme}://" == REMOTE_SCHEME:
        host, _, port = rest.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536:
            return RemoteAddress(host, int(port))
    raise UsageError(
        f"invalid replica {text!r}: give a directory, or tcp://HOST:PORT of an 'lhblock replica'"
    )


def parse_labels(pairs: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Return the labels of repeated ``--label KEY=VALUE`` options.

    Raises:
      UsageError: no ``=``, an empty key or value, or a key given twice.
    """
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"invalid label {pair!r}: give KEY=VALUE, both not empty")
        if key in labels:
            raise UsageError(f"label {key!r} is given twice")
        labels[key] = value
    return labels


def debug_wanted() -> bool:
    """True if ``LHBLOCK_DEBUG`` asks for tracebacks and debug logs."""
    return os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "no", "false")
