"""``lhblock attach`` and ``lhblock detach``: volumes as block devices of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._names import complete_volume, volume_argument
from lhblock.cli._output import note, print_json
from lhblock.device import (
    FILE_SYSTEMS,
    Attached,
    AttachOptions,
    Host,
    Nbd,
    Target,
    check_wishes,
    choose,
    keep,
    kind_names,
    make,
    mount,
    uri_identity,
    volume_identity,
)
from lhblock.device import attach as attach_device
from lhblock.device import detach as detach_device
from lhblock.errors import NotAttached, NotServing, UsageError
from lhblock.settings import check_volume_name, format_size

_SCHEMES = ("nbd://", "nbd+unix://", "iscsi://")


@click.command()
@volume_argument
@click.option(
    "--device",
    "kind",
    type=click.Choice(kind_names()),
    default="auto",
    show_default=True,
    help="How the device is made; auto takes the first that this host can do.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 16),
    metavar="N",
    default=2,
    show_default=True,
    help="Connections to the server, 1-16; each is served by one thread.",
)
@click.option(
    "--timeout",
    type=click.IntRange(0, 86400),
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="After this a request without an answer is tried on another connection; with one"
    " connection 0 means never, as long as it lives.",
)
@click.option(
    "--away",
    type=click.IntRange(0, 86400 * 365),
    metavar="SECONDS",
    default=600,
    show_default=True,
    help="How long requests wait for a server that went away before they fail.",
)
@click.option("--read-only", is_flag=True, help="Nothing can be written through this device.")
@click.option(
    "--mkfs",
    type=click.Choice(sorted(FILE_SYSTEMS)),
    help="Make a file system if the volume is blank.",
)
@click.option(
    "--mount",
    "place",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Mount the device at this directory.",
)
@click.option(
    "--foreground",
    is_flag=True,
    help="Keep the device from this process; detach at SIGTERM or Ctrl-C.",
)
@common_options
def attach(
    app: App,
    volume: str,
    kind: str,
    connections: int,
    timeout: int,
    away: int,
    read_only: bool,
    mkfs: str | None,
    place: Path | None,
    foreground: bool,
) -> None:
    """Make a block device of VOLUME, and print it.

    VOLUME is served by a process of this host, or is the nbd://, nbd+unix:// or iscsi:// URI of an
    export anywhere. A volume that is attached already keeps its device, and the kernel learns its
    size anew. fuse is a loop device on the file that mount-fuse or --frontend fuse shows. With nbd
    a process stays behind that reconnects the device when the server was restarted; what uses the
    device waits meanwhile.

    --mkfs refuses a volume that holds anything, and does nothing if it holds that file system.

    \b
    lhblock attach db
    lhblock attach db --mkfs ext4 --mount /srv/db
    lhblock attach nbd://10.0.0.9:10809/db --connections 4
    lhblock attach iscsi://10.0.0.9/iqn.2019-10.io.longhorn:db/1
    """
    if mkfs and read_only:
        raise UsageError("--mkfs writes, and --read-only forbids it; leave one of them out")
    place = Path.cwd() / place if place else None
    host = Host()
    check_wishes(host, kind=mkfs, place=place)
    target = _target(app, volume)
    options = AttachOptions(connections, timeout, away, read_only)

    def finish(device: Attached) -> None:
        made = make(host, device, target, mkfs) if mkfs else False
        if place:
            mount(host, device, place)
        _print_attached(app, volume, device, formatted=made, place=place)

    if not foreground:
        finish(attach_device(host, target, options, kind))
        return
    if kind not in ("auto", Nbd.name):
        raise UsageError(f"--foreground is for nbd devices, not for {kind}")
    choose(host, Nbd.name)

    from lhblock.instance import Notifier

    notifier = Notifier()

    def on_ready(device: Attached) -> None:
        finish(device)
        notifier.ready(f"{volume} is {device.device}")

    keep(host, target, options, on_ready=on_ready, log=note)


@click.command()
@click.argument("volume", metavar="VOLUME|DEVICE", shell_complete=complete_volume)
@common_options
def detach(app: App, volume: str) -> None:
    """Take the block device of a volume away. One that is mounted or in use is refused.

    Give the volume, the URI it was attached by, or the device.

    \b
    lhblock detach db
    lhblock detach /dev/nbd0
    """
    host = Host()
    if volume.startswith("/"):
        gone = detach_device(host, device=Path(volume))
    else:
        try:
            gone = detach_device(host, identity=_identity(app, volume))
        except NotAttached as error:
            raise NotAttached(f"volume {volume} is not attached to this host") from error
    if app.json:
        print_json({"volume": volume, "device": str(gone.device), "kind": gone.kind})
    else:
        click.echo(f"detached {gone.device}")


def _identity(app: App, volume: str) -> str:
    if volume.startswith(_SCHEMES):
        return uri_identity(volume)
    return volume_identity(str(app.data_dir.path), check_volume_name(volume))


def _target(app: App, volume: str) -> Target:
    """Where the volume is served. NotServing: nowhere."""
    if volume.startswith(_SCHEMES):
        return Target.of_uri(volume)
    from google.protobuf.empty_pb2 import Empty

    from lhblock.instance import answering_address, served_channel
    from lhblock.rpc import VOLUME

    app.registry.get(volume)
    address = answering_address(app.data_dir, volume)
    uris: list[str] = []
    if address is not None:
        with served_channel(address, volume) as channel:
            uris = list(channel.call(VOLUME, "StatusGet", Empty()).uris)
    if not uris:
        raise NotServing(volume, f"it is not served; start it: lhblock serve {volume}")
    return Target.of_volume(str(app.data_dir.path), volume, uris)


def _print_attached(
    app: App, volume: str, device: Attached, *, formatted: bool, place: Path | None
) -> None:
    if app.json:
        document: dict[str, Any] = {
            "volume": volume,
            "device": str(device.device),
            "kind": device.kind,
            "size_bytes": device.size_bytes,
            "attached": device.made,
            "formatted": formatted,
            "mounted": str(place) if place else None,
        }
        print_json(document)
        return
    click.echo(str(device.device))
    if not device.made:
        note(f"{volume} was attached already, {format_size(device.size_bytes)}")
