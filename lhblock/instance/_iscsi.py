"""The front ends ``tgt-iscsi`` and ``tgt-blockdev`` over the volumes of this process.

Whoever has volumes open starts them with `start_iscsi`: nothing here knows which command that is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.device import (
    ISCSI_DEVICE,
    Attached,
    AttachOptions,
    Host,
    Target,
    attach,
    detach,
    rescan,
)
from lhblock.engine import Engine
from lhblock.errors import DeviceUnavailable, FrontendError, LhblockError, UsageError
from lhblock.frontend.fuse import serve_fuse, volume_file
from lhblock.frontend.nbd import open_unix_listener, serve_nbd
from lhblock.frontend.tgt import (
    FIRST_LUN,
    Backing,
    Chap,
    Plan,
    TargetPlan,
    Tgt,
    UnitExports,
    UnitPlan,
    check_allowed,
    choose_backing,
    keep_tgtd,
    read_chap,
    share_tgtd,
    shared_backing,
    target_name,
)
from lhblock.instance._exports import VolumeExports
from lhblock.instance._fuse_files import ServedFiles
from lhblock.instance._fuse_session import FuseSession
from lhblock.instance._served import ServedVolume
from lhblock.instance._settings import ServeSettings
from lhblock.settings import SOCKET_PATH_BYTES_MAX, DataDir, check_volume_name, parse_listen

ISCSI_FRONTENDS: Final = ("tgt-iscsi", "tgt-blockdev")
# tgtd has one connection to each volume; one more while the last is ending.
_CONNECTIONS_PER_VOLUME: Final = 2
# The longest name made in the directory.
_NAME_BYTES_MAX: Final = len("/tgtd.0.lock")

_log = structlog.get_logger("lhblock.instance")


@dataclass(frozen=True)
class IscsiUnit:
    """Where initiators find a volume."""

    target: str
    lun: int
    portal: str

    @property
    def uri(self) -> str:
        return f"iscsi://{self.portal}/{self.target}/{self.lun}"


@dataclass(frozen=True)
class Iscsi:
    """The running front end. `units`, `devices`: by volume."""

    tgt: Tgt
    backing: Backing
    units: Mapping[str, IscsiUnit]
    exports: UnitExports | None
    devices: dict[str, Attached] = field(default_factory=dict)

    def device(self, volume: str) -> str:
        """The path of a volume's device on this host, "" if it has none."""
        return str(self.devices[volume].device) if volume in self.devices else ""


def is_wanted(settings: ServeSettings) -> bool:
    """Whether one of the front ends is asked for."""
    return any(name in settings.frontend for name in ISCSI_FRONTENDS)


def check_iscsi(settings: ServeSettings) -> Chap | None:
    """Read the file of CHAP, and refuse options that cannot be.

    Raises:
      UsageError: with the option.
    """
    given = [
        ("--iscsi-chap", settings.iscsi_chap is not None),
        ("--iscsi-allow", bool(settings.iscsi_allow)),
        ("--iscsi-target", settings.iscsi_target is not None),
        ("--iscsi-shared", settings.iscsi_shared),
    ]
    if not is_wanted(settings):
        for option, wanted in given:
            if wanted:
                raise UsageError(f"{option} is for --frontend tgt-iscsi; add that, or leave it out")
        return None
    parse_listen(settings.iscsi_listen)
    for who in settings.iscsi_allow:
        check_allowed(who)
    if settings.iscsi_target is not None:
        check_volume_name(settings.iscsi_target)
    return read_chap(settings.iscsi_chap)


async def start_iscsi(
    nursery: trio.Nursery,
    *,
    engine: Engine,
    volumes: Mapping[str, ServedVolume],
    data_dir: DataDir,
    settings: ServeSettings,
    fuse: FuseSession,
    devices: bool,
) -> Iscsi:
    """Offer volumes over iSCSI for as long as the nursery lasts.

    A volume that is expanded later is seen by initiators with its new size.

    Args:
      fuse: had for as long as tgtd has files.
      devices: they are to be devices of this host as well, if it can.

    Raises:
      FrontendError: tgtd is not there, or does not do it.
      DeviceError: this host could log in, and it fails.
    """
    start = _Start(engine, volumes, data_dir, settings, fuse, devices)
    iscsi: Iscsi = await nursery.start(_run, start)
    for served in volumes.values():
        served.on_resized.append(partial(_resized, served.name, iscsi))
    return iscsi


