"""The replica's control service over real directories: Longhorn's states, behaviours and texts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from lhblock.engine import (
    DrivenReplica,
    EngineOptions,
    create_replicas,
    open_driven,
    open_engine,
)
from lhblock.errors import LhblockError, ReplicaDamaged, ReplicaStale, SizeError, UsageError
from lhblock.instance._identity import check_identity
from lhblock.instance._replica import Replica
from lhblock.instance._replica_process import data_socket_path
from lhblock.instance._replica_service import ReplicaService
from lhblock.replica import ACTIVITY_NAME, ReplicaDirectory, peek
from lhblock.rpc import REPLICA, Call, CallFailed, method
from lhblock.rpc.generated import replica_pb2 as pb

SIZE_BYTES = 4 << 20
BLOCK = 4096
TIMEOUT_S = 60.0
CREATED = "2026-11-23T08:46:13Z"


@dataclass
class Served:
    """One replica and its service, called as the server would."""

    replica: Replica
    service: ReplicaService

    async def call(self, name: str, request: Any = None) -> Any:
        call = Call(method(REPLICA, name))
        with trio.fail_after(TIMEOUT_S):
            reply = await self.service.handlers[name](request or Empty(), call)
        return getattr(reply, "replica", reply)

    async def refused(self, name: str, request: Any = None) -> tuple[str, str]:
        with pytest.raises((CallFailed, LhblockError)) as caught:
            await self.call(name, request)
        return getattr(caught.value, "code", "UNKNOWN"), str(caught.value)

    async def says(self, name: str, request: Any = None) -> str:
        code, text = await self.refused(name, request)
        assert code == "UNKNOWN"
        return text

    async def open(self) -> pb.Replica:
        info: pb.Replica = await self.call("ReplicaOpen", pb.ReplicaOpenRequest())
        return info

    async def snapshot(self, name: str, **more: Any) -> pb.Replica:
        request = pb.ReplicaSnapshotRequest(
            name=name, user_created=True, created=CREATED, labels=more
        )
        info: pb.Replica = await self.call("ReplicaSnapshot", request)
        return info

    @property
    def opened(self) -> DrivenReplica:
        assert self.replica.opened is not None
        return self.replica.opened

    async def merged(self) -> None:
        with trio.fail_after(TIMEOUT_S):
            await self.opened.wait_merged()


@asynccontextmanager
async def serve(
    path: Path, *, create: bool = True, encrypted: bool = False, **options: Any
) -> AsyncIterator[Served]:
    async with (
        open_engine(EngineOptions(queues=1, workers=2, driver="pool")) as engine,
        trio.open_nursery() as nursery,
    ):
        replica = Replica(engine, path, nursery, volume="db", encrypted=encrypted)
        served = Served(replica, ReplicaService(replica, **options))
        if create:
            await served.call("ReplicaCreate", pb.ReplicaCreateRequest(size=str(SIZE_BYTES)))
        yield served
        nursery.cancel_scope.cancel()


def image(name: str) -> str:
    return f"volume-snap-{name}.img"


# ---- States.


async def test_a_replica_goes_from_initial_to_closed_to_open_to_dirty_and_back(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path / "r", create=False) as at:
        assert (await at.call("ReplicaGet")).state == "initial"
        made = await at.call("ReplicaCreate", pb.ReplicaCreateRequest(size=str(SIZE_BYTES)))
        assert (made.state, made.size, made.sector_size) == ("closed", str(SIZE_BYTES), 512)
        assert (made.head, made.dirty, len(made.disks)) == ("volume-head-000.img", False, 0)
        assert (await at.open()).state == "open"
        await at.opened.write(0, b"x" * BLOCK)
        written = await at.call("ReplicaGet")
        assert (written.state, written.dirty) == ("dirty", True)
        closed = await at.call("ReplicaClose")
        assert (closed.state, closed.dirty) == ("closed", False)


async def test_an_open_replica_tells_what_a_controller_reads(tmp_path: Path) -> None:
    async with serve(tmp_path / "r", snapshot_max_count=9, unmap_mark=True) as at:
        await at.open()
        await at.opened.write(0, b"x" * BLOCK)
        info = await at.snapshot("s1", k="v")
        assert list(info.chain) == ["volume-head-001.img", image("s1")]
        assert (info.head, info.parent) == ("volume-head-001.img", image("s1"))
        assert info.revision_counter_disabled
        assert info.unmap_mark_disk_chain_removed
        assert (info.remain_snapshots, info.snapshot_count_usage) == (8, 1)
        assert info.snapshot_count_total == 2
        assert info.snapshot_size_usage >= BLOCK
        assert info.last_modify_time > 0
        disk = info.disks[image("s1")]
        assert dict(disk.children) == {"volume-head-001.img": True}
        assert (disk.user_created, disk.created, dict(disk.labels)) == (True, CREATED, {"k": "v"})
        assert int(disk.size) >= BLOCK


async def test_damaged_metadata_is_the_state_error(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        (tmp_path / "r" / "volume.meta").write_text('{"Size":')
        assert (await at.call("ReplicaGet")).state == "error"
        assert "volume.meta" in await at.says("ReplicaOpen", pb.ReplicaOpenRequest())


async def test_a_disk_file_that_disappears_is_the_state_error(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.snapshot("s1")
        (tmp_path / "r" / image("s1")).unlink()
        assert (await at.call("ReplicaGet")).state == "error"
        with pytest.raises(LhblockError):
            at.opened.attach_data(0)


# ---- Making, opening, deleting.


async def test_create_refuses_sizes_in_longhorns_words(tmp_path: Path) -> None:
    async with serve(tmp_path / "r", create=False) as at:
        request = pb.ReplicaCreateRequest(size="4k")
        assert await at.says("ReplicaCreate", request) == (
            'strconv.ParseInt: parsing "4k": invalid syntax'
        )
        request = pb.ReplicaCreateRequest(size="1000")
        assert await at.says("ReplicaCreate", request) == (
            "size 1000 not a multiple of sector size 512"
        )
        assert "4096" in await at.says("ReplicaCreate", pb.ReplicaCreateRequest(size="512"))
        assert not (tmp_path / "r").exists()


async def test_create_of_what_exists_changes_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        again = await at.call("ReplicaCreate", pb.ReplicaCreateRequest(size="8192"))
        assert again.size == str(SIZE_BYTES)


async def test_open_of_nothing_and_of_an_open_one_is_refused(tmp_path: Path) -> None:
    async with serve(tmp_path / "r", create=False) as at:
        assert await at.says("ReplicaOpen", pb.ReplicaOpenRequest()) == "file does not exist"
        assert not (tmp_path / "r").exists()
        await at.call("ReplicaCreate", pb.ReplicaCreateRequest(size=str(SIZE_BYTES)))
        await at.open()
        assert await at.says("ReplicaOpen", pb.ReplicaOpenRequest()) == "replica is already open"


async def test_an_encrypted_replica_grows_by_its_header_when_opened(tmp_path: Path) -> None:
    larger = SIZE_BYTES + (16 << 20)
    async with serve(tmp_path / "r", encrypted=True) as at:
        request = pb.ReplicaOpenRequest(expected_backend_size=larger)
        assert (await at.call("ReplicaOpen", request)).size == str(larger)
    async with serve(tmp_path / "plain") as at:
        assert (await at.call("ReplicaOpen", request)).size == str(SIZE_BYTES)


async def test_delete_acts_on_an_open_replica_only(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.call("ReplicaDelete")
        assert (await at.call("ReplicaGet")).state == "closed"
        await at.open()
        await at.snapshot("s1")
        await at.call("ReplicaDelete")
        assert (await at.call("ReplicaGet")).state == "initial"
        assert list((tmp_path / "r").iterdir()) == []
        made = await at.call("ReplicaCreate", pb.ReplicaCreateRequest(size=str(SIZE_BYTES)))
        assert made.state == "closed"


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("ReplicaClose", None),
        ("ReplicaReload", None),
        ("ReplicaRevert", pb.ReplicaRevertRequest(name=image("s"), created=CREATED)),
        ("ReplicaSnapshot", pb.ReplicaSnapshotRequest(name="s", created=CREATED)),
        ("ReplicaExpand", pb.ReplicaExpandRequest(size=8 << 20)),
        ("DiskRemove", pb.DiskRemoveRequest(name=image("s"))),
        ("DiskReplace", pb.DiskReplaceRequest(target=image("s"), source=image("t"))),
        ("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name="s")),
        ("RevisionCounterSet", pb.RevisionCounterSetRequest(counter=7)),
    ],
)
async def test_a_closed_replica_does_nothing_and_says_so_by_its_state(
    tmp_path: Path, name: str, request_: Any
) -> None:
    async with serve(tmp_path / "r") as at:
        before = peek(tmp_path / "r")
        assert (await at.call(name, request_)).state == "closed"
        assert peek(tmp_path / "r") == before


# ---- Snapshots.


async def test_snapshot_arguments_are_refused_in_longhorns_words(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        request = pb.ReplicaSnapshotRequest(created=CREATED)
        assert await at.says("ReplicaSnapshot", request) == "cannot accept empty snapshot name"
        request = pb.ReplicaSnapshotRequest(name="s1")
        assert await at.says("ReplicaSnapshot", request) == "need to specific created time"
        await at.snapshot("s1")
        request = pb.ReplicaSnapshotRequest(name="s1", created=CREATED)
        assert await at.says("ReplicaSnapshot", request) == (
            f"snapshot {image('s1')} is already existing"
        )


async def test_the_count_limit_is_kept_and_not_checked_when_set(tmp_path: Path) -> None:
    async with serve(tmp_path / "r", snapshot_max_count=1) as at:
        await at.open()
        assert (await at.snapshot("s1")).remain_snapshots == 0
        request = pb.ReplicaSnapshotRequest(name="s2", created=CREATED)
        assert await at.says("ReplicaSnapshot", request) == "too many active disks: 3"
        info = await at.call("SnapshotMaxCountSet", pb.SnapshotMaxCountSetRequest(count=0))
        assert info.remain_snapshots == -1
        await at.call("SnapshotMaxCountSet", pb.SnapshotMaxCountSetRequest(count=2))
        await at.call("SnapshotMaxSizeSet", pb.SnapshotMaxSizeSetRequest(size=1))
        assert (await at.snapshot("s2")).snapshot_count_usage == 2


async def test_flags_survive_closing(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        request = pb.UnmapMarkDiskChainRemovedSetRequest(enabled=True)
        await at.call("UnmapMarkDiskChainRemovedSet", request)
        assert (await at.open()).unmap_mark_disk_chain_removed
        await at.call("ReplicaClose")
        assert (await at.open()).unmap_mark_disk_chain_removed


async def test_revert_brings_the_snapshots_content_back(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        await at.snapshot("s1")
        await at.opened.write(0, b"b" * BLOCK)
        request = pb.ReplicaRevertRequest(name=image("s1"), created=CREATED)
        info = await at.call("ReplicaRevert", request)
        assert info.parent == image("s1")
        assert info.disks[info.head].created == CREATED
        assert await at.opened.read(0, BLOCK) == b"a" * BLOCK


async def test_revert_targets_are_refused_in_longhorns_words(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        assert await at.says("ReplicaRevert", pb.ReplicaRevertRequest(created=CREATED)) == (
            "cannot accept empty snapshot name"
        )
        request = pb.ReplicaRevertRequest(name=image("s9"))
        assert await at.says("ReplicaRevert", request) == "need to specific created time"
        request.created = CREATED
        path = tmp_path / "r" / image("s9")
        assert await at.says("ReplicaRevert", request) == f"stat {path}: no such file or directory"
        path.write_bytes(b"")
        assert await at.says("ReplicaRevert", request) == (
            f"cannot revert to disk file {image('s9')} since it's not in the disk chain"
        )
        request.name = "../r/volume.meta"
        assert "not in the disk chain" in await at.says("ReplicaRevert", request)


async def test_expansion_keeps_the_data_and_fails_with_a_document(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        larger = 2 * SIZE_BYTES
        info = await at.call("ReplicaExpand", pb.ReplicaExpandRequest(size=larger))
        assert info.size == str(larger)
        assert info.parent == image(f"expand-{larger}")
        assert dict(info.disks[info.parent].labels) == {"replica-expansion": str(larger)}
        await at.opened.write(larger - BLOCK, b"z" * BLOCK)
        assert await at.opened.read(0, BLOCK) == b"a" * BLOCK
        code, text = await at.refused("ReplicaExpand", pb.ReplicaExpandRequest(size=SIZE_BYTES))
        assert code == "INTERNAL"
        assert json.loads(text) == {
            "code": "FunctionFailedWithoutRollback",
            "message": f"cannot expand replica to a smaller size {SIZE_BYTES}",
            "rollbackMessage": "",
        }
        _, text = await at.refused("ReplicaExpand", pb.ReplicaExpandRequest(size=larger + 512))
        assert "not multiple of volume sector size 4096" in json.loads(text)["message"]
        same = await at.call("ReplicaExpand", pb.ReplicaExpandRequest(size=larger))
        assert len(same.disks) == 2


# ---- Disks.


async def test_a_marked_disk_is_merged_here_and_leaves_nothing_to_the_caller(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        await at.snapshot("s1")
        await at.snapshot("s2")
        request = pb.DiskPrepareRemoveRequest(name="s1")
        assert await at.says("DiskPrepareRemove", request) == (
            f"disk {image('s1')} hasn't been marked as removed"
        )
        info = await at.call("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name="s1"))
        assert image("s1") not in info.chain
        assert list((await at.call("DiskPrepareRemove", request)).operations) == []
        await at.merged()
        assert image("s1") not in (await at.call("ReplicaGet")).disks
        assert await at.opened.read(0, BLOCK) == b"a" * BLOCK


async def test_the_head_is_never_removed(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        head = (await at.open()).head
        assert await at.says("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name=head)) == (
            "cannot mark the active differencing disk as removed"
        )
        deleting = "cannot delete the active differencing disk"
        assert await at.says("DiskRemove", pb.DiskRemoveRequest(name=head, force=True)) == deleting
        request = pb.DiskPrepareRemoveRequest(name=head)
        assert await at.says("DiskPrepareRemove", request) == deleting
        replace = pb.DiskReplaceRequest(target=head, source="x")
        assert await at.says("DiskReplace", replace) == (
            "cannot replace the active differencing disk"
        )


async def test_unknown_disks_are_no_error_except_to_replace(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.call("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name="nothing"))
        await at.call("DiskRemove", pb.DiskRemoveRequest(name=image("nothing")))
        await at.call("DiskPrepareRemove", pb.DiskPrepareRemoveRequest(name="nothing"))
        request = pb.DiskReplaceRequest(target=image("t"), source=image("s"))
        assert await at.says("DiskReplace", request) == (
            f"cannot find source of replacing: {image('s')}"
        )


async def test_removing_a_disk_that_others_need_keeps_their_content(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        await at.snapshot("s1")
        await at.call("DiskRemove", pb.DiskRemoveRequest(name=image("s1")))
        await at.merged()
        assert list((await at.call("ReplicaGet")).chain) == ["volume-head-001.img"]
        assert await at.opened.read(0, BLOCK) == b"a" * BLOCK


async def test_a_replace_without_a_merge_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        await at.snapshot("s1")
        await at.opened.write(0, b"b" * BLOCK)
        await at.snapshot("s2")
        request = pb.DiskReplaceRequest(target=image("s2"), source=image("s1"))
        assert "merges disks by itself" in await at.says("DiskReplace", request)
        assert await at.opened.read(0, BLOCK) == b"b" * BLOCK


async def test_several_children_need_force(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.snapshot("s1")
        await at.snapshot("s2")
        await at.call("ReplicaRevert", pb.ReplicaRevertRequest(name=image("s1"), created=CREATED))
        request = pb.DiskRemoveRequest(name=image("s1"))
        assert await at.says("DiskRemove", request) == (
            f"cannot remove snapshot {image('s1')} with 2 children"
        )
        # A leaf of a side branch goes at once.
        info = await at.call("DiskRemove", pb.DiskRemoveRequest(name=image("s2")))
        assert image("s2") not in info.disks


# ---- Rebuilding.


async def test_rebuilding_is_kept_over_a_close_and_only_ended_from_itself(
    tmp_path: Path,
) -> None:
    start, end = (pb.RebuildingSetRequest(rebuilding=value) for value in (True, False))
    async with serve(tmp_path / "r") as at:
        assert await at.says("RebuildingSet", start) == (
            "cannot set rebuilding=true from state closed"
        )
        await at.open()
        assert await at.says("RebuildingSet", end) == "cannot set rebuilding=false from state open"
        assert (await at.call("RebuildingSet", start)).state == "rebuilding"
        closed = await at.call("ReplicaClose")
        assert (closed.state, closed.rebuilding) == ("closed", True)
    with pytest.raises(ReplicaStale):
        ReplicaDirectory.open(tmp_path / "r")
    async with serve(tmp_path / "r", create=False) as at:
        assert (await at.open()).state == "rebuilding"
        ended = await at.call("RebuildingSet", end)
        assert (ended.state, ended.rebuilding) == ("open", False)


async def test_during_a_rebuild_disks_go_at_once_and_nothing_is_merged(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        for name in ("s1", "s2", "s3"):
            await at.snapshot(name)
        await at.call("RebuildingSet", pb.RebuildingSetRequest(rebuilding=True))
        await at.call("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name="s1"))
        await at.merged()
        assert image("s1") in (await at.call("ReplicaGet")).disks
        info = await at.call("DiskRemove", pb.DiskRemoveRequest(name=image("s2"), force=True))
        assert image("s2") not in info.disks
        assert info.disks[image("s3")].parent == image("s1")
        await at.call("RebuildingSet", pb.RebuildingSetRequest(rebuilding=False))
        await at.merged()
        assert set((await at.call("ReplicaGet")).disks) == {image("s3"), "volume-head-003.img"}


async def test_reload_takes_up_disks_that_were_put_beside_the_head(tmp_path: Path) -> None:
    path = tmp_path / "r"
    async with serve(path) as at:
        await at.open()
        await at.call("RebuildingSet", pb.RebuildingSetRequest(rebuilding=True))
        await at.opened.write(BLOCK, b"n" * BLOCK)
        # As a rebuild does: a snapshot's files arrive, then the head's record names it.
        with (path / image("s1")).open("wb") as file:
            file.write(b"o" * 2 * BLOCK)
            file.truncate(SIZE_BYTES)
        record = {"Name": "x", "Parent": "", "Removed": False, "Created": CREATED, "Labels": None}
        (path / f"{image('s1')}.meta").write_text(json.dumps(record))
        (path / "volume-head-000.img.meta").write_text(json.dumps(record | {"Parent": image("s1")}))
        info = await at.call("ReplicaReload")
        assert list(info.chain) == ["volume-head-000.img", image("s1")]
        assert info.state == "rebuilding"
        assert await at.opened.read(0, 2 * BLOCK) == b"o" * BLOCK + b"n" * BLOCK
    meta = peek(path)
    assert meta is not None
    assert meta.parent == image("s1")


async def test_a_reload_of_nonsense_leaves_the_replica_as_it_was(tmp_path: Path) -> None:
    async with serve(tmp_path / "r") as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
        (tmp_path / "r" / "volume-head-000.img.meta").write_text("{")
        assert "volume-head-000.img.meta" in await at.says("ReplicaReload")
        assert (await at.call("ReplicaGet")).state == "dirty"
        assert await at.opened.read(0, BLOCK) == b"a" * BLOCK


# ---- The directory.


async def test_opening_for_an_engine_names_nobody_stale(tmp_path: Path) -> None:
    """The generation of a set is its engine's; here are two of its members."""
    paths = [tmp_path / "a", tmp_path / "b"]
    await create_replicas("db", paths, SIZE_BYTES)
    async with serve(paths[0], create=False) as at:
        await at.open()
        await at.opened.write(0, b"a" * BLOCK)
    with ReplicaDirectory.open(paths[0]) as directory:
        assert directory.generation is not None
        assert directory.generation.counter == 1
        assert len(directory.generation.members) == 2


