"""``lhblock replica``: a superset of Longhorn's options for the same command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options, identity_options
from lhblock.cli._longhorn import LonghornCommand
from lhblock.cli._names import SizeType
from lhblock.errors import UsageError
from lhblock.settings import parse_listen, parse_size

if TYPE_CHECKING:
    from lhblock.instance import ReplicaReady

_COUNT_MAX = 250


@click.command(cls=LonghornCommand)
@click.argument("directory", metavar="DIR")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="localhost:9502",
    show_default=True,
    help="Control calls; data connections are one port higher.",
)
@click.option("--size", type=SizeType(), help="Create the replica if there is none, of this size.")
@click.option(
    "--data-server-protocol",
    metavar="tcp|unix",
    default="tcp",
    help="unix: data connections on a Unix socket of the control path.",
)
@click.option(
    "--data-socket", metavar="PATH", help="That Unix socket.  [default: in LONGHORN_CONTROL_PATH]"
)
@click.option("--snapshot-max-count", type=int, default=_COUNT_MAX, show_default=True)
@click.option("--snapshot-max-size", metavar="SIZE", default="0", help="0 is no limit.")
@click.option(
    "--unmap-mark-disk-chain-removed", is_flag=True, help="Kept and reported, without effect."
)
@click.option("--disableRevCounter", is_flag=True, help="Taken for granted: none is kept.")
@click.option("--encrypted", is_flag=True, help="Note in a new replica that it is a LUKS volume.")
@click.option("--backing-file", metavar="FILE", default="", help="Not supported yet.")
@click.option("--sync-agent/--no-sync-agent", default=True, help="Accepted; there is none yet.")
@click.option("--sync-agent-port-count", type=int, default=10, help="Accepted, unused.")
@click.option("--restore-from", default="", help="Accepted, unused.")
@click.option("--restore-name", default="", help="Accepted, unused.")
@click.option(
    "--plain", is_flag=True, help="Answer only what Longhorn's replica does, also to our engines."
)
@click.option(
    "--cache", type=click.Choice(["writeback", "none"]), default="writeback", show_default=True
)
@click.option(
    "--driver", type=click.Choice(["auto", "io_uring", "pool"]), default="auto", show_default=True
)
@click.option("--queues", type=int, default=2, help="Threads that serve connections.  [1-64]")
@click.option("--workers", type=int, default=16, help="Threads for I/O that would block.  [1-64]")
@identity_options
@common_options
def replica(
    app: App,
    directory: str,
    listen: str,
    size: int | None,
    data_server_protocol: str,
    data_socket: str | None,
    snapshot_max_count: int,
    snapshot_max_size: str,
    unmap_mark_disk_chain_removed: bool,
    encrypted: bool,
    backing_file: str,
    plain: bool,
    cache: Any,
    driver: Any,
    queues: int,
    workers: int,
    **_unused: object,
) -> None:
    """Serve the replica in DIR to an engine on this or another host until SIGINT or SIGTERM.

    The engine decides when it is opened. The options are those of Longhorn's command of this
    name and a few more.
    """
    if backing_file:
        raise UsageError("--backing-file: volumes on a backing file are not supported yet")
    if data_server_protocol not in ("tcp", "unix"):
        raise UsageError(f"unsupported protocol: {data_server_protocol}; give tcp or unix")
    if data_socket is not None and data_server_protocol != "unix":
        raise UsageError("--data-socket is for --data-server-protocol unix")
    address = parse_listen(listen)

    import trio

    from lhblock.instance import ReplicaOptions, configure_logging, run_replica

    options = ReplicaOptions(
        path=Path.cwd() / directory,
        listen=address,
        size_bytes=size,
        volume=app.volume_name,
        instance=app.instance_name,
        data_protocol="unix" if data_server_protocol == "unix" else "tcp",
        data_socket=None if data_socket is None else Path.cwd() / data_socket,
        unmap_mark=unmap_mark_disk_chain_removed,
        snapshot_max_count=snapshot_max_count,
        snapshot_max_size=parse_size(snapshot_max_size),
        encrypted=encrypted,
        plain=plain,
        cache=cache,
        driver=driver,
        queues=queues,
        workers=workers,
    )
    configure_logging(debug=app.debug, json=app.json)

    def on_ready(ready: ReplicaReady) -> None:
        if app.json:
            import json

            print(json.dumps({"event": "ready", **asdict(ready)}), flush=True)
            return
        made = ", created" if ready.created else ""
        print(
            f"lhblock serves the replica {ready.path} ({ready.state}{made})\n"
            f"  control calls    {ready.control}\n"
            f"  data connections {ready.data}\n"
            "stop with Ctrl-C",
            flush=True,
        )

    async def main() -> None:
        await run_replica(options, on_ready=on_ready)

    trio.run(main)
