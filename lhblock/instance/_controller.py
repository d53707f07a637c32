"""``ptypes.ControllerService`` for the volumes of this process: Longhorn's calls, our engine.

The message texts are those Longhorn's clients match. In a controller process, which has a
`VolumeHost`, everything works; what a serving process lacks answers UNIMPLEMENTED with a sentence.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import trio
from google.protobuf.empty_pb2 import Empty

from lhblock import __version__
from lhblock.errors import (
    LhblockError,
    SnapshotExists,
    VolumeBusy,
    VolumeError,
)
from lhblock.instance._membership import (
    add_replica,
    remove_replica,
    replica_place,
    sentences,
)
from lhblock.instance._registry import Registry
from lhblock.instance._served import ServedVolume, no_new_clients
from lhblock.rpc import Call, CallFailed, Handlers
from lhblock.rpc.generated import controller_pb2 as pb
from lhblock.settings import BLOCK_BYTES, check_snapshot_name

if TYPE_CHECKING:
    from lhblock.instance._volume_host import VolumeHost

VERSIONS: dict[str, Any] = {
    "cliAPIVersion": 12,
    "cliAPIMinVersion": 8,
    "controllerAPIVersion": 6,
    "controllerAPIMinVersion": 4,
    "dataFormatVersion": 1,
    "dataFormatMinVersion": 1,
}

_EMBEDDED = (
    "this process serves its volumes from its start to its end and cannot {what}; use"
    " 'lhblock controller'"
)
_HOSTED = {
    "VolumeStart": "start one with other replicas",
    "VolumeShutdown": "close one and go on; stop the process with SIGTERM",
}
_COUNT_MAX_DEFAULT = 250


class Choice:
    """Which of the served volumes a call means.

    Args:
      host: the volume that may be closed now, of a controller.
    """

    def __init__(self, volumes: Mapping[str, ServedVolume], host: VolumeHost | None = None) -> None:
        self._volumes = volumes
        self._host = host

    def check(self, call: Call) -> None:
        """Refuse a call that names a volume this process does not serve."""
        sent = call.value("volume-name")
        if sent and sent not in self._volumes:
            raise CallFailed(
                "FAILED_PRECONDITION", f"incorrect volume name {sent}; check controller address"
            )

    def volume(self, call: Call) -> ServedVolume:
        """Return the volume the metadata names; without a name, the only one.

        Raises:
          CallFailed: a controller's volume is closed, or there are several and none was named.
        """
        if self._host is not None:
            if self._host.served is None:
                raise CallFailed(
                    "UNKNOWN",
                    f"volume {self._host.name} is stopped: it has no replicas until VolumeStart"
                    " or ControllerReplicaCreate names some",
                )
            return self._host.served
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
    """The handlers. `handlers` is the table for `lhblock.rpc.serve_rpc`.

    Args:
      host: starts and stops the volume of a controller.
    """

    def __init__(self, choice: Choice, registry: Registry, host: VolumeHost | None = None) -> None:
        self._choice = choice
        self._registry = registry
        self._host = host

    @property
    def handlers(self) -> Handlers:
        return {
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
            "VolumeStart": self.volume_start,
            "VolumeShutdown": self.volume_shutdown,
            "ControllerReplicaCreate": self.replica_create,
            "ReplicaDelete": self.replica_delete,
            "ReplicaUpdate": self.replica_update,
            "ReplicaPrepareRebuild": self.prepare_rebuild,
            "ReplicaVerifyRebuild": self.verify_rebuild,
            "JournalList": self._journal,
        }

    async def volume_get(self, _request: Empty, call: Call) -> pb.Volume:
        if (host := self._closed_host) is not None:
            return self._describe_closed(host)
        return self._describe(self._choice.volume(call))

    async def volume_start(self, request: pb.VolumeStartRequest, call: Call) -> pb.Volume:
        host = self._hosted(call)
        if request.replicaAddresses and host.served is None:
            try:
                await host.start(request.replicaAddresses, request.currentSize or request.size)
            except LhblockError as error:
                raise CallFailed("UNKNOWN", no_backend(request.replicaAddresses, error)) from error
        return await self.volume_get(Empty(), call)

    async def volume_shutdown(self, _request: Empty, call: Call) -> pb.Volume:
        host = self._hosted(call)
        await host.shutdown()
        return self._describe_closed(host)

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
        name = request.frontend
        if name and (host := self._closed_host) is not None:
            # Kept until there is a volume to offer.
            self._check_frontend(name, host.frontends)
            host.frontend = name
            return self._describe_closed(host)
        served = self._choice.volume(call)
        if served.expansion.running:
            raise CallFailed("UNKNOWN", "cannot start frontend during the engine expansion")
        if not name:
            raise CallFailed("UNKNOWN", "cannot start empty frontend")
        if served.frontend_up and name != served.frontend:
            raise CallFailed(
                "UNKNOWN",
                f"frontend {served.frontend} is already started, cannot be set as {name}",
            )
        self._check_frontend(name, served.frontends)
        was_up, served.frontend, served.frontend_up = served.frontend_up, name, True
        if self._host is not None:
            try:
                await self._host.door.open(name)
            except LhblockError as error:
                served.frontend_up = was_up
                raise CallFailed("UNKNOWN", str(error)) from error
        return self._describe(served)

    async def frontend_shutdown(self, _request: Empty, call: Call) -> pb.Volume:
        if (host := self._closed_host) is not None:
            return self._describe_closed(host)
        served = self._choice.volume(call)
        if self._host is not None:
            await self._host.door.close()
        served.frontend_up = False
        await served.wait_idle()
        return self._describe(served)

    @staticmethod
    def _check_frontend(name: str, known: Sequence[str]) -> None:
        if name not in known:
            raise CallFailed(
                "UNKNOWN", f"failed to find frontend: {name}: unsupported frontend type: {name}"
            )

    async def unmap_mark_set(
        self, request: pb.VolumeUnmapMarkSnapChainRemovedSetRequest, call: Call
    ) -> pb.Volume:
        served = self._choice.volume(call)
        if self._host is not None:
            self._host.unmap_mark = request.enabled
        elif request.enabled:
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
        if self._closed_host is not None:
            return pb.ReplicaListReply()
        replicas = self._choice.volume(call).volume.replicas()
        return pb.ReplicaListReply(
            replicas=[_replica(item.address, item.mode) for item in replicas]
        )

    async def replica_get(self, request: pb.ReplicaAddress, call: Call) -> pb.ControllerReplica:
        return self._find(self._choice.volume(call), request.address)

    async def replica_create(
        self, request: pb.ControllerReplicaCreateRequest, call: Call
    ) -> pb.ControllerReplica:
        """Add a replica. The engine rebuilds it by itself; it is WO until that is done."""
        address = request.address
        if (host := self._closed_host) is not None:
            try:
                await host.start([address])
            except LhblockError as error:
                raise CallFailed("UNKNOWN", str(error)) from error
        served = self._choice.volume(call)
        place = replica_place(address)
        if served.expansion.running:
            raise CallFailed("UNKNOWN", "cannot add WO replica during expansion")
        if not any(item.address == str(place) for item in served.volume.replicas()):
            await add_replica(self._registry, served, place)
        return self._find(served, str(place))

    async def replica_delete(self, request: pb.ReplicaAddress, call: Call) -> Empty:
        served = self._choice.volume(call)
        place = replica_place(request.address)
        replicas = served.volume.replicas()
        if any(item.address == str(place) for item in replicas):
            if len(replicas) == 1 and served.frontend_up:
                raise CallFailed("UNKNOWN", "cannot remove last replica if volume is up")
            await remove_replica(self._registry, served, place)
        return Empty()

    async def replica_update(
        self, request: pb.ControllerReplica, call: Call
    ) -> pb.ControllerReplica:
        served = self._choice.volume(call)
        address = request.address.address
        found = self._find(served, address)
        if request.mode == pb.WO:
            raise CallFailed("UNKNOWN", "cannot set to mode WO")
        if request.mode == pb.RW and found.mode == pb.WO:
            raise CallFailed(
                "UNKNOWN", f"{address} is being rebuilt and becomes RW when that is done"
            )
        if request.mode == pb.ERR and found.mode != pb.ERR:
            with sentences():
                await served.volume.fail_replica(
                    replica_place(address), "set to ERR through the control service"
                )
        return self._find(served, address)

    async def prepare_rebuild(
        self, request: pb.ReplicaAddress, call: Call
    ) -> pb.ReplicaPrepareRebuildReply:
        """Nothing is left for the caller to copy: the engine copies itself."""
        found = self._find(self._choice.volume(call), request.address)
        if found.mode != pb.WO:
            mode = pb.ReplicaMode.Name(found.mode)
            raise CallFailed(
                "UNKNOWN", f"invalid mode {mode} for replica {request.address} to prepare rebuild"
            )
        return pb.ReplicaPrepareRebuildReply(replica=found)

    async def verify_rebuild(self, request: pb.ReplicaAddress, call: Call) -> pb.ControllerReplica:
        """Wait until a replica is RW, however many attempts it takes, up to the call's deadline."""
        served = self._choice.volume(call)
        found = self._find(served, request.address)
        if found.mode != pb.RW:
            with sentences():
                await served.volume.wait_rebuilt(replica_place(request.address))
        return self._find(served, request.address)

    @staticmethod
    def _find(served: ServedVolume, address: str) -> pb.ControllerReplica:
        for replica in served.volume.replicas():
            if replica.address == address:
                return _replica(replica.address, replica.mode)
        raise CallFailed(
            "NOT_FOUND",
            f"cannot find the replica with address {address} in the controller server of"
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

    @property
    def _closed_host(self) -> VolumeHost | None:
        """The host of a controller whose volume is closed now."""
        return self._host if self._host is not None and self._host.served is None else None

    def _hosted(self, call: Call) -> VolumeHost:
        if self._host is None:
            what = _HOSTED[call.method.name]
            raise CallFailed("UNIMPLEMENTED", _EMBEDDED.format(what=what))
        return self._host

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

    @staticmethod
    def _describe_closed(host: VolumeHost) -> pb.Volume:
        return pb.Volume(
            name=host.name,
            size=host.size_bytes,
            frontend=host.frontend,
            frontendState="down" if host.frontend else "",
            unmap_mark_snap_chain_removed=host.unmap_mark,
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
            unmap_mark_snap_chain_removed=self._host is not None and self._host.unmap_mark,
            last_expansion_error=served.expansion.error,
            last_expansion_failed_at=served.expansion.failed_at,
            snapshot_max_count=served.record.snapshot_count_max,
            snapshot_max_size=served.record.snapshot_bytes_max,
        )


def no_backend(addresses: Sequence[str], error: LhblockError) -> str:
    """The words that Longhorn's clients look for, and the reason."""
    listed = " ".join(addresses)
    return f"no available backend due to replica error from the addresses [{listed}]: {error}"


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
