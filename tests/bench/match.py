"""A match: contestants that run interleaved, all started and warm, one at a time at work."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.contestants import Contestant, Running
from tests.bench.settings import BenchSettings
from tests.bench.workload import POINTS, Point, Sample, fill, measure


@dataclass(frozen=True)
class Match:
    """One table of the report. The first contestant is the one others are compared with.

    ``image_divisor`` makes images smaller, for contestants that keep several copies: dirty pages
    beyond the kernel's background limit make the disk's write-back the thing that is measured.
    """

    name: str
    contestants: Sequence[Contestant]
    points: Sequence[Point] = POINTS
    tcp: bool = False
    image_divisor: int = 1


# Samples of one contestant at one point, in the order of the rounds.
Results = dict[tuple[str, str], list[Sample]]


def play(match: Match, settings: BenchSettings) -> Results:
    """Run all rounds. Each round begins with another contestant, so no place is always the last.

    Raises:
      RuntimeError: fio failed, or a server ended early.
    """
    bytes_ = (settings.image_mib << 20) // match.image_divisor & -(1 << 20)
    settings.directory.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    with ExitStack() as stack:
        root = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bench-", dir=settings.directory)
        )
        running: list[Running] = []
        for number, contestant in enumerate(match.contestants):
            # A short name: the path of a Unix socket has a hundred bytes to fit in.
            directory = Path(root, str(number))
            directory.mkdir()
            server = stack.enter_context(contestant.start(directory, bytes_, tcp=match.tcp))
            fill(server.engine, bytes_=bytes_, write=not contestant.prefilled)
            running.append(server)
        for round_ in range(settings.rounds):
            for point in match.points:
                first = round_ % len(running)
                for server in running[first:] + running[:first]:
                    os.sync()  # nobody pays for what another has left dirty
                    sample = measure(
                        point,
                        server.engine,
                        seconds=settings.seconds,
                        server_pid=server.pid,
                        replica_pids=server.replica_pids,
                    )
                    results.setdefault((server.name, point.name), []).append(sample)
            print(f"{match.name}: round {round_ + 1} of {settings.rounds}", flush=True)
    return results


def median(samples: Sequence[Sample]) -> Sample:
    """The median of every figure by itself."""
    cpu = [sample.cpu_us for sample in samples if sample.cpu_us is not None]
    replicas = [each.replicas_cpu_us for each in samples if each.replicas_cpu_us is not None]
    return Sample(
        iops=statistics.median(sample.iops for sample in samples),
        mib_s=statistics.median(sample.mib_s for sample in samples),
        p50_us=statistics.median(sample.p50_us for sample in samples),
        p99_us=statistics.median(sample.p99_us for sample in samples),
        cpu_us=statistics.median(cpu) if cpu else None,
        replicas_cpu_us=statistics.median(replicas) if replicas else None,
    )
