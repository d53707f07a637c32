"""Hypothesis adds, drops and rebuilds replicas of a volume that is written all the time.

The model is what the head and every snapshot hold. Whatever the order of rules was, in the end
every replica that takes part has exactly that, read by itself.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lhblock.engine import RebuildOptions, Volume
from tests.model.portal import Portal
from tests.model.test_volume_rebuild import contents_of
from tests.model.volumes import BLOCK, VolumeFiles, fault

pytestmark = pytest.mark.model

BLOCKS = 2 * 256 + 3  # two units and a piece of a third
GROWTH_BLOCKS = 5
EXPANSIONS_MAX = 3
REPLICAS_MAX = 4
LIMIT_S = 60
EXAMPLES_QUICK, EXAMPLES_NIGHTLY = 12, 500
STEPS_QUICK, STEPS_NIGHTLY = 20, 50

OPTIONS = RebuildOptions(automatic=True, rate_bytes_s=64 << 20)

offsets = st.one_of(st.integers(0, BLOCKS * BLOCK - 1), st.integers(0, 4 * BLOCK))
lengths = st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from([1, BLOCK, 70 * BLOCK, 300 * BLOCK]))


class RebuildMachine(RuleBasedStateMachine):
    """One volume whose replicas come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.portal = Portal()
        self.base = Path(tempfile.mkdtemp(prefix="lhblock-rebuild-"))
        self.files: VolumeFiles | None = None
        self.stack = AsyncExitStack()
        self.volume: Volume | None = None
        self.head = bytes(BLOCKS * BLOCK)
        self.snapshots: dict[str, bytes] = {}
        self.taken = self.made = self.expansions = 0

    def call(self, function: Any, *arguments: Any) -> Any:
        # Without a limit of its own: contexts that one call enters are left by another.
        return self.portal.call(function, *arguments)

    @property
    def now(self) -> Volume:
        assert self.volume is not None
        return self.volume

    @property
    def paths(self) -> list[Path]:
        assert self.files is not None
        return self.files.paths

    async def open(self) -> None:
        assert self.files is not None
        self.volume = await self.stack.enter_async_context(self.files.open(rebuild=OPTIONS))

    async def close(self) -> None:
        self.volume = None
        await self.stack.aclose()

    @initialize(replicas=st.integers(1, 2), cache=st.sampled_from(["writeback", "none"]))
    def create(self, replicas: int, cache: Any) -> None:
        async def create() -> None:
            self.files = await VolumeFiles.create(
                self.base, replicas=replicas, size_bytes=BLOCKS * BLOCK, cache=cache
            )
            await self.open()

        self.call(create)

    # ---- Requests.

    @rule(
        kind=st.sampled_from(["write", "write", "write", "trim", "zero"]),
        offset=offsets,
        length=lengths,
        fill=st.integers(1, 255),
        flush=st.booleans(),
    )
    def change(self, kind: str, offset: int, length: int, fill: int, flush: bool) -> None:
        length = min(length, len(self.head) - offset)
        data = bytes([fill if kind == "write" else 0]) * length

        async def change() -> None:
            if kind == "write":
                await self.now.write(offset, data)
            elif kind == "trim":
                await self.now.trim(offset, length)
            else:
                await self.now.zero(offset, length)
            if flush:
                await self.now.flush()

        self.call(change)
        self.head = self.head[:offset] + data + self.head[offset + length :]

    @rule()
    def snapshot(self) -> None:
        self.taken += 1
        name = f"s{self.taken:02}"
        self.call(self.now.create_snapshot, name)
        self.snapshots[name] = self.head

    @precondition(lambda self: self.snapshots)
    @rule(choice=st.integers(0, 5))
    def remove(self, choice: int) -> None:
        name = sorted(self.snapshots)[choice % len(self.snapshots)]
        self.call(self.now.remove_snapshot, name)
        del self.snapshots[name]

    @precondition(lambda self: self.snapshots)
    @rule(choice=st.integers(0, 5))
    def revert(self, choice: int) -> None:
        name = sorted(self.snapshots)[choice % len(self.snapshots)]

        async def revert() -> None:
            await self.settle()
            await self.now.revert_snapshot(name)

        self.call(revert)
        content = self.snapshots[name]
        self.head = content + bytes(len(self.head) - len(content))

    @precondition(lambda self: self.expansions < EXPANSIONS_MAX)
    @rule()
    def expand(self) -> None:
        self.expansions += 1
        self.head += bytes(GROWTH_BLOCKS * BLOCK)
        self.call(self.now.expand, len(self.head))

    @rule()
    def merge(self) -> None:
        self.call(self.now.wait_merged)

    # ---- Replicas.

    @precondition(lambda self: self.files and len(self.paths) < REPLICAS_MAX)
    @rule()
    def add(self) -> None:
        self.made += 1
        path = self.base / f"new{self.made}"
        self.call(self.add_replica, path)
        self.paths.append(path)

    async def add_replica(self, path: Path) -> None:
        assert self.files is not None
        await self.now.add_replica(await self.files.place_of(path))

    async def remove_replica(self, path: Path) -> None:
        assert self.files is not None
        await self.now.remove_replica(await self.files.place_of(path))

    @rule(choice=st.integers(0, 5))
    def drop(self, choice: int) -> None:
        """Take a replica out; it may be the target or the source of a rebuild."""
        path = self.paths[choice % len(self.paths)]
        assert self.files is not None
        usable = [info.address for info in self.now.replicas() if info.mode == "RW"]
        if usable == [str(self.call(self.files.place_of, path))]:
            # Which one is the last depends on how far rebuilds are.
            self.call(self.settle)
        if len(self.paths) > 1:
            self.call(self.remove_replica, path)
            self.paths.remove(path)

    @rule(choice=st.integers(0, 5))
    def come_back(self, choice: int) -> None:
        """One that was taken out is added again, with what it had."""
        gone = sorted(path for path in self.base.iterdir() if path not in self.paths)
        if gone and len(self.paths) < REPLICAS_MAX:
            path = gone[choice % len(gone)]
            self.call(self.add_replica, path)
            self.paths.append(path)

    @rule()
    def wait(self) -> None:
        self.call(self.settle)
        assert self.now.state == "healthy"

    async def settle(self) -> None:
        assert self.files is not None
        with trio.fail_after(LIMIT_S):
            for path in list(self.paths):
                await self.now.wait_rebuilt(await self.files.place_of(path))

    @rule(
        point=st.sampled_from(
            ["store.write", "store.sync", "unit.read", "unit.write", "unit.sync"]
        ),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
        skip=st.integers(0, 6),
    )
    def something_fails(self, point: str, error: int, skip: int) -> None:
        """A store or a copy fails once, while there are two that take part."""
        self.call(self.settle)
        self.call(self.now.wait_merged)
        if len(self.paths) < 2 or len(self.paths) >= REPLICAS_MAX:
            return
        with fault(point, error, skip=skip):
            self.add()
            self.change("write", 5 * BLOCK + 7, 2 * BLOCK, 1 + self.made, True)

    @rule(choice=st.integers(0, 5), offset=offsets, length=lengths, snapshot=st.booleans())
    def go_and_come(self, choice: int, offset: int, length: int, snapshot: bool) -> None:
        """The process of a replica ends, misses something, and is started again."""
        self.call(self.settle)
        path = self.paths[choice % len(self.paths)]
        if self.files is None or len(self.paths) < 2 or not self.call(self.files.stop, path):
            return
        self.change("write", offset, length, 7, False)
        if snapshot:
            self.snapshot()
        self.change("trim", offset // 2, length, 0, True)
        self.call(self.files.start, path)

    @rule()
    def restart(self) -> None:
        async def restart() -> None:
            await self.close()
            await self.open()

        self.call(restart)

    # ---- What always holds.

    @invariant()
    def everything_reads_as_it_must(self) -> None:
        if self.volume is None:
            return
        assert self.call(self.now.read, 0, len(self.head)) == self.head
        alive = {info.name for info in self.now.snapshots() if not info.removed}
        ours = {name for name in alive if not name.startswith(("expand-", "rebuild-"))}
        assert ours == set(self.snapshots)

    def teardown(self) -> None:
        try:
            if self.volume is not None:
                self.call(self.compare_replicas)
        finally:
            if self.volume is not None:
                self.call(self.close)
            self.portal.close()
            shutil.rmtree(self.base)

    async def compare_replicas(self) -> None:
        assert self.files is not None
        with trio.fail_after(LIMIT_S):
            await self.settle()
            await self.now.wait_merged()
        names = [info.name for info in self.now.snapshots() if not info.removed]
        assert not [name for name in names if name.startswith("rebuild-")]
        await self.close()
        for index, path in enumerate(self.paths):
            async with self.files.open(only=[index], read_only=True) as volume:
                found = await contents_of(volume)
            assert found.pop("") == self.head, f"head of {path.name}"
            for name, content in self.snapshots.items():
                assert found[name] == content, f"snapshot {name} of {path.name}"


@pytest.mark.slow
def test_replicas_come_and_go_and_are_all_alike() -> None:
    nightly = settings.default is not None and settings.default.max_examples > 1000
    run_state_machine_as_test(
        RebuildMachine,
        settings=settings(
            max_examples=EXAMPLES_NIGHTLY if nightly else EXAMPLES_QUICK,
            stateful_step_count=STEPS_NIGHTLY if nightly else STEPS_QUICK,
        ),
    )