async def test_a_killed_process_is_found_by_the_next(tmp_path: Path) -> None:
    async with serve(tmp_path / "r"):
        pass
    ReplicaDirectory.open(tmp_path / "r").close(clean=False)
    async with open_engine(EngineOptions(queues=1, workers=1, driver="pool")) as engine:
        async with open_driven(engine, tmp_path / "r") as replica:
            assert replica.found.was_dirty
            assert replica.dirty
        async with open_driven(engine, tmp_path / "r") as replica:
            assert not replica.dirty


async def test_what_another_engine_writes_is_in_no_activity_log(tmp_path: Path) -> None:
    async with serve(tmp_path / "r"):
        pass
    with ReplicaDirectory.open(tmp_path / "r") as directory:
        directory.write_activity(b"a log")
        directory.close(clean=False)
    async with (
        open_engine(EngineOptions(queues=1, workers=1, driver="pool")) as engine,
        open_driven(engine, tmp_path / "r"),
    ):
        assert not (tmp_path / "r" / ACTIVITY_NAME).exists()


def test_peek_reads_without_changing_anything(tmp_path: Path) -> None:
    assert peek(tmp_path / "nothing") is None
    assert peek(tmp_path) is None
    (tmp_path / "volume.meta").write_text("[]")
    with pytest.raises(ReplicaDamaged):
        peek(tmp_path)
    with pytest.raises(ReplicaDamaged):
        peek(tmp_path / "volume.meta")
    assert [path.name for path in tmp_path.iterdir()] == ["volume.meta"]


