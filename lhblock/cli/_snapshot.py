"""``lhblock snapshot`` and ``lhblock scrub``: on a served volume and on a stopped one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._names import complete_snapshot, snapshot_argument, volume_argument
from lhblock.cli._output import counted, note, print_json, print_table
from lhblock.settings import check_snapshot_name, check_volume_name, format_size, parse_labels

HEAD = "volume-head"


@click.group()
def snapshot() -> None:
    """Create, list, revert to, remove and check snapshots."""


@snapshot.command()
@volume_argument
@click.argument("name", required=False)
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Kept with it; repeatable."
)
@common_options
def create(app: App, volume: str, name: str | None, labels: tuple[str, ...]) -> None:
    """Take a snapshot of VOLUME and print its name.

    NAME is 1 to 200 letters, digits, '_', '.' or '-'; a random one is chosen without it. The
    snapshot holds what was written and acknowledged before; of a mounted file system sync the
    client first.

    \b
    lhblock snapshot create db before-upgrade --label why=upgrade
    """
    check_volume_name(volume)
    given = check_snapshot_name(name) if name is not None else ""
    parsed = parse_labels(labels)

    from lhblock.instance import open_channel
    from lhblock.rpc import CONTROLLER
    from lhblock.rpc.generated import controller_pb2

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        request = controller_pb2.VolumeSnapshotRequest(name=given, labels=parsed)
        made = channel.call(CONTROLLER, "VolumeSnapshot", request).name
    if app.json:
        print_json({"volume": volume, "name": made})
    else:
        click.echo(made)


@snapshot.command()
@volume_argument
@common_options
def ls(app: App, volume: str) -> None:
    """List the snapshots of VOLUME as a tree, oldest first.

    volume-head is the live data. ON DISK is what the layer itself takes.
    """
    check_volume_name(volume)

    from google.protobuf.empty_pb2 import Empty

    from lhblock.cli._documents import snapshot_document
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME

    app.quiet_logs()
    with open_channel(app.data_dir, volume, read_only=True) as channel:
        reply = channel.call(VOLUME, "SnapshotList", Empty())
    documents = [snapshot_document(item) for item in reply.snapshots]
    if app.json:
        print_json(
            {
                "volume": volume,
                "size_bytes": reply.volume_bytes,
                "snapshots": documents,
                "merges_pending": reply.merges_pending,
            }
        )
        return
    print_table(
        ("NAME", "ON DISK", "CREATED", "LABELS"),
        [
            (
                f"{branch}{_title(item)}",
                format_size(item["allocated_bytes"]),
                item["created"],
                " ".join(f"{key}={value}" for key, value in item["labels"].items()),
            )
            for branch, item in tree(documents)
        ],
        right="ON DISK",
    )


@snapshot.command()
@volume_argument
@snapshot_argument
@common_options
def revert(app: App, volume: str, snapshot: str) -> None:
    """Make the content of VOLUME that of SNAPSHOT. Does not ask.

    What was written since the last snapshot is lost. Refused while clients are connected.
    """
    check_volume_name(volume)

    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME
    from lhblock.rpc.generated import volume_pb2

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        request = volume_pb2.SnapshotRevertRequest(name=snapshot)
        channel.call(VOLUME, "SnapshotRevert", request)
    if app.json:
        print_json({"volume": volume, "name": snapshot})
    else:
        click.echo(f"{volume} is what it was at {snapshot}")


@snapshot.command()
@volume_argument
@click.argument(
    "snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=complete_snapshot
)
@click.option("--wait", is_flag=True, help="Return when the data has moved, too.")
@common_options
def rm(app: App, volume: str, snapshots: tuple[str, ...], wait: bool) -> None:
    """Remove snapshots of VOLUME.

    What a newer snapshot needs of them moves there: in the background while VOLUME is served,
    before the command returns when it is stopped.
    """
    check_volume_name(volume)

    from lhblock.cli._waiting import wait_merged
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME
    from lhblock.rpc.generated import volume_pb2

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        for name in dict.fromkeys(snapshots):
            channel.call(VOLUME, "SnapshotRemove", volume_pb2.SnapshotRemoveRequest(name=name))
            if not app.json:
                click.echo(f"removed {name}")
        if wait or not channel.served:
            wait_merged(channel, show=not app.json)
    if app.json:
        print_json({"volume": volume, "removed": list(dict.fromkeys(snapshots))})


@snapshot.command("hash")
@volume_argument
@snapshot_argument
@click.option("--rehash", is_flag=True, help="Read the data even if a checksum is recorded.")
@common_options
def hash_command(app: App, volume: str, snapshot: str, rehash: bool) -> None:
    """Print and record the checksum of a snapshot's layer.

    One line for each replica. It is the CRC-64 of the layer's file with its holes as zeros, as
    Longhorn computes it.
    """
    check_volume_name(volume)

    from lhblock.cli._waiting import wait_job
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME
    from lhblock.rpc.generated import volume_pb2

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        request = volume_pb2.SnapshotHashRequest(name=snapshot, rehash=rehash)
        job = wait_job(channel, channel.call(VOLUME, "SnapshotHash", request), show=not app.json)
    if app.json:
        checksums = [
            {"replica": item.replica, "method": item.method, "checksum": item.value}
            for item in job.checksums
        ]
        print_json({"volume": volume, "name": snapshot, "checksums": checksums})
        return
    for item in job.checksums:
        click.echo(f"{item.value}  {item.replica}")
    if len({item.value for item in job.checksums}) > 1:
        note(f"the replicas differ in {snapshot}; 'lhblock scrub {volume}' finds the damaged one")


@click.command()
@volume_argument
@common_options
def scrub(app: App, volume: str) -> int:
    """Read every snapshot of VOLUME on every replica and compare with the recorded checksums.

    Damage is repaired from a good replica where there is one. The exit status is 1 if any was
    found.
    """
    check_volume_name(volume)

    from google.protobuf.empty_pb2 import Empty

    from lhblock.cli._waiting import wait_job
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME

    app.quiet_logs()
    with open_channel(app.data_dir, volume) as channel:
        job = wait_job(channel, channel.call(VOLUME, "Scrub", Empty()), show=not app.json)
    mismatches = [
        {
            "replica": item.replica,
            "snapshot": item.snapshot,
            "expected": item.expected,
            "found": item.found,
            "repaired_from": item.repaired_from or None,
        }
        for item in job.mismatches
    ]
    if app.json:
        print_json(
            {
                "volume": volume,
                "verified": job.verified,
                "without_record": job.without_record,
                "mismatches": mismatches,
            }
        )
    else:
        for item in mismatches:
            source = item["repaired_from"]
            end = f"repaired from {source}" if source else "no replica has a good copy"
            click.echo(f"damaged: {item['snapshot']} in {item['replica']}; {end}")
        click.echo(
            f"{counted(job.verified, 'layer')} verified, {len(mismatches)} damaged,"
            f" {job.without_record} without a checksum"
        )
        if job.without_record:
            note(f"'lhblock snapshot hash {volume} NAME' records the checksum of one")
    return 1 if mismatches else 0


def tree(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each snapshot with the branches drawn before its name, parents before children.

    A chain without forks is drawn flat, so that 250 layers do not march off the screen.
    """
    known = {item["name"]: item for item in documents}
    roots = [item["name"] for item in documents if item["parent"] not in known]
    # (name, what is drawn on its own line, what its descendants' lines begin with)
    pending = [(name, "", "") for name in reversed(roots)]
    while pending:
        name, branch, indent = pending.pop()
        yield branch, known[name]
        children = [child for child in known[name]["children"] if child in known]
        if len(children) == 1:
            pending.append((children[0], indent, indent))
            continue
        # The line that leads to the head comes last, at the bottom of the list.
        children.sort(key=lambda child: _leads_to_head(known, child))
        for child in reversed(children):
            last = child == children[-1]
            pending.append(
                (child, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "))
            )


def _leads_to_head(known: dict[str, dict[str, Any]], name: str) -> bool:
    pending = [name]
    while pending:
        one = pending.pop()
        if one == HEAD:
            return True
        pending.extend(child for child in known[one]["children"] if child in known)
    return False


def _title(item: dict[str, Any]) -> str:
    return f"{item['name']} (being removed)" if item["removed"] else str(item["name"])
