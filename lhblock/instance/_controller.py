"""``ptypes.ControllerService`` for the volumes of this process: Longhorn's calls, our engine.

The message texts are those Longhorn's clients match; what an embedded volume lacks (remote
replicas, rebuilds) answers UNIMPLEMENTED with a sentence.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, NoReturn

import trio
from google.protobuf.empty_pb2 import Empty

from lhblock import __version__
from lhblock.errors import (
    SnapshotExists,
    VolumeBusy,
    VolumeError,
)
from lhblock.instance._registry import Registry
from lhblock.instance._served import ServedVolume, no_new_clients
from lhblock.rpc import Call, CallFailed, Handler, Handlers
from lhblock.rpc.generated import controller_pb2 as pb
from lhblock.settings import BLOCK_BYTES, check_snapshot_name

VERSIONS: dict[str, Any] = {
    "cliAPIVersion": 12,
    "cliAPIMinVersion": 8,
    "controllerAPIVersion": 6,
    "controllerAPIMinVersion": 4,
    "dataFormatVersion": 1,
    "dataFormatMinVersion": 1,
}

_EMBEDDED = (
    "the replicas of this volume are directories of the serving process, which cannot {what};"
    " use a controller with remote replicas"
)
_LACKING = {
    "VolumeStart": "start with other replicas",
    "VolumeShutdown": "close them and go on; stop the process with SIGTERM",
    "ControllerReplicaCreate": "add replicas",
    "ReplicaDelete": "remove replicas",
    "ReplicaUpdate": "change their mode",
    "ReplicaPrepareRebuild": "rebuild",
    "ReplicaVerifyRebuild": "rebuild",
}
_COUNT_MAX_DEFAULT = 250


class Choice:
    """Which of the served volumes a call means."""

    def __init__(self, volumes: Mapping[str, ServedVolume]) -> None:
        self._volumes = volumes

    def check(self, call: Call) -> None:
        """Refuse a call that names a volume this process does not serve."""
        sent = call.value("volume-name")
        if sent and sent not in self._volumes:
            raise CallFailed(
                "FAILED_PRECONDITION", f"incorrect volume name {sent}; check controller address"
            )

    def volume(self, call: Call) -> ServedVolume:
        """Return the volume the metadata names; without a name, the only one."""
        sent = call.value("volume-name")
        if sent:
            return self._volumes[sent]
        if len(self._volumes) == 1:
            return next(iter(self._volumes.values()))
        names = ", ".join(sorted(self._volumes))
        raise CallFailed(
            "FAILED_PRECONDITION",
            f"this process serves {len(self._volumes)} volumes ({names}): send the name of one"
            " as metadata volume-name",
        )


class ControllerService:
    """The handlers. `handlers` is the table for `lhblock.rpc.serve_rpc`."""

    def __init__(self, choice: Choice, registry: Registry) -> None:
        self._choice = choice
        self._registry = registry

    @property
    def handlers(self) -> Handlers:
        served: dict[str, Handler] = {
            "VolumeGet": self.volume_get,
            "VolumeSnapshot": self.volume_snapshot,
            "VolumeRevert": self.volume_revert,
            "VolumeExpand": self.volume_expand,
            "VolumeFrontendStart": self.frontend_start,
            "VolumeFrontendShutdown": self.frontend_shutdown,
            "VolumeUnmapMarkSnapChainRemovedSet": self.unmap_mark_set,
            "VolumeSnapshotMaxCountSet": self.max_count_set,
            "VolumeSnapshotMaxSizeSet": self.max_size_set,
            "ReplicaList": self.replica_list,
            "ReplicaGet": self.replica_get,
            "ReplicaRebuildConcurrentSyncLimitSet": self.sync_limit_set,
            "ReplicaRebuildConcurrentSyncLimitGet": self.sync_limit_get,
            "VersionDetailGet": self.version_get,
            "MetricsGet": self.metrics_get,
        }
        return served | dict.fromkeys(_LACKING, self._lacking) | {"JournalList": self._journal}

    async def volume_get(self, _request: Empty, call: Call) -> pb.Volume:
        return self._describe(self._choice.volume(call))

    async def volume_snapshot(
        self, request: pb.VolumeSnapshotRequest, call: Call
    ) -> pb.VolumeSnapshotReply:
        served = self._choice.volume(call)
        name = check_snapshot_name(request.name) if request.name else str(uuid.uuid4())
        try:
            made = await served.volume.create_snapshot(
                name, labels=dict(request.labels), user_created=True
            )
        except SnapshotExists as error:
            raise CallFailed("UNKNOWN", f"snapshot {name} is already existing") from error
        except VolumeError as error:
            raise CallFailed("UNKNOWN", error.sentence) from error
        return pb.VolumeSnapshotReply(name=made)

    async def volume_revert(self, request: pb.VolumeRevertRequest, call: Call) -> pb.Volume:
        served = self._choice.volume(call)
        if served.volume.state == "faulted":
            raise CallFailed(
                "UNKNOWN",
                "not valid state to revert, rebuilding in process or all replica are in ERR state",
            )
        check_revert_target(served, request.name)
        if served.frontend_up:
            raise CallFailed("UNKNOWN", "volume frontend enabled, aborting snapshot revert")
        await revert(served, request.name)
        return self._describe(served)

    async def volume_expand(self, request: pb.VolumeExpandRequest, call: Call) -> pb.Volume:
        served = self._choice.volume(call)
        size_bytes = served.volume.size_bytes
        if served.expansion.running:
            raise CallFailed("UNKNOWN", "controller expansion is in progress")
        if request.size % BLOCK_BYTES:
            raise CallFailed(
                "UNKNOWN",
                f"requested expansion size {request.size} not multiple of volume sector size"
                f" {BLOCK_BYTES}",
            )
        if request.size < size_bytes:
            raise CallFailed(
                "UNKNOWN", f"controller cannot be expanded to a smaller size {request.size}"
            )
        if request.size > size_bytes:
            served.start_expansion(self._registry, request.size)
        return self._describe(served)

    async def frontend_start(self, request: pb.VolumeFrontendStartRequest, call: Call) -> pb.Volume:
        served = self._choice.volume(call)
        name = request.frontend
        if served.expansion.running:
            raise CallFailed("UNKNOWN", "cannot start frontend during the engine expansion")
        if not name:
            raise CallFailed("UNKNOWN", "cannot start empty frontend")
        if served.frontend_up and name != served.frontend:
            raise CallFailed(
                "UNKNOWN",
                f"frontend {served.frontend} is already started, cannot be set as {name}",
            )
        if name not in served.frontends:
            raise CallFailed(
                "UNKNOWN", f"failed to find frontend: {name}: unsupported frontend type: {name}"
            )
        served.frontend, served.frontend_up = name, True
        return self._describe(served)

    async def frontend_shutdown(self, _request: Empty, call: Call) -> pb.Volume:
        served = self._choice.volume(call)
        served.frontend_up = False
        await served.wait_idle()
        return self._describe(served)

    async def unmap_mark_set(
        self, request: pb.VolumeUnmapMarkSnapChainRemovedSetRequest, call: Call
    ) -> pb.Volume:
        served = self._choice.volume(call)
        if request.enabled:
            raise CallFailed(
                "UNIMPLEMENTED",
                "discards here never mark snapshots as removed: they give back the space of the"
                " head and leave every snapshot as it is",
            )
        return self._describe(served)

    async def max_count_set(
        self, request: pb.VolumeSnapshotMaxCountSetRequest, call: Call
    ) -> pb.Volume:
        served = self._choice.volume(call)
        count = request.count or _COUNT_MAX_DEFAULT
        await self._set_limits(served, snapshot_count_max=count)
        return self._describe(served)

    async def max_size_set(
        self, request: pb.VolumeSnapshotMaxSizeSetRequest, call: Call
    ) -> pb.Volume:
        served = self._choice.volume(call)
        await self._set_limits(served, snapshot_bytes_max=request.size)
        return self._describe(served)

    async def replica_list(self, _request: Empty, call: Call) -> pb.ReplicaListReply:
        replicas = self._choice.volume(call).volume.replicas()
        return pb.ReplicaListReply(
            replicas=[_replica(item.address, item.mode) for item in replicas]
        )

    async def replica_get(self, request: pb.ReplicaAddress, call: Call) -> pb.ControllerReplica:
        served = self._choice.volume(call)
        for replica in served.volume.replicas():
            if replica.address == request.address:
                return _replica(replica.address, replica.mode)
        raise CallFailed(
            "NOT_FOUND",
            f"cannot find the replica with address {request.address} in the controller server of"
            f" volume {served.name}",
        )

    async def sync_limit_set(
        self, request: pb.ReplicaRebuildConcurrentSyncLimitSetRequest, call: Call
    ) -> Empty:
        served = self._choice.volume(call)
        if request.limit <= 0:
            raise CallFailed(
                "UNKNOWN",
                f"invalid concurrent sync limit {request.limit}, which should be a positive"
                " integer",
            )
        served.rebuild_sync_limit = request.limit
        return Empty()

    async def sync_limit_get(
        self, _request: Empty, call: Call
    ) -> pb.ReplicaRebuildConcurrentSyncLimitGetReply:
        limit = self._choice.volume(call).rebuild_sync_limit
        return pb.ReplicaRebuildConcurrentSyncLimitGetReply(limit=limit)

    async def version_get(self, _request: Empty, _call: Call) -> pb.VersionDetailGetReply:
        version = pb.VersionOutput(version=__version__, **VERSIONS)
        return pb.VersionDetailGetReply(version=version)

    async def metrics_get(self, _request: Empty, call: Call) -> pb.MetricsGetReply:
        metrics = self._choice.volume(call).volume.metrics()
        return pb.MetricsGetReply(
            metrics=pb.Metrics(
                readThroughput=round(metrics.read_bytes_s),
                writeThroughput=round(metrics.write_bytes_s),
                readLatency=metrics.read_latency_ns,
                writeLatency=metrics.write_latency_ns,
                readIOPS=round(metrics.read_iops),
                writeIOPS=round(metrics.write_iops),
            )
        )

    async def _lacking(self, _request: Any, call: Call) -> NoReturn:
        what = _LACKING[call.method.name]
        raise CallFailed("UNIMPLEMENTED", _EMBEDDED.format(what=what))

    async def _journal(self, _request: Any, _call: Call) -> NoReturn:
        raise CallFailed(
            "UNIMPLEMENTED", "no journal of I/O is kept; MetricsGet and StatusGet have the figures"
        )

    async def _set_limits(self, served: ServedVolume, **changes: int) -> None:
        async with served.recording:
            record = served.record
            count = changes.get("snapshot_count_max", record.snapshot_count_max)
            size = changes.get("snapshot_bytes_max", record.snapshot_bytes_max)
            try:
                await served.volume.set_limits(snapshot_max_count=count, snapshot_max_size=size)
            except VolumeError as error:
                raise CallFailed("UNKNOWN", error.sentence) from error
            served.record = await trio.to_thread.run_sync(
                lambda: self._registry.update(served.name, **changes)
            )

    def _describe(self, served: ServedVolume) -> pb.Volume:
        volume = served.volume
        state = "" if not served.frontend else "up" if served.frontend_up else "down"
        return pb.Volume(
            name=served.name,
            size=volume.size_bytes,
            replicaCount=len(volume.replicas()),
            endpoint=served.uris[0] if served.frontend_up and served.uris else "",
            frontend=served.frontend,
            frontendState=state,
            isExpanding=served.expansion.running,
            last_expansion_error=served.expansion.error,
            last_expansion_failed_at=served.expansion.failed_at,
            snapshot_max_count=served.record.snapshot_count_max,
            snapshot_max_size=served.record.snapshot_bytes_max,
        )


def check_revert_target(served: ServedVolume, name: str) -> None:
    """Refuse a snapshot that cannot be reverted to, in Longhorn's words."""
    for snapshot in served.volume.snapshots():
        if snapshot.name == name and name != "volume-head":
            if snapshot.removed:
                raise CallFailed("UNKNOWN", f"cannot revert to removed snapshot {name}")
            return
    raise CallFailed("UNKNOWN", f"cannot do revert since the target snapshot {name} is not found")


async def revert(served: ServedVolume, name: str) -> None:
    """Revert with new clients kept out.

    Raises:
      CallFailed: FAILED_PRECONDITION while clients are connected.
    """
    with no_new_clients(served):
        try:
            await served.volume.revert_snapshot(name)
        except VolumeBusy as error:
            raise CallFailed("FAILED_PRECONDITION", error.sentence) from error
        except VolumeError as error:
            raise CallFailed("UNKNOWN", error.sentence) from error


def _replica(address: str, mode: str) -> pb.ControllerReplica:
    return pb.ControllerReplica(address=pb.ReplicaAddress(address=address), mode=mode)
