"""What a run leaves: tables on standard output and one JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.match import Match, Results, median
from tests.bench.settings import REPOSITORY, BenchSettings


def table(match: Match, results: Results) -> str:
    """Medians, one block of lines for each point; ratios are to the first contestant."""
    lines = [f"== {match.name}"]
    reference = match.contestants[0].name
    for point in match.points:
        unit = "MiB/s" if point.in_mib_s else "IOPS"
        lines.append(
            f"{point.name:<18}{unit:>10}{'ratio':>8}{'p50 us':>10}{'p99 us':>10}{'cpu us':>9}"
            f"{'replicas':>10}"
        )
        base = median(results[reference, point.name])
        for contestant in match.contestants:
            sample = median(results[contestant.name, point.name])
            figure = sample.mib_s if point.in_mib_s else sample.iops
            cpu = "-" if sample.cpu_us is None else f"{sample.cpu_us:.1f}"
            apart = sample.replicas_cpu_us
            replicas = "" if apart is None else f"{apart:>10.1f}"
            lines.append(
                f"  {contestant.name:<16}{figure:>10.0f}{sample.iops / base.iops:>8.2f}"
                f"{sample.p50_us:>10.1f}{sample.p99_us:>10.1f}{cpu:>9}{replicas}"
            )
    return "\n".join(lines)


def figures(values: Mapping[str, float]) -> str:
    """One line a figure."""
    return "\n".join(f"  {name:<28}{value:>10.2f}" for name, value in values.items())


def as_json(match: Match, results: Results) -> dict[str, Any]:
    """Medians and every sample."""
    return {
        contestant.name: {
            point.name: {
                "median": asdict(median(results[contestant.name, point.name])),
                "samples": [asdict(sample) for sample in results[contestant.name, point.name]],
            }
            for point in match.points
        }
        for contestant in match.contestants
    }


def environment(settings: BenchSettings) -> dict[str, Any]:
    """What has to be known to believe a figure."""
    return {
        "commit": _output(["git", "rev-parse", "HEAD"]) or "unknown",
        "modified": bool(_output(["git", "status", "--porcelain", "--untracked-files=no"])),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "cpu": _cpu(),
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "image_mib": settings.image_mib,
        "peers": {
            "nbdkit": _version("nbdkit"),
            "qemu-nbd": _version("qemu-nbd"),
            "fio": _version("fio"),
        },
    }


def write(document: dict[str, Any], directory: Path) -> Path:
    """Write the JSON file, named for the time and the commit."""
    directory.mkdir(exist_ok=True)
    stamp = document["environment"]["time"].replace(":", "")
    path = directory / f"{stamp}-{document['environment']['commit'][:10]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    return done.stdout.strip()


def _version(program: str) -> str:
    return _output([program, "--version"]).partition("\n")[0]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
