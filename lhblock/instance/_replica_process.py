"""The replica process: control service on port P, data connections on P+1, until a signal."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import structlog
import trio

from lhblock.engine import CacheMode, DriverChoice, Engine, EngineOptions, open_engine
from lhblock.errors import FrontendError, LhblockError, UsageError
from lhblock.frontend.nbd import Listener, open_tcp_listeners, open_unix_listener
from lhblock.instance._identity import check_identity
from lhblock.instance._peer_service import DataAddress, PeerService
from lhblock.instance._replica import Replica, ReplicaState
from lhblock.instance._replica_data import DataServer
from lhblock.instance._replica_service import SNAPSHOT_COUNT_MAX, ReplicaService
from lhblock.instance._signals import run_until_signal
from lhblock.rpc import PEER, REPLICA, Call, serve_rpc
from lhblock.settings import Listen

CONTROL_THREADS_MAX: Final = 32
"""More than a rebuild has streams, so that it never keeps others waiting."""
REQUEST_BYTES_MAX: Final = 8 << 20
CONTROL_PATH_VARIABLE: Final = "LONGHORN_CONTROL_PATH"
_CONTROL_PATH_DEFAULT: Final = "/var/lib/longhorn"
_PORT_PAIR_TRIES: Final = 32

_log = structlog.get_logger("lhblock.instance")


@dataclass(frozen=True)
class ReplicaOptions:
    """How one ``lhblock replica`` runs.

    Attributes:
      path: the directory.
      listen: where control calls are answered; data connections are one port higher. Port 0 lets
        the kernel choose both.
      size_bytes: of a new replica; without it the directory may wait for a ``ReplicaCreate``.
      volume, instance: who callers must be looking for; empty is not checked.
      data_protocol: ``unix`` takes data connections on a Unix socket instead of P+1.
      plain: answer only what Longhorn's replica does; its engines do not ask for more.
      data_socket: its path; None is Longhorn's, which is made of the control path and the volume.
    """

    path: Path
    listen: Listen
    size_bytes: int | None = None
    volume: str = ""
    instance: str = ""
    data_protocol: Literal["tcp", "unix"] = "tcp"
    data_socket: Path | None = None
    unmap_mark: bool = False
    snapshot_max_count: int = SNAPSHOT_COUNT_MAX
    snapshot_max_size: int = 0
    encrypted: bool = False
    plain: bool = False
    cache: CacheMode = "writeback"
    driver: DriverChoice = "auto"
    queues: int = 2
    workers: int = 16


@dataclass(frozen=True)
class ReplicaReady:
    """Where a replica process answers. `created`: this process made the replica."""

    pid: int
    path: str
    control: str
    data: str
    state: ReplicaState
    created: bool
    driver: str
    driver_reason: str


def data_socket_path(volume: str, control_path: str | None) -> Path:
    """Where the Unix socket for data connections is.

    Args:
      control_path: value of ``LONGHORN_CONTROL_PATH``; one that cannot be meant is passed over.

    Raises:
      UsageError: the volume has no name that could be a file's.
    """
    if not volume or "/" in volume:
        raise UsageError(
            "data connections over a Unix socket need the volume's name for its path; give"
            " --volume-name, or the path itself with --data-socket"
        )
    chosen = os.path.normpath(control_path or "")
    if not chosen.startswith("/") or chosen == "/" or f"{chosen}/".startswith("/dev/"):
        chosen = _CONTROL_PATH_DEFAULT
    return Path(f"/host{chosen}") / "unix-domain-socket" / f"{volume}.sock"


async def run_replica(options: ReplicaOptions, *, on_ready: Callable[[ReplicaReady], None]) -> None:
    """Serve one replica until SIGINT or SIGTERM; a second signal ends the process at once.

    Args:
      on_ready: called once, when engines can connect.

    Raises:
      UsageError: an option that cannot be.
      LhblockError: the directory or an address cannot be used.

    Cancelled: as after a signal.
    """
    await run_until_signal(partial(serve_replica, options, on_ready))


async def serve_replica(options: ReplicaOptions, on_ready: Callable[[ReplicaReady], None]) -> None:
    """Serve one replica until cancelled; as :func:`run_replica` without its signals."""
    failure: Exception | None = None
    how = EngineOptions(queues=options.queues, workers=options.workers, driver=options.driver)
    async with open_engine(how) as engine, trio.open_nursery() as nursery:
        try:
            ready = await _start(options, engine, nursery)
        except Exception as error:
            # Raised below, as it is, and not in a group.
            failure = error
            nursery.cancel_scope.cancel()
        else:
            on_ready(ready)
            await trio.sleep_forever()
    if failure is not None:
        raise failure


async def _start(options: ReplicaOptions, engine: Engine, nursery: trio.Nursery) -> ReplicaReady:
    replica = Replica(
        engine,
        options.path,
        nursery,
        volume=options.volume,
        cache=options.cache,
        encrypted=options.encrypted,
    )
    created = await _create_if_new(replica, options.size_bytes)
    service = ReplicaService(
        replica,
        unmap_mark=options.unmap_mark,
        snapshot_max_count=options.snapshot_max_count,
        snapshot_max_size=options.snapshot_max_size,
    )
    listeners: list[Listener] = []

    def data() -> DataAddress:
        if options.data_protocol == "unix":
            return DataAddress("unix", socket=Path(listeners[0].address))
        return DataAddress("tcp", port=listeners[0].port)

    peers = PeerService(replica, volume=options.volume, data=data)
    services = {REPLICA: service.handlers}
    if not options.plain:
        services[PEER] = peers.handlers
    serve_control = partial(
        serve_rpc,
        services=services,
        check=check_identity("replica", options.volume, options.instance),
        unexpected=_log_unexpected,
        threads_max=CONTROL_THREADS_MAX,
        message_bytes_max=REQUEST_BYTES_MAX,
    )
    state, _ = await replica.look()
    opened, control = await _listen(options, nursery, serve_control)
    listeners.extend(opened)
    nursery.start_soon(replica.hold_hosted)
    await nursery.start(DataServer(replica).serve, listeners)
    return ReplicaReady(
        pid=os.getpid(),
        path=str(options.path),
        control=control,
        data=listeners[0].address,
        state=state,
        created=created,
        driver=engine.driver,
        driver_reason=engine.driver_reason,
    )


async def _create_if_new(replica: Replica, size_bytes: int | None) -> bool:
    state, meta = await replica.look()
    if state == "error":
        _log.error("the replica cannot be opened as it is", replica=str(replica.path))
    if size_bytes is None:
        return False
    if state == "initial":
        await replica.create(size_bytes)
        return True
    if state == "closed" and meta.size_bytes != size_bytes:
        _log.warning(
            "the replica exists with another size; --size is only for creating it",
            replica=str(replica.path),
            size_bytes=meta.size_bytes,
        )
    return False


async def _listen(
    options: ReplicaOptions,
    nursery: trio.Nursery,
    serve_control: Callable[..., Awaitable[None]],
) -> tuple[list[Listener], str]:
    """Start the control service and open the data listeners, two ports in a row."""
    host, port = options.listen.host, options.listen.port
    if options.data_protocol == "unix":
        path = options.data_socket or data_socket_path(
            options.volume, os.environ.get(CONTROL_PATH_VARIABLE)
        )
        if not path.parent.is_dir():
            raise FrontendError(f"cannot listen on {path}: its directory does not exist")
        listener = await open_unix_listener(path)
        try:
            got = await nursery.start(serve_control, _rpc_address(host, port))
        except BaseException:
            listener.close()
            raise
        return [listener], str(Listen(host, got))
    if port == 65535:
        raise UsageError("port 65535 has no next one for data connections; choose another")
    for attempt in range(_PORT_PAIR_TRIES):
        listeners = await open_tcp_listeners(host, port + 1 if port else 0)
        try:
            # Where the kernel chooses, it chooses the second of the pair.
            control_port = listeners[0].port - 1
            if len(listeners) > 1 and not port:
                raise UsageError(f"{host} is several addresses; with port 0 give one of them")
            got = await nursery.start(serve_control, _rpc_address(host, control_port))
            return listeners, str(Listen(host, got))
        except BaseException as error:
            for listener in listeners:
                listener.close()
            taken = isinstance(error, LhblockError) and not isinstance(error, UsageError)
            if port or not taken or attempt == _PORT_PAIR_TRIES - 1:
                raise
    raise AssertionError("the last attempt raises or returns")


def _rpc_address(host: str, port: int) -> str:
    return str(Listen(host or "::", port))


def _log_unexpected(call: Call, error: Exception) -> None:
    _log.error("control call failed", method=call.method.path, exc_info=error)
