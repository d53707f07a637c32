"""Volume records, and the removal of what belongs to them."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lhblock.errors import (
    ReplicaForeign,
    ReplicaLocked,
    UsageError,
    VolumeError,
    VolumeExists,
    VolumeNotFound,
)
from lhblock.instance import (
    Registry,
    ReplicaRecord,
    VolumeRecord,
    answering_address,
    create_volume,
    removable,
    remove_dead_sockets,
    remove_replica,
    serving,
)
from lhblock.replica import ReplicaDirectory
from lhblock.settings import DataDir


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    where = DataDir(tmp_path / "data")
    where.prepare()
    return Registry(where)


def a_record(registry: Registry, name: str = "db") -> VolumeRecord:
    replica = ReplicaRecord(registry.data_dir.volume(name) / "replica", "directory")
    return VolumeRecord(name, 1 << 20, "writeback", "2026-11-23T08:44:24Z", (replica,))


def a_replica(path: Path) -> ReplicaRecord:
    """A directory with every kind of file that a replica may have."""
    path.mkdir(parents=True)
    for name in (
        "volume.meta",
        "volume-head-003.img",
        "volume-head-003.img.meta",
        "volume-head-003.img.meta.tmp",
        "volume-snap-s 1.img",
        "volume-snap-s 1.img.meta",
        "volume-snap-s 1.img.checksum",
        "volume-snap-s 1.img.checksum..tmp",
        "revision.counter",
        "lhblock.lock",
        "lhblock.generation",
        "lhblock.discard.snap-s1",
    ):
        (path / name).touch()
    return ReplicaRecord(path, "directory")


def test_a_record_is_read_back_as_it_was_written(registry: Registry) -> None:
    record = a_record(registry)
    registry.add(record)
    assert registry.get("db") == record
    assert registry.names() == ["db"]


def test_no_data_directory_means_no_volumes(tmp_path: Path) -> None:
    registry = Registry(DataDir(tmp_path / "none"))
    assert registry.names() == []
    with pytest.raises(VolumeNotFound, match="lhblock serve db --size"):
        registry.get("db")


def test_a_name_is_taken_once(registry: Registry) -> None:
    registry.add(a_record(registry))
    with pytest.raises(VolumeExists):
        registry.add(a_record(registry))


def test_names_cannot_leave_the_data_directory(registry: Registry) -> None:
    with pytest.raises(UsageError):
        registry.get("../db")


def test_an_update_keeps_the_rest(registry: Registry) -> None:
    registry.add(a_record(registry))
    changed = registry.update("db", size_bytes=2 << 20)
    assert registry.get("db") == changed == replace(a_record(registry), size_bytes=2 << 20)


def test_a_crash_while_writing_leaves_the_old_record(registry: Registry) -> None:
    registry.add(a_record(registry))
    (registry.data_dir.volume("db") / "volume.tmp").write_text('{"name": "d')
    assert registry.get("db") == a_record(registry)
    registry.update("db", size_bytes=2 << 20)
    assert not (registry.data_dir.volume("db") / "volume.tmp").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"size_bytes": -1},
        {"size_bytes": "1"},
        {"size_bytes": True},
        {"cache": "maybe"},
        {"created": None},
        {"replicas": []},
        {"replicas": [{"path": "relative", "made": ""}]},
        {"replicas": [{"path": "/x", "made": "all"}]},
        {"replicas": "x"},
    ],
)
def test_a_damaged_record_is_a_sentence_and_stays_listed(
    registry: Registry, change: dict[str, object]
) -> None:
    registry.add(a_record(registry))
    path = registry.data_dir.volume("db") / "volume.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(VolumeError, match="is damaged"):
        registry.get("db")
    assert registry.names() == ["db"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"{}"])
def test_what_is_no_record_is_a_sentence(registry: Registry, content: bytes) -> None:
    registry.add(a_record(registry))
    (registry.data_dir.volume("db") / "volume.json").write_bytes(content)
    with pytest.raises(VolumeError, match="is damaged"):
        registry.get("db")


def test_forgetting_leaves_what_others_put_there(registry: Registry) -> None:
    registry.add(a_record(registry))
    keep = registry.data_dir.volume("db") / "notes.txt"
    keep.touch()
    registry.forget("db")
    assert registry.names() == []
    assert keep.exists()


def test_removal_takes_every_file_of_a_replica(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    with removable(replica) as names:
        assert len(names) == 12
        remove_replica(replica, names)
    assert not replica.path.exists()


def test_removal_keeps_a_directory_that_was_there_before(tmp_path: Path) -> None:
    replica = replace(a_replica(tmp_path / "r"), made="files")
    with removable(replica) as names:
        remove_replica(replica, names)
    assert list(replica.path.iterdir()) == []


def test_removal_refuses_foreign_files_and_deletes_nothing(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    (replica.path / "photo.jpg").touch()
    with pytest.raises(ReplicaForeign, match=r"photo\.jpg"), removable(replica):
        pass
    assert (replica.path / "volume.meta").exists()


def test_removal_refuses_links_with_a_good_name(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    precious = tmp_path / "precious"
    precious.write_text("x")
    (replica.path / "volume-snap-x.img").symlink_to(precious)
    with pytest.raises(ReplicaForeign, match=r"volume-snap-x\.img"), removable(replica):
        pass
    assert precious.read_text() == "x"


def test_removal_refuses_directories_with_a_good_name(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    (replica.path / "volume-snap-x.img").mkdir()
    with pytest.raises(ReplicaForeign), removable(replica):
        pass


def test_removal_refuses_a_link_to_a_replica(tmp_path: Path) -> None:
    real = a_replica(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real.path)
    record = ReplicaRecord(link, "directory")
    with pytest.raises(ReplicaForeign, match="not a directory of its own"), removable(record):
        pass
    assert (real.path / "volume.meta").exists()


def test_removal_refuses_a_locked_replica(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    with (replica.path / "lhblock.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ReplicaLocked), removable(replica):
            pass
    assert (replica.path / "volume.meta").exists()


def test_a_second_removal_takes_what_a_crash_left(tmp_path: Path) -> None:
    replica = a_replica(tmp_path / "r")
    (replica.path / "volume.meta").unlink()
    with removable(replica) as names:
        remove_replica(replica, names)
    with removable(replica) as names:
        assert names == []
        remove_replica(replica, names)
    assert not replica.path.exists()


def test_a_held_lock_means_serving_and_names_the_process(registry: Registry) -> None:
    record = a_record(registry)
    registry.add(record)
    assert serving(registry.data_dir, record) is None
    lock = record.paths[0] / "lhblock.lock"
    a_replica(record.paths[0])
    lock.write_text(f"{os.getpid()}\n")
    assert serving(registry.data_dir, record) is None
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = serving(registry.data_dir, record)
    assert holder is not None
    assert holder.pid == os.getpid()


def test_a_control_socket_nobody_answers_on_counts_for_nothing(registry: Registry) -> None:
    import socket

    path = registry.data_dir.control_socket(4711)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        registry.data_dir.control_link("db").symlink_to(path.name)
        assert answering_address(registry.data_dir, "db") is None
        sock.listen(1)
        assert answering_address(registry.data_dir, "db") == f"unix:{path}"
        holder = serving(registry.data_dir, a_record(registry))
        assert holder is not None
        assert holder.pid == 4711
    assert answering_address(registry.data_dir, "db") is None


def test_a_directory_that_may_not_be_searched_is_held_by_nobody(
    registry: Registry, tmp_path: Path
) -> None:
    # A name that is too long is refused for root, too, as a closed directory is for others.
    closed = ReplicaRecord(tmp_path / ("x" * 300), "directory")
    good = a_replica(tmp_path / "good")
    record = replace(a_record(registry), replicas=(closed, good))
    assert serving(registry.data_dir, record) is None
    with (good.path / "lhblock.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert serving(registry.data_dir, record) is not None


def test_only_sockets_of_dead_processes_are_removed(registry: Registry) -> None:
    import socket

    # Above the largest pid the kernel gives.
    dead = registry.data_dir.control_socket(1 << 23)
    answering = registry.data_dir.control_socket((1 << 23) + 1)
    living = registry.data_dir.control_socket(os.getpid())
    other = registry.data_dir.nbd_socket
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(answering))
        listening.listen(1)
        for path in (dead, living, other):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        remove_dead_sockets(registry.data_dir)
        assert not dead.exists()
        assert all(path.exists() for path in (answering, living, other))


def test_a_control_link_cannot_lead_elsewhere(registry: Registry, tmp_path: Path) -> None:
    registry.data_dir.control_link("db").symlink_to(tmp_path / "serve-1.sock")
    assert answering_address(registry.data_dir, "db") is None


@pytest.mark.parametrize("given", [False, True])
async def test_a_creation_that_was_killed_can_be_done_again(
    registry: Registry, tmp_path: Path, *, given: bool
) -> None:
    path = tmp_path / "r0" if given else registry.data_dir.volume("db") / "replica"
    path.mkdir(parents=True)
    ReplicaDirectory.create(path, size_bytes=1 << 20)
    (path / "volume.meta").unlink()  # it is written last
    replicas = [path] if given else []
    record = await create_volume(registry, "db", size_bytes=1 << 20, replicas=replicas)
    assert [replica.made for replica in record.replicas] == ["files" if given else "directory"]
    ReplicaDirectory.open(path).close()


async def test_a_directory_with_something_else_is_no_killed_creation(
    registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "r0"
    ReplicaDirectory.create(path, size_bytes=1 << 20)
    (path / "volume.meta").unlink()
    (path / "volume-head-000.img").write_bytes(b"data" * 1024)
    with pytest.raises(ReplicaForeign, match="is not empty"):
        await create_volume(registry, "db", size_bytes=1 << 20, replicas=[path])
    assert (path / "volume-head-000.img").exists()
