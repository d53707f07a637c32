"""The serving process: volumes opened, front end and control service running, until a signal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from lhblock.engine import Engine, EngineOptions, RebuildOptions, RemoteLimits, open_engine
from lhblock.errors import LhblockError, UsageError, VolumeNotFound
from lhblock.frontend.fuse import serve_fuse
from lhblock.frontend.nbd import (
    ClientInfo,
    Listener,
    NbdServer,
    TlsKeys,
    adopt_activation_listeners,
    open_tcp_listeners,
    open_unix_listener,
    read_tls_keys,
    serve_nbd,
    serve_stdio,
    serve_tls,
)
from lhblock.instance._controller import Choice, ControllerService
from lhblock.instance._creation import create_volume, uncreate_volume
from lhblock.instance._exports import VolumeExports
from lhblock.instance._fuse_files import ServedFiles
from lhblock.instance._fuse_handover import serve_handover
from lhblock.instance._fuse_session import FuseSession
from lhblock.instance._iscsi import Iscsi, check_iscsi, is_wanted, start_iscsi
from lhblock.instance._notify import Notifier
from lhblock.instance._registry import Registry, VolumeRecord
from lhblock.instance._served import ServedVolume, open_served
from lhblock.instance._serving import refuse_served, remove_dead_sockets
from lhblock.instance._settings import ServeSettings
from lhblock.instance._signals import run_until_signal
from lhblock.instance._volume_service import VolumeService
from lhblock.rpc import CONTROLLER, VOLUME, Call, Handlers, serve_rpc
from lhblock.settings import (
    SOCKET_PATH_BYTES_MAX,
    DataDir,
    check_volume_name,
    format_size,
    parse_listen,
    parse_replica,
)

if TYPE_CHECKING:
    from lhblock.instance._volume_host import VolumeHost

_log = structlog.get_logger("lhblock.instance")


@dataclass(frozen=True)
class ReadyVolume:
    """A volume that is served now.

    Attributes:
      created: this process made it.
      file: of FUSE, or "".
      device: of this host, by ``tgt-blockdev``, or "".
    """

    name: str
    size_bytes: int
    cache: str
    state: str
    read_only: bool
    created: bool
    uris: tuple[str, ...]
    file: str
    device: str = ""


@dataclass(frozen=True)
class Ready:
    """What clients need to know once everything answers.

    Attributes:
      listen: TCP addresses.
      sockets: paths of Unix sockets.
      control: path of the control socket.
      portal: where iSCSI initiators log in; "" without that front end.
      backing: how tgtd reaches the volumes, and why so.
    """

    pid: int
    data_dir: str
    driver: str
    driver_reason: str
    listen: tuple[str, ...]
    sockets: tuple[str, ...]
    control: str
    volumes: tuple[ReadyVolume, ...]
    portal: str = ""
    backing: str = ""


@dataclass
class Process:
    """What one `run_serve` has open."""

    data_dir: DataDir
    registry: Registry
    settings: ServeSettings
    volumes: dict[str, ServedVolume] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)
    iscsi: Iscsi | None = None
    fuse: FuseSession = field(default_factory=FuseSession)
    ready: bool = False


async def run_serve(
    data_dir: DataDir,
    names: Sequence[str],
    settings: ServeSettings,
    *,
    size_bytes: int | None,
    on_ready: Callable[[Ready], None],
    stdio: bool = False,
) -> None:
    """Serve volumes until SIGINT or SIGTERM; a second signal ends the process at once.

    Volumes that do not exist are created with `size_bytes`. When anything fails before the
    process is ready, volumes it created are removed again.

    Args:
      on_ready: called once, when clients can connect.
      stdio: serve one client on standard input and output, and return when it is done.

    Raises:
      UsageError: a name, or a volume that does not exist and no size.
      LhblockError: a replica, an address or the data directory cannot be used.

    Cancelled: as after a signal.
    """
    notifier = Notifier()
    process = Process(data_dir, Registry(data_dir), settings)
    await run_until_signal(
        partial(_serve, process, names, size_bytes, on_ready, notifier, stdio=stdio)
    )


async def _serve(
    process: Process,
    names: Sequence[str],
    size_bytes: int | None,
    on_ready: Callable[[Ready], None],
    notifier: Notifier,
    *,
    stdio: bool,
) -> None:
    data_dir, settings = process.data_dir, process.settings
    _check_names(process, names, size_bytes)
    keys = _tls_keys(settings, stdio=stdio)
    check_iscsi(settings)
    data_dir.prepare()
    with suppress(OSError):
        remove_dead_sockets(data_dir)
    async with AsyncExitStack() as stack:
        has_nbd = "nbd" in settings.frontend
        listeners = (
            []
            if stdio or not has_nbd
            else await listen_for_clients(stack, data_dir, settings, keys)
        )
        records = await _records(stack, process, names, size_bytes)
        engine = await stack.enter_async_context(open_engine(engine_options(settings)))
        for record in records:
            await open_recorded(stack, process, engine, record, listeners)
        exports = VolumeExports(process.volumes)
        server: list[NbdServer] = []

        def clients() -> Sequence[ClientInfo]:
            return server[0].clients() if server else ()

        async with trio.open_nursery() as nursery:
            control = await _start_control(nursery, process, engine, clients)
            links = [data_dir.control_link(name) for name in process.volumes]
            try:
                for link in links:
                    point_link(link, control.name)
                if "fuse" in settings.frontend:
                    await start_fuse(nursery, process, engine)
                if is_wanted(settings):
                    await _start_iscsi(nursery, process, engine)
                if listeners:
                    plain = [item for item in listeners if item.tls is None]
                    server.append(await start_nbd(nursery, settings, plain, exports))
                if keys is not None:
                    await _start_tls(nursery, settings, keys, listeners)
                await start_handover(nursery, process, engine)
                process.ready = True
                ready = ready_now(process, engine, listeners, control)
                on_ready(ready)
                notifier.ready(f"serving {', '.join(process.volumes)}")
                if stdio:
                    reason = await serve_stdio(
                        exports, handshake_timeout_s=settings.handshake_timeout_s
                    )
                    _log.info("connection ended", reason=reason)
                    nursery.cancel_scope.cancel()
                await trio.sleep_forever()
            finally:
                for link in links:
                    unpoint_link(link, control.name)
                control.unlink(missing_ok=True)
                nursery.cancel_scope.cancel()


def _check_names(process: Process, names: Sequence[str], size_bytes: int | None) -> None:
    settings = process.settings
    if "fuse" in settings.frontend and settings.fuse_dir is None:
        raise UsageError("--frontend fuse needs --fuse-dir, the directory to mount on")
    if "fuse" not in settings.frontend and settings.fuse_dir is not None:
        raise UsageError("--fuse-dir is for --frontend fuse; add that, or leave it out")
    if len(set(names)) != len(names):
        raise UsageError("a volume is named twice")
    if settings.replica and len(names) > 1:
        raise UsageError("--replica is for one volume; create the others on their own")
    for name in names:
        check_volume_name(name)
        try:
            record = process.registry.get(name)
        except VolumeNotFound as error:
            if settings.read_only:
                raise UsageError(
                    f"volume {name} does not exist, and --read-only cannot create it"
                ) from error
            if size_bytes is None and not settings.replica:
                raise UsageError(
                    f"volume {name} does not exist; give --size to create it"
                ) from error
            continue
        if not settings.read_only:
            refuse_served(process.data_dir, record)
        if settings.replica:
            wanted = {parse_replica(text, Path.cwd()) for text in settings.replica}
            if wanted != set(record.places):
                listed = ", ".join(str(place) for place in record.places)
                raise UsageError(
                    f"volume {name} exists with the replicas {listed}; leave --replica out"
                )
        if size_bytes not in (None, record.size_bytes):
            _log.warning(
                "the volume exists; --size is only for creating it, see 'lhblock volume expand'",
                volume=name,
                size=format_size(record.size_bytes),
            )


def _tls_keys(settings: ServeSettings, *, stdio: bool) -> TlsKeys | None:
    keys = read_tls_keys(
        settings.tls_certificates,
        settings.tls_psk,
        verify_clients=settings.tls_verify_clients,
    )
    if keys is not None and (stdio or not settings.tcp or "nbd" not in settings.frontend):
        raise UsageError(
            "TLS is for clients on TCP; leave out --stdio, --no-tcp and --frontend fuse alone,"
            " or the --tls options"
        )
    return keys


async def listen_for_clients(
    stack: AsyncExitStack, data_dir: DataDir, settings: ServeSettings, keys: TlsKeys | None
) -> list[Listener]:
    listeners = adopt_activation_listeners(os.environ)
    for listener in listeners:
        stack.callback(listener.close)
    activated = bool(listeners)
    if not activated and settings.tcp:
        address = parse_listen(settings.listen)
        for listener in await open_tcp_listeners(address.host, address.port):
            stack.callback(listener.close)
            listeners.append(listener)
    for listener in listeners:
        if listener.uri().host is not None:
            listener.tls = keys
    # What speaks TLS passes its clients on to a Unix socket.
    if activated and (keys is None or any(map(_unix_path, listeners))):
        return listeners
    path = Path.cwd() / settings.socket if settings.socket else data_dir.nbd_socket
    listener = await open_unix_listener(path)
    stack.callback(listener.close)
    return [*listeners, listener]


def _unix_path(listener: Listener) -> str:
    """Where clients find a Unix socket; "" if it is none, or has a name that is no path."""
    path = listener.uri().socket_path or ""
    return path if path.startswith("/") else ""


async def _records(
    stack: AsyncExitStack, process: Process, names: Sequence[str], size_bytes: int | None
) -> list[VolumeRecord]:
    records = []
    for name in names:
        try:
            records.append(process.registry.get(name))
        except VolumeNotFound:
            record = await create_volume(
                process.registry,
                name,
                size_bytes=size_bytes,
                replicas=[parse_replica(text, Path.cwd()) for text in process.settings.replica],
                cache=process.settings.cache or "writeback",
            )
            process.created.add(name)
            stack.callback(_undo, process, record)
            records.append(record)
    return records


def _undo(process: Process, record: VolumeRecord) -> None:
    if not process.ready:
        with suppress(LhblockError):
            uncreate_volume(process.registry, record)


def engine_options(settings: ServeSettings) -> EngineOptions:
    return EngineOptions(queues=settings.queues, workers=settings.workers, driver=settings.driver)


async def open_recorded(
    stack: AsyncExitStack,
    process: Process,
    engine: Engine,
    record: VolumeRecord,
    listeners: Sequence[Listener],
) -> None:
    settings = process.settings
    served = await stack.enter_async_context(
        open_served(
            engine,
            record,
            cache=settings.cache,
            read_only=settings.read_only,
            rebuild=RebuildOptions(
                automatic=settings.rebuild,
                rate_bytes_s=settings.rebuild_rate << 20,
                streams=settings.rebuild_streams,
            ),
            remote=RemoteLimits(
                reply_timeout_ms=round(settings.replica_timeout * 1000),
                call_timeout_s=settings.replica_timeout,
            ),
            quorum_wait_s=settings.quorum_wait,
            force=settings.force,
        )
    )
    await served.refresh_record(process.registry)
    served.addresses = tuple(str(listener.uri(record.name)) for listener in listeners)
    served.fuse = process.fuse
    served.frontends = settings.frontend
    served.frontend, served.frontend_up = settings.frontend[0], True
    process.volumes[record.name] = served


async def start_nbd(
    nursery: trio.Nursery,
    settings: ServeSettings,
    listeners: Sequence[Listener],
    exports: VolumeExports,
) -> NbdServer:
    server: NbdServer = await nursery.start(
        partial(
            serve_nbd,
            listeners,
            exports,
            handshake_timeout_s=settings.handshake_timeout_s,
            connections_max=settings.connections_max,
        )
    )
    return server


async def _start_tls(
    nursery: trio.Nursery, settings: ServeSettings, keys: TlsKeys, listeners: Sequence[Listener]
) -> None:
    secured = [listener for listener in listeners if listener.tls is not None]
    paths = list(filter(None, map(_unix_path, listeners)))
    if not secured:
        raise UsageError("TLS is for clients on TCP, and no TCP socket was passed by systemd")
    await nursery.start(
        partial(serve_tls, keys, secured, paths[0], connections_max=settings.connections_max)
    )


async def start_fuse(nursery: trio.Nursery, process: Process, engine: Engine) -> None:
    assert process.settings.fuse_dir is not None
    directory = Path.cwd() / process.settings.fuse_dir

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        files = ServedFiles(process.volumes, engine)
        async with process.fuse.own(directory):
            await serve_fuse(directory, files, task_status=task_status)
        _log.warning("unmounted by somebody else; files are not offered any more")

    await nursery.start(run)


async def start_handover(nursery: trio.Nursery, process: Process, engine: Engine) -> None:
    """Take over mounts of `lhblock mount-fuse`, once the doors of this process are open."""
    path = process.data_dir.handover_socket(os.getpid())
    volumes = partial(ServedFiles, process.volumes, engine)
    await nursery.start(serve_handover, path, process.fuse, volumes)


async def _start_iscsi(nursery: trio.Nursery, process: Process, engine: Engine) -> None:
    iscsi = await start_iscsi(
        nursery,
        engine=engine,
        volumes=process.volumes,
        data_dir=process.data_dir,
        settings=process.settings,
        fuse=process.fuse,
        devices="tgt-blockdev" in process.settings.frontend,
    )
    process.iscsi = iscsi
    for served in process.volumes.values():
        served.addresses = (*served.addresses, iscsi.units[served.name].uri)


async def _start_control(
    nursery: trio.Nursery,
    process: Process,
    engine: Engine,
    clients: Callable[[], Sequence[ClientInfo]],
) -> Path:
    choice = Choice(process.volumes)
    path = control_path(process)
    services = control_services(process, engine, choice, clients)
    await nursery.start(
        partial(serve_rpc, f"unix:{path}", services, check=choice.check, unexpected=log_unexpected)
    )
    return path


def control_path(process: Process) -> Path:
    """Where the control socket of this process goes."""
    path = process.data_dir.control_socket(os.getpid())
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"the path of the control socket, {path}, is longer than {SOCKET_PATH_BYTES_MAX}"
            " bytes; choose a shorter data directory"
        )
    return path


def control_services(
    process: Process,
    engine: Engine,
    choice: Choice,
    clients: Callable[[], Sequence[ClientInfo]],
    host: VolumeHost | None = None,
) -> dict[str, Handlers]:
    """The services that work on the volumes of this process."""
    return {
        CONTROLLER: ControllerService(choice, process.registry, host).handlers,
        VOLUME: VolumeService(
            choice,
            registry=process.registry,
            serving=True,
            driver=(engine.driver, engine.driver_reason),
            clients=clients,
        ).handlers,
    }


def log_unexpected(call: Call, error: Exception) -> None:
    _log.error("control call failed", method=call.method.path, exc_info=error)


def point_link(link: Path, target: str) -> None:
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.rename(link)


def unpoint_link(link: Path, target: str) -> None:
    # Another process may have taken the volume over in the meantime.
    with suppress(OSError):
        if os.fspath(link.readlink()) == target:
            link.unlink()


def ready_now(
    process: Process, engine: Engine, listeners: Sequence[Listener], control: Path
) -> Ready:
    sockets = tuple(uri.socket_path for item in listeners if (uri := item.uri()).socket_path)
    return Ready(
        pid=os.getpid(),
        data_dir=str(process.data_dir.path),
        driver=engine.driver,
        driver_reason=engine.driver_reason,
        listen=tuple(item.address for item in listeners if item.uri().socket_path is None),
        sockets=tuple(path for path in sockets if path),
        control=str(control),
        portal=str(process.iscsi.tgt.portal) if process.iscsi else "",
        backing=f"{process.iscsi.backing.name}: {process.iscsi.backing.reason}"
        if process.iscsi
        else "",
        volumes=tuple(
            ReadyVolume(
                name=served.name,
                size_bytes=served.volume.size_bytes,
                cache=served.cache,
                state=served.volume.state,
                read_only=served.volume.read_only,
                created=served.name in process.created,
                uris=tuple(served.uris),
                file=served.file,
                device=process.iscsi.device(served.name) if process.iscsi else "",
            )
            for served in process.volumes.values()
        ),
    )
