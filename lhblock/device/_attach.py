"""Attaching and detaching, whatever way the host offers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from lhblock.device._host import Host
from lhblock.device._iscsi import Iscsi
from lhblock.device._kernel_nbd import IDENTITY_BYTES_MAX
from lhblock.device._kind import Attached, Kind
from lhblock.device._loop import Loop
from lhblock.device._nbd import Nbd
from lhblock.device._target import AttachOptions, Target
from lhblock.errors import DeviceError, DeviceForeign, DeviceUnavailable, NotAttached

# In the order `auto` tries them.
KINDS: Final[tuple[Kind, ...]] = (Nbd(), Iscsi(), Loop())
AUTO: Final = "auto"


def kind_names() -> list[str]:
    """What may be asked for."""
    return [AUTO, *(kind.name for kind in KINDS)]


def attach(host: Host, target: Target, options: AttachOptions, kind: str = AUTO) -> Attached:
    """Make a block device of a served volume, or return the one there is.

    Raises:
      DeviceUnavailable: the host offers no way; says what would help.
      DeviceError: it cannot be done.
    """
    if len(os.fsencode(target.identity)) > IDENTITY_BYTES_MAX:
        raise DeviceError(f"the path or address of {target.volume} is too long to attach")
    for found in attached_devices(host):
        if found.identity == target.identity:
            return _kind(found.kind).attach(host, target, options)
    return choose(host, kind, target).attach(host, target, options)


def choose(host: Host, name: str = AUTO, target: Target | None = None) -> Kind:
    """The way to attach, a target if one is given, on this host. DeviceUnavailable: none is."""
    obstacles = []
    for kind in KINDS:
        if name not in (AUTO, kind.name):
            continue
        obstacle = (kind.lacks(target) if target else None) or kind.obstacle(host)
        if obstacle is None:
            return kind
        obstacles.append(obstacle)
    raise DeviceUnavailable("this host cannot attach volumes: " + "; ".join(obstacles))


def attached_devices(host: Host) -> list[Attached]:
    """Every device of this host that shows one of our volumes."""
    return [device for kind in KINDS for device in kind.devices(host)]


def detach(host: Host, *, identity: str | None = None, device: Path | None = None) -> Attached:
    """Take a device away, found by its volume or by its path, and return what it was.

    Raises:
      NotAttached: there is no such device.
      DeviceForeign: it is not one of ours.
      DeviceBusy: it is mounted, or something else uses it.
    """
    assert (identity is None) != (device is None)
    for found in attached_devices(host):
        if found.identity == identity or (device and _same(found.device, device)):
            _kind(found.kind).detach(host, found)
            return found
    if device is None:
        raise NotAttached("no device of this host shows it")
    if not device.exists():
        raise NotAttached(f"{device} does not exist")
    raise DeviceForeign(f"{device} was not attached by lhblock; nothing was done")


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