# ---- Identity, addresses.


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"volume-name": ("db",), "instance-name": ("i",)},
        {"volume-name": ("db", "web")},
    ],
)
def test_callers_that_mean_this_replica_or_do_not_say_are_served(
    metadata: dict[str, tuple[str, ...]],
) -> None:
    check_identity("replica", "db", "i")(Call(method(REPLICA, "ReplicaGet"), metadata))


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"volume-name": "web"}, "incorrect volume name web; check replica address"),
        ({"instance-name": "j"}, "incorrect instance name j; check replica address"),
        (
            {"volume-name": "web", "instance-name": "j"},
            "incorrect volume name web; check replica address",
        ),
    ],
)
def test_callers_of_another_replica_are_refused(metadata: dict[str, str], text: str) -> None:
    call = Call(method(REPLICA, "ReplicaGet"), {key: (value,) for key, value in metadata.items()})
    check_identity("replica", "", "")(call)
    with pytest.raises(CallFailed) as caught:
        check_identity("replica", "db", "i")(call)
    assert (caught.value.code, str(caught.value)) == ("FAILED_PRECONDITION", text)


@pytest.mark.parametrize("value", [None, "", "relative", "/", "/dev", "/dev/shm"])
def test_a_control_path_that_cannot_be_meant_is_the_default(value: str | None) -> None:
    assert data_socket_path("db", value) == Path(
        "/host/var/lib/longhorn/unix-domain-socket/db.sock"
    )


def test_the_data_socket_lies_below_the_control_path() -> None:
    assert data_socket_path("db", "/srv/lh/") == Path("/host/srv/lh/unix-domain-socket/db.sock")
    with pytest.raises(UsageError):
        data_socket_path("", None)


async def test_a_size_no_volume_can_have_is_refused(tmp_path: Path) -> None:
    async with serve(tmp_path / "r", create=False) as at:
        with pytest.raises(SizeError):
            await at.replica.create(1000)
