"""The controller process: the engine of one volume, told over gRPC what to do, until a signal.

It differs from a serving process in what may change: the volume gets its replicas at the start or
later, is closed and opened again, and its front end comes and goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import structlog
import trio

from lhblock.engine import Engine, open_engine
from lhblock.errors import NoBackend, UsageError, VolumeBusy, VolumeError
from lhblock.frontend.nbd import ClientInfo, Listener, NbdServer
from lhblock.instance._controller import Choice, no_backend
from lhblock.instance._exports import VolumeExports
from lhblock.instance._identity import check_identity
from lhblock.instance._notify import Notifier
from lhblock.instance._registry import Registry
from lhblock.instance._serve import (
    Process,
    Ready,
    control_path,
    control_services,
    engine_options,
    listen_for_clients,
    log_unexpected,
    point_link,
    ready_now,
    start_fuse,
    start_handover,
    start_nbd,
    unpoint_link,
)
from lhblock.instance._serving import remove_dead_sockets
from lhblock.instance._settings import ServeSettings
from lhblock.instance._signals import run_until_signal
from lhblock.instance._volume_host import VolumeHost
from lhblock.rpc import serve_rpc
from lhblock.settings import DataDir, Listen, check_volume_name

_log = structlog.get_logger("lhblock.instance")


@dataclass(frozen=True)
class ControllerOptions:
    """How one controller runs.

    Attributes:
      listen: address of the control service; port 0 lets the kernel choose.
      instance: name that callers must mean; empty is not checked.
      size_bytes: of a volume that is made anew.
      frontend: offered while the volume is open; "" until VolumeFrontendStart.
      replicas: opened at the start; none waits for VolumeStart.
      limits: fields of the volume's record that replace what is recorded.
      unmap_mark: kept and reported, without effect.
      sync_limit: the same.
    """

    volume: str
    listen: Listen
    instance: str = ""
    size_bytes: int | None = None
    frontend: str = ""
    replicas: Sequence[str] = ()
    limits: dict[str, int] = field(default_factory=dict)
    unmap_mark: bool = False
    sync_limit: int = 1


@dataclass(frozen=True)
class ControllerReady:
    """What callers need to know. `control`: of the TCP service; `serving`: of the clients."""

    control: str
    serving: Ready


async def run_controller(
    data_dir: DataDir,
    options: ControllerOptions,
    settings: ServeSettings,
    *,
    on_ready: Callable[[ControllerReady], None],
) -> None:
    """Run the engine of one volume until SIGINT or SIGTERM; a second one ends it at once.

    Args:
      on_ready: called once, when the control service answers.

    Raises:
      NoBackend: none of the replicas it was started with can be used.
      LhblockError: an address or the data directory cannot be used.

    Cancelled: as after a signal.
    """
    notifier = Notifier()
    process = Process(data_dir, Registry(data_dir), settings)
    await run_until_signal(partial(_control, process, options, on_ready, notifier))


async def _control(
    process: Process,
    options: ControllerOptions,
    on_ready: Callable[[ControllerReady], None],
    notifier: Notifier,
) -> None:
    data_dir, settings, name = process.data_dir, process.settings, options.volume
    check_volume_name(name)
    if options.frontend and options.frontend not in settings.frontend:
        raise UsageError(
            f"failed to find frontend: {options.frontend}: unsupported frontend type:"
            f" {options.frontend}"
        )
    data_dir.prepare()
    with suppress(OSError):
        remove_dead_sockets(data_dir)
    async with AsyncExitStack() as stack:
        listeners = await listen_for_clients(stack, data_dir, settings, None)
        engine = await stack.enter_async_context(open_engine(engine_options(settings)))
        failure: Exception | None = None
        async with trio.open_nursery() as volumes:
            try:
                host = VolumeHost(
                    process,
                    name,
                    engine,
                    volumes,
                    listeners,
                    size_bytes=options.size_bytes,
                    frontend=options.frontend,
                    limits=options.limits,
                    unmap_mark=options.unmap_mark,
                    sync_limit=options.sync_limit,
                )
                if options.replicas:
                    await _start(host, options.replicas)
                await _answer(process, options, host, engine, listeners, on_ready, notifier)
            except Exception as error:
                failure = error
            volumes.cancel_scope.cancel()
        if failure is not None:
            raise failure


async def _start(host: VolumeHost, replicas: Sequence[str]) -> None:
    try:
        await host.start(replicas)
    except (UsageError, VolumeBusy):
        raise
    except VolumeError as error:
        raise NoBackend(no_backend(replicas, error)) from error


async def _answer(
    process: Process,
    options: ControllerOptions,
    host: VolumeHost,
    engine: Engine,
    listeners: Sequence[Listener],
    on_ready: Callable[[ControllerReady], None],
    notifier: Notifier,
) -> None:
    server: list[NbdServer] = []

    def clients() -> Sequence[ClientInfo]:
        return server[0].clients() if server else ()

    choice = Choice(process.volumes, host)
    services = control_services(process, engine, choice, clients, host)
    check = check_identity("controller", options.volume, options.instance)
    path, link = control_path(process), process.data_dir.control_link(options.volume)
    address = Listen(options.listen.host or "::", options.listen.port)
    async with trio.open_nursery() as nursery:
        serve = partial(serve_rpc, services=services, check=check, unexpected=log_unexpected)
        port = await nursery.start(serve, str(address))
        await nursery.start(serve, f"unix:{path}")
        try:
            point_link(link, path.name)
            if "fuse" in process.settings.frontend:
                await start_fuse(nursery, process, engine)
            if listeners:
                exports = VolumeExports(process.volumes)
                server.append(await start_nbd(nursery, process.settings, listeners, exports))
            await start_handover(nursery, process, engine)
            process.ready = True
            ready = ready_now(process, engine, listeners, path)
            on_ready(ControllerReady(str(replace(address, port=port)), ready))
            notifier.ready(f"controls {options.volume}")
            await trio.sleep_forever()
        finally:
            unpoint_link(link, path.name)
            path.unlink(missing_ok=True)
            nursery.cancel_scope.cancel()
