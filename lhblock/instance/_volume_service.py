"""``lhblock.v1.VolumeService``: what Longhorn's controller service has no call for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields

from google.protobuf.empty_pb2 import Empty

from lhblock import __version__
from lhblock.engine import JobInfo, RebuildInfo, VolumeStatistics
from lhblock.errors import VolumeError
from lhblock.frontend.nbd import ClientInfo
from lhblock.instance._controller import Choice, check_revert_target, revert
from lhblock.instance._jobs import Job
from lhblock.instance._membership import add_replica, remove_replica, replica_place
from lhblock.instance._registry import Registry
from lhblock.instance._served import ServedVolume
from lhblock.rpc import Call, CallFailed, Handlers
from lhblock.rpc.generated import volume_pb2 as pb


class VolumeService:
    """The handlers. `handlers` is the table for `lhblock.rpc.serve_rpc`.

    Args:
      driver: name and reason of the I/O driver.
      clients: those connected to any volume of the process.
      registry: where it is recorded which replicas a volume has.
      serving: the volumes stay open, so that work in the background makes sense.
    """

    def __init__(
        self,
        choice: Choice,
        *,
        registry: Registry,
        serving: bool,
        driver: tuple[str, str],
        clients: Callable[[], Sequence[ClientInfo]],
    ) -> None:
        self._choice = choice
        self._driver = driver
        self._clients = clients
        self._registry = registry
        self._serving = serving

    @property
    def handlers(self) -> Handlers:
        return {
            "StatusGet": self.status_get,
            "SnapshotList": self.snapshot_list,
            "SnapshotRemove": self.snapshot_remove,
            "SnapshotRevert": self.snapshot_revert,
            "SnapshotHash": self.snapshot_hash,
            "MergeWait": self.merge_wait,
            "Scrub": self.scrub,
            "ReplicaAdd": self.replica_add,
            "ReplicaRemove": self.replica_remove,
            "ReplicaWait": self.replica_wait,
            "JobGet": self.job_get,
            "JobCancel": self.job_cancel,
        }

    async def status_get(self, _request: Empty, call: Call) -> pb.Status:
        served = self._choice.volume(call)
        volume = served.volume
        driver, reason = self._driver
        rebuilds = {item.address: _rebuild(item) for item in volume.rebuilds()}
        return pb.Status(
            name=served.name,
            size_bytes=volume.size_bytes,
            read_only=volume.read_only,
            cache=served.cache,
            state=volume.state,
            pid=os.getpid(),
            driver=driver,
            driver_reason=reason,
            uris=served.uris if served.frontend_up else (),
            replicas=[
                pb.Replica(
                    address=item.address,
                    mode=item.mode,
                    error=item.error,
                    generation=item.generation,
                    lag=item.lag,
                    rebuild=rebuilds.get(item.address),
                )
                for item in volume.replicas()
            ],
            statistics=_statistics(volume.statistics()),
            jobs=[*_merges(volume.jobs()), *served.jobs.messages()],
            merges_pending=_pending(served),
            history=[
                pb.Membership(
                    generation=entry.counter,
                    time=entry.time,
                    reason=entry.reason,
                    members=len(entry.members),
                    left=len(entry.left),
                )
                for entry in volume.history
            ],
            version=__version__,
            clients=[
                pb.Client(
                    peer=client.peer,
                    export=client.export,
                    since=client.since.strftime("%Y-%m-%dT%H:%M:%SZ"),
                )
                for client in self._clients()
                if client.export.partition("@")[0] == served.name
            ],
        )

    async def snapshot_list(self, _request: Empty, call: Call) -> pb.SnapshotListReply:
        served = self._choice.volume(call)
        await served.volume.measure()
        return pb.SnapshotListReply(
            snapshots=[
                pb.Snapshot(
                    name=item.name,
                    parent=item.parent,
                    children=item.children,
                    created=item.created,
                    removed=item.removed,
                    user_created=item.user_created,
                    labels=dict(item.labels),
                    size_bytes=item.size_bytes,
                    allocated_bytes=item.allocated_bytes,
                )
                for item in (*served.volume.snapshots(), served.volume.head())
            ],
            merges_pending=_pending(served),
            volume_bytes=served.volume.size_bytes,
        )

    async def snapshot_remove(self, request: pb.SnapshotRemoveRequest, call: Call) -> Empty:
        served = self._choice.volume(call)
        try:
            await served.volume.remove_snapshot(request.name)
        except VolumeError as error:
            raise CallFailed("UNKNOWN", error.sentence) from error
        return Empty()

    async def snapshot_revert(self, request: pb.SnapshotRevertRequest, call: Call) -> Empty:
        served = self._choice.volume(call)
        check_revert_target(served, request.name)
        await revert(served, request.name)
        return Empty()

    async def snapshot_hash(self, request: pb.SnapshotHashRequest, call: Call) -> pb.Job:
        served = self._choice.volume(call)
        _snapshot(served, request.name)

        async def work(message: pb.Job) -> None:
            await served.volume.hash_snapshot(request.name, rehash=request.rehash)
            for address, value in (await served.volume.checksums(request.name)).items():
                message.checksums.add(
                    replica=address, snapshot=request.name, method="crc64", value=value
                )

        return served.jobs.start("hash", request.name, work).message

    async def merge_wait(self, _request: Empty, call: Call) -> pb.Job:
        served = self._choice.volume(call)

        async def work(_message: pb.Job) -> None:
            await served.volume.wait_merged()

        return served.jobs.start("merge", "", work).message

    async def scrub(self, _request: Empty, call: Call) -> pb.Job:
        served = self._choice.volume(call)

        async def work(message: pb.Job) -> None:
            report = await served.volume.scrub()
            message.verified = report.verified
            message.without_record = report.without_record
            for item in report.mismatches:
                message.mismatches.add(
                    replica=item.replica,
                    snapshot=item.snapshot,
                    expected=item.expected,
                    found=item.found,
                    repaired_from=item.repaired_from,
                )

        return served.jobs.start("scrub", "", work).message

    async def replica_add(self, request: pb.ReplicaAddRequest, call: Call) -> Empty:
        served = self._choice.volume(call)
        await add_replica(
            self._registry,
            served,
            replica_place(request.address),
            force=request.force,
            rebuild=self._serving or request.rebuild,
        )
        return Empty()

    async def replica_remove(self, request: pb.ReplicaRemoveRequest, call: Call) -> Empty:
        served = self._choice.volume(call)
        await remove_replica(self._registry, served, replica_place(request.address))
        return Empty()

    async def replica_wait(self, request: pb.ReplicaWaitRequest, call: Call) -> pb.Job:
        served = self._choice.volume(call)
        place = replica_place(request.address)

        async def work(_message: pb.Job) -> None:
            await served.volume.wait_rebuilt(place)

        return served.jobs.start("rebuild", request.address, work).message

    async def job_get(self, request: pb.JobGetRequest, call: Call) -> pb.Job:
        return self._job(self._choice.volume(call), request.id).message

    async def job_cancel(self, request: pb.JobGetRequest, call: Call) -> pb.Job:
        job = self._job(self._choice.volume(call), request.id)
        job.scope.cancel()
        await job.finished.wait()
        return job.message

    def _job(self, served: ServedVolume, job_id: str) -> Job:
        try:
            return served.jobs.get(job_id)
        except KeyError as error:
            raise CallFailed(
                "NOT_FOUND", f"cannot find job {job_id}; it may be forgotten"
            ) from error


def _rebuild(info: RebuildInfo) -> pb.Rebuild:
    return pb.Rebuild(
        phase=info.phase,
        source=info.source,
        done_bytes=info.done_bytes,
        total_bytes=info.total_bytes,
        rate_bytes_s=info.rate_bytes_s,
        left_s=info.left_s or 0.0,
        attempts=info.attempts,
        error=info.error,
        compares=info.compares,
        why=info.why,
    )


def _snapshot(served: ServedVolume, name: str) -> None:
    if not any(item.name == name for item in served.volume.snapshots()):
        raise CallFailed("NOT_FOUND", f"cannot find snapshot {name}")


def _pending(served: ServedVolume) -> int:
    if served.volume.state == "faulted":
        return 0
    return sum(item.removed for item in served.volume.snapshots())


def _statistics(statistics: VolumeStatistics) -> pb.Statistics:
    known = pb.Statistics.DESCRIPTOR.fields_by_name
    values = {
        item.name: getattr(statistics.io, item.name)
        for item in fields(statistics.io)
        if item.name in known
    }
    return pb.Statistics(**values)


def _merges(jobs: Sequence[JobInfo]) -> list[pb.Job]:
    return [
        pb.Job(
            kind=job.kind,
            subject=job.snapshot,
            replica=job.replica,
            state="running",
            done_bytes=job.done_bytes,
            total_bytes=job.total_bytes,
        )
        for job in jobs
    ]
