"""A volume on the real core against a dictionary of bytes, in random histories."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lhblock.engine import CacheMode, DriverChoice, Volume
from tests.model.volumes import BLOCK, VolumeFiles, view_content

# Few blocks, so that requests meet; not a power of two, so that nothing divides evenly.
BLOCKS = 37
GROWTH_BLOCKS = 5
NAMES = ["a", "b", "c", "d"]


@dataclass
class Model:
    """What the volume must hold."""

    head: bytearray
    snapshots: dict[str, bytes] = field(default_factory=dict)
    going: set[str] = field(default_factory=set)


ranges = st.tuples(
    st.integers(0, BLOCKS * BLOCK - 1),
    st.one_of(st.integers(0, 3 * BLOCK), st.integers(1, 12).map(lambda blocks: blocks * BLOCK)),
    st.booleans(),
)
operations = st.one_of(
    st.tuples(st.just("write"), ranges, st.integers(1, 255)),
    st.tuples(st.just("trim"), ranges),
    st.tuples(st.just("zero"), ranges, st.booleans()),
    st.tuples(st.just("snapshot"), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("revert"), st.sampled_from(NAMES)),
    st.tuples(st.just("merge")),
    st.tuples(st.just("expand")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("reopen")),
)


def place(model: Model, wanted: tuple[int, int, bool]) -> tuple[int, int]:
    """Cut a range to the volume; aligned to blocks when asked."""
    offset, length, aligned = wanted
    if aligned:
        offset -= offset % BLOCK
    return offset, min(length, len(model.head) - offset)


async def apply(volume: Volume, model: Model, operation: tuple[Any, ...]) -> None:
    """Do one operation to both."""
    kind, *rest = operation
    if kind in ("write", "trim", "zero"):
        offset, length = place(model, rest[0])
        if kind == "write":
            data = bytes([rest[1]]) * length
            await volume.write(offset, data)
        elif kind == "trim":
            data = bytes(length)
            await volume.trim(offset, length)
        else:
            data = bytes(length)
            await volume.zero(offset, length, no_hole=rest[1])
        model.head[offset : offset + length] = data
    elif kind == "snapshot":
        name = rest[0]
        if name in model.snapshots:
            return
        if name in model.going:
            await volume.wait_merged()
            if name in {info.name for info in volume.snapshots()}:
                return  # it waits for something else
            model.going.discard(name)
        await volume.create_snapshot(name)
        model.snapshots[name] = bytes(model.head)
    elif kind == "remove" and rest[0] in model.snapshots:
        await volume.remove_snapshot(rest[0])
        del model.snapshots[rest[0]]
        model.going.add(rest[0])
    elif kind == "revert" and rest[0] in model.snapshots:
        await volume.revert_snapshot(rest[0])
        content = model.snapshots[rest[0]]
        model.head[:] = content + bytes(len(model.head) - len(content))
    elif kind == "merge":
        await volume.wait_merged()
    elif kind == "expand" and len(volume.snapshots()) < 20:
        await volume.expand(volume.size_bytes + GROWTH_BLOCKS * BLOCK)
        model.head += bytes(GROWTH_BLOCKS * BLOCK)
    elif kind == "flush":
        await volume.flush()


async def compare(volume: Volume, model: Model) -> None:
    """Everything that can be read is what the model says."""
    assert await volume.read(0, volume.size_bytes) == bytes(model.head)
    alive = {info.name for info in volume.snapshots() if not info.removed}
    assert {name for name in alive if not name.startswith("expand-")} == set(model.snapshots)
    for name, content in model.snapshots.items():
        assert await view_content(volume, name) == content, name


@pytest.mark.model
@pytest.mark.parametrize(
    ("replicas", "driver", "cache"),
    [
        (1, "auto", "writeback"),
        (3, "auto", "writeback"),
        (2, "pool", "writeback"),
        (1, "auto", "none"),
        (3, "pool", "none"),
    ],
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=st.lists(operations, max_size=30))
async def test_volume_and_its_snapshots_hold_what_was_written(
    replicas: int, driver: DriverChoice, cache: CacheMode, history: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as base:
        size_bytes = BLOCKS * BLOCK
        files = await VolumeFiles.create(
            Path(base), replicas=replicas, size_bytes=size_bytes, driver=driver, cache=cache
        )
        model = Model(bytearray(size_bytes))
        left = list(history)
        while True:
            async with files.open() as volume:
                while left and left[0][0] != "reopen":
                    await apply(volume, model, left.pop(0))
                await compare(volume, model)
                if not left:
                    await volume.wait_merged()
                    await compare(volume, model)
            if not left:
                break
            left.pop(0)
        async with files.open() as volume:
            await compare(volume, model)
        for content in await files.contents():
            assert content == bytes(model.head)
