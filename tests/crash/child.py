"""A process that says what it does, a line at a time, until it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio

REPOSITORY = Path(__file__).parents[2]


async def run_until_killed(module: str, arguments: list[str], lines_max: int) -> tuple[int, str]:
    """Run a module; kill it after so many lines. Returns its exit status and all that it said."""
    command = [sys.executable, "-m", module, *arguments]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    text = b""
    killed = False
    async with process.stdout:
        async for chunk in process.stdout:
            text += chunk
            if not killed and text.count(b"\n") >= lines_max:
                process.kill()
                killed = True
    return await process.wait(), text.decode()
