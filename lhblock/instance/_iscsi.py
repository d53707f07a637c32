"""The front end ``tgt-iscsi`` over the volumes of this process.

Whoever has volumes open starts them with `start_iscsi`: nothing here knows which command that is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.engine import Engine
from lhblock.errors import FrontendError, LhblockError, UsageError
from lhblock.frontend.fuse import REQUESTS_MAX, serve_fuse, volume_file
from lhblock.frontend.nbd import open_unix_listener, serve_nbd
from lhblock.frontend.tgt import (
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
from lhblock.instance._served import ServedVolume
from lhblock.instance._settings import ServeSettings
from lhblock.settings import SOCKET_PATH_BYTES_MAX, DataDir, check_volume_name, parse_listen

ISCSI_FRONTENDS: Final = ("tgt-iscsi",)
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
    """The running front end. `units`: by volume."""

    tgt: Tgt
    backing: Backing
    units: Mapping[str, IscsiUnit]


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
) -> Iscsi:
    """Offer volumes over iSCSI for as long as the nursery lasts.

    A volume that is expanded later is seen by initiators with its new size.

    Raises:
      FrontendError: tgtd is not there, or does not do it.
    """
    chap = check_iscsi(settings)
    if settings.iscsi_shared:
        backing = await shared_backing(settings.iscsi_backing, settings.iscsi_socket)
    else:
        backing = await trio.to_thread.run_sync(choose_backing, settings.iscsi_backing)
    directory = _make_directory(data_dir)
    exports: UnitExports | None = None
    if backing.name == "module":
        exports = UnitExports(VolumeExports(volumes))
        await _serve_socket(nursery, directory, exports, settings, len(volumes))
    elif "fuse" not in settings.frontend:
        await _mount(nursery, directory, engine, volumes)
    plan = _plan(volumes, backing, directory, settings, chap)
    tgt = await nursery.start(_run, plan, directory, backing, settings)
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
    for served in volumes.values():
        served.on_resized.append(partial(_resized, served.name, tgt, exports))
    return Iscsi(tgt, backing, units)


async def _resized(name: str, tgt: Tgt, exports: UnitExports | None) -> None:
    if exports is not None:
        exports.reconnect(name)
    else:
        # A file has the size that it was opened with.
        tgt.restart()


async def _run(
    plan: Plan,
    directory: Path,
    backing: Backing,
    settings: ServeSettings,
    *,
    task_status: trio.TaskStatus[Tgt],
) -> None:
    try:
        if settings.iscsi_shared:
            await share_tgtd(plan, settings.iscsi_socket, task_status=task_status)
        else:
            listen = parse_listen(settings.iscsi_listen)
            await keep_tgtd(plan, listen, directory, backing, task_status=task_status)
    finally:
        _remove(directory)


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
    for number, served in enumerate(volumes.values(), 1):
        lun = number if settings.iscsi_target is not None else 1
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


async def _mount(
    nursery: trio.Nursery,
    directory: Path,
    engine: Engine,
    volumes: Mapping[str, ServedVolume],
) -> None:
    mount = directory / "mount"
    mount.mkdir(mode=0o700)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        async with engine.open_calls(REQUESTS_MAX) as calls:
            await serve_fuse(mount, ServedFiles(volumes, calls), task_status=task_status)
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
