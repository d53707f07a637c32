"""``make bench``: run every match, print its table, write the JSON file."""

from __future__ import annotations

import logging
from typing import Any

import structlog

from tests.bench import iscsi, report
from tests.bench.contestants import fio_direct, nbdkit_file, nbdkit_memory, qemu_nbd
from tests.bench.fuse import fuse_contestants
from tests.bench.goals import goals
from tests.bench.idle import idle_cost
from tests.bench.map_memory import map_memory
from tests.bench.match import Match, play
from tests.bench.nbdkit_plugin import plugin_contestants
from tests.bench.ours import LAYERS_DEEP, lhblock, lhblock_deep
from tests.bench.rebuild import rebuild_cost
from tests.bench.remote import REMOTE, lhblock_remote
from tests.bench.settings import BenchSettings
from tests.bench.workload import POINTS


def matches() -> list[Match]:
    """All tables, in the order they are run."""
    peers = [nbdkit_file(), nbdkit_memory(), qemu_nbd()]
    small = [point for point in POINTS if not point.in_mib_s]
    reads = [point for point in POINTS if not point.is_write]
    return [
        Match("unix", [*peers, lhblock("lhblock"), lhblock("lhblock x3", replicas=3)]),
        Match(
            "copies",
            [lhblock("lhblock"), lhblock("lhblock x3", replicas=3)],
            small,
            image_divisor=3,
        ),
        Match(
            "remote",
            [nbdkit_file(tcp=True), lhblock("lhblock"), lhblock_remote(REMOTE, replicas=3)],
            image_divisor=3,
        ),
        Match("tcp", [*peers, lhblock("lhblock")], tcp=True),
        Match(
            "direct",
            [
                fio_direct(),
                lhblock("none, io_uring", "--cache", "none", "--driver", "io_uring"),
                lhblock("none, pool", "--cache", "none", "--driver", "pool"),
            ],
            small,
        ),
        Match("fuse", fuse_contestants()),
        Match("plugin", [*plugin_contestants(), lhblock("lhblock")]),
        Match("depth", [lhblock("1 layer"), lhblock_deep(f"{LAYERS_DEEP} layers")], reads),
    ]


def main() -> None:
    """Run what ``BENCH_ONLY`` asks for, or everything."""
    # The engine runs in this process while deep chains are made; its log is not for the report.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = BenchSettings.from_environment()
    document: dict[str, Any] = {"environment": report.environment(settings), "matches": {}}
    for match in matches():
        if not settings.wants(match.name):
            continue
        results = play(match, settings)
        print(report.table(match, results), flush=True)
        document["matches"][match.name] = report.as_json(match, results)
    if settings.wants("iscsi"):
        document["iscsi"] = iscsi.iscsi_throughput(settings)
        print("== iscsi\n" + iscsi.table(document["iscsi"]), flush=True)
    if settings.wants("map"):
        document["map"] = map_memory()
        print("== map\n" + report.figures(document["map"]), flush=True)
    if settings.wants("idle"):
        document["idle"] = idle_cost(settings)
        print("== idle\n" + report.figures(document["idle"]), flush=True)
    if settings.wants("rebuild"):
        document["rebuild"] = rebuild_cost(settings)
        print("== rebuild\n" + report.figures(document["rebuild"]), flush=True)
    print("== goals", *goals(document), sep="\n", flush=True)
    print(f"written to {report.write(document, settings.results)}")


if __name__ == "__main__":
    main()
