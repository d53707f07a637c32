"""Every operation on a replica directory, ended after each of its system calls.

Each case is one operation. It is cut off after 0, 1, 2, ... changing calls, once as kill -9 and
once as power loss; then the directory is opened (and that is cut off too), and must make sense:
every snapshot reads as before, the head reads as before or after the operation, nothing is left
over, and the operation succeeds when it is tried again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lhblock.errors import ReplicaForeign, ReplicaNotFound
from lhblock.replica import ReplicaDirectory, new_set, supersede
from tests.crash import layers
from tests.crash.cut import Crash, Cut
from tests.crash.layers import CREATED, SIZE, View, build, clone, image, views

pytestmark = pytest.mark.crash

CALLS_MAX = 200
"""No operation makes more changing calls; a loop that never gets through ends here."""

Views = dict[str, View]


@dataclass(frozen=True)
class Case:
    """An operation, what the native core has merged before it, and what it does to the views."""

    name: str
    run: Callable[[ReplicaDirectory], None]
    done: Callable[[ReplicaDirectory], bool]
    after: Callable[[Views], Views]
    merge: Callable[[Path], None] = lambda path: None
    arrange: Callable[[Path], None] = lambda path: None


def _take_snapshot(directory: ReplicaDirectory) -> None:
    layers.snapshot(directory, "new")


def _with_new(before: Views) -> Views:
    return before | {"new": before["volume-head"]}


def _expand(directory: ReplicaDirectory) -> None:
    head = directory.prepare_expansion(2 * SIZE, created=CREATED)
    head.commit()
    head.settle()


def _without(name: str) -> Callable[[Views], Views]:
    return lambda before: {key: value for key, value in before.items() if key != name}


def _leave_no_discards_to_merge(path: Path) -> None:
    """Only upper has bits, and all of them under its own data: the merged layer has none."""
    for name in "bc":
        (path / ReplicaDirectory.discard_name(image(name))).unlink()
    layers.write_layer(path, image("c"), {}, [3])


def _supersede(directory: ReplicaDirectory) -> None:
    generation = directory.generation
    if generation is None:
        (generation,) = new_set(1, time=CREATED)
    (generation,) = supersede([generation], left=[], reason="test", time=CREATED)
    directory.write_generation(generation)


CASES = [
    Case(
        "snapshot",
        _take_snapshot,
        done=lambda directory: image("new") in directory.disks,
        after=_with_new,
    ),
    Case(
        "expand",
        _expand,
        done=lambda directory: directory.size_bytes == 2 * SIZE,
        after=lambda before: before | {f"expand-{2 * SIZE}": before["volume-head"]},
    ),
    Case(
        "revert",
        lambda directory: layers.revert(directory, "a"),
        done=lambda directory: directory.head.parent == image("a"),
        after=lambda before: before | {"volume-head": before["a"]},
    ),
    Case(
        "mark",
        lambda directory: directory.mark_removed("d"),
        done=lambda directory: directory.disks[image("d")].removed,
        after=_without("d"),
    ),
    Case(
        "unlink leaf",
        lambda directory: directory.unlink_disk(image("e")),
        done=lambda directory: image("e") not in directory.disks,
        after=lambda before: before,
    ),
    Case(
        "unlink leaf that nobody marked",
        lambda directory: directory.unlink_disk(image("f")),
        done=lambda directory: image("f") not in directory.disks,
        after=_without("f"),
    ),
    Case(
        "unlink after merge up",
        lambda directory: directory.unlink_disk(image("b")),
        done=lambda directory: image("b") not in directory.disks,
        after=lambda before: before,
        merge=lambda path: layers.merge_up(path, image("b"), image("c")),
    ),
    Case(
        "unlink after merge up into the head",
        lambda directory: directory.unlink_disk(image("d")),
        done=lambda directory: image("d") not in directory.disks,
        after=_without("d"),
        merge=lambda path: layers.merge_up(path, image("d"), "volume-head-008.img"),
    ),
    Case(
        "adopt",
        lambda directory: directory.adopt_merged(image("b"), image("c")),
        done=lambda directory: image("b") not in directory.disks,
        after=lambda before: before,
        merge=lambda path: layers.merge_down(path, image("b"), image("c")),
    ),
    Case(
        "adopt without discards",
        lambda directory: directory.adopt_merged(image("b"), image("c")),
        done=lambda directory: image("b") not in directory.disks,
        after=lambda before: before,
        merge=lambda path: layers.merge_down(path, image("b"), image("c")),
        arrange=_leave_no_discards_to_merge,
    ),
    Case(
        "generation",
        _supersede,
        done=lambda directory: directory.generation is not None,
        after=lambda before: before,
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "replica"
    build(path)
    return path


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is followed by ``Cut``; the disk itself would only take minutes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def die(directory: ReplicaDirectory) -> None:
    """What the kernel does for a process that is gone."""
    directory._lock.release()
    os.close(directory.dir_fd)
    directory._closed = True


@contextlib.contextmanager
def living(directory: ReplicaDirectory) -> Iterator[None]:
    try:
        yield
    finally:
        if not directory._closed:
            die(directory)


def leftovers(directory: ReplicaDirectory) -> set[str]:
    """Names in the directory that belong to no disk."""
    expected = {"volume.meta", "lhblock.lock", "lhblock.spare", "lhblock.generation"}
    for name in directory.disks:
        expected |= {name, f"{name}.meta", f"{name}.checksum", directory.discard_name(name)}
    return {each.name for each in directory.path.iterdir()} - expected


def check(case: Case, path: Path, before: Views) -> None:
    """Open what the crash left; everything must be as before or as after; then do it again."""
    with contextlib.closing(ReplicaDirectory.open(path)) as directory:
        assert directory.was_dirty
        assert leftovers(directory) == set()
        found = views(directory)
        expected = case.after(before) if case.done(directory) else before
        for name, view in expected.items():
            # A snapshot that is marked first and goes later may be either.
            if name in found or name not in set(before) - set(case.after(before)):
                assert found[name][: len(view)] == view, name
        assert set(found) <= set(before) | set(case.after(before))
        if not case.done(directory):
            case.run(directory)
            assert case.done(directory)
        elif case.name == "snapshot":
            disk = directory.disks[image("new")]
            assert (disk.user_created, dict(disk.labels)) == (True, {"of": "new"})
        assert views(directory) == case.after(before)
        layers.snapshot(directory, "later")
    with contextlib.closing(ReplicaDirectory.open(path)) as directory:
        assert directory.cleaned == ()
        assert not directory.was_dirty
        assert leftovers(directory) == set()


def start(case: Case, built: Path, tmp_path: Path) -> tuple[Path, Views]:
    prepared = tmp_path / "prepared"
    clone(built, prepared)
    case.arrange(prepared)
    with contextlib.closing(ReplicaDirectory.open(prepared)) as directory:
        before = views(directory)
    case.merge(prepared)
    with contextlib.closing(ReplicaDirectory.open(prepared)) as directory:
        assert directory.head.name == "volume-head-008.img"
        assert views(directory) == before, "the merge itself changed something"
    return prepared, before


def cut_operation(case: Case, prepared: Path, path: Path, limit: int, *, power: bool) -> bool:
    """Run it in a copy and cut it off. Returns whether it got through before the cut."""
    clone(prepared, path)
    directory = ReplicaDirectory.open(path)
    with living(directory):
        cut = Cut(limit)
        with cut():
            case.run(directory)
            assert cut.unsynced(path) == [], "it returned before it was durable"
        if power:
            cut.lose_unsynced(path)
    return not cut.happened


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operation_cut_off_anywhere_leaves_a_directory_that_opens_and_reads_right(
    case: Case, power: bool, built: Path, tmp_path: Path
) -> None:
    prepared, before = start(case, built, tmp_path)
    for limit in range(CALLS_MAX):
        path = tmp_path / f"cut-{limit}"
        through = cut_operation(case, prepared, path, limit, power=power)
        check(case, path, before)
        if through:
            assert limit > 0
            return
    pytest.fail(f"not through after {CALLS_MAX} calls")


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_clean_up_cut_off_anywhere_is_finished_by_the_next_open(
    case: Case, power: bool, built: Path, tmp_path: Path
) -> None:
    prepared, before = start(case, built, tmp_path)
    for limit in range(CALLS_MAX):
        crashed = tmp_path / f"crashed-{limit}"
        through = cut_operation(case, prepared, crashed, limit, power=power)
        for second in range(CALLS_MAX):
            path = tmp_path / f"opened-{limit}-{second}"
            clone(crashed, path)
            cut = Cut(second)
            directory: ReplicaDirectory | None = None
            with cut():
                directory = ReplicaDirectory.open(path)
            if directory is not None:
                die(directory)
            if power:
                cut.lose_unsynced(path)
            check(case, path, before)
            if not cut.happened:
                break
        if through:
            return


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_a_close_cut_off_anywhere_is_no_foreign_write(power: bool, tmp_path: Path) -> None:
    (generation,) = new_set(1, time=CREATED)
    for limit in range(CALLS_MAX):
        path = tmp_path / f"cut-{limit}"
        ReplicaDirectory.create(path, size_bytes=SIZE, generation=generation)
        directory = ReplicaDirectory.open(path)
        layers.fill_head(directory, "h", 1, [2])
        cut = Cut(limit)
        with living(directory), cut():
            directory.close()
        if power:
            cut.lose_unsynced(path)
        with contextlib.closing(ReplicaDirectory.open(path)) as again:
            assert again.written_elsewhere == ""
            assert layers.discarded(path, again.head.name) == {2}
        if not cut.happened:
            return
    pytest.fail(f"not through after {CALLS_MAX} calls")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_a_creation_cut_off_anywhere_can_be_repeated(
    power: bool, existing: bool, tmp_path: Path
) -> None:
    (generation,) = new_set(1, time=CREATED)
    for limit in range(CALLS_MAX):
        path = tmp_path / f"cut-{limit}"
        if existing:
            path.mkdir()
        cut = Cut(limit)
        with cut():
            ReplicaDirectory.create(path, size_bytes=SIZE, generation=generation)
            assert cut.unsynced(path) == []
        if power and path.exists():
            cut.lose_unsynced(path)
        try:
            ReplicaDirectory.create(path, size_bytes=SIZE, generation=generation)
        except ReplicaForeign:
            assert (path / "volume.meta").exists()
        with contextlib.closing(ReplicaDirectory.open(path)) as directory:
            assert directory.size_bytes == SIZE
            assert directory.generation is not None
            assert directory.written_elsewhere == ""
            assert leftovers(directory) == set()
        if not cut.happened:
            return
    pytest.fail(f"not through after {CALLS_MAX} calls")


def test_an_unfinished_creation_is_no_replica(tmp_path: Path) -> None:
    path = tmp_path / "replica"
    path.mkdir()
    (path / "volume-head-000.img").touch()
    with pytest.raises(ReplicaNotFound, match="its creation ended early"):
        ReplicaDirectory.open(path)


def test_the_cut_itself_stops_everything_after_it(tmp_path: Path) -> None:
    cut = Cut(1)
    with cut():
        (tmp_path / "one").mkdir()
        with contextlib.suppress(Crash):
            (tmp_path / "two").mkdir()
        (tmp_path / "three").mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["one"]
