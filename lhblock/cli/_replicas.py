"""``lhblock replica``: the replicas of a volume; or, with a directory, the replica process.

Longhorn's command of this name has no verbs, and programs that start it give a directory. So what
is no verb is the process's argument; a directory that is called like a verb is given as ``./ls``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._documents import describe_rebuild, rebuild_document
from lhblock.cli._names import volume_argument
from lhblock.cli._output import counted, note, print_json, print_table
from lhblock.settings import parse_replica

if TYPE_CHECKING:
    from lhblock.instance import VolumeChannel

WATCH_S = 0.5
"""Between two looks at a rebuild."""

_PROCESS = "process"


class _ReplicaGroup(click.Group):
    """A group whose default command serves a replica directory."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == _PROCESS:
            from lhblock.cli._replica import replica as process

            return process
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # With --help alone, this group's help: it says where the process's is.
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [_PROCESS, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ReplicaGroup)
def replica() -> None:
    """Add, remove and show the replicas of a volume.

    Without one of these verbs it is the replica process: `lhblock replica DIR --listen HOST:PORT`
    serves the replica in DIR to an engine elsewhere; see `lhblock replica DIR --help`. A directory
    that is called like a verb is given as ./ls.
    """


@replica.command()
@volume_argument
@click.argument("address")
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite a replica that is not this volume's, or has writes of its own.",
)
@click.option("--wait", is_flag=True, help="Wait until it takes part.")
@common_options
def add(app: App, volume: str, address: str, force: bool, wait: bool) -> None:
    """Add the replica ADDRESS to VOLUME, or bring back one that takes no part.

    ADDRESS is a directory, or tcp://HOST:PORT of an 'lhblock replica'. The replica is made, or is
    of this volume and was away. It is rebuilt in the background while clients go on; when no
    process serves the volume, by the next one that does, or at once with --wait.
    """
    from lhblock.cli._waiting import wait_job
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME
    from lhblock.rpc.generated import volume_pb2 as pb

    app.quiet_logs()
    path = _absolute(address)
    with open_channel(app.data_dir, volume) as channel:
        channel.call(
            VOLUME, "ReplicaAdd", pb.ReplicaAddRequest(address=path, force=force, rebuild=wait)
        )
        if wait:
            request = pb.ReplicaWaitRequest(address=path)
            wait_job(channel, channel.call(VOLUME, "ReplicaWait", request), show=not app.json)
        rows, served = _rows(channel), channel.served
    if app.json:
        print_json({"name": volume, "serving": served, "replicas": rows})
    elif wait:
        click.echo(f"{path} is a replica of {volume} now")
    elif served:
        click.echo(f"{path} is being rebuilt; see 'lhblock replica rebuild-status {volume}'")
    else:
        click.echo(f"{path} is rebuilt when {volume} is served")


@replica.command()
@volume_argument
@click.argument("address")
@common_options
def rm(app: App, volume: str, address: str) -> None:
    """Take the replica ADDRESS out of VOLUME. Its files stay as they are.

    The others name it stale first, so it can never be taken for one that has all writes. The last
    usable replica is refused.
    """
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME
    from lhblock.rpc.generated import volume_pb2 as pb

    app.quiet_logs()
    path = _absolute(address)
    with open_channel(app.data_dir, volume) as channel:
        channel.call(VOLUME, "ReplicaRemove", pb.ReplicaRemoveRequest(address=path))
        rows, served = _rows(channel), channel.served
    if app.json:
        print_json({"name": volume, "serving": served, "replicas": rows})
    else:
        click.echo(f"{path} is no replica of {volume} any more; its files are still there")


@replica.command()
@volume_argument
@common_options
def ls(app: App, volume: str) -> None:
    """List the replicas of VOLUME.

    Modes: RW takes part, WO is being rebuilt, ERR was left out or has failed.
    """
    rows, served = _look(app, volume)
    if app.json:
        print_json({"name": volume, "serving": served, "replicas": rows})
        return
    print_table(
        ("REPLICA", "MODE", "GENERATION", "STATE"),
        [(row["path"], row["mode"], str(row["generation"]), _state(row)) for row in rows],
        right="GENERATION",
    )


@replica.command("rebuild-status")
@volume_argument
@click.option("--watch", is_flag=True, help="Go on until nothing is being rebuilt.")
@common_options
def rebuild_status(app: App, volume: str, watch: bool) -> None:
    """Show how far the rebuilds of VOLUME's replicas are: rate, time left, and why one failed."""
    if watch:
        _watch(app, volume)
        return
    rows, served = _look(app, volume)
    shown = [row for row in rows if row["rebuild"]]
    if app.json:
        print_json({"name": volume, "serving": served, "rebuilds": shown})
        return
    if not shown:
        note(f"no replica of {volume} is being rebuilt")
    for row in shown:
        click.echo(f"{row['path']}  {describe_rebuild(row['rebuild'])}")


def _watch(app: App, volume: str) -> None:
    from lhblock.cli._waiting import progress
    from lhblock.instance import open_channel

    app.quiet_logs()
    with (
        open_channel(app.data_dir, volume, read_only=True) as channel,
        progress(f"rebuild of {volume}", show=not app.json) as advance,
    ):
        last = ""
        while True:
            shown = [row for row in _rows(channel) if row["rebuild"]]
            if app.json:
                import json

                print(json.dumps({"name": volume, "rebuilds": shown}), flush=True)
            going = [row for row in shown if row["rebuild"]["phase"] != "refused"]
            for row in going:
                advance(row["rebuild"]["done_bytes"], row["rebuild"]["total_bytes"])
            text = "; ".join(f"{row['path']}  {describe_rebuild(row['rebuild'])}" for row in shown)
            if not app.json and not sys.stderr.isatty() and text and text != last:
                click.echo(text)
                last = text
            if not going or not channel.served:
                break
            time.sleep(WATCH_S)
    if not app.json:
        click.echo(text or f"no replica of {volume} is being rebuilt")


def _look(app: App, volume: str) -> tuple[list[dict[str, Any]], bool]:
    from lhblock.instance import open_channel

    app.quiet_logs()
    with open_channel(app.data_dir, volume, read_only=True) as channel:
        return _rows(channel), channel.served


def _rows(channel: VolumeChannel) -> list[dict[str, Any]]:
    from google.protobuf.empty_pb2 import Empty

    from lhblock.rpc import VOLUME

    return [
        {
            "path": item.address,
            "mode": item.mode,
            "error": item.error,
            "generation": item.generation,
            "lag": item.lag,
            "rebuild": rebuild_document(item.rebuild) if item.HasField("rebuild") else None,
        }
        for item in channel.call(VOLUME, "StatusGet", Empty()).replicas
    ]


def _state(row: dict[str, Any]) -> str:
    rebuild = row["rebuild"]
    if rebuild is not None:
        return describe_rebuild(rebuild)
    behind = f"{counted(row['lag'], 'generation')} behind" if row["lag"] else ""
    return ", ".join(filter(None, (row["error"], behind))) or "-"


def _absolute(address: str) -> str:
    return str(parse_replica(address, Path.cwd()))
