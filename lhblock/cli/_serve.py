"""``lhblock serve``: its options, and what it prints once clients can connect."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._names import SizeType, volumes_argument
from lhblock.settings import check_volume_name, format_size, parse_listen

if TYPE_CHECKING:
    from lhblock.instance import Ready

_SHOWN_VOLUMES_MAX = 20


@click.command()
@volumes_argument
@click.option(
    "--size",
    type=SizeType(),
    help="Create volumes that do not exist, of this size: 100G, 512M (powers of 1024).",
)
@click.option(
    "--replica",
    multiple=True,
    metavar="DIR|tcp://HOST:PORT",
    help="Replica of a new volume: a directory, or an 'lhblock replica'; up to 8."
    "  [default: one in the data dir]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="TCP address; port 0 lets the kernel choose.  [default: 127.0.0.1:10809]",
)
@click.option("--no-tcp", is_flag=True, help="Listen on the Unix socket only.")
@click.option(
    "--tls-certificates",
    metavar="DIR",
    help="Speak TLS on TCP, and nothing else: ca-cert.pem, server-cert.pem, server-key.pem.",
)
@click.option(
    "--tls-psk",
    metavar="FILE",
    help="Speak TLS on TCP, and nothing else, with the keys that psktool put there.",
)
@click.option(
    "--tls-verify-clients",
    is_flag=True,
    help="With --tls-certificates: let in only clients with a certificate of that authority.",
)
@click.option("--socket", metavar="PATH", help="Unix socket.  [default: DATA-DIR/run/nbd.sock]")
@click.option(
    "--frontend",
    multiple=True,
    type=click.Choice(["nbd", "fuse", "tgt-iscsi", "tgt-blockdev"]),
    help="A door to open; repeat it for more.  [default: nbd]",
)
@click.option(
    "--fuse-dir",
    metavar="DIR",
    help="Where fuse mounts: DIR/VOLUME/volume, snapshots/NAME, status.json.",
)
@click.option(
    "--iscsi-listen",
    metavar="HOST:PORT",
    help="Where tgt-iscsi and tgt-blockdev listen.  [default: 127.0.0.1:3260]",
)
@click.option(
    "--iscsi-chap",
    metavar="FILE",
    help="Let in only initiators that know the secret there: a line 'USER SECRET', mode 0600.",
)
@click.option(
    "--iscsi-allow",
    multiple=True,
    metavar="WHO",
    help="Let in only this address, network or initiator name; repeat it.  [default: everybody]",
)
@click.option(
    "--iscsi-block-size",
    type=click.Choice(["512", "4096"]),
    help="Bytes of a logical block.  [default: 512]",
)
@click.option(
    "--iscsi-target",
    metavar="NAME",
    help="One target with the volumes as units 1, 2, ...  [default: a target for each]",
)
@click.option("--iscsi-shared", is_flag=True, help="Use the tgtd that runs already.")
@click.option(
    "--iscsi-backing",
    type=click.Choice(["auto", "module", "fuse"]),
    help="How tgtd reaches a volume: a module in it, or a file.  [default: auto]",
)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "none"]),
    help="none bypasses the page cache (O_DIRECT).  [default: as recorded, else writeback]",
)
@click.option("--read-only", is_flag=True, help="Write nothing, metadata included.")
@click.option(
    "--driver",
    type=click.Choice(["auto", "io_uring", "pool"]),
    help="How I/O that has to wait is done.  [default: auto]",
)
@click.option("--queues", metavar="N", help="Threads that serve connections, 1-64.  [default: 2]")
@click.option(
    "--workers",
    metavar="N",
    help="Threads at most for I/O that would stall a queue, 1-64.  [default: 16]",
)
@click.option("--max-connections", metavar="N", help="Clients at once.  [default: 1024]")
@click.option(
    "--rebuild-rate",
    metavar="MIB_S",
    help="MiB a second at most for rebuilding a replica; 0 is no limit.  [default: 0]",
)
@click.option(
    "--rebuild-streams",
    metavar="N",
    help="Pieces that a rebuild copies at a time, 1-8.  [default: 2]",
)
@click.option(
    "--no-rebuild",
    is_flag=True,
    help="Leave replicas that were away, or failed, alone until 'lhblock replica add'.",
)
@click.option(
    "--replica-timeout",
    metavar="SECONDS",
    help="What a replica of another process may take for a request, 1-3600.  [default: 8]",
)
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
@click.option("--stdio", is_flag=True, help="Serve one client on standard input and output.")
@common_options
def serve(
    app: App,
    volumes: tuple[str, ...],
    size: int | None,
    max_connections: str | None,
    no_tcp: bool,
    no_rebuild: bool,
    read_only: bool,
    force: bool,
    stdio: bool,
    tls_verify_clients: bool,
    replica: tuple[str, ...],
    frontend: tuple[str, ...],
    iscsi_allow: tuple[str, ...],
    iscsi_shared: bool,
    **options: str | None,
) -> None:
    """Serve one or more volumes over NBD until SIGINT or SIGTERM.

    A client chooses a volume by its name as export name; VOLUME@SNAPSHOT is a read-only export
    of a snapshot. A second signal stops at once. Each option but --size, --replica and --stdio
    can be given as a variable: LHBLOCK_LISTEN, LHBLOCK_TCP=0, LHBLOCK_SOCKET, LHBLOCK_CACHE,
    LHBLOCK_READ_ONLY, LHBLOCK_DRIVER, LHBLOCK_QUEUES, LHBLOCK_WORKERS, LHBLOCK_CONNECTIONS_MAX,
    LHBLOCK_REBUILD=0, LHBLOCK_REBUILD_RATE, LHBLOCK_REBUILD_STREAMS, LHBLOCK_REPLICA_TIMEOUT,
    LHBLOCK_TLS_CERTIFICATES, LHBLOCK_TLS_PSK, LHBLOCK_TLS_VERIFY_CLIENTS.

    \b
    lhblock serve db --size 100G
    lhblock serve db --size 100G --replica /disk1/db --replica /disk2/db
    lhblock serve db --size 100G --replica /disk1/db --replica tcp://10.0.0.2:10000
    lhblock serve web logs --no-tcp --socket /run/nbd.sock
    lhblock serve db --listen 10.0.0.9:10809 --tls-psk /etc/lhblock/keys.psk
    lhblock serve db --frontend nbd --frontend fuse --fuse-dir /mnt/lhblock
    lhblock serve db --frontend tgt-iscsi --iscsi-chap /etc/lhblock/chap
    """
    for name in volumes:
        check_volume_name(name)
    if options["listen"] is not None:
        parse_listen(options["listen"])

    import trio

    from lhblock.instance import configure_logging, run_serve, serve_settings

    settings = serve_settings(
        replica=replica or None,
        frontend=tuple(dict.fromkeys(frontend)) or None,
        iscsi_allow=iscsi_allow or None,
        iscsi_shared=True if iscsi_shared else None,
        tcp=False if no_tcp else None,
        rebuild=False if no_rebuild else None,
        read_only=True if read_only else None,
        force=True if force else None,
        tls_verify_clients=True if tls_verify_clients else None,
        connections_max=max_connections,
        **options,
    )
    configure_logging(debug=app.debug, json=app.json, quiet=stdio)

    def on_ready(ready: Ready) -> None:
        # Standard output is the client's connection.
        stream = sys.stderr if stdio else sys.stdout
        if app.json:
            import json

            print(json.dumps({"event": "ready", **asdict(ready)}), file=stream, flush=True)
        elif not stdio:
            print(banner(ready), file=stream, flush=True)

    async def main() -> None:
        await run_serve(
            app.data_dir, volumes, settings, size_bytes=size, on_ready=on_ready, stdio=stdio
        )

    trio.run(main)


def banner(ready: Ready) -> str:
    """Return what people need to attach a client, ready to paste."""
    lines = [f"lhblock serves from {ready.data_dir} (I/O: {ready.driver}, {ready.driver_reason})"]
    for volume in ready.volumes[:_SHOWN_VOLUMES_MAX]:
        mode = ", read-only" if volume.read_only else ""
        made = ", created" if volume.created else ""
        lines.append("")
        lines.append(
            f"{volume.name}: {format_size(volume.size_bytes)}, {volume.state},"
            f" cache {volume.cache}{mode}{made}"
        )
        lines.extend(f"  {uri}" for uri in volume.uris)
        if volume.device:
            lines.append(f"  {volume.device}")
    hidden = len(ready.volumes) - _SHOWN_VOLUMES_MAX
    if hidden > 0:
        lines.append(f"and {hidden} more; see 'lhblock volume ls'")
    lines.append("")
    lines.extend(f"Unix socket: {path}" for path in ready.sockets)
    if ready.portal:
        lines.append(f"iSCSI portal: {ready.portal} (backing: {ready.backing})")
    first = ready.volumes[0]
    lines.append("attach:")
    lines.extend(f"  {command}" for command in attach_commands(ready, first.name, first.uris))
    if first.file:
        lines.append(f"  losetup --find --show --direct-io=on {shlex.quote(first.file)}")
    lines.append("stop with Ctrl-C")
    return "\n".join(lines)


def attach_commands(ready: Ready, name: str, uris: Any) -> list[str]:
    """Return commands that attach or copy `name`, for addresses that are listened on."""
    iscsi = [uri for uri in uris if uri.startswith("iscsi:")]
    uris = [uri for uri in uris if uri not in iscsi and not uri.startswith("/")]
    commands = [f"lhblock attach {shlex.quote(uris[-1])}"] if uris else []
    secured = [uri for uri in uris if uri.startswith("nbds:")]
    uris = [uri for uri in uris if uri not in secured]
    commands += [f"nbdinfo {shlex.quote(uri)}" for uri in secured[:1]]
    if ready.listen and not secured:
        host, _, port = ready.listen[0].rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
        commands.append(f"nbd-client {host} {port} /dev/nbd0 -N {name}")
    elif ready.sockets:
        path = shlex.quote(ready.sockets[0])
        commands.append(f"nbd-client -unix {path} /dev/nbd0 -N {name}")
    if uris:
        uri = shlex.quote(uris[0])
        commands.append(f"qemu-img convert -n -f qcow2 -O raw disk.qcow2 {uri}")
        commands.append(f"nbdcopy disk.img {shlex.quote(uris[-1])}")
    if iscsi:
        target = iscsi[0].split("/")[3]
        commands.append(f"iscsiadm -m discovery -t sendtargets -p {ready.portal}")
        commands.append(f"iscsiadm -m node -T {target} -p {ready.portal} --login")
    return commands