class IscsiDoor:
    """The front end of a process whose volume comes and goes.

    Args:
      nursery: where it lives while it is open.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        engine: Engine,
        volumes: Mapping[str, ServedVolume],
        data_dir: DataDir,
        settings: ServeSettings,
        fuse: FuseSession,
    ) -> None:
        self._nursery = nursery
        self._engine = engine
        self._volumes = volumes
        self._data_dir = data_dir
        self._settings = settings
        self._fuse = fuse
        self._scope: trio.CancelScope | None = None
        self._closed = trio.Event()

    async def open(self, frontend: str) -> None:
        """Offer the open volume. Nothing happens if it is offered, or by another front end.

        Raises:
          LhblockError: as `start_iscsi`.
        """
        if self._scope is not None or frontend not in ISCSI_FRONTENDS:
            return
        try:
            await self._nursery.start(self._hold, frontend)
        except BaseExceptionGroup as group:
            known, others = group.split(LhblockError)
            if known is None or others is not None:
                raise
            error: BaseException = known
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from group

    async def close(self) -> None:
        """Stop offering it; commands that were answered are in the volume.

        Cancelled: it is closed all the same.
        """
        if self._scope is not None:
            self._scope.cancel()
            await self._closed.wait()

    async def _hold(self, frontend: str, *, task_status: trio.TaskStatus[None]) -> None:
        self._closed = trio.Event()
        volumes = dict(self._volumes)
        before = {name: tuple(served.addresses) for name, served in volumes.items()}
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    iscsi = await start_iscsi(
                        nursery,
                        engine=self._engine,
                        volumes=volumes,
                        data_dir=self._data_dir,
                        settings=self._settings,
                        fuse=self._fuse,
                        devices=frontend == "tgt-blockdev",
                    )
                    for name, served in volumes.items():
                        served.addresses = (iscsi.units[name].uri, *served.addresses)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            for name, served in volumes.items():
                served.addresses = before[name]
                served.on_resized.clear()
            self._scope = None
            self._closed.set()


@dataclass(frozen=True)
class _Start:
    """What `start_iscsi` was given."""

    engine: Engine
    volumes: Mapping[str, ServedVolume]
    data_dir: DataDir
    settings: ServeSettings
    fuse: FuseSession
    devices: bool


async def _run(start: _Start, *, task_status: trio.TaskStatus[Iscsi]) -> None:
    """Everything, in the order that its end needs: devices go before what they are made of."""
    directory = _make_directory(start.data_dir)
    try:
        async with trio.open_nursery() as nursery:
            until_detached = trio.CancelScope(shield=True)
            iscsi: Iscsi = await nursery.start(_offer, start, directory, until_detached)
            try:
                if start.devices:
                    await _attach(iscsi, start.data_dir)
                task_status.started(iscsi)
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await _detach(iscsi)
                until_detached.cancel()
    finally:
        _remove(directory)


async def _offer(
    start: _Start,
    directory: Path,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[Iscsi],
) -> None:
    settings, volumes = start.settings, start.volumes
    chap = check_iscsi(settings)
    if settings.iscsi_shared:
        backing = await shared_backing(settings.iscsi_backing, settings.iscsi_socket)
    else:
        backing = await trio.to_thread.run_sync(choose_backing, settings.iscsi_backing)
    with scope:
        async with trio.open_nursery() as nursery:
            exports: UnitExports | None = None
            if backing.name == "module":
                exports = UnitExports(VolumeExports(volumes))
                await _serve_socket(nursery, directory, exports, settings, len(volumes))
            elif settings.fuse_dir is None:
                await _mount(nursery, directory, start)
            plan = _plan(volumes, backing, directory, settings, chap)
            if settings.iscsi_shared:
                run = partial(share_tgtd, plan, settings.iscsi_socket)
            else:
                listen = parse_listen(settings.iscsi_listen)
                run = partial(keep_tgtd, plan, listen, directory, backing)
            tgt: Tgt = await nursery.start(run)
            _log.info("iSCSI", portal=str(tgt.portal), backing=backing.name, reason=backing.reason)
            if chap is None and not settings.iscsi_allow and not _is_loopback(tgt.portal.host):
                _log.warning(
                    "whoever reaches this address may write: see --iscsi-chap and --iscsi-allow",
                    address=str(tgt.portal),
                )
            units = {
                unit.volume: IscsiUnit(target.name, unit.lun, str(tgt.portal))
                for target in plan.targets
                for unit in target.units
            }
            task_status.started(Iscsi(tgt, backing, units, exports))


async def _attach(iscsi: Iscsi, data_dir: DataDir) -> None:
    host = Host()
    for name, unit in iscsi.units.items():
        target = Target.of_volume(str(data_dir.path), name, [unit.uri])
        try:
            made = await trio.to_thread.run_sync(
                attach, host, target, AttachOptions(), ISCSI_DEVICE
            )
        except DeviceUnavailable as error:
            _log.warning("volumes are no devices of this host", reason=str(error))
            return
        iscsi.devices[name] = made
        _log.info("device", volume=name, device=str(made.device))


async def _detach(iscsi: Iscsi) -> None:
    for name, made in iscsi.devices.items():
        try:
            await trio.to_thread.run_sync(partial(detach, Host(), identity=made.identity))
        except LhblockError as error:
            _log.warning("the device stays, without its volume", volume=name, reason=str(error))


async def _resized(name: str, iscsi: Iscsi) -> None:
    if iscsi.exports is not None:
        iscsi.exports.reconnect(name)
    else:
        # A file has the size that it was opened with.
        iscsi.tgt.restart()
    made = iscsi.devices.get(name)
    if made is None:
        return
    try:
        await trio.to_thread.run_sync(rescan, Host(), made)
    except LhblockError as error:
        _log.warning("the device has its old size", volume=name, reason=str(error))


def _plan(
    volumes: Mapping[str, ServedVolume],
    backing: Backing,
    directory: Path,
    settings: ServeSettings,
    chap: Chap | None,
) -> Plan:
    mount = directory / "mount"
    if settings.fuse_dir is not None:
        mount = Path.cwd() / settings.fuse_dir
    units = []
    for number, served in enumerate(volumes.values(), FIRST_LUN):
        lun = number if settings.iscsi_target is not None else FIRST_LUN
        path = str(directory / "nbd.sock")
        if backing.name == "fuse":
            path = str(volume_file(mount, served.name))
        units.append(
            UnitPlan(
                served.name,
                lun,
                served.volume.volume_id,
                path,
                read_only=served.volume.read_only,
            )
        )
    targets = [TargetPlan(target_name(unit.volume), (unit,)) for unit in units]
    if settings.iscsi_target is not None:
        targets = [TargetPlan(target_name(settings.iscsi_target), tuple(units))]
    return Plan(
        tuple(targets),
        backing.store,
        directory,
        allowed=tuple(check_allowed(who) for who in settings.iscsi_allow),
        chap=chap,
        block_bytes=int(settings.iscsi_block_size),
    )


async def _serve_socket(
    nursery: trio.Nursery,
    directory: Path,
    exports: UnitExports,
    settings: ServeSettings,
    volumes: int,
) -> None:
    listener = await open_unix_listener(directory / "nbd.sock")
    await nursery.start(
        partial(
            serve_nbd,
            [listener],
            exports,
            handshake_timeout_s=settings.handshake_timeout_s,
            connections_max=_CONNECTIONS_PER_VOLUME * volumes,
        )
    )


async def _mount(nursery: trio.Nursery, directory: Path, start: _Start) -> None:
    mount = directory / "mount"
    mount.mkdir(mode=0o700)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        files = ServedFiles(start.volumes, start.engine)
        async with start.fuse.own(mount, private=True):
            await serve_fuse(mount, files, task_status=task_status)
        raise FrontendError(
            f"{mount} was unmounted by somebody else; tgtd had its files from there"
        )

    await nursery.start(run)


def _make_directory(data_dir: DataDir) -> Path:
    for path in data_dir.run.glob("tgt-*"):
        pid = path.name.removeprefix("tgt-")
        if pid.isdecimal() and not Path("/proc", pid).exists():
            _remove(path)
    directory = data_dir.run / f"tgt-{os.getpid()}"
    if len(os.fsencode(directory)) + _NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"sockets in {directory} would have paths longer than {SOCKET_PATH_BYTES_MAX} bytes;"
            " choose a shorter data directory"
        )
    try:
        _remove(directory)
        directory.mkdir(mode=0o700)
    except OSError as error:
        raise LhblockError(f"cannot make {directory}: {error.strerror}") from error
    return directory


def _remove(directory: Path) -> None:
    """Remove what a process made there. A mount that is left, dead or not, stays."""
    for name in ("nbd.sock", "tgtd.0", "tgtd.0.lock"):
        (directory / name).unlink(missing_ok=True)
    for path in (directory / "mount", directory):
        with suppress(OSError):
            path.rmdir()


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
