"""The pure decisions of the engine: what to merge, which trees agree, which limits hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from lhblock.engine._agreement import shape_of
from lhblock.engine._config import EngineOptions, VolumeConfig, check_size
from lhblock.engine._limits import SnapshotLimits, SnapshotUsage, check_limits
from lhblock.engine._merge import Merge, next_merge
from lhblock.errors import SizeError, SnapshotLimit, UsageError
from lhblock.replica import Disk

HEAD = "volume-head-001.img"


def snap(name: str) -> str:
    return f"volume-snap-{name}.img"


def tree(*links: tuple[str, str], removed: str = "") -> dict[str, Disk]:
    """Disks from (name, parent) pairs; ``head`` is the head."""

    def image(name: str) -> str:
        return "" if not name else HEAD if name == "head" else snap(name)

    return {
        image(name): Disk(image(name), image(parent), removed=name in removed.split())
        for name, parent in links
    }


def plan(disks: dict[str, Disk], *, pinned: str = "", skipped: str = "") -> Merge | None:
    return next_merge(
        disks,
        HEAD,
        pinned={snap(name) for name in pinned.split()},
        skipped={snap(name) for name in skipped.split()},
    )


CHAIN = (("a", ""), ("b", "a"), ("head", "b"))


def test_nothing_is_merged_that_was_not_removed() -> None:
    assert plan(tree(*CHAIN)) is None


def test_removed_layer_goes_into_its_only_child() -> None:
    assert plan(tree(*CHAIN, removed="a")) == Merge(snap("a"), snap("b"))


def test_layer_below_the_head_comes_last() -> None:
    assert plan(tree(*CHAIN, removed="a b")) == Merge(snap("a"), snap("b"))
    assert plan(tree(*CHAIN, removed="b")) == Merge(snap("b"), HEAD, into_head=True)


def test_leaf_goes_before_everything_else() -> None:
    disks = tree(*CHAIN, ("leaf", "a"), removed="b leaf")
    assert plan(disks) == Merge(snap("leaf"), "")


def test_layer_with_two_children_waits() -> None:
    assert plan(tree(*CHAIN, ("side", "a"), removed="a")) is None


def test_pinned_layer_and_pinned_child_wait() -> None:
    disks = tree(*CHAIN, removed="a")
    assert plan(disks, pinned="a") is None
    assert plan(disks, pinned="b") is None


def test_skipped_layer_lets_others_go_first() -> None:
    disks = tree(("a", ""), ("b", "a"), ("c", "b"), ("head", "c"), removed="a b")
    assert plan(disks, skipped="a") == Merge(snap("b"), snap("c"))


def test_shape_leaves_removed_layers_out() -> None:
    full = shape_of(4096, tree(("a", ""), ("b", "a"), ("c", "b"), ("head", "c"), removed="b"))
    merged = shape_of(4096, tree(("a", ""), ("c", "a"), ("head", "c")))
    assert full == merged
    assert full.snapshots == {"a", "c"}


def test_shapes_of_different_trees_differ() -> None:
    one = shape_of(4096, tree(*CHAIN))
    assert one != shape_of(4096, tree(("a", ""), ("b", "a"), ("head", "a")))
    assert one != shape_of(8192, tree(*CHAIN))


def usage(**numbers: int) -> SnapshotUsage:
    return SnapshotUsage(**{"count": 0, "total": 1, "chain_bytes": 0, "head_bytes": 0, **numbers})


def test_limits_look_at_the_fullest_replica() -> None:
    limits = SnapshotLimits(count_max=3)
    check_limits("db", limits, [usage(count=2), usage(count=1)])
    with pytest.raises(SnapshotLimit, match="usage 3 "):
        check_limits("db", limits, [usage(count=1), usage(count=3)])


def test_chain_never_grows_beyond_what_can_be_opened() -> None:
    with pytest.raises(SnapshotLimit, match="already too big: 250"):
        check_limits("db", SnapshotLimits(), [usage(count=3, total=250)])


@pytest.mark.parametrize("size_bytes", [0, 512, -4096, 1 << 60, 4097])
def test_impossible_sizes_are_refused(size_bytes: int) -> None:
    with pytest.raises(SizeError, match=str(size_bytes)):
        check_size("db", size_bytes)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a@s1", "x" * 65, "a b"])
def test_impossible_volume_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="volume name"):
        VolumeConfig(name=name, replicas=[Path("r")])


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UsageError, match="0 queues"):
        EngineOptions(queues=0)
    with pytest.raises(UsageError, match="65 workers"):
        EngineOptions(workers=65)
    with pytest.raises(UsageError, match="9 replicas"):
        VolumeConfig(name="db", replicas=[Path(f"r{index}") for index in range(9)])
