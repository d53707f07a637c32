"""``lhblock volume``: the volumes of the data directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options, confirm
from lhblock.cli._names import SizeType, volume_argument, volumes_argument
from lhblock.cli._output import counted, note, print_fields, print_json, print_table
from lhblock.errors import LhblockError, SizeError, VolumeBusy
from lhblock.settings import format_size, parse_replica

if TYPE_CHECKING:
    from lhblock.instance import Registry, ReplicaRecord, VolumeRecord

SIZE = SizeType()
_HISTORY_SHOWN = 5


@click.group()
def volume() -> None:
    """Create, list, show, expand and remove volumes."""


@volume.command()
@common_options
def ls(app: App) -> None:
    """List the volumes. Asks no process: a held lock means that a volume is served."""
    registry = app.registry
    rows = [_summary(registry, name) for name in registry.names()]
    if app.json:
        print_json({"data_dir": str(app.data_dir.path), "volumes": rows})
        return
    if not rows:
        note(f"there are no volumes in {app.data_dir.path}")
        return
    print_table(
        ("NAME", "SIZE", "STATE", "PID", "REPLICAS", "CREATED"),
        [
            (
                row["name"],
                format_size(row["size_bytes"]) if row["size_bytes"] is not None else "-",
                row["state"],
                str(row["pid"] or "-"),
                str(len(row["replicas"])),
                row["created"] or "-",
            )
            for row in rows
        ],
        right="SIZE,PID,REPLICAS",
    )
    for row in rows:
        if row["error"]:
            note(row["error"])


@volume.command()
@volume_argument
@click.option("--size", type=SIZE, help="Size of the volume: 100G, 512M (powers of 1024).")
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    metavar="DIR|tcp://HOST:PORT",
    help="Replica: a directory, or an 'lhblock replica'; up to 8.  [default: one in the data dir]",
)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "none"]),
    default="writeback",
    show_default=True,
    help="none bypasses the page cache (O_DIRECT).",
)
@common_options
def create(app: App, volume: str, size: int | None, replicas: tuple[str, ...], cache: str) -> None:
    """Create VOLUME without serving it.

    Directories that hold a replica already, for instance one of Longhorn, are adopted as they
    are; --size is then not needed.

    \b
    lhblock volume create db --size 100G
    lhblock volume create db --size 100G --replica /disk1/db --replica /disk2/db
    """
    import trio

    from lhblock.instance import create_volume

    app.quiet_logs()

    async def main() -> VolumeRecord:
        return await create_volume(
            app.registry,
            volume,
            size_bytes=size,
            replicas=[parse_replica(replica, Path.cwd()) for replica in replicas],
            cache=cache,
        )

    record = trio.run(main)
    if app.json:
        print_json(_summary(app.registry, volume))
        return
    paths = ", ".join(str(place) for place in record.places)
    done = "created" if record.replicas[0].made else "adopted"
    click.echo(f"{done} {volume}: {format_size(record.size_bytes)} in {paths}")


@volume.command()
@volume_argument
@common_options
def info(app: App, volume: str) -> None:
    """Show everything about VOLUME.

    State, size, replicas and what is wrong with them; of a served volume also addresses,
    clients, jobs and statistics.
    """
    from google.protobuf.empty_pb2 import Empty

    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME

    app.quiet_logs()
    record = app.registry.get(volume)
    with open_channel(app.data_dir, volume, read_only=True) as channel:
        status = channel.call(VOLUME, "StatusGet", Empty())
        document = _document(record, status, served=channel.served)
    if app.json:
        print_json(document)
    else:
        _print_info(document)


@volume.command()
@volume_argument
@click.argument("size", type=SIZE)
@common_options
def expand(app: App, volume: str, size: int) -> None:
    """Make VOLUME larger, while it is served or stopped.

    SIZE is the new size, not the difference: 200G, 1.5T (powers of 1024), a multiple of 4096
    bytes. Connected clients see it when they reconnect. Volumes do not shrink.
    """
    from google.protobuf.empty_pb2 import Empty

    from lhblock.cli._waiting import wait_expanded
    from lhblock.instance import open_channel
    from lhblock.rpc import CONTROLLER, VOLUME
    from lhblock.rpc.generated import controller_pb2

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        now = channel.call(CONTROLLER, "VolumeGet", Empty()).size
        if size < now:
            raise SizeError(
                volume,
                f"it has {format_size(now)} and does not shrink; {format_size(size)} is less",
            )
        channel.call(CONTROLLER, "VolumeExpand", controller_pb2.VolumeExpandRequest(size=size))
        size_bytes = wait_expanded(channel, volume)
        clients = channel.call(VOLUME, "StatusGet", Empty()).statistics.connections
    if app.json:
        print_json({"name": volume, "size_bytes": size_bytes, "connections": clients})
        return
    click.echo(f"{volume} has {format_size(size_bytes)} now")
    if clients:
        note(f"{counted(clients, 'client')} connected: the new size is seen after reconnecting")


@volume.command()
@volumes_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@common_options
def rm(app: App, volumes: tuple[str, ...], yes: bool) -> None:
    """Remove volumes and the replicas made for them. A served volume is refused.

    Replica directories that existed before the volume did, and replicas of other processes, are
    left as they are.
    """
    registry = app.registry
    records = [registry.get(name) for name in dict.fromkeys(volumes)]
    for record in records:
        _refuse_served(app, record)
    made = [str(item.path) for record in records for item in record.replicas if _goes(item)]
    names = ", ".join(record.name for record in records)
    data = f" and all data in {', '.join(made)}" if made else "; its replicas stay"
    confirm(f"Remove {names}{data}?", yes=yes)
    removed = []
    for record in records:
        kept = _remove(registry, record)
        removed.append({"name": record.name, "kept": kept})
        if not app.json:
            click.echo(f"removed {record.name}")
            for path in kept:
                why = "delete it on its host" if "://" in path else "it existed before the volume"
                note(f"left {path} as it is: {why}")
    if app.json:
        print_json({"removed": removed})


def _remove(registry: Registry, record: VolumeRecord) -> list[str]:
    from contextlib import ExitStack

    from lhblock.instance import removable, remove_replica

    with registry.locked(), ExitStack() as stack:
        ours = [item for item in record.replicas if _goes(item)]
        held = [(item, stack.enter_context(removable(item))) for item in ours]
        for item, names in held:
            remove_replica(item, names)
        registry.forget(record.name)
    return [str(item.place) for item in record.replicas if not _goes(item)]


def _goes(replica: ReplicaRecord) -> bool:
    """Whether it goes with its volume: a directory that was made for it."""
    return bool(replica.made) and isinstance(replica.place, Path)


def _refuse_served(app: App, record: VolumeRecord) -> None:
    from lhblock.instance import serving

    holder = serving(app.data_dir, record)
    if holder is not None:
        who = f"process {holder.pid}" if holder.pid else "a process"
        raise VolumeBusy(record.name, f"{who} serves it; stop that first")


def _summary(registry: Registry, name: str) -> dict[str, Any]:
    from lhblock.instance import serving

    try:
        record = registry.get(name)
    except LhblockError as error:
        return {
            "name": name,
            "size_bytes": None,
            "state": "damaged",
            "pid": None,
            "cache": None,
            "created": None,
            "replicas": [],
            "error": str(error),
        }
    holder = serving(registry.data_dir, record)
    return {
        "name": name,
        "size_bytes": record.size_bytes,
        "state": "stopped" if holder is None else "serving",
        "pid": holder.pid or None if holder else None,
        "cache": record.cache,
        "created": record.created,
        "replicas": [str(place) for place in record.places],
        "error": None,
    }


def _document(record: VolumeRecord, status: Any, *, served: bool) -> dict[str, Any]:
    from lhblock.cli._documents import (
        client_document,
        job_document,
        membership_document,
        numbers,
        rebuild_document,
    )

    return {
        "name": record.name,
        "state": status.state,
        "serving": served,
        "pid": status.pid if served else None,
        "size_bytes": status.size_bytes,
        "read_only": status.read_only if served else False,
        "cache": status.cache,
        "created": record.created,
        "uris": list(status.uris),
        "driver": status.driver,
        "driver_reason": status.driver_reason,
        "replicas": [
            {
                "path": item.address,
                "mode": item.mode,
                "error": item.error,
                "generation": item.generation,
                "lag": item.lag,
                "rebuild": rebuild_document(item.rebuild) if item.HasField("rebuild") else None,
            }
            for item in status.replicas
        ],
        "history": [membership_document(item) for item in status.history],
        "clients": [client_document(item) for item in status.clients],
        "statistics": numbers(status.statistics),
        "jobs": [job_document(item) for item in status.jobs],
        "merges_pending": status.merges_pending,
        "snapshot_count_max": record.snapshot_count_max,
        "snapshot_bytes_max": record.snapshot_bytes_max,
        "version": status.version,
    }


def _print_info(document: dict[str, Any]) -> None:
    from lhblock.cli._documents import describe_rebuild

    where = f"served by process {document['pid']}" if document["serving"] else "stopped"
    mode = ", read-only" if document["read_only"] else ""
    fields = [
        ("volume", document["name"]),
        ("state", f"{document['state']}, {where}{mode}"),
        ("size", f"{format_size(document['size_bytes'])} ({document['size_bytes']} bytes)"),
        ("cache", document["cache"]),
        ("created", document["created"]),
        *(("uri", uri) for uri in document["uris"]),
    ]
    for item in document["replicas"]:
        error = f": {item['error']}" if item["error"] else ""
        behind = f", {item['lag']} behind" if item["lag"] else ""
        where = f"{item['path']}  generation {item['generation']}{behind}{error}"
        fields.append(("replica", f"{item['mode']}  {where}"))
        if item["rebuild"]:
            fields.append(("rebuild", describe_rebuild(item["rebuild"])))
    for item in document["history"][-_HISTORY_SHOWN:]:
        left = f", {counted(item['left'], 'replica')} left behind" if item["left"] else ""
        members = counted(item["members"], "member")
        fields.append(
            ("history", f"{item['time']}  {item['generation']}: {members}{left}, {item['reason']}")
        )
    fields.extend(
        ("client", f"{item['peer']}  {item['export']}  since {item['since']}")
        for item in document["clients"]
    )
    for item in document["jobs"]:
        done = f"{item['done_bytes'] * 100 // item['total_bytes']} %" if item["total_bytes"] else ""
        fields.append(("job", f"{item['kind']} {item['subject']} {item['state']} {done}".rstrip()))
    if document["serving"]:
        totals = document["statistics"]
        fields.append(("reads", f"{totals['reads']} ({format_size(totals['read_bytes'])})"))
        fields.append(("writes", f"{totals['writes']} ({format_size(totals['write_bytes'])})"))
        fields.append(("errors", str(totals["errors"])))
        fields.append(("block map", format_size(totals["map_bytes"])))
    print_fields(fields)
