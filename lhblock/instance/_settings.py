"""The settings of a serving process, checked together before anything starts.

Options win over ``LHBLOCK_*`` variables, which win over the defaults. This module imports
pydantic, so only ``lhblock serve`` imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lhblock.errors import UsageError
from lhblock.settings import ISCSI_PORT, NBD_PORT, QUORUM_WAIT_S, REBUILD_STREAMS

# The doors there are; `controller` has the same.
Frontend = Literal["nbd", "fuse", "tgt-iscsi", "tgt-blockdev"]

_ENV_PREFIX = "LHBLOCK_"
# Options that are not called as their setting.
_OPTIONS = {"connections_max": "--max-connections"}


class ServeSettings(BaseSettings):
    """How one ``lhblock serve`` listens and does its I/O.

    Attributes:
      listen: TCP address, ``HOST:PORT``; port 0 lets the kernel choose.
      tcp: listen on TCP at all.
      socket: path of the Unix socket; None is ``run/nbd.sock`` in the data directory.
      cache: overrides the recorded cache mode of every volume; None keeps it.
      read_only: nothing is written, the replica metadata included.
      driver: how disk I/O that may wait is done.
      queues: queue threads.
      workers: threads for I/O that would stall a queue.
      connections_max: clients at once, over all volumes.
      frontend: the doors that are opened, each named once.
      fuse_dir: where the FUSE front end mounts.
      iscsi_listen: where tgtd listens; port 0 lets the kernel choose.
      iscsi_chap: file with the names and secrets of CHAP.
      iscsi_allow: addresses, networks and initiators that may log in; none given is everybody.
      iscsi_block_size: bytes of a logical block.
      iscsi_target: one target with all volumes as its units, not a target for each.
      iscsi_shared: use the tgtd that runs already.
      iscsi_socket: of the management of that tgtd.
      iscsi_backing: how tgtd reaches a volume.
      tls_certificates: directory with X.509 files; TCP then speaks TLS.
      tls_psk: file of pre-shared keys; TCP then speaks TLS.
      tls_verify_clients: with certificates: clients need one of the same authority.
      handshake_timeout_s: how long a client may take to choose its export.
      rebuild: replicas that were away, or failed, are brought back by themselves.
      rebuild_rate: MiB a second at most for a rebuild; 0 is no limit.
      rebuild_streams: units of a rebuild under way at a time.
      replica: directories of a new volume, or addresses; none means the default one.
      quorum_wait: seconds that I/O waits for a majority of the replicas that was lost at once.
      force: open volumes although too few of their replicas are there.
      replica_timeout: seconds that a replica of another process may take for a request.
    """

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX, extra="forbid", frozen=True, validate_default=True
    )

    listen: str = f"127.0.0.1:{NBD_PORT}"
    tcp: bool = True
    socket: Path | None = None
    cache: Literal["writeback", "none"] | None = None
    read_only: bool = False
    driver: Literal["auto", "io_uring", "pool"] = "auto"
    queues: Annotated[int, Field(ge=1, le=64)] = 2
    workers: Annotated[int, Field(ge=1, le=64)] = 16
    connections_max: Annotated[int, Field(ge=1, le=65536)] = 1024
    tls_certificates: Path | None = None
    tls_psk: Path | None = None
    tls_verify_clients: bool = False
    handshake_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    rebuild: bool = True
    rebuild_rate: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    rebuild_streams: Annotated[int, Field(ge=1, le=8)] = REBUILD_STREAMS
    frontend: Annotated[tuple[Frontend, ...], NoDecode, Field(min_length=1)] = ("nbd",)
    fuse_dir: Path | None = None
    iscsi_listen: str = f"127.0.0.1:{ISCSI_PORT}"
    iscsi_chap: Path | None = None
    iscsi_allow: Annotated[tuple[str, ...], NoDecode] = ()
    iscsi_block_size: Literal["512", "4096"] = "512"
    iscsi_target: str | None = None
    iscsi_shared: bool = False
    iscsi_socket: str = "/var/run/tgtd/socket.0"
    iscsi_backing: Literal["auto", "module", "fuse"] = "auto"
    replica: Annotated[tuple[str, ...], NoDecode] = ()
    replica_timeout: Annotated[float, Field(ge=1, le=3600)] = 8.0
    quorum_wait: Annotated[float, Field(ge=0, le=86400)] = QUORUM_WAIT_S
    force: bool = False


def serve_settings(**options: Any) -> ServeSettings:
    """Return the settings; options that are None were not given.

    Raises:
      UsageError: a value is not possible; the sentence names the option, or the variable the
        value came from.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return ServeSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "settings"
        option = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
        source = option if field in given else f"{_ENV_PREFIX}{field.upper()}"
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{source} {first['input']!r}: {problem}") from error
