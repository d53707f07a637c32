"""The control services over a real volume: Longhorn's behaviours and texts, and our own calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from lhblock.engine import EngineOptions, open_engine
from lhblock.errors import LhblockError
from lhblock.instance import Registry, create_volume
from lhblock.instance._controller import Choice, ControllerService
from lhblock.instance._served import ServedVolume, open_served
from lhblock.instance._volume_service import VolumeService
from lhblock.rpc import CONTROLLER, VOLUME, Call, CallFailed, method
from lhblock.rpc.generated import controller_pb2 as pb
from lhblock.rpc.generated import volume_pb2
from lhblock.settings import DataDir

SIZE_BYTES = 1 << 20
TIMEOUT_S = 60.0


@dataclass
class Services:
    """Both services over open volumes, called as the server would."""

    registry: Registry
    volumes: dict[str, ServedVolume]
    choice: Choice

    async def call(self, name: str, request: Any = None, *, volume: str = "") -> Any:
        tables = {
            CONTROLLER: ControllerService(self.choice, self.registry).handlers,
            VOLUME: VolumeService(
                self.choice,
                registry=self.registry,
                serving=True,
                driver=("pool", "forced by a setting"),
                clients=tuple,
            ).handlers,
        }
        service = CONTROLLER if name in tables[CONTROLLER] else VOLUME
        metadata = {"volume-name": (volume,)} if volume else {}
        call = Call(method(service, name), metadata)
        self.choice.check(call)
        with trio.fail_after(TIMEOUT_S):
            return await tables[service][name](request or Empty(), call)

    async def refused(self, name: str, request: Any = None, *, volume: str = "") -> tuple[str, str]:
        with pytest.raises((CallFailed, LhblockError)) as caught:
            await self.call(name, request, volume=volume)
        return getattr(caught.value, "code", "UNKNOWN"), str(caught.value)

    async def finish(self, job: volume_pb2.Job) -> Any:
        served = self.volumes["db"]
        with trio.fail_after(TIMEOUT_S):
            await served.jobs.get(job.id).finished.wait()
        return await self.call("JobGet", volume_pb2.JobGetRequest(id=job.id))


@asynccontextmanager
async def services(
    tmp_path: Path, *names: str, replicas: int = 1, read_only: bool = False
) -> AsyncIterator[Services]:
    where = DataDir(tmp_path / "data")
    registry = Registry(where)
    volumes: dict[str, ServedVolume] = {}
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            open_engine(EngineOptions(queues=1, workers=2, driver="pool"))
        )
        for name in names or ("db",):
            record = await create_volume(
                registry,
                name,
                size_bytes=SIZE_BYTES,
                replicas=[tmp_path / f"{name}{index}" for index in range(replicas)],
            )
            volumes[name] = await stack.enter_async_context(
                open_served(engine, record, read_only=read_only)
            )
        yield Services(registry, volumes, Choice(volumes))


async def test_the_only_volume_needs_no_name(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        assert (await at.call("VolumeGet")).name == "db"
        assert (await at.call("VolumeGet", volume="db")).name == "db"


async def test_a_wrong_volume_name_is_refused_in_longhorns_words(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        assert await at.refused("VolumeGet", volume="web") == (
            "FAILED_PRECONDITION",
            "incorrect volume name web; check controller address",
        )


async def test_several_volumes_need_a_name(tmp_path: Path) -> None:
    async with services(tmp_path, "db", "web") as at:
        code, sentence = await at.refused("VolumeGet")
        assert code == "FAILED_PRECONDITION"
        assert "db, web" in sentence
        assert (await at.call("VolumeGet", volume="web")).name == "web"


async def test_the_status_of_a_volume_that_failed_says_why(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        at.volumes["db"].volume._replicas.fault("its disk is gone")
        status = await at.call("StatusGet")
        assert (status.state, status.merges_pending) == ("faulted", 0)
        assert [(item.mode, item.error) for item in status.replicas] == [
            ("ERR", "its disk is gone")
        ]
        assert (await at.call("VolumeGet")).frontendState == ""


async def test_changes_of_the_record_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        for count in range(2, 12):
            size_bytes = count << 24
            async with trio.open_nursery() as nursery:
                for name, request in (
                    ("VolumeSnapshotMaxCountSet", pb.VolumeSnapshotMaxCountSetRequest(count=count)),
                    (
                        "VolumeSnapshotMaxSizeSet",
                        pb.VolumeSnapshotMaxSizeSetRequest(size=size_bytes),
                    ),
                ):
                    nursery.start_soon(at.call, name, request)
            served = at.volumes["db"]
            assert served.volume.limits.count_max == count
            assert served.volume.limits.size_bytes_max == size_bytes
            assert served.record == at.registry.get("db")
            assert served.record.snapshot_count_max == count
            assert served.record.snapshot_bytes_max == size_bytes


async def test_volume_get_describes_the_volume(tmp_path: Path) -> None:
    async with services(tmp_path, replicas=3) as at:
        at.volumes["db"].addresses = ("nbd://127.0.0.1/db",)
        assert await at.call("VolumeGet") == pb.Volume(
            name="db", size=SIZE_BYTES, replicaCount=3, snapshot_max_count=250
        )
        up = await at.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="nbd"))
        assert (up.frontend, up.frontendState, up.endpoint) == ("nbd", "up", "nbd://127.0.0.1/db")
        down = await at.call("VolumeFrontendShutdown")
        assert (down.frontend, down.frontendState, down.endpoint) == ("nbd", "down", "")


async def test_front_ends_that_cannot_be_started(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        for name, sentence in (
            ("", "cannot start empty frontend"),
            ("rest", "failed to find frontend: rest: unsupported frontend type: rest"),
        ):
            request = pb.VolumeFrontendStartRequest(frontend=name)
            assert await at.refused("VolumeFrontendStart", request) == ("UNKNOWN", sentence)
        await at.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="nbd"))
        request = pb.VolumeFrontendStartRequest(frontend="tgt-iscsi")
        assert await at.refused("VolumeFrontendStart", request) == (
            "UNKNOWN",
            "frontend nbd is already started, cannot be set as tgt-iscsi",
        )


async def test_a_snapshot_without_a_name_gets_a_uuid(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        made = await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(labels={"a": "b"}))
        assert len(made.name) == 36
        (snapshot, head) = (await at.call("SnapshotList")).snapshots
        assert (snapshot.name, dict(snapshot.labels)) == (made.name, {"a": "b"})
        assert snapshot.user_created
        assert (head.name, head.parent) == ("volume-head", made.name)


async def test_a_taken_snapshot_name_matches_what_longhorns_clients_look_for(
    tmp_path: Path,
) -> None:
    async with services(tmp_path) as at:
        request = pb.VolumeSnapshotRequest(name="s1")
        await at.call("VolumeSnapshot", request)
        assert await at.refused("VolumeSnapshot", request) == (
            "UNKNOWN",
            "snapshot s1 is already existing",
        )


async def test_a_snapshot_name_that_cannot_be_makes_nothing(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        _, sentence = await at.refused("VolumeSnapshot", pb.VolumeSnapshotRequest(name="a/b"))
        assert "invalid snapshot name 'a/b'" in sentence
        assert len((await at.call("SnapshotList")).snapshots) == 1


async def test_the_count_limit_is_set_checked_and_kept(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        for name in ("s1", "s2"):
            await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name=name))
        _, sentence = await at.refused(
            "VolumeSnapshotMaxCountSet", pb.VolumeSnapshotMaxCountSetRequest(count=1)
        )
        assert sentence.startswith(
            "cannot set snapshotMaxCount=1 smaller than current snapshot count usage=2"
        )
        volume = await at.call(
            "VolumeSnapshotMaxCountSet", pb.VolumeSnapshotMaxCountSetRequest(count=2)
        )
        assert volume.snapshot_max_count == 2
        _, sentence = await at.refused("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s3"))
        assert sentence.startswith(
            "snapshot count usage 2 is equal or larger than snapshotMaxCount 2"
        )
        assert at.registry.get("db").snapshot_count_max == 2


async def test_revert_wants_the_front_end_down_and_the_snapshot_there(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        served = at.volumes["db"]
        await served.volume.write(0, b"old" * 100)
        await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s1"))
        await served.volume.write(0, b"new" * 100)
        await at.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="nbd"))
        assert await at.refused("VolumeRevert", pb.VolumeRevertRequest(name="s9")) == (
            "UNKNOWN",
            "cannot do revert since the target snapshot s9 is not found",
        )
        request = pb.VolumeRevertRequest(name="s1")
        assert await at.refused("VolumeRevert", request) == (
            "UNKNOWN",
            "volume frontend enabled, aborting snapshot revert",
        )
        await at.call("VolumeFrontendShutdown")
        await at.call("VolumeRevert", request)
        assert await served.volume.read(0, 3) == b"old"


async def test_our_revert_works_with_the_front_end_up(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        served = at.volumes["db"]
        served.frontend, served.frontend_up = "nbd", True
        await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s1"))
        await served.volume.write(0, b"new")
        await at.call("SnapshotRevert", volume_pb2.SnapshotRevertRequest(name="s1"))
        assert await served.volume.read(0, 3) == bytes(3)
        assert not served.reverting


async def test_expansion_runs_behind_the_call_and_is_recorded(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        for size, sentence in (
            (SIZE_BYTES + 1, "not multiple of volume sector size 4096"),
            (SIZE_BYTES // 2, f"cannot be expanded to a smaller size {SIZE_BYTES // 2}"),
        ):
            _, said = await at.refused("VolumeExpand", pb.VolumeExpandRequest(size=size))
            assert said.endswith(sentence)
        request = pb.VolumeExpandRequest(size=2 * SIZE_BYTES)
        assert (await at.call("VolumeExpand", request)).isExpanding
        assert await at.refused("VolumeExpand", request) == (
            "UNKNOWN",
            "controller expansion is in progress",
        )
        with trio.fail_after(TIMEOUT_S):
            while (await at.call("VolumeGet")).isExpanding:
                await trio.lowlevel.checkpoint()
        assert (await at.call("VolumeGet")).size == 2 * SIZE_BYTES
        assert at.registry.get("db").size_bytes == 2 * SIZE_BYTES


async def test_a_failed_expansion_is_told_afterwards(tmp_path: Path) -> None:
    async with services(tmp_path, read_only=False) as at:
        size = 1 << 51  # more than the engine allows
        assert (await at.call("VolumeExpand", pb.VolumeExpandRequest(size=size))).isExpanding
        with trio.fail_after(TIMEOUT_S):
            while (volume := await at.call("VolumeGet")).isExpanding:
                await trio.lowlevel.checkpoint()
        assert str(size) in volume.last_expansion_error
        assert volume.last_expansion_failed_at.endswith("Z")
        assert volume.size == SIZE_BYTES


async def test_replicas_are_listed_in_order_and_found_by_their_address(tmp_path: Path) -> None:
    async with services(tmp_path, replicas=2) as at:
        replicas = (await at.call("ReplicaList")).replicas
        assert [item.address.address for item in replicas] == [
            str(tmp_path / "db0"),
            str(tmp_path / "db1"),
        ]
        assert {item.mode for item in replicas} == {pb.RW}
        assert await at.call("ReplicaGet", replicas[1].address) == replicas[1]
        assert await at.refused("ReplicaGet", pb.ReplicaAddress(address="/x")) == (
            "NOT_FOUND",
            "cannot find the replica with address /x in the controller server of volume db",
        )


async def test_the_rebuild_limit_is_a_positive_number(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        assert (await at.call("ReplicaRebuildConcurrentSyncLimitGet")).limit == 1
        request = pb.ReplicaRebuildConcurrentSyncLimitSetRequest(limit=5)
        await at.call("ReplicaRebuildConcurrentSyncLimitSet", request)
        assert (await at.call("ReplicaRebuildConcurrentSyncLimitGet")).limit == 5
        request = pb.ReplicaRebuildConcurrentSyncLimitSetRequest(limit=0)
        assert await at.refused("ReplicaRebuildConcurrentSyncLimitSet", request) == (
            "UNKNOWN",
            "invalid concurrent sync limit 0, which should be a positive integer",
        )


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("VolumeShutdown", Empty()),
        ("VolumeStart", pb.VolumeStartRequest()),
        ("JournalList", pb.JournalListRequest()),
        (
            "VolumeUnmapMarkSnapChainRemovedSet",
            pb.VolumeUnmapMarkSnapChainRemovedSetRequest(enabled=True),
        ),
    ],
)
async def test_what_an_embedded_volume_lacks_says_so(
    tmp_path: Path, name: str, request_: Any
) -> None:
    async with services(tmp_path) as at:
        code, sentence = await at.refused(name, request_)
        assert code == "UNIMPLEMENTED"
        assert len(sentence.split()) > 6


async def test_versions_are_those_longhorn_checks(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        version = (await at.call("VersionDetailGet")).version
        assert (version.controllerAPIVersion, version.controllerAPIMinVersion) == (6, 4)
        assert (version.cliAPIVersion, version.dataFormatVersion) == (12, 1)


async def test_status_counts_what_was_done(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        await at.volumes["db"].volume.write(4096, bytes(8192))
        status = await at.call("StatusGet")
        assert (status.state, status.statistics.writes) == ("healthy", 1)
        assert status.statistics.write_bytes == 8192
        assert (await at.call("MetricsGet")).metrics == pb.Metrics()


async def test_a_removed_snapshot_goes_away_behind_the_call(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s1"))
        await at.call("SnapshotRemove", volume_pb2.SnapshotRemoveRequest(name="s1"))
        job = await at.finish(await at.call("MergeWait"))
        assert (job.state, job.error) == ("complete", "")
        (head,) = (await at.call("SnapshotList")).snapshots
        assert head.name == "volume-head"


async def test_hash_and_scrub_find_a_damaged_replica(tmp_path: Path) -> None:
    async with services(tmp_path, replicas=2) as at:
        await at.volumes["db"].volume.write(0, b"x" * 4096)
        await at.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s1"))
        job = await at.finish(
            await at.call("SnapshotHash", volume_pb2.SnapshotHashRequest(name="s1"))
        )
        assert job.state == "complete", job.error
        assert len(job.checksums) == 2
        assert len({item.value for item in job.checksums}) == 1
        report = await at.finish(await at.call("Scrub"))
        assert (report.state, report.verified, len(report.mismatches)) == ("complete", 2, 0)


async def test_hashing_what_is_not_there_is_refused(tmp_path: Path) -> None:
    async with services(tmp_path) as at:
        request = volume_pb2.SnapshotHashRequest(name="s9")
        assert await at.refused("SnapshotHash", request) == (
            "NOT_FOUND",
            "cannot find snapshot s9",
        )
        request2 = volume_pb2.JobGetRequest(id="nope")
        assert (await at.refused("JobGet", request2))[0] == "NOT_FOUND"
