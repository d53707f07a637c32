"""A process that serves a volume on sockets it inherits, until it is killed.

Run as ``python -m tests.model.volume_server DRIVER CACHE FD,FD,... DIRECTORY...``. It writes
``ready``; then takes a snapshot for each name it reads from standard input, and says it is done.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog
import trio

from tests.model.volumes import VolumeFiles


async def main(driver: str, cache: str, fds: str, paths: list[str]) -> None:
    files = VolumeFiles(
        [Path(path) for path in paths],
        0,
        driver="pool" if driver == "pool" else "auto",
        cache="none" if cache == "none" else "writeback",
    )
    async with files.open() as volume:
        for number, fd in enumerate(fds.split(",")):
            os.set_blocking(int(fd), False)
            volume.attach(int(fd), structured=number % 2 == 0)
        os.write(1, b"ready\n")
        names = trio.lowlevel.FdStream(os.dup(0))
        text = b""
        async for chunk in names:
            text += chunk
            *lines, text = text.split(b"\n")
            for line in lines:
                await volume.create_snapshot(line.decode())
                os.write(1, line + b"\n")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
