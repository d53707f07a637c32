"""What a run of the benchmarks may be told, all through the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class BenchSettings:
    """Defaults are those of the published figures.

    Attributes:
      rounds: interleaved rounds, of which the median is reported.
      seconds: how long one point of one contestant runs.
      image_mib: size of every image; it should fit the page cache several times.
      only: names of the tables to run, empty for all.
      directory: where the images are made, on the disk that is to be measured.
      results: where the JSON file goes.
    """

    rounds: int
    seconds: float
    image_mib: int
    only: frozenset[str]
    directory: Path
    results: Path

    @classmethod
    def from_environment(cls) -> BenchSettings:
        """Read ``BENCH_ROUNDS``, ``_SECONDS``, ``_IMAGE_MIB``, ``_ONLY`` and ``_DIR``."""
        environ = os.environ
        return cls(
            rounds=int(environ.get("BENCH_ROUNDS", "5")),
            seconds=float(environ.get("BENCH_SECONDS", "3")),
            image_mib=int(environ.get("BENCH_IMAGE_MIB", "2048")),
            only=frozenset(filter(None, environ.get("BENCH_ONLY", "").split(","))),
            directory=Path(environ.get("BENCH_DIR", REPOSITORY / "build")),
            results=REPOSITORY / "bench-results",
        )

    def wants(self, table: str) -> bool:
        """Whether this table was asked for."""
        return not self.only or table in self.only
