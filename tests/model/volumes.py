"""Builds volumes on the real native core in a test's own directory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import ClassVar, Final

import trio

from lhblock import _native
from lhblock.engine import (
    CacheMode,
    DriverChoice,
    EngineOptions,
    RebuildOptions,
    SnapshotLimits,
    Volume,
    VolumeConfig,
    create_replicas,
    open_engine,
)
from lhblock.replica import ReplicaDirectory
from lhblock.settings import QUORUM_WAIT_S, RemoteAddress
from tests.model.remote import ReplicaHost, open_host, options_for

BLOCK = _native.BLOCK_BYTES
UNTIL_S: Final = 60.0
POLL_S: Final = 0.001


class VolumeFiles:
    """The replica directories of one volume, and how they are opened."""

    REMOTE: ClassVar[frozenset[int]] = frozenset()
    """Those that a volume gets from replica processes unless it is told."""
    ADDED_REMOTE: ClassVar[bool] = False
    """Whether replicas that come later are such."""

    def __init__(
        self,
        paths: list[Path],
        size_bytes: int,
        *,
        driver: DriverChoice = "auto",
        cache: CacheMode = "writeback",
        remote: frozenset[int] | None = None,
    ) -> None:
        chosen = self.REMOTE if remote is None else remote
        self._local = {path for index, path in enumerate(paths) if index not in chosen}
        self._remote = set(paths) - self._local
        self._host: ReplicaHost | None = None
        self.paths = paths
        self.places: list[Path | RemoteAddress] = [*paths]  # of what is open
        self.size_bytes = size_bytes
        self.driver = driver
        self.cache = cache

    @classmethod
    async def create(
        cls,
        base: Path,
        *,
        replicas: int,
        size_bytes: int,
        driver: DriverChoice = "auto",
        cache: CacheMode = "writeback",
        remote: frozenset[int] | None = None,
    ) -> VolumeFiles:
        """Make the directories ``r0``, ``r1``, ... below ``base``.

        Args:
          remote: those that the volume gets from replica processes.
        """
        paths = [base / f"r{index}" for index in range(replicas)]
        files = cls(paths, size_bytes, driver=driver, cache=cache, remote=remote)
        await create_replicas("db", files.paths, size_bytes)
        return files

    @asynccontextmanager
    async def open(
        self,
        *,
        only: list[int] | None = None,
        read_only: bool = False,
        limits: SnapshotLimits | None = None,
        rebuild: RebuildOptions | None = None,
        force: bool | None = None,
        quorum_wait_s: float = QUORUM_WAIT_S,
    ) -> AsyncIterator[Volume]:
        """Open the volume in an engine of its own.

        Args:
          force: also with too few replicas; by default where only some of them are asked for.
        """
        chosen = range(len(self.paths)) if only is None else only
        options = EngineOptions(queues=1, workers=4, driver=self.driver)
        async with AsyncExitStack() as stack:
            self._host = await stack.enter_async_context(open_host())
            places = [await self.place_of(self.paths[index]) for index in chosen]
            config = VolumeConfig(
                name="db",
                replicas=places,
                cache=self.cache,
                read_only=read_only,
                limits=limits or SnapshotLimits(),
                rebuild=rebuild or RebuildOptions(),
                force=only is not None if force is None else force,
                quorum_wait_s=quorum_wait_s,
            )
            self.places = places
            async with open_engine(options) as engine, engine.open_volume(config) as volume:
                yield volume

    async def place_of(self, path: Path) -> Path | RemoteAddress:
        """Where the volume, which is open, finds the replica in a directory."""
        remote = path in self._remote or (self.ADDED_REMOTE and path not in self._local)
        if not remote:
            return path
        assert self._host is not None
        return await self._host.serve(options_for(path))

    async def stop(self, path: Path) -> bool:
        """End the process of a replica of the open volume, if it has one."""
        if isinstance(await self.place_of(path), Path):
            return False
        assert self._host is not None
        await self._host.stop(path)
        return True

    async def start(self, path: Path) -> None:
        """Start it again."""
        assert self._host is not None
        await self._host.start(path)

    async def contents(self) -> list[bytes]:
        """What each replica holds, read one by one. The volume is closed."""
        found = []
        for index in range(len(self.paths)):
            async with self.open(only=[index], read_only=True) as volume:
                found.append(await volume.read(0, volume.size_bytes))
        return found

    def copy_of(self, index: int, target: Path) -> Path:
        """Keep a replica as it is now, holes included, to put it back later."""
        shutil.copytree(self.paths[index], target, copy_function=copy_sparse)
        return target


async def until(condition: Callable[[], object]) -> None:
    """Wait for what announces itself to nobody.

    It sleeps between two looks: a loop that only yields to other tasks keeps the interpreter
    lock from the threads that it waits for.
    """
    limit_s = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < limit_s, "it does not come"
        await trio.sleep(POLL_S)


def copy_sparse(source: str, target: str) -> None:
    """Copy a file with its extents and nothing else."""
    with Path(source).open("rb") as old, Path(target).open("wb") as new:
        new.truncate(Path(source).stat().st_size)
        for extent in _native.file_extents(old.fileno()):
            old.seek(extent.offset_bytes)
            new.seek(extent.offset_bytes)
            new.write(old.read(extent.length_bytes))
    shutil.copystat(source, target)


def write_head(path: Path, offset_bytes: int, data: bytes) -> None:
    """A write that reached one replica before the crash."""
    with ReplicaDirectory.open(path) as directory:
        fd = os.open(directory.head.name, os.O_RDWR, dir_fd=directory.dir_fd)
        os.pwrite(fd, data, offset_bytes)
        os.close(fd)
        directory.close(clean=False)


async def view_content(volume: Volume, snapshot: str) -> bytes:
    """The content of a snapshot."""
    async with volume.open_view(snapshot) as view:
        return await view.read(0, view.size_bytes)


@contextmanager
def fault(point: str, error: int, *, skip: int = 0, times: int = 1) -> Iterator[None]:
    """Let a fault point fail within the block."""
    _native.arm_fault(point, error, skip=skip, times=times)
    try:
        yield
    finally:
        _native.clear_faults()
