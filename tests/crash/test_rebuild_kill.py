"""kill -9 after each change that a rebuild makes to a directory, names and records alike.

The process that rebuilds is a fork of the test's; it ends itself at the n-th system call that
changes a directory. Whatever is left: the target is complete or is never believed, and the volume
opens and finishes the rebuild.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import settings

from lhblock.engine import RebuildOptions, Volume
from lhblock.errors import VolumeFaulted
from tests.model.test_volume_rebuild import assert_alike, contents_of, scribble
from tests.model.volumes import BLOCK, VolumeFiles

pytestmark = pytest.mark.crash

SIZE_BYTES = 300 * BLOCK  # one unit and a piece of another
PATIENCE_S = 60
AUTOMATIC = RebuildOptions(automatic=True)
KILLED = 9
CALLS_MAX = 400
"""No rebuild of so few layers makes more changing calls."""


def end_after(calls: int) -> None:
    """Let so many changing calls through; the next one ends this process."""
    left = calls

    def counted(real: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if changes(*arguments):
                left -= 1
                if left < 0:
                    os._exit(KILLED)
            return real(*arguments, **keywords)

        return call

    for name in ("link", "rename", "unlink", "mkdir", "ftruncate", "fsync", "write"):
        setattr(os, name, counted(getattr(os, name), lambda *_: True))
    os.open = counted(os.open, lambda path, flags, *_: bool(flags & os.O_CREAT))


def rebuild_in_fork(files: VolumeFiles, target: Path, calls: int) -> bool:
    """Rebuild the target in a process that ends after so many calls. True: it came through."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with Path(os.devnull).open("w") as nothing:
                sys.stdout = nothing
                trio.run(_rebuild, files, target, calls)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) in (0, KILLED)
    return os.WEXITSTATUS(status) == 0


async def _rebuild(files: VolumeFiles, target: Path, calls: int) -> None:
    async with files.open(only=[0]) as volume:
        end_after(calls)
        await volume.add_replica(target)
        await volume.wait_rebuilt(target)
        await volume.wait_merged()


async def make_new(base: Path) -> tuple[VolumeFiles, Path]:
    """A replica that does not exist yet."""
    files = await VolumeFiles.create(base, replicas=1, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await fill(volume, 1)
    return files, base / "new"


async def make_returning(base: Path) -> tuple[VolumeFiles, Path]:
    """A replica that missed a snapshot, a removal, an expansion and writes."""
    files = await VolumeFiles.create(base, replicas=2, size_bytes=SIZE_BYTES)
    async with files.open() as volume:
        await fill(volume, 1)
    async with files.open(only=[0]) as volume:
        await scribble(volume, 3, requests=10)
        await volume.create_snapshot("c")
        await volume.remove_snapshot("a")
        await volume.expand(SIZE_BYTES + 8 * BLOCK)
        await scribble(volume, 4, requests=10)
    return files, files.paths.pop()


async def fill(volume: Volume, seed: int) -> None:
    for name in ("a", "b"):
        await scribble(volume, seed, requests=15)
        await volume.create_snapshot(name)
        seed += 1
    await volume.write(0, random.Random(seed).randbytes(5000))


async def content_alone(path: Path) -> dict[str, bytes]:
    """What a replica has, read by itself; nothing if there is none."""
    if not (await trio.Path(path).exists()):
        return {}
    async with VolumeFiles([path], SIZE_BYTES).open(read_only=True) as volume:
        return await contents_of(volume)


async def check(
    files: VolumeFiles, target: Path, before: dict[str, bytes], expected: dict[str, bytes]
) -> None:
    """The target alone is what it was, complete, or refused; together they become equal."""
    refusal = ""
    if await trio.Path(target / "volume.meta").exists():
        try:
            assert await content_alone(target) in (before, expected), "half built, and believed"
        except VolumeFaulted as error:
            refusal = str(error)
    assert not refusal or "rebuild never finished" in refusal
    with trio.fail_after(PATIENCE_S):
        async with files.open(rebuild=AUTOMATIC) as volume:
            await volume.add_replica(target)
            await volume.wait_rebuilt(target)
            await volume.wait_merged()
            assert not [s.name for s in volume.snapshots() if s.name.startswith("rebuild-")]
            assert volume.state == "healthy"
    await assert_alike(VolumeFiles([*files.paths, target], SIZE_BYTES), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_new, make_returning], ids=["new", "returning"])
def test_rebuild_killed_after_each_change(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    # Seventeen is a prime, so that it falls into step with nothing; nightly takes every call.
    nightly = settings.default is not None and settings.default.max_examples > 1000
    for calls in range(0, CALLS_MAX, 1 if nightly else 17):
        where = tmp_path / f"after-{calls}"
        where.mkdir()
        files, target = trio.run(make, where)
        before = trio.run(content_alone, target)
        expected = trio.run(content_alone, files.paths[0])
        came_through = rebuild_in_fork(files, target, calls)
        trio.run(check, files, target, before, expected)
        shutil.rmtree(where)
        if came_through:
            assert calls > 40, "the calls are not counted"
            return
    pytest.fail("it never came through")
