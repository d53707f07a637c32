"""lhblock as a contestant, in the set-ups whose cost is of interest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from lhblock.engine import EngineOptions, VolumeConfig, open_engine
from tests.activation import activated, listen_unix
from tests.bench.contestants import EXPORT, Contestant, nbd_engine
from tests.bench.workload import fill

LHBLOCK = (sys.executable, "-c", "from lhblock.cli import main; main()")
# One run of blocks of one layer; neighbours belong to other layers.
PIECE_BYTES = 64 << 10
LAYERS_DEEP = 250


def serve_command(
    data_dir: Path, names: Sequence[str], bytes_: int, options: Sequence[str | Path] = ()
) -> list[str | Path]:
    """The command line that serves ``names`` on the activation socket."""
    return [*LHBLOCK, "serve", *names, "--size", str(bytes_), "--data-dir", data_dir, *options]


def lhblock(name: str, *options: str, replicas: int = 1) -> Contestant:
    """One volume on ``replicas`` local replicas, all on the same disk."""

    def command(directory: Path, bytes_: int) -> list[str | Path]:
        chosen: list[str | Path] = list(options)
        if replicas > 1:
            for number in range(replicas):
                chosen += ["--replica", directory / f"replica-{number}"]
        return serve_command(directory / "data", [EXPORT], bytes_, chosen)

    return Contestant(name, command)


def lhblock_deep(name: str) -> Contestant:
    """A chain as long as chains may be, with the volume's blocks spread over all of its files."""

    def command(directory: Path, bytes_: int) -> list[str | Path]:
        return serve_command(directory / "data", [EXPORT], bytes_)

    def prepare(directory: Path, bytes_: int) -> None:
        with listen_unix(directory / "create") as listener:
            log = directory / "create.log"
            with activated(command(directory, bytes_), listener, log):
                fill(nbd_engine(listener, bytes_), bytes_=bytes_)
        replica = directory / "data" / "volumes" / EXPORT / "replica"
        trio.run(_stack_layers, replica, bytes_)

    return Contestant(name, command, prepare, prefilled=True)


async def _stack_layers(replica: Path, bytes_: int) -> None:
    """Write the volume once more, every piece into the layer whose turn it is."""
    piece = bytes(range(256)) * (PIECE_BYTES // 256)
    config = VolumeConfig(name=EXPORT, replicas=[replica], size_bytes=bytes_)
    async with open_engine(EngineOptions()) as engine, engine.open_volume(config) as volume:
        for layer in range(LAYERS_DEEP - 1):
            await volume.create_snapshot(f"layer-{layer}")
            for offset in range(layer * PIECE_BYTES, bytes_, (LAYERS_DEEP - 1) * PIECE_BYTES):
                await volume.write(offset, piece)
