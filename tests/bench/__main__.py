"""``make bench``: run every match, print its table, write the JSON file."""

from __future__ import annotations

from typing import Any

from tests.bench import report
from tests.bench.contestants import nbdkit_file, nbdkit_memory, qemu_nbd
from tests.bench.map_memory import map_memory
from tests.bench.match import Match, play
from tests.bench.settings import BenchSettings


def matches() -> list[Match]:
    """All tables, in the order they are run."""
    peers = [nbdkit_file(), nbdkit_memory(), qemu_nbd()]
    return [
        Match("unix", peers),
        Match("tcp", peers, tcp=True),
    ]


def main() -> None:
    """Run what ``BENCH_ONLY`` asks for, or everything."""
    settings = BenchSettings.from_environment()
    document: dict[str, Any] = {"environment": report.environment(settings), "matches": {}}
    for match in matches():
        if not settings.wants(match.name):
            continue
        results = play(match, settings)
        print(report.table(match, results), flush=True)
        document["matches"][match.name] = report.as_json(match, results)
    if settings.wants("map"):
        document["map_bytes_per_tib"] = map_memory()
        print("== map\n" + report.mib_table(document["map_bytes_per_tib"]), flush=True)
    print(f"written to {report.write(document, settings.results)}")


if __name__ == "__main__":
    main()
