"""``lhblock controller``: a superset of Longhorn's options for the same command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options, identity_options
from lhblock.cli._longhorn import LonghornCommand
from lhblock.cli._names import SizeType
from lhblock.errors import UsageError
from lhblock.settings import check_volume_name, parse_listen, parse_size

if TYPE_CHECKING:
    from lhblock.instance import ControllerReady

_TIMEOUT_S = 8.0
_BACKENDS = ("tcp", "file")


@click.command(cls=LonghornCommand)
@click.argument("volume", metavar="VOLUME")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="localhost:9501",
    show_default=True,
    help="Control calls.",
)
@click.option("--size", type=SizeType(), help="Of the volume, if its replicas are blank.")
@click.option("--current-size", type=SizeType(), help="The same, and wins over --size.")
@click.option(
    "--replica",
    multiple=True,
    metavar="tcp://HOST:PORT|DIR",
    help="Open the volume with these replicas; up to 8.  [default: wait for VolumeStart]",
)
@click.option(
    "--frontend",
    default="",
    metavar="nbd|fuse|tgt-iscsi|tgt-blockdev",
    help="Offer the volume while it is open.  [default: wait for VolumeFrontendStart]",
)
@click.option(
    "--nbd-listen",
    metavar="HOST:PORT",
    help="TCP address for NBD clients.  [default: none, the Unix socket only]",
)
@click.option(
    "--nbd-socket", metavar="PATH", help="Unix socket for NBD.  [default: DATA-DIR/run/VOLUME.nbd]"
)
@click.option("--fuse-dir", metavar="DIR", help="Where fuse mounts.")
@click.option(
    "--iscsi-listen",
    metavar="HOST:PORT",
    default="127.0.0.1:0",
    show_default=True,
    help="Where tgtd listens; port 0 lets the kernel choose.",
)
@click.option("--iscsi-chap", metavar="FILE", help="Names and secrets of CHAP.")
@click.option("--iscsi-allow", multiple=True, metavar="WHO", help="Initiators that may log in.")
@click.option("--iscsi-shared", is_flag=True, help="Use the tgtd that runs already.")
@click.option(
    "--engine-replica-timeout",
    metavar="SECONDS",
    type=float,
    default=_TIMEOUT_S,
    show_default=True,
    help="A replica that takes longer for a request is dropped; at least 1.",
)
@click.option("--snapshot-max-count", type=click.IntRange(min=1), help="[default: as recorded]")
@click.option("--snapshot-max-size", metavar="SIZE", help="0 is no limit.  [default: as recorded]")
@click.option(
    "--unmap-mark-snap-chain-removed", is_flag=True, help="Kept and reported, without effect."
)
@click.option("--rebuild-sync-concurrent-limit", type=int, default=1, help="Kept and reported.")
@click.option("--enable-backend", multiple=True, metavar="tcp|file", help="Accepted: both are.")
@click.option("--upgrade", is_flag=True, help="Accepted: clients reconnect to the new process.")
@click.option("--disableRevCounter", is_flag=True, help="Taken for granted: none is kept.")
@click.option(
    "--salvageRequested", is_flag=True, help="Taken for granted: the newest replica is chosen."
)
@click.option(
    "--data-server-protocol", default="tcp", help="Accepted: each replica says where its data is."
)
@click.option("--file-sync-http-client-timeout", type=int, default=5, help="Accepted, unused.")
@click.option("--cache", type=click.Choice(["writeback", "none"]), help="Of directories here.")
@click.option("--driver", type=click.Choice(["auto", "io_uring", "pool"]), help="[default: auto]")
@click.option("--queues", type=int, metavar="N", help="Threads that serve connections, 1-64.")
@click.option("--workers", type=int, metavar="N", help="Threads for I/O that would block, 1-64.")
@click.option("--max-connections", type=int, metavar="N", help="NBD clients at once.")
@click.option(
    "--rebuild-rate", type=int, metavar="MIB_S", help="MiB a second at most for rebuilding."
)
@click.option("--rebuild-streams", type=int, metavar="N", help="Pieces copied at a time, 1-8.")
@click.option(
    "--quorum-wait",
    type=float,
    metavar="SECONDS",
    help="How long I/O waits for a majority of the replicas that was lost at once.  [default: 30]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Open with too few replicas to know that none is newer; what only others have is lost.",
)
@click.option("--no-rebuild", is_flag=True, help="Leave replicas that were away alone.")
@identity_options
@common_options
def controller(
    app: App,
    volume: str,
    listen: str,
    size: int | None,
    current_size: int | None,
    replica: tuple[str, ...],
    frontend: str,
    nbd_listen: str | None,
    nbd_socket: str | None,
    engine_replica_timeout: float,
    snapshot_max_count: int | None,
    snapshot_max_size: str | None,
    unmap_mark_snap_chain_removed: bool,
    rebuild_sync_concurrent_limit: int,
    enable_backend: tuple[str, ...],
    max_connections: int | None,
    no_rebuild: bool,
    iscsi_allow: tuple[str, ...],
    iscsi_shared: bool,
    force: bool,
    **options: Any,
) -> None:
    """Run the engine of VOLUME, with replicas in other processes, until SIGINT or SIGTERM.

    The options are those of Longhorn's command of this name and a few more. Without --replica the
    volume is opened by VolumeStart of ptypes.ControllerService; lhblock's other commands find the
    process by the volume's name.

    \b
    lhblock controller db --size 100G --listen 10.0.0.9:9501 --frontend nbd \\
      --replica tcp://10.0.0.1:10000 --replica tcp://10.0.0.2:10000 --replica tcp://10.0.0.3:10000
    """
    check_volume_name(volume)
    for backend in enable_backend:
        if backend not in _BACKENDS:
            raise UsageError(f"Unsupported backend: {backend}; give tcp or file")
    if rebuild_sync_concurrent_limit <= 0:
        raise UsageError("rebuild-sync-concurrent-limit must be a positive integer")
    address = parse_listen(listen)
    if nbd_listen is not None:
        parse_listen(nbd_listen)

    import trio

    from lhblock.instance import (
        ControllerOptions,
        configure_logging,
        run_controller,
        serve_settings,
    )

    unused = ("upgrade", "disablerevcounter", "salvagerequested", "data_server_protocol")
    for name in (*unused, "file_sync_http_client_timeout"):
        options.pop(name)
    socket = Path(nbd_socket) if nbd_socket else app.data_dir.run / f"{volume}.nbd"
    settings = serve_settings(
        listen=nbd_listen,
        tcp=nbd_listen is not None,
        socket=socket,
        frontend=(
            *("nbd", "tgt-iscsi", "tgt-blockdev"),
            *(() if options["fuse_dir"] is None else ("fuse",)),
        ),
        iscsi_allow=iscsi_allow or None,
        iscsi_shared=True if iscsi_shared else None,
        replica=(),
        replica_timeout=engine_replica_timeout if engine_replica_timeout >= 1 else _TIMEOUT_S,
        rebuild=False if no_rebuild else None,
        connections_max=max_connections,
        force=True if force else None,
        **options,
    )
    limits = {}
    if snapshot_max_count is not None:
        limits["snapshot_count_max"] = snapshot_max_count
    if snapshot_max_size is not None:
        limits["snapshot_bytes_max"] = parse_size(snapshot_max_size)
    configure_logging(debug=app.debug, json=app.json)

    def on_ready(ready: ControllerReady) -> None:
        if app.json:
            import json

            document = {"event": "ready", "controller": ready.control, **asdict(ready.serving)}
            print(json.dumps(document), flush=True)
            return
        print(banner(ready, volume), flush=True)

    async def main() -> None:
        await run_controller(
            app.data_dir,
            ControllerOptions(
                volume=volume,
                listen=address,
                instance=app.engine_instance_name,
                size_bytes=current_size or size,
                frontend=frontend,
                replicas=replica,
                limits=limits,
                unmap_mark=unmap_mark_snap_chain_removed,
                sync_limit=rebuild_sync_concurrent_limit,
            ),
            settings,
            on_ready=on_ready,
        )

    trio.run(main)


def banner(ready: ControllerReady, volume: str) -> str:
    """Return what people need to know, ready to paste."""
    lines = [f"lhblock controls {volume}", f"  control calls    {ready.control}"]
    for served in ready.serving.volumes:
        lines.append(f"  state            {served.state}")
        lines.extend(f"  {uri}" for uri in served.uris)
    if not ready.serving.volumes:
        lines.append("  it has no replicas yet: VolumeStart names them")
    lines.append("stop with Ctrl-C")
    return "\n".join(lines)
