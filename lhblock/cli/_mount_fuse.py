"""``lhblock mount-fuse``: its argument, and what it prints once volumes are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lhblock.cli._app import App, common_options

if TYPE_CHECKING:
    from lhblock.instance import MountFuseReady


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@common_options
def mount_fuse(app: App, directory: Path) -> None:
    """Show every volume that this host serves as a file in DIR, until SIGINT or SIGTERM.

    DIR/VOLUME/volume is the volume, DIR/VOLUME/snapshots/NAME a snapshot, DIR/VOLUME/status.json
    its state. Volumes come and go as they are served, from this data directory. The processes that
    serve them do the I/O. DIR is made if it is missing, and must be empty.

    \b
    lhblock mount-fuse /mnt/lhblock
    losetup --find --show --direct-io=on /mnt/lhblock/db/volume
    """
    import trio

    from lhblock.instance import configure_logging, run_mount_fuse

    configure_logging(debug=app.debug, json=app.json)

    def on_ready(ready: MountFuseReady) -> None:
        if app.json:
            import json
            from dataclasses import asdict

            click.echo(json.dumps({"event": "ready", **asdict(ready)}))
            return
        click.echo(f"volumes served from {ready.data_dir} are shown in {ready.directory}")
        for volume in ready.volumes:
            click.echo(f"  {volume.file}")
        click.echo("stop with Ctrl-C")

    async def main() -> None:
        await run_mount_fuse(app.data_dir, Path.cwd() / directory, on_ready=on_ready)

    trio.run(main)
