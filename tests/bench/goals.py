"""What we want to reach, computed from the figures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.iscsi import MODULE, STOCK
from tests.bench.remote import REMOTE

PEERS = ("nbdkit file", "nbdkit memory", "qemu-nbd")


@dataclass(frozen=True)
class Goal:
    """One goal. ``at_least`` says on which side of the bound the value should be."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "reached" if self.reached else "MISSED"
        return f"  {self.name:<52}{self.value:>8.2f} {sign} {self.bound:<7.2f} {verdict}"


def goals(document: Mapping[str, Any]) -> list[Goal]:
    """The goals whose tables were run."""
    return [
        goal
        for part in (
            _peers,
            _copies,
            _remote,
            _direct,
            _plugin,
            _fuse,
            _iscsi,
            _depth,
            _idle,
            _map,
            _rebuild,
        )
        for goal in part(document)
    ]


def _iops(table: Mapping[str, Any], contestant: str, point: str) -> float:
    return float(table[contestant][point]["median"]["iops"])


def _peers(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("unix")
    if table is None:
        return
    for point, bound in (
        ("randread-4k-32", 1.3),
        ("randwrite-4k-32", 1.2),
        ("randread-4k-1", 1.0),
        ("randwrite-4k-1", 1.0),
    ):
        ratio = _iops(table, "lhblock", point) / _iops(table, "nbdkit file", point)
        yield Goal(f"{point} to nbdkit file", ratio, bound)
    for point in ("read-1m-8", "write-1m-8"):
        best = max(_iops(table, peer, point) for peer in PEERS)
        yield Goal(f"{point} to the best peer", _iops(table, "lhblock", point) / best, 1.0)


def _copies(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("copies")
    if table is None:
        return
    point = "randwrite-4k-32"
    ratio = _iops(table, "lhblock x3", point) / _iops(table, "lhblock", point)
    yield Goal(f"{point}, three replicas to one", ratio, 0.45)


def _remote(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("remote")
    if table is None:
        return
    for point, other, bound in (
        ("randwrite-4k-32", "nbdkit file", 0.45),
        ("randwrite-4k-32", "lhblock", 0.35),
        ("randread-4k-32", "lhblock", 0.8),
        ("write-1m-8", "lhblock", 0.3),
    ):
        ratio = _iops(table, REMOTE, point) / _iops(table, other, point)
        yield Goal(f"{point}, three remote to {other}", ratio, bound)
    point = "randwrite-4k-1"
    ours, one = (table[name][point]["median"]["p50_us"] for name in (REMOTE, "lhblock"))
    yield Goal(f"{point}, latency of three remote to one", ours / one, 1.6, at_least=False)


def _direct(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("direct")
    if table is None:
        return
    for point in ("randread-4k-32", "randwrite-4k-32"):
        ratio = _iops(table, "none, io_uring", point) / _iops(table, "fio direct", point)
        yield Goal(f"{point}, cache none to fio direct", ratio, 0.8)


def _plugin(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("plugin")
    if table is None:
        return
    for point in ("randread-4k-1", "randread-4k-32", "randwrite-4k-32"):
        for name in ("lhblock plugin", "lhblock plugin in C"):
            ratio = _iops(table, name, point) / _iops(table, "nbdkit python", point)
            yield Goal(f"{point}, {name} to a disk in nbdkit's Python", ratio, 1.0)


def _fuse(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("fuse")
    if table is None:
        return
    for point in table["lhblock"]:
        ratio = _iops(table, "lhblock", point) / _iops(table, "pyfuse3 file", point)
        yield Goal(f"{point}, FUSE to a pass-through on pyfuse3", ratio, 1.0)


def _iscsi(document: Mapping[str, Any]) -> Iterator[Goal]:
    for point, by_name in document.get("iscsi", {}).items():
        ratio = by_name[MODULE]["median"] / by_name[STOCK]["median"]
        yield Goal(f"iSCSI {point}, module to stock tgtd on a file", ratio, 0.9)


def _depth(document: Mapping[str, Any]) -> Iterator[Goal]:
    table = document["matches"].get("depth")
    if table is None:
        return
    point = "randread-4k-32"
    ratio = _iops(table, "250 layers", point) / _iops(table, "1 layer", point)
    yield Goal(f"{point}, 250 layers to one", ratio, 0.97)


def _idle(document: Mapping[str, Any]) -> Iterator[Goal]:
    idle = document.get("idle")
    if idle is None:
        return
    yield Goal("100 idle volumes, % of a core", idle["cpu_percent_of_a_core"], 1.0, at_least=False)
    yield Goal("idle volume, MiB each", idle["pss_mib_per_volume"], 4.0, at_least=False)


def _rebuild(document: Mapping[str, Any]) -> Iterator[Goal]:
    figures = document.get("rebuild")
    if figures is None:
        return
    yield Goal("full rebuild to dd through a socket", figures["data_to_dd"], 0.7)
    yield Goal("rebuild of every other block, MiB/s", figures["alternating_mib_s"], 150.0)
    yield Goal(
        "resync, copied to written", figures["resync_copied_to_written"], 1.1, at_least=False
    )
    yield Goal(
        "snapshot under load, pause in ms",
        figures["snapshot_pause_ms_longest"],
        20.0,
        at_least=False,
    )


def _map(document: Mapping[str, Any]) -> Iterator[Goal]:
    for name, bound in (("untouched", 1.0), ("sequential", 1.0), ("fragmented", 320.0)):
        if "map" in document:
            value = document["map"][f"{name}_mib_per_tib"]
            yield Goal(f"block map of a TiB {name}, MiB", value, bound, at_least=False)
