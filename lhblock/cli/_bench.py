"""``lhblock bench``: a quick figure, from fio, over the Unix socket."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from lhblock.cli._app import App, common_options, confirm
from lhblock.cli._names import SizeType, volume_argument
from lhblock.cli._output import counted, note, print_json, print_table
from lhblock.errors import LhblockError, UsageError
from lhblock.settings import check_volume_name, format_size

if TYPE_CHECKING:
    from lhblock.instance import VolumeRecord
    from lhblock.instance.bench import Figure, Target

_FILL_S = 3.0

Advance = Callable[[str, float], None]


@click.command()
@volume_argument
@click.option(
    "--seconds",
    metavar="S",
    type=click.FloatRange(0.1, 3600),
    default=3.0,
    help="Seconds of each measurement.  [default: 3]",
)
@click.option(
    "--size",
    type=SizeType(),
    help="Size of the scratch volume.  [default: 1G, less if there is little space]",
)
@click.option("--here", is_flag=True, help="Measure VOLUME itself: reads only.")
@click.option("--write", is_flag=True, help="With --here: also writes. DESTROYS ITS CONTENT.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@common_options
def bench(
    app: App, volume: str, seconds: float, size: int | None, here: bool, write: bool, yes: bool
) -> None:
    """Measure how fast a volume like VOLUME is on this machine.

    A scratch volume is made beside VOLUME, with as many replicas on the same disks and the same
    cache mode, filled, measured and removed; VOLUME is not touched. Needs fio.
    """
    check_volume_name(volume)
    if write and not here:
        raise UsageError("--write goes with --here; without it a scratch volume is written")
    if size is not None and here:
        raise UsageError("--size is for the scratch volume; --here measures the volume itself")

    from lhblock.instance import bench as measuring

    app.quiet_logs()
    measuring.require_fio()
    record = app.registry.get(volume)
    if write:
        confirm(f"Overwrite volume {volume} with random data?", yes=yes)
    patterns = [item for item in measuring.PATTERNS if write or not here or not item.writes]
    with (
        _terminable(),
        _target(app, record, here=here, write=write, size_bytes=size) as target,
        _bar(len(patterns) * seconds + (0 if here else _FILL_S), show=not app.json) as advance,
    ):
        if not here:
            measuring.fill(target, advance)
        figures = measuring.measure(target, patterns, seconds=seconds, advance=advance)
        size_bytes = target.size_bytes
    if app.json:
        print_json(
            {
                "volume": volume,
                "target": "volume" if here else "scratch",
                "size_bytes": size_bytes,
                "replicas": len(record.replicas),
                "cache": record.cache,
                "seconds": seconds,
                "results": [_document(figure) for figure in figures],
            }
        )
        return
    what = volume if here else f"a scratch volume beside {volume}"
    click.echo(
        f"{what}: {format_size(size_bytes)}, {counted(len(record.replicas), 'replica')},"
        f" cache {record.cache}, {seconds:g} s each"
    )
    print_table(
        ("WHAT", "IOPS", "MB/S", "P50 US", "P99 US", "CPU US/IO"),
        [
            (
                figure.pattern.name,
                f"{figure.iops:,.0f}",
                f"{figure.bytes_per_s / 1e6:,.1f}",
                f"{figure.p50_us:,.0f}",
                f"{figure.p99_us:,.0f}",
                f"{figure.server_cpu_us_per_io:.1f}",
            )
            for figure in figures
        ],
        right="IOPS,MB/S,P50 US,P99 US,CPU US/IO",
    )
    if here:
        note("ranges that were never written read as zeros without touching the disk")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: the scratch volume and who serves it must not be left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _target(
    app: App, record: VolumeRecord, *, here: bool, write: bool, size_bytes: int | None
) -> Iterator[Target]:
    import trio

    from lhblock.instance import answering_address
    from lhblock.instance.bench import scratch_volume, serving_child

    if not here:
        with (
            scratch_volume(app.registry, record, trio.run, size_bytes=size_bytes) as scratch,
            serving_child(app.data_dir.path, scratch.name, read_only=False) as target,
        ):
            yield target
    elif answering_address(app.data_dir, record.name) is None:
        with serving_child(app.data_dir.path, record.name, read_only=not write) as target:
            yield target
    else:
        yield _served_target(app, record.name)


def _served_target(app: App, volume: str) -> Target:
    from google.protobuf.empty_pb2 import Empty

    from lhblock.instance import bench as measuring
    from lhblock.instance import open_channel
    from lhblock.rpc import VOLUME

    with open_channel(app.data_dir, volume) as channel:
        status = channel.call(VOLUME, "StatusGet", Empty())
    if not status.uris:
        raise LhblockError(f"volume {volume}: its front end is shut down")
    unix = [uri for uri in status.uris if uri.startswith("nbd+unix:")]
    return measuring.Target((unix or list(status.uris))[0], status.pid, status.size_bytes)


@contextlib.contextmanager
def _bar(total_s: float, *, show: bool) -> Iterator[Advance]:
    if not show or not sys.stderr.isatty():
        yield lambda name, passed_s: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_s)

        def advance(name: str, passed_s: float) -> None:
            bar.update(task, advance=passed_s, description=name)

        yield advance


def _document(figure: Figure) -> dict[str, Any]:
    pattern = figure.pattern
    return {
        "name": pattern.name,
        "operation": "write" if pattern.writes else "read",
        "pattern": "random" if pattern.rw.startswith("rand") else "sequential",
        "block_bytes": pattern.block_bytes,
        "depth": pattern.depth,
        "iops": round(figure.iops, 1),
        "bytes_per_s": round(figure.bytes_per_s),
        "p50_us": round(figure.p50_us, 1),
        "p99_us": round(figure.p99_us, 1),
        "server_cpu_us_per_io": round(figure.server_cpu_us_per_io, 2),
    }
