"""``ptypes.ReplicaService`` for the replica of this process: Longhorn's calls and texts.

Where keeping our promises needs another behaviour, docs/reference/replica-process.md says so.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.empty_pb2 import Empty

from lhblock.engine import DrivenReplica, ReplicaLayers
from lhblock.errors import (
    LhblockError,
    NativeError,
    ReplicaError,
    ReplicaNoExtents,
    ReplicaNotFound,
    SnapshotExists,
    SnapshotLimit,
)
from lhblock.instance._replica import Replica
from lhblock.replica import Disk, snapshot_image, snapshot_of
from lhblock.rpc import Call, CallFailed, Handler, Handlers
from lhblock.rpc.generated import replica_pb2 as pb
from lhblock.settings import BLOCK_BYTES

SECTOR_BYTES = 512
LUKS_HEADER_BYTES = 16 << 20
SNAPSHOT_COUNT_MAX = 250


class ReplicaService:
    """The handlers. `handlers` is the table for `lhblock.rpc.serve_rpc`.

    Args:
      unmap_mark: as started; kept and reported, without effect.
      snapshot_max_count, snapshot_max_size: as started; the size is the engine's to enforce.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        unmap_mark: bool = False,
        snapshot_max_count: int = SNAPSHOT_COUNT_MAX,
        snapshot_max_size: int = 0,
    ) -> None:
        self._replica = replica
        self._unmap_mark = unmap_mark
        self._max_count = snapshot_max_count
        self._max_size = snapshot_max_size

    @property
    def handlers(self) -> Handlers:
        return {
            "ReplicaCreate": self._handler(pb.ReplicaCreateResponse, self._create),
            "ReplicaDelete": self._delete,
            "ReplicaGet": self._handler(pb.ReplicaGetResponse, self._get),
            "ReplicaOpen": self._handler(pb.ReplicaOpenResponse, self._open),
            "ReplicaClose": self._handler(pb.ReplicaCloseResponse, self._close),
            "ReplicaReload": self._handler(pb.ReplicaReloadResponse, self._reload),
            "ReplicaRevert": self._handler(pb.ReplicaRevertResponse, self._revert),
            "ReplicaSnapshot": self._handler(pb.ReplicaSnapshotResponse, self._snapshot),
            "ReplicaExpand": self._handler(pb.ReplicaExpandResponse, self._expand),
            "DiskRemove": self._handler(pb.DiskRemoveResponse, self._disk_remove),
            "DiskReplace": self._handler(pb.DiskReplaceResponse, self._disk_replace),
            "DiskPrepareRemove": self._disk_prepare_remove,
            "DiskMarkAsRemoved": self._handler(pb.DiskMarkAsRemovedResponse, self._disk_mark),
            "RebuildingSet": self._handler(pb.RebuildingSetResponse, self._rebuilding_set),
            "RevisionCounterSet": self._handler(pb.RevisionCounterSetResponse, self._get),
            "UnmapMarkDiskChainRemovedSet": self._handler(
                pb.UnmapMarkDiskChainRemovedSetResponse, self._unmap_mark_set
            ),
            "SnapshotMaxCountSet": self._handler(
                pb.SnapshotMaxCountSetResponse, self._max_count_set
            ),
            "SnapshotMaxSizeSet": self._handler(pb.SnapshotMaxSizeSetResponse, self._max_size_set),
        }

    def _handler(self, reply: type[Any], act: Callable[[Any], Awaitable[None]]) -> Handler:
        """Act on a request while nobody else does, and reply with the replica as it is then."""

        async def handle(request: Any, _call: Call) -> Any:
            async with self._replica.lock:
                try:
                    await act(request)
                except LhblockError as error:
                    raise CallFailed("UNKNOWN", _text(error)) from error
                return reply(replica=await self._describe())

        return handle

    # ---- The directory.

    async def _get(self, _request: Any) -> None:
        """Nothing to do. Setting the revision counter is as little: none is kept."""

    async def _create(self, request: pb.ReplicaCreateRequest) -> None:
        if self._replica.opened is not None or (await self._replica.look())[0] != "initial":
            return
        text = request.size or "0"
        if not text.removeprefix("-").isdecimal() or not text.isascii():
            raise CallFailed("UNKNOWN", f'strconv.ParseInt: parsing "{text}": invalid syntax')
        size_bytes = int(text)
        if size_bytes % SECTOR_BYTES:
            raise CallFailed(
                "UNKNOWN", f"size {size_bytes} not a multiple of sector size {SECTOR_BYTES}"
            )
        await self._replica.create(size_bytes)

    async def _delete(self, _request: Empty, _call: Call) -> Empty:
        async with self._replica.lock:
            if self._replica.opened is not None:
                await self._replica.delete()
        return Empty()

    async def _open(self, request: pb.ReplicaOpenRequest) -> None:
        if self._replica.opened is not None:
            raise CallFailed("UNKNOWN", "replica is already open")
        try:
            opened = await self._replica.open()
        except ReplicaNotFound as error:
            raise CallFailed("UNKNOWN", "file does not exist") from error
        except ReplicaNoExtents as error:
            raise CallFailed("UNKNOWN", f"file extent is unsupported: {error.sentence}") from error
        larger_bytes = opened.size_bytes + LUKS_HEADER_BYTES
        if (
            opened.encrypted
            and not request.is_upgrade
            and request.expected_backend_size == larger_bytes
        ):
            await opened.expand(larger_bytes)

    async def _close(self, _request: Empty) -> None:
        await self._replica.close()

    async def _reload(self, _request: Empty) -> None:
        if self._replica.opened is not None:
            await self._replica.opened.reload()

    async def _rebuilding_set(self, request: pb.RebuildingSetRequest) -> None:
        opened = self._replica.opened
        state = self._replica.state if opened else (await self._replica.look())[0]
        legal = ("open", "dirty") if request.rebuilding else ("rebuilding",)
        if opened is None or state not in legal:
            wanted = str(request.rebuilding).lower()
            raise CallFailed("UNKNOWN", f"cannot set rebuilding={wanted} from state {state}")
        await opened.set_rebuilding(request.rebuilding)

    # ---- Snapshots.

    async def _snapshot(self, request: pb.ReplicaSnapshotRequest) -> None:
        _check_arguments(request.name, request.created)
        opened = self._replica.opened
        if opened is None:
            return
        layers = await opened.layers()
        image = snapshot_image(request.name)
        if image in layers.disks:
            raise CallFailed("UNKNOWN", f"snapshot {image} is already existing")
        if self._max_count - _usage(layers) <= 0:
            raise _too_many(layers)
        try:
            await opened.create_snapshot(
                request.name,
                user_created=request.user_created,
                created=request.created,
                labels=dict(request.labels),
            )
        except SnapshotLimit as error:
            raise _too_many(layers) from error
        except (ReplicaError, NativeError) as error:
            raise CallFailed(
                "UNKNOWN", f"failed to create new disk {request.name}: {_text(error)}"
            ) from error

    async def _revert(self, request: pb.ReplicaRevertRequest) -> None:
        _check_arguments(request.name, request.created)
        opened = self._replica.opened
        if opened is None:
            return
        image = request.name
        path = self._replica.path / image
        if "/" not in image and not path.exists():
            raise CallFailed("UNKNOWN", f"stat {path}: no such file or directory")
        disk = (await self._disks(opened)).get(image)
        refused = f"cannot revert to disk file {image} since it's"
        if disk is None:
            raise CallFailed("UNKNOWN", f"{refused} not in the disk chain")
        if disk.removed:
            raise CallFailed("UNKNOWN", f"{refused} already marked as removed")
        if disk.is_head:
            raise CallFailed("UNKNOWN", f"{refused} the head")
        await opened.revert(snapshot_of(image), created=request.created)

    async def _expand(self, request: pb.ReplicaExpandRequest) -> None:
        opened = self._replica.opened
        if opened is None:
            return
        size_bytes = request.size
        if size_bytes < opened.size_bytes:
            raise _expansion_failed(f"cannot expand replica to a smaller size {size_bytes}")
        if size_bytes % BLOCK_BYTES:
            raise _expansion_failed(
                f"failed to expend volume replica size {size_bytes}, because it is not multiple of"
                f" volume sector size {BLOCK_BYTES}"
            )
        try:
            await opened.expand(size_bytes)
        except SnapshotExists as error:
            image = snapshot_image(f"expand-{size_bytes}")
            raise _expansion_failed(f"snapshot {image} is already existing") from error
        except LhblockError as error:
            if opened.error:
                raise _expansion_failed(
                    _text(error), "FunctionFailedRollbackFailed", opened.error
                ) from error
            raise _expansion_failed(_text(error), "FunctionFailedRollbackSucceeded") from error

    # ---- Disks.

    async def _disks(self, opened: DrivenReplica) -> Mapping[str, Disk]:
        layers = await opened.layers()
        return {name: layer.disk for name, layer in layers.disks.items()}

    async def _find(self, name: str) -> Disk | None:
        """The disk that an image or a snapshot name means, if it is there and the replica open."""
        if self._replica.opened is None:
            return None
        disks = await self._disks(self._replica.opened)
        return disks.get(name) or disks.get(snapshot_image(name))

    async def _disk_mark(self, request: pb.DiskMarkAsRemovedRequest) -> None:
        opened = self._replica.opened
        disk = await self._find(request.name)
        if opened is None or disk is None:
            return
        if disk.is_head:
            raise CallFailed("UNKNOWN", "cannot mark the active differencing disk as removed")
        await opened.mark_removed(disk.snapshot)

    async def _disk_prepare_remove(
        self, request: pb.DiskPrepareRemoveRequest, _call: Call
    ) -> pb.DiskPrepareRemoveResponse:
        async with self._replica.lock:
            disk = await self._find(request.name)
        if disk is not None and disk.is_head:
            raise CallFailed("UNKNOWN", "cannot delete the active differencing disk")
        if disk is not None and not disk.removed:
            raise CallFailed("UNKNOWN", f"disk {disk.name} hasn't been marked as removed")
        # A marked disk is merged away by this process: nothing is left for the caller to do.
        return pb.DiskPrepareRemoveResponse()

    async def _disk_remove(self, request: pb.DiskRemoveRequest) -> None:
        opened = self._replica.opened
        if opened is None:
            return
        layer = (await opened.layers()).disks.get(request.name)
        if layer is None:
            return
        if layer.disk.is_head:
            raise CallFailed("UNKNOWN", "cannot delete the active differencing disk")
        if len(layer.children) > 1 and not request.force:
            raise CallFailed(
                "UNKNOWN",
                f"cannot remove snapshot {request.name} with {len(layer.children)} children",
            )
        await opened.remove_disk(request.name)

    async def _disk_replace(self, request: pb.DiskReplaceRequest) -> None:
        opened = self._replica.opened
        if opened is None:
            return
        disks = await self._disks(opened)
        target = disks.get(request.target)
        if target is not None and target.is_head:
            raise CallFailed("UNKNOWN", "cannot replace the active differencing disk")
        if request.source not in disks:
            raise CallFailed("UNKNOWN", f"cannot find source of replacing: {request.source}")
        raise CallFailed(
            "UNKNOWN",
            f"disk {request.source} is not put in the place of {request.target}: this replica"
            " merges disks by itself once they are marked as removed",
        )

    # ---- What is kept and reported.

    async def _unmap_mark_set(self, request: pb.UnmapMarkDiskChainRemovedSetRequest) -> None:
        self._unmap_mark = request.enabled

    async def _max_count_set(self, request: pb.SnapshotMaxCountSetRequest) -> None:
        self._max_count = request.count

    async def _max_size_set(self, request: pb.SnapshotMaxSizeSetRequest) -> None:
        self._max_size = request.size

    async def _describe(self) -> pb.Replica:
        opened = self._replica.opened
        if opened is None:
            state, meta = await self._replica.look()
            return pb.Replica(
                dirty=meta.dirty,
                rebuilding=meta.rebuilding,
                head=meta.head,
                parent=meta.parent,
                size=str(meta.size_bytes),
                sector_size=SECTOR_BYTES,
                backing_file=meta.backing_file,
                state=state,
            )
        try:
            layers = await opened.layers()
        except ReplicaError:
            return pb.Replica(
                size=str(opened.size_bytes), sector_size=SECTOR_BYTES, state=self._replica.state
            )
        return self._describe_open(opened, layers)

    def _describe_open(self, opened: DrivenReplica, layers: ReplicaLayers) -> pb.Replica:
        disks = layers.disks
        usage = _usage(layers)
        return pb.Replica(
            dirty=opened.dirty,
            rebuilding=opened.rebuilding,
            head=layers.head.disk.name,
            parent=layers.head.disk.parent,
            size=str(opened.size_bytes),
            sector_size=SECTOR_BYTES,
            state=self._replica.state,
            chain=[name for name in layers.chain if not disks[name].disk.removed],
            disks={name: _disk_info(layer.disk, layer) for name, layer in disks.items()},
            remain_snapshots=max(self._max_count - usage, -(1 << 31)),
            last_modify_time=layers.head_modified_ns,
            head_file_size=layers.head.allocated_bytes,
            revision_counter_disabled=True,
            unmap_mark_disk_chain_removed=self._unmap_mark,
            snapshot_count_usage=usage,
            snapshot_size_usage=sum(
                disks[name].allocated_bytes
                for name in layers.chain[1:]
                if not disks[name].disk.removed
            ),
            snapshot_count_total=len(disks),
        )


