"""Creating, opening, locking and changing a replica directory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lhblock.errors import (
    ReplicaDamaged,
    ReplicaError,
    ReplicaForeign,
    ReplicaIO,
    ReplicaLocked,
    ReplicaNotFound,
    ReplicaStale,
    ReplicaUnsupported,
    UsageError,
)
from lhblock.replica import (
    LAYERS_MAX,
    ChecksumRecord,
    ReplicaDirectory,
    change_time_text,
    hash_image,
    lock_holder,
    new_set,
    read_checksum,
    valid_checksum,
)

SIZE = 64 * 4096
T = "2026-11-23T08:46:13Z"
(GENERATION,) = new_set(1, time=T)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "replica"
    ReplicaDirectory.create(made, size_bytes=SIZE, generation=GENERATION)
    return made


def snapshot(directory: ReplicaDirectory, name: str) -> None:
    pending = directory.prepare_snapshot(name, user_created=True, created=T)
    pending.commit()
    pending.settle()


@contextlib.contextmanager
def snapshots(path: Path, *names: str) -> Iterator[ReplicaDirectory]:
    with ReplicaDirectory.open(path) as directory:
        for name in names:
            snapshot(directory, name)
        yield directory


def edit(file: Path, **members: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | members))


def state(path: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        each.name: (each.stat().st_ino, each.stat().st_mtime_ns, each.read_bytes())
        for each in path.iterdir()
        if each.name != "lhblock.lock"
    }


# ---- Creating.


def test_a_new_replica_is_longhorns_with_its_modes(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "volume.meta").read_bytes() == (
        b'{"Size":262144,"Head":"volume-head-000.img","Dirty":false,"Rebuilding":false,"Error":"",'
        b'"Parent":"","SectorSize":512,"BackingFilePath":"","Encrypted":false}\n'
    )
    head = path / "volume-head-000.img"
    assert (head.stat().st_size, head.stat().st_blocks) == (SIZE, 0)
    assert stat.S_IMODE(head.stat().st_mode) == 0o644 & ~_umask()
    record = json.loads((path / "volume-head-000.img.meta").read_text())
    assert list(record) == ["Name", "Parent", "Removed", "UserCreated", "Created", "Labels"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("size_bytes", [0, 4095, 1 << 63])
def test_a_bad_size_creates_nothing(size_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(size_bytes)):
        ReplicaDirectory.create(tmp_path / "r", size_bytes=size_bytes)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_hold_the_size_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReplicaError):
        ReplicaDirectory.create(tmp_path / "r", size_bytes=(1 << 63) - 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_extent_lists_creates_nothing(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    for path in (tmp_path / "r", existing):
        with pytest.raises(ReplicaUnsupported, match="FIEMAP: Operation not supported"):
            ReplicaDirectory.create(path, size_bytes=SIZE, probe=lambda fd: -errno.EOPNOTSUPP)
    assert [each.name for each in tmp_path.rglob("*")] == ["existing"]


def test_create_refuses_an_existing_replica_and_leaves_it(path: Path) -> None:
    before = state(path)
    with pytest.raises(ReplicaForeign, match="holds a replica already"):
        ReplicaDirectory.create(path, size_bytes=SIZE)
    assert state(path) == before


def test_create_refuses_a_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ReplicaForeign, match=r"'letter\.txt'"):
        ReplicaDirectory.create(tmp_path, size_bytes=SIZE)
    assert [each.name for each in tmp_path.iterdir()] == ["letter.txt"]


def test_create_takes_the_root_of_a_new_file_system(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    ReplicaDirectory.create(tmp_path, size_bytes=SIZE)
    ReplicaDirectory.open(tmp_path).close()


def test_create_names_a_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(ReplicaNotFound, match="/no does not exist"):
        ReplicaDirectory.create(tmp_path / "no" / "r", size_bytes=SIZE)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_during_creation_leaves_nothing(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    if existing:
        path.mkdir()
    monkeypatch.setattr(os, "write", _full)
    with pytest.raises(ReplicaIO, match="No space left on device"):
        ReplicaDirectory.create(path, size_bytes=SIZE)
    assert path.exists() == existing
    assert not existing or list(path.iterdir()) == []


def _full(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- Opening what is no sane replica.


def test_open_says_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReplicaNotFound, match="no such directory"):
        ReplicaDirectory.open(tmp_path / "no")
    with pytest.raises(ReplicaNotFound, match="holds no replica"):
        ReplicaDirectory.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ReplicaForeign, match="'file'"):
        ReplicaDirectory.open(tmp_path)
    with pytest.raises(ReplicaForeign, match="not a directory"):
        ReplicaDirectory.open(tmp_path / "file")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def _break_volume_meta(path: Path) -> None:
    (path / "volume.meta").write_text('{"Size":')


def _two_heads(path: Path) -> None:
    (path / "volume.meta").write_bytes(b"")
    (path / "volume-head-009.img").write_bytes(bytes(4096))


def _no_head(path: Path) -> None:
    (path / "volume-head-002.img").unlink()


def _no_layer(path: Path) -> None:
    (path / "volume-snap-a.img").unlink()


def _no_record(path: Path) -> None:
    (path / "volume-snap-a.img.meta").unlink()


def _empty_layer(path: Path) -> None:
    os.truncate(path / "volume-snap-a.img", 0)


def _odd_layer(path: Path) -> None:
    os.truncate(path / "volume-snap-a.img", 4097)


def _large_layer(path: Path) -> None:
    os.truncate(path / "volume-snap-a.img", SIZE + 4096)


def _circle(path: Path) -> None:
    edit(path / "volume-snap-a.img.meta", Parent="volume-snap-b.img")


def _empty_record(path: Path) -> None:
    (path / "volume-snap-a.img.meta").write_bytes(b"")


def _symbolic_link(path: Path) -> None:
    (path / "volume-snap-a.img").rename(path.parent / "elsewhere")
    (path / "volume-snap-a.img").symlink_to(path.parent / "elsewhere")


def _pipe(path: Path) -> None:
    (path / "volume-snap-a.img").unlink()
    os.mkfifo(path / "volume-snap-a.img")


def _size(size_bytes: int) -> Callable[[Path], None]:
    return lambda path: edit(path / "volume.meta", Size=size_bytes)


def _member(**members: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "volume.meta", **members)


def _generation(path: Path) -> None:
    (path / "lhblock.generation").write_text("{}")


def _shared(path: Path) -> None:
    (path / "volume-snap-b.img").unlink()
    (path / "volume-snap-b.img").hardlink_to(path / "volume-snap-a.img")


def _head_is_a_parent(path: Path) -> None:
    (path / "volume-snap-b.img").unlink()
    (path / "volume-snap-b.img").hardlink_to(path / "volume-head-002.img")


def _odd_name(path: Path) -> None:
    (path / "volume-snap-x.meta.img").touch()


@pytest.mark.parametrize(
    ("damage", "kind", "sentence"),
    [
        (_break_volume_meta, ReplicaDamaged, "volume.meta is not JSON"),
        (_two_heads, ReplicaDamaged, "there are 2 head images"),
        (_no_head, ReplicaDamaged, "volume-head-002.img is missing"),
        (_no_layer, ReplicaDamaged, "volume-snap-a.img is missing"),
        (_no_record, ReplicaDamaged, "Parent = 'volume-snap-a.img', which is missing"),
        (_empty_layer, ReplicaDamaged, "volume-snap-a.img is empty"),
        (_odd_layer, ReplicaDamaged, "4097 bytes"),
        (_large_layer, ReplicaDamaged, f"more than the Size = {SIZE}"),
        (_circle, ReplicaDamaged, "closes a circle"),
        (_empty_record, ReplicaDamaged, "volume-snap-a.img.meta is not JSON"),
        (_symbolic_link, ReplicaDamaged, "not a regular file"),
        (_pipe, ReplicaDamaged, "not a regular file"),
        (_size(0), ReplicaDamaged, "Size = 0"),
        (_size(SIZE + 512), ReplicaUnsupported, "not a multiple of 4096"),
        (_member(Rebuilding=True), ReplicaStale, "rebuild"),
        (_member(BackingFilePath="/base"), ReplicaUnsupported, "'/base'"),
        (_generation, ReplicaDamaged, "lhblock.generation cannot be understood"),
        (_shared, ReplicaDamaged, "are one file but separate layers"),
        (_head_is_a_parent, ReplicaDamaged, "needs it"),
        (_odd_name, ReplicaUnsupported, "ends in '.meta'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("read_only", [False, True], ids=["write", "read"])
def test_a_damaged_directory_is_refused_with_the_value_and_left_alone(
    damage: Callable[[Path], None],
    kind: type[ReplicaError],
    sentence: str,
    read_only: bool,
    path: Path,
) -> None:
    with snapshots(path, "a", "b"):
        pass
    # A leftover, to see that a directory that is refused is not cleaned up either.
    (path / "volume.meta.tmp").touch()
    damage(path)
    before = {each.name: each.lstat().st_ino for each in path.iterdir()}
    with pytest.raises(kind) as caught:
        ReplicaDirectory.open(path, read_only=read_only)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert {each.name: each.lstat().st_ino for each in path.iterdir()} == before
    assert lock_holder(path) is None


def test_a_missing_extent_list_is_refused_at_open(path: Path) -> None:
    with pytest.raises(ReplicaUnsupported, match="FIEMAP"):
        ReplicaDirectory.open(path, probe=lambda fd: -errno.ENOTTY)
    ReplicaDirectory.open(path, probe=lambda fd: 0).close()


def test_a_chain_beyond_the_limit_is_refused(path: Path) -> None:
    parent = ""
    for number in range(LAYERS_MAX):
        image = path / f"volume-snap-{number}.img"
        image.touch()
        os.truncate(image, SIZE)
        (path / f"{image.name}.meta").write_text(json.dumps({"Parent": parent}))
        parent = image.name
    edit(path / "volume-head-000.img.meta", Parent=parent)
    with pytest.raises(ReplicaUnsupported, match="has 251 images, more than 250"):
        ReplicaDirectory.open(path)
    edit(path / "volume-head-000.img.meta", Parent="volume-snap-248.img")
    (path / parent).unlink()
    (path / f"{parent}.meta").unlink()
    with ReplicaDirectory.open(path) as directory:
        assert len(directory.chain) == LAYERS_MAX
        with pytest.raises(ReplicaUnsupported, match="has 250 images"):
            directory.prepare_snapshot("more", user_created=True, created=T)


# ---- Opening what needs a little help.


@pytest.mark.parametrize("lost", ["gone", "empty"])
def test_a_lost_volume_meta_is_made_again_from_the_only_head(lost: str, path: Path) -> None:
    with snapshots(path, "a"):
        pass
    if lost == "gone":
        (path / "volume.meta").unlink()
    else:
        (path / "volume.meta").write_bytes(b"")
    with ReplicaDirectory.open(path) as directory:
        assert directory.size_bytes == SIZE
        assert [disk.snapshot for disk in directory.chain] == ["a", "volume-head"]
    assert json.loads((path / "volume.meta").read_text())["Size"] == SIZE


@pytest.mark.parametrize("clean", [True, False])
def test_an_activity_log_is_kept_for_the_next_engine(path: Path, clean: bool) -> None:
    with ReplicaDirectory.open(path) as directory:
        directory.write_activity(b"a log")
        directory.close(clean=clean)
    with ReplicaDirectory.open(path) as directory:
        assert directory.read_activity() == b"a log"
        directory.forget_activity()
        assert directory.read_activity() == b""
        directory.forget_activity()


def test_an_activity_log_ends_when_another_program_has_opened_the_directory(path: Path) -> None:
    """Though it crashed like us, and left nothing else."""
    with ReplicaDirectory.open(path) as directory:
        directory.write_activity(b"a log")
        directory.close(clean=False)
    file = path / "volume.meta"
    members = json.loads(file.read_text())
    assert members.pop("Lhblock") is True
    file.write_text(json.dumps(members))
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert directory.read_activity() == b"a log"
    with ReplicaDirectory.open(path) as directory:
        assert directory.read_activity() == b""


def test_a_recorded_error_is_cleared_when_all_is_sane(path: Path) -> None:
    edit(path / "volume.meta", Error="cannot stat disk")
    with ReplicaDirectory.open(path) as directory:
        assert any("'cannot stat disk'" in each for each in directory.cleaned)
    assert json.loads((path / "volume.meta").read_text())["Error"] == ""


def test_the_parent_in_the_heads_record_wins(path: Path) -> None:
    with snapshots(path, "a"):
        pass
    edit(path / "volume.meta", Parent="volume-snap-lost.img")
    with ReplicaDirectory.open(path) as directory:
        assert directory.head.parent == "volume-snap-a.img"
    assert json.loads((path / "volume.meta").read_text())["Parent"] == "volume-snap-a.img"


@pytest.mark.parametrize("read_only", [False, True])
def test_a_head_that_was_cut_short_is_refused_and_left_as_it_is(
    path: Path, read_only: bool
) -> None:
    os.truncate(path / "volume-head-000.img", 4096)
    with pytest.raises(ReplicaDamaged, match=rf"has 4096 bytes and the volume {SIZE}.*truncate"):
        ReplicaDirectory.open(path, read_only=read_only)
    assert (path / "volume-head-000.img").stat().st_size == 4096


def test_the_revision_counter_goes_because_longhorn_would_believe_a_stale_one(path: Path) -> None:
    (path / "revision.counter").write_bytes(b"17".ljust(4096, b"\0"))
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert directory.cleaned == ()
    assert (path / "revision.counter").exists()
    with ReplicaDirectory.open(path) as directory:
        assert any("revision.counter" in each for each in directory.cleaned)
    assert not (path / "revision.counter").exists()


def test_dirty_is_on_disk_while_open_and_after_an_unclean_close(path: Path) -> None:
    directory = ReplicaDirectory.open(path)
    assert not directory.was_dirty
    assert json.loads((path / "volume.meta").read_text())["Dirty"] is True
    directory.close(clean=False)
    directory = ReplicaDirectory.open(path)
    assert directory.was_dirty
    directory.close()
    directory.close()
    assert json.loads((path / "volume.meta").read_text())["Dirty"] is False


def test_flags_we_do_not_use_are_kept(path: Path) -> None:
    edit(path / "volume.meta", Encrypted=True)
    with ReplicaDirectory.open(path) as directory:
        assert directory.encrypted
        snapshot(directory, "a")
    assert json.loads((path / "volume.meta").read_text())["Encrypted"] is True


# ---- A full disk.


def test_a_full_disk_does_not_keep_a_replica_from_opening_and_closing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ReplicaDirectory.open(path).close()
    write, spare = os.write, path / "lhblock.spare"

    def only_without_spare(fd: int, data: Any) -> int:
        return _full() if spare.exists() else write(fd, data)

    monkeypatch.setattr(os, "write", only_without_spare)
    monkeypatch.setattr(os, "posix_fallocate", _full)
    with ReplicaDirectory.open(path) as directory:
        assert not spare.exists()
        directory.write_generation(GENERATION)
    monkeypatch.undo()
    with ReplicaDirectory.open(path) as directory:
        assert not directory.was_dirty
    assert spare.stat().st_blocks * 512 >= 16384


def test_after_a_crash_a_full_disk_without_any_spare_still_opens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ReplicaDirectory.open(path).close(clean=False)
    (path / "lhblock.spare").unlink()
    monkeypatch.setattr(os, "write", _full)
    monkeypatch.setattr(os, "posix_fallocate", _full)
    directory = ReplicaDirectory.open(path)
    with pytest.raises(ReplicaIO, match="cannot note the clean close: No space left"):
        directory.close()
    assert lock_holder(path) is None


def test_a_snapshot_on_a_full_disk_leaves_nothing_and_keeps_the_spare(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ReplicaDirectory.open(path) as directory:
        before = set(os.listdir(path))  # noqa: PTH208
        monkeypatch.setattr(os, "write", _full)
        with pytest.raises(ReplicaIO, match=r"cannot prepare the head volume-head-001\.img"):
            directory.prepare_snapshot("a", user_created=True, created=T)
        monkeypatch.undo()
        assert set(os.listdir(path)) == before  # noqa: PTH208
        snapshot(directory, "a")


# ---- Locking.


def test_a_second_opener_is_told_who_has_it(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from lhblock.replica import ReplicaDirectory\n"
        "directory = ReplicaDirectory.open(Path(sys.argv[1])); print('open', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        assert lock_holder(path) == holder.pid
        for read_only in (False, True):
            with pytest.raises(ReplicaLocked, match=f"in use by process {holder.pid};"):
                ReplicaDirectory.open(path, read_only=read_only)
        holder.kill()
        holder.wait()
    assert lock_holder(path) is None
    ReplicaDirectory.open(path).close()


def test_readers_share_and_exclude_a_writer(path: Path) -> None:
    # The file names the last writer, who has nothing to do with it.
    ReplicaDirectory.open(path).close()
    with (
        ReplicaDirectory.open(path, read_only=True),
        ReplicaDirectory.open(path, read_only=True),
        pytest.raises(ReplicaLocked, match="is being read by another process;"),
    ):
        ReplicaDirectory.open(path)


def test_a_symbolic_link_in_place_of_the_lock_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (path / "lhblock.lock").unlink()
    (path / "lhblock.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ReplicaIO, match="symbolic links"):
        ReplicaDirectory.open(path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_nobody_holds_the_lock_of_what_is_not_there(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / "no") is None


# ---- Snapshots, reverts, removals.


def test_a_snapshot_freezes_the_head_and_its_discards(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        head = path / directory.head.name
        head.write_bytes(b"x" * SIZE)
        (path / directory.discard_name(head.name)).write_bytes(b"\1")
        inode = head.stat().st_ino
        pending = directory.prepare_snapshot(
            "a", user_created=True, created=T, labels={"z": "1", "b": "2"}
        )
        assert pending.image == "volume-head-001.img"
        assert (path / pending.image).stat().st_size == SIZE
        assert not (path / pending.discard).exists()
        assert directory.head.name == head.name
        pending.commit()
        pending.settle()
        assert (path / "volume-snap-a.img").stat().st_ino == inode
        assert (path / "lhblock.discard.snap-a").read_bytes() == b"\1"
        assert not head.exists()
        assert not (path / directory.discard_name(head.name)).exists()
        assert json.loads((path / "volume-snap-a.img.meta").read_text()) == {
            "Name": "volume-snap-a.img",
            "Parent": "",
            "Removed": False,
            "UserCreated": True,
            "Created": T,
            "Labels": {"b": "2", "z": "1"},
        }
        assert directory.children("a") == (directory.head,)
        assert [disk.snapshot for disk in directory.ancestry("a")] == ["a"]


def test_a_commit_syncs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReplicaDirectory.open(path) as directory:
        pending = directory.prepare_snapshot("a", user_created=True, created=T)
        with monkeypatch.context() as patch:
            for name in ("fsync", "fdatasync", "sync"):
                patch.setattr(os, name, lambda *_: pytest.fail("I/O is frozen meanwhile"))
            pending.commit()
        pending.settle()


def test_an_abort_leaves_nothing(path: Path) -> None:
    with snapshots(path, "a") as directory:
        before = {each.name for each in path.iterdir()}
        directory.prepare_snapshot("b", user_created=True, created=T).abort()
        directory.prepare_revert("a", created=T).abort()
        assert {each.name for each in path.iterdir()} == before
        snapshot(directory, "b")


@pytest.mark.parametrize("failing", ["link", "rename"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_commit_that_fails_leaves_the_old_head(
    failing: str, after: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ReplicaDirectory.open(path) as directory:
        (path / "lhblock.discard.head-000").write_bytes(b"\1")
        before = {each.name for each in path.iterdir()}
        pending = directory.prepare_snapshot("a", user_created=True, created=T)
        real, calls = getattr(os, failing), iter(range(after))

        def fail(*args: Any, **keywords: Any) -> Any:
            if next(calls, None) is None:
                _full()
            return real(*args, **keywords)

        monkeypatch.setattr(os, failing, fail)
        with pytest.raises(ReplicaIO, match="No space left"):
            pending.commit()
        monkeypatch.undo()
        pending.abort()
        assert directory.head.name == "volume-head-000.img"
        assert {each.name for each in path.iterdir()} == before
        snapshot(directory, "a")


def test_an_expansion_is_longhorns(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        pending = directory.prepare_expansion(2 * SIZE, created=T)
        assert pending.size_bytes == 2 * SIZE
        pending.commit()
        pending.settle()
        disk = directory.disks[f"volume-snap-expand-{2 * SIZE}.img"]
        assert not disk.user_created
        assert dict(disk.labels) == {"replica-expansion": str(2 * SIZE)}
    with ReplicaDirectory.open(path) as directory:
        assert directory.size_bytes == 2 * SIZE
        assert (path / directory.head.name).stat().st_size == 2 * SIZE


@pytest.mark.parametrize("size_bytes", [SIZE - 4096, SIZE + 1, 0])
def test_an_expansion_to_a_bad_size_is_a_usage_error(size_bytes: int, path: Path) -> None:
    with (
        ReplicaDirectory.open(path) as directory,
        pytest.raises(UsageError, match=str(size_bytes)),
    ):
        directory.prepare_expansion(size_bytes, created=T)


def test_what_cannot_be_done_is_a_usage_error(path: Path) -> None:
    with snapshots(path, "a", "b") as directory:
        with pytest.raises(UsageError, match="has a snapshot 'a' already"):
            directory.prepare_snapshot("a", user_created=True, created=T)
        with pytest.raises(UsageError, match="no snapshot 'x'"):
            directory.prepare_revert("x", created=T)
        with pytest.raises(UsageError, match="no snapshot 'x'"):
            directory.mark_removed("x")
        with pytest.raises(UsageError, match="cannot be removed"):
            directory.mark_removed(directory.head.name)
        with pytest.raises(UsageError, match="cannot be unlinked"):
            directory.unlink_disk(directory.head.name)
        directory.mark_removed("b")
        with pytest.raises(UsageError, match="no snapshot one can revert to"):
            directory.prepare_revert("b", created=T)


def test_a_disk_with_several_children_stays(path: Path) -> None:
    with snapshots(path, "a", "b") as directory:
        pending = directory.prepare_revert("a", created=T)
        pending.commit()
        pending.settle()
        assert len(directory.children("a")) == 2
        with pytest.raises(UsageError, match=r"several children \(2\)"):
            directory.unlink_disk("volume-snap-a.img")


def test_a_longhorn_leftover_in_the_way_of_a_new_snapshot_is_set_aside(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        (path / "volume-snap-a.img").write_bytes(b"x" * 4096)
        (path / "lhblock.discard.snap-a").write_bytes(b"\1")
        snapshot(directory, "a")
        assert (path / "lhblock.aside.snap-a.0").read_bytes() == b"x" * 4096
        assert not (path / "lhblock.discard.snap-a").exists()
    with ReplicaDirectory.open(path) as directory:
        assert directory.cleaned == ()


def test_a_merged_file_shorter_than_what_was_merged_into_it_is_refused(path: Path) -> None:
    with snapshots(path, "a", "b") as directory:
        directory.mark_removed("a")
        os.truncate(path / "volume-snap-a.img", SIZE - 4096)
        with pytest.raises(ReplicaDamaged, match="less than"):
            directory.adopt_merged("volume-snap-a.img", "volume-snap-b.img")


# ---- The generation, and other programs.


def test_a_generation_is_on_disk_when_written(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        assert directory.generation is not None
        assert directory.generation.replica_id == GENERATION.replica_id
        assert directory.generation.head is None
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert directory.generation is not None
        assert directory.generation.head is not None


def test_our_own_sessions_and_crashes_are_no_foreign_writes(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        (path / directory.head.name).write_bytes(b"x" * SIZE)
    with ReplicaDirectory.open(path) as directory:
        assert directory.written_elsewhere == ""
        (path / directory.head.name).write_bytes(b"y" * SIZE)
        directory.close(clean=False)
    directory = ReplicaDirectory.open(path)
    assert directory.written_elsewhere == ""
    directory.close()


def test_a_foreign_write_is_noticed_and_ends_the_discards(path: Path) -> None:
    with ReplicaDirectory.open(path) as directory:
        (path / directory.discard_name(directory.head.name)).write_bytes(b"\1")
    with (path / "volume-head-000.img").open("r+b") as file:
        file.write(b"foreign")
    with pytest.raises(ReplicaUnsupported, match="discards are out of date"):
        ReplicaDirectory.open(path, read_only=True)
    with ReplicaDirectory.open(path) as directory:
        assert "another program has written" in directory.written_elsewhere
        assert any("lhblock.discard.head-000" in each for each in directory.cleaned)
        assert not (path / "lhblock.discard.head-000").exists()


@pytest.mark.parametrize("clean", [False, True])
def test_a_foreign_write_is_told_at_every_open_until_it_is_made_good(
    clean: bool, path: Path
) -> None:
    with (path / "volume-head-000.img").open("r+b") as file:
        file.write(b"foreign")
    for _ in range(2):
        directory = ReplicaDirectory.open(path)
        assert directory.written_elsewhere
        assert directory.generation is not None
        directory.write_generation(GENERATION)
        directory.close(clean=clean)
    with ReplicaDirectory.open(path) as directory:
        directory.note_repaired()
        (path / "lhblock.discard.head-000").write_bytes(b"1")
        assert directory.written_elsewhere == ""
    with ReplicaDirectory.open(path) as directory:
        assert directory.written_elsewhere == ""
        assert (path / "lhblock.discard.head-000").exists()


@pytest.mark.parametrize("clean", [False, True])
def test_a_torn_change_is_told_at_every_open_until_it_is_made_good(clean: bool, path: Path) -> None:
    ReplicaDirectory.open(path).close()
    (path / "volume-snap-s.img").hardlink_to(path / "volume-head-000.img")
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert directory.torn
    for number in range(2):
        directory = ReplicaDirectory.open(path)
        assert directory.torn
        assert len(directory.cleaned) == (number == 0)
        directory.close(clean=clean)
    with ReplicaDirectory.open(path) as directory:
        directory.note_repaired()
    with ReplicaDirectory.open(path) as directory:
        assert not directory.torn


def test_a_foreign_session_after_our_crash_is_noticed(path: Path) -> None:
    ReplicaDirectory.open(path).close(clean=False)
    edit(path / "volume.meta", Dirty=False)
    with ReplicaDirectory.open(path) as directory:
        assert "since our last crash" in directory.written_elsewhere


# ---- Checksums.


def test_a_checksum_holds_until_the_image_changes(path: Path) -> None:
    with snapshots(path, "a") as directory:
        image, asked = "volume-snap-a.img", []

        def crc64(fd: int, size_bytes: int) -> int:
            asked.append(size_bytes)
            return 0xDC741A697D1CB87E

        record = hash_image(directory.dir_fd, image, crc64, now=T)
        assert record is not None
        assert record.checksum == "dc741a697d1cb87e"
        assert hash_image(directory.dir_fd, image, crc64, now=T) == record
        assert asked == [SIZE]
        (path / image).chmod(0o600)
        assert valid_checksum(directory.dir_fd, image) is None
        assert read_checksum(directory.dir_fd, image) == record


def test_a_different_checksum_of_an_untouched_image_is_corruption(path: Path) -> None:
    with snapshots(path, "a") as directory:
        image = "volume-snap-a.img"
        hash_image(directory.dir_fd, image, lambda fd, size: 1, now=T)
        record = hash_image(directory.dir_fd, image, lambda fd, size: 2, now="later", rehash=True)
        assert record == ChecksumRecord(
            "0000000000000001",
            change_time_text((path / image).stat().st_ctime_ns),
            T,
            silently_corrupted=True,
        )


def test_an_image_that_changes_while_it_is_hashed_gets_no_record(path: Path) -> None:
    with snapshots(path, "a") as directory:
        image = "volume-snap-a.img"

        def crc64(fd: int, size_bytes: int) -> int:
            os.utime(path / image, ns=(1, 1))
            (path / image).chmod(0o600)
            return 1

        assert hash_image(directory.dir_fd, image, crc64, now=T) is None
        assert not (path / f"{image}.checksum").exists()


def test_change_times_are_printed_as_go_does() -> None:
    assert change_time_text(1795423573_573117089) == "2026-11-23 08:46:13.573117089 +0000 UTC"
    assert change_time_text(1795423573_500000000) == "2026-11-23 08:46:13.5 +0000 UTC"
    assert change_time_text(1795423573_000000000) == "2026-11-23 08:46:13 +0000 UTC"


def test_a_damaged_checksum_record_is_none(path: Path) -> None:
    with snapshots(path, "a") as directory:
        (path / "volume-snap-a.img.checksum").write_text("{")
        assert read_checksum(directory.dir_fd, "volume-snap-a.img") is None
