"""Hypothesis drives a volume through NBD clients, snapshots, restarts and failing stores.

A model knows what the head and every snapshot hold. After requests that ran at the same time there
is more than one possible content: then the history is checked, and what was read becomes the model.
Which rules may come next never depends on how such a race ended, or Hypothesis could not repeat it.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
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

from lhblock import _native
from lhblock.engine import CacheMode, DriverChoice
from lhblock.errors import VolumeBusy
from tests.model import nbd_client
from tests.model.linearizability import BLOCK, History
from tests.model.portal import Portal
from tests.model.served import CLIENTS, LIMIT_S, ServedVolume, Step, contents_of
from tests.model.volumes import VolumeFiles, fault, view_content

pytestmark = pytest.mark.model

# Few blocks, so that requests meet; not a power of two, so that nothing divides evenly.
BLOCKS = 23
GROWTH_BLOCKS = 3
EXPANSIONS_MAX = 4
BURST_MAX = 12
# Half of the default is enough for `make test`; nightly tries a thousand.
EXAMPLES_QUICK, EXAMPLES_NIGHTLY = 30, 1000
STEPS_QUICK, STEPS_NIGHTLY = 25, 60

choices = st.integers(0, 5)
steps = st.builds(
    Step,
    kind=st.sampled_from(["write", "read", "write", "zero", "trim", "write", "flush"]),
    offset=st.one_of(
        st.integers(0, BLOCKS * BLOCK - 1),
        st.integers(0, BLOCKS - 1).map(lambda block: block * BLOCK),
        # Most of a burst should meet in the same few blocks.
        st.integers(0, 3 * BLOCK),
    ),
    length=st.one_of(
        st.integers(1, 3 * BLOCK),
        st.sampled_from([1, 511, BLOCK, 2 * BLOCK, 9 * BLOCK]),
    ),
    flag=st.booleans(),
    client=st.integers(0, CLIENTS - 1),
)


class VolumeMachine(RuleBasedStateMachine):
    """One volume, from creation to the comparison of its replicas."""

    replicas = 1

    def __init__(self) -> None:
        super().__init__()
        self.portal = Portal()
        self.base = Path(tempfile.mkdtemp(prefix="lhblock-model-"))
        self.served: ServedVolume | None = None
        self.head = b""
        self.snapshots: dict[str, bytes] = {}
        self.taken = 0
        self.kills = 0
        self.expansions = 0

    def call(self, function: Any, *arguments: Any) -> Any:
        return self.portal.call(function, *arguments)

    @property
    def now(self) -> ServedVolume:
        assert self.served is not None
        return self.served

    @initialize(
        driver=st.sampled_from(["auto", "pool"]), cache=st.sampled_from(["writeback", "none"])
    )
    def create(self, driver: DriverChoice, cache: CacheMode) -> None:
        async def create() -> None:
            files = await VolumeFiles.create(
                self.base,
                replicas=self.replicas,
                size_bytes=BLOCKS * BLOCK,
                driver=driver,
                cache=cache,
            )
            served = ServedVolume(files)
            await served.open()
            self.served = served

        self.head = bytes(BLOCKS * BLOCK)
        self.call(create)

    # ---- Requests.

    def cut(self, step: Step) -> Step:
        """The step, within the volume."""
        length = min(step.length, len(self.head) - step.offset)
        return Step(step.kind, step.offset, length, step.flag, step.client)

    @rule(step=steps)
    def one_request(self, step: Step) -> None:
        self.call(self.run_burst, [self.cut(step)], None, "")

    @rule(burst=st.lists(steps, min_size=2, max_size=BURST_MAX))
    def requests_at_the_same_time(self, burst: list[Step]) -> None:
        self.call(self.run_burst, [self.cut(step) for step in burst], None, "")

    def chosen(self, choice: int) -> str:
        """One of the snapshots."""
        return sorted(self.snapshots)[choice % len(self.snapshots)]

    @rule(burst=st.lists(steps, min_size=1, max_size=BURST_MAX))
    def snapshot_under_load(self, burst: list[Step]) -> None:
        self.taken += 1
        name = f"s{self.taken:02}"
        self.call(self.run_burst, [self.cut(step) for step in burst], "snapshot", name)

    @precondition(lambda self: self.snapshots)
    @rule(burst=st.lists(steps, min_size=1, max_size=BURST_MAX), choice=choices)
    def remove_under_load(self, burst: list[Step], choice: int) -> None:
        name = self.chosen(choice)
        self.call(self.run_burst, [self.cut(step) for step in burst], "remove", name)

    @precondition(lambda self: self.expansions < EXPANSIONS_MAX)
    @rule(burst=st.lists(steps, min_size=1, max_size=BURST_MAX))
    def expand_under_load(self, burst: list[Step]) -> None:
        self.expansions += 1
        self.call(self.run_burst, [self.cut(step) for step in burst], "expand", "")

    async def run_burst(self, burst: list[Step], change: str | None, name: str) -> None:
        """Requests and at most one change of the tree, all at once; all must succeed."""
        history = History()
        before = self.head
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.now.perform_all, burst, history)
            if change is not None:
                await self.change_tree(change, name, history)
        assert self.now.failures == []
        self.head = await self.now.read_all(history)
        history.check(before + bytes(len(self.head) - len(before)))

    async def change_tree(self, change: str, name: str, history: History) -> None:
        volume = self.now.volume
        with trio.fail_after(LIMIT_S):
            if change == "expand":
                await volume.expand(volume.size_bytes + GROWTH_BLOCKS * BLOCK)
            elif change == "remove":
                await volume.remove_snapshot(name)
                del self.snapshots[name]
            else:
                # A snapshot is a read of everything at one moment while it is taken.
                seen = history.begin_read(0)
                await volume.create_snapshot(name)
                history.end(seen)
                seen.data = self.snapshots[name] = await view_content(volume, name)

    # ---- Snapshots at rest.

    @precondition(lambda self: self.snapshots)
    @rule(choice=choices)
    def revert(self, choice: int) -> None:
        name = self.chosen(choice)

        async def revert() -> None:
            with pytest.raises(VolumeBusy, match="connected"):
                await self.now.volume.revert_snapshot(name)
            await self.now.disconnect()
            await self.now.volume.revert_snapshot(name)
            await self.now.connect()

        self.call(revert)
        content = self.snapshots[name]
        self.head = content + bytes(len(self.head) - len(content))

    @precondition(lambda self: self.snapshots)
    @rule(choice=choices, step=steps)
    def client_of_a_snapshot(self, choice: int, step: Step) -> None:
        name = self.chosen(choice)
        expected = self.snapshots[name]

        async def look() -> None:
            async with (
                self.now.volume.open_view(name) as view,
                nbd_client.connect(view, structured=step.flag) as client,
            ):
                assert view.size_bytes == len(expected)
                found = await client.request(nbd_client.READ, 0, len(expected))
                assert found == (0, expected)
                refused = await client.request(nbd_client.WRITE, step.offset, 1, data=b"x")
                assert refused[0] == nbd_client.EPERM

        self.call(look)

    @rule()
    def merge(self) -> None:
        self.call(self.now.volume.wait_merged)

    # ---- Restarts.

    @rule()
    def restart(self) -> None:
        async def restart() -> None:
            await self.now.close()
            await self.now.open()

        self.call(restart)

    @rule()
    def killed(self) -> None:
        self.kills += 1
        target = self.base / f"kill-{self.kills}"
        target.mkdir()
        self.call(self.now.reopen_as_if_killed, target)

    # ---- Failing stores.

    @rule(
        burst=st.lists(steps, min_size=1, max_size=BURST_MAX),
        point=st.sampled_from(["store.write", "store.read", "store.sync"]),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
        skip=st.integers(0, 5),
    )
    def store_fails(self, burst: list[Step], point: str, error: int, skip: int) -> None:
        cut = [self.cut(step) for step in burst]
        # A merge that meets the fault fails, as it may: test_volume_replicas.py has those.
        self.call(self.now.volume.wait_merged)
        with fault(point, error, skip=skip):
            if len(self.now.usable()) > 1:
                self.call(self.run_burst, cut, None, "")
            else:
                self.call(self.last_store_fails, cut)

    async def last_store_fails(self, burst: list[Step]) -> None:
        """What the clients were told stands; the rest may have happened or not."""
        history = History()
        before = self.head
        await self.now.perform_all(burst, history)
        _native.clear_faults()
        await self.now.close()
        await self.now.open()
        self.head = await self.now.read_all(history)
        history.check(before)

    # ---- What always holds.

    @invariant()
    def everything_reads_as_it_must(self) -> None:
        if self.served is None:
            return
        history = History()
        assert self.call(self.now.read_all, history) == self.head
        alive = {info.name for info in self.now.volume.snapshots() if not info.removed}
        assert {name for name in alive if not name.startswith("expand-")} == set(self.snapshots)

    def teardown(self) -> None:
        try:
            if self.served is not None:
                self.call(self.compare_replicas)
        finally:
            if self.served is not None:
                self.call(self.served.close)
            self.portal.close()
            shutil.rmtree(self.base)

    async def compare_replicas(self) -> None:
        """Each replica alone has what the volume has (stale ones excepted)."""
        await self.now.volume.wait_merged()
        usable = self.now.usable()
        await self.now.close()
        for index in usable:
            found = await contents_of(self.now.files, index)
            assert found.pop("") == self.head, f"head of replica {index}"
            for name, content in self.snapshots.items():
                assert found[name] == content, f"snapshot {name} of replica {index}"


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3])
def test_volume_does_what_its_model_does(replicas: int) -> None:
    class Machine(VolumeMachine):
        pass

    Machine.replicas = replicas
    Machine.__qualname__ = Machine.__name__ = f"VolumeMachineOf{replicas}"
    nightly = settings.default is not None and settings.default.max_examples > 1000
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES_NIGHTLY if nightly else EXAMPLES_QUICK,
            stateful_step_count=STEPS_NIGHTLY if nightly else STEPS_QUICK,
        ),
    )