def _disk_info(disk: Disk, layer: Any) -> pb.DiskInfo:
    return pb.DiskInfo(
        name=disk.name,
        parent=disk.parent,
        children=dict.fromkeys(layer.children, True),
        removed=disk.removed,
        user_created=disk.user_created,
        created=disk.created,
        size=str(layer.allocated_bytes),
        labels=disk.labels,
    )


def _usage(layers: ReplicaLayers) -> int:
    head = layers.chain[0]
    return sum(not layer.disk.removed for name, layer in layers.disks.items() if name != head)


def _too_many(layers: ReplicaLayers) -> CallFailed:
    return CallFailed("UNKNOWN", f"too many active disks: {len(layers.chain) + 1}")


def _check_arguments(name: str, created: str) -> None:
    if not name:
        raise CallFailed("UNKNOWN", "cannot accept empty snapshot name")
    if not created:
        raise CallFailed("UNKNOWN", "need to specific created time")


def _expansion_failed(
    message: str, code: str = "FunctionFailedWithoutRollback", rollback: str = ""
) -> CallFailed:
    document = {"code": code, "message": message, "rollbackMessage": rollback}
    return CallFailed("INTERNAL", json.dumps(document, separators=(",", ":")))


def _text(error: LhblockError) -> str:
    # Engines look for these words as Go's standard library writes them.
    return str(error).replace("No space left on device", "no space left on device")
