"""A replica that speaks Longhorn's protocol and no more: the least that a volume can stand on.

It gets what Longhorn's controller would send: ``ptypes.ReplicaService``, and of the data protocol
READ and WRITE. It keeps no generation, so nobody can tell whether it missed writes; it has no
flush, so what was flushed may not be on its disk; it merges removed snapshots by itself, or its own
kind does; and it is not rebuilt, hashed or read by snapshot from here. A volume consists of such
replicas only, or of none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, ClassVar

from lhblock._native import NativeEngine, NativePeer, NativeVolume
from lhblock.engine import wire
from lhblock.engine._config import RemoteLimits
from lhblock.engine._member import LayerSize, Member
from lhblock.engine._peer_client import EngineIdentity, PeerClient
from lhblock.engine._remote_member import why_peer_failed
from lhblock.errors import (
    LhblockError,
    ReplicaDamaged,
    ReplicaIO,
    ReplicaLocked,
    ReplicaNotFound,
    ReplicaStale,
    ReplicaUnreachable,
    ReplicaUnsupported,
)
from lhblock.replica import Disk, Generation, MalformedError, snapshot_image, walk_up, why_bad_size
from lhblock.rpc import REPLICA
from lhblock.rpc.generated import peer_pb2
from lhblock.rpc.generated import replica_pb2 as pb
from lhblock.settings import RemoteAddress


def _refuses(what: str) -> Any:
    def refuse(self: PlainMember, *_: object, **__: object) -> Any:
        raise ReplicaUnsupported(self.address, f"speaks Longhorn's protocol only, so {what}")

    return refuse


class PlainMember(Member):
    """A replica of a process that is not ours, or pretends so. Args: as ``RemoteMember``."""

    exclusive: ClassVar[bool] = True  # or not: nothing that it keeps would tell
    merges_itself: ClassVar[bool] = True

    def __init__(
        self,
        place: RemoteAddress,
        engine: NativeEngine,
        identity: EngineIdentity,
        limits: RemoteLimits,
        *,
        volume: str = "",
    ) -> None:
        super().__init__(str(place), str(place).partition("://")[2])
        self.place = place
        self._engine = engine
        self._identity = identity
        self._limits = limits
        self._volume = volume
        self._client: PeerClient | None = None
        self._records: wire.RemoteRecords | None = None
        self._sizes: dict[str, LayerSize] = {}
        self._peer: NativePeer | None = None
        self._switched = False
        self._commit: Callable[[], None] | None = None

    # ---- What is known of it without asking.

    @property
    def opened(self) -> bool:
        return self._records is not None

    @property
    def records(self) -> wire.RemoteRecords:
        assert self._records is not None, self.address
        return self._records

    @property
    def generation_counter(self) -> int:
        """Unknown: the one that the volume counts is nowhere on this replica."""
        return 0

    @property
    def has_store(self) -> bool:
        return self._peer is not None

    @property
    def store(self) -> NativePeer:
        assert self._peer is not None, self.address
        return self._peer

    def layer_size(self, image: str) -> LayerSize:
        size = self._sizes.get(image)
        if size is None:
            raise ReplicaIO(self.address, f"has no layer {image}")
        return size

    def why_failed(self, error: int, offset_bytes: int) -> str:
        return why_peer_failed(self.store, self._limits, error, offset_bytes)

    @property
    def switched(self) -> bool:
        return self._switched

    # ---- Calls.

    def _call(self, name: str, request: Any = None, *, long: bool = False) -> Any:
        assert self._client is not None
        timeout_s = self._limits.long_timeout_s if long else self._limits.call_timeout_s
        return self._client.call(name, request, service=REPLICA, timeout_s=timeout_s)

    def _take(self, info: pb.Replica) -> None:
        """What a reply says of the layers."""
        assert self._client is not None
        told, sizes = self._client.understand(lambda: _decode(self.address, info))
        if self._records is not None:
            told = replace(told, generation=self._records.generation)
        self._records, self._sizes = told, sizes

    # ---- Opening and closing.

    def open(self, *, read_only: bool = False) -> None:
        if read_only:
            raise ReplicaUnsupported(
                self.address, "speaks Longhorn's protocol only, which cannot open it read-only"
            )
        self._client = PeerClient(
            self.place, self._identity, self._limits, self._volume, pings=False
        )
        try:
            self._refuse_unusable(self._call("ReplicaGet").replica)
            self._take(self._call("ReplicaOpen", pb.ReplicaOpenRequest(), long=True).replica)
        except BaseException:
            self._client.close()
            self._client = self._records = None
            raise

    def _refuse_unusable(self, info: pb.Replica) -> None:
        state = info.state
        if state == "initial":
            raise ReplicaNotFound(self.address, "has no replica")
        if state == "error":
            raise ReplicaDamaged(self.address, "is in state error; see the log of its process")
        if state == "rebuilding" or info.rebuilding:
            raise ReplicaStale(self.address, "was never rebuilt to the end")
        if state != "closed":
            raise ReplicaLocked(
                self.address,
                f"is in state {state!r:.40}: another engine has it open, or was killed; stop that "
                "one, or start the replica's process anew",
            )

    def open_store(self, *, write_only: bool = False) -> None:
        assert not write_only
        assert self._client is not None
        peer = NativePeer(self._engine, self.records.size_bytes, 0, self._limits.reply_timeout_ms)
        data = peer_pb2.PeerHello(data_protocol="tcp", data_port=self.place.port + 1)
        try:
            for queue in range(self._engine.queues):
                fd = self._client.connect(data, None)
                try:
                    peer.add_connection(queue, fd)
                except BaseException:
                    os.close(fd)
                    raise
        except BaseException:
            peer.close()
            raise
        self._peer = peer

    def serve(self, volume: NativeVolume | None) -> None:
        """Nothing to do."""

    def sync(self) -> None:
        """Longhorn has nothing for that."""

    def close(self, *, clean: bool) -> None:
        peer, self._peer = self._peer, None
        client, self._client = self._client, None
        self._records = None
        try:
            if peer is not None:
                peer.close()
        finally:
            if client is not None:
                try:
                    with nullcontext() if clean else suppress(LhblockError):
                        client.call("ReplicaClose", service=REPLICA)
                finally:
                    client.close()

    def close_synced(self) -> None:
        self.close(clean=True)

    # ---- What it knows of the volume: nothing, so it is kept here while it is open.

    def write_generation(self, generation: Generation) -> None:
        self._records = replace(self.records, generation=replace(generation, head=None))

    def note_repaired(self) -> None:
        """It never noted anything."""

    # ---- The tree.

    def layer_sizes(self) -> Mapping[str, LayerSize]:
        self._take(self._call("ReplicaGet").replica)
        return self._sizes

    def mark_removed(self, snapshot: str) -> None:
        request = pb.DiskMarkAsRemovedRequest(name=snapshot_image(snapshot))
        self._take(self._call("DiskMarkAsRemoved", request).replica)

    def prepare_snapshot(
        self,
        snapshot: str,
        *,
        user_created: bool,
        created: str,
        labels: Mapping[str, str],
        size_bytes: int | None,
    ) -> None:
        def commit() -> None:
            if size_bytes is not None:
                request = pb.ReplicaExpandRequest(size=size_bytes)
                self._take(self._call("ReplicaExpand", request).replica)
                self.store.resize(size_bytes)
                return
            self._take(
                self._call(
                    "ReplicaSnapshot",
                    pb.ReplicaSnapshotRequest(
                        name=snapshot, user_created=user_created, created=created, labels=labels
                    ),
                ).replica
            )

        self._switched, self._commit = False, commit

    def prepare_revert(self, snapshot: str, *, created: str) -> None:
        request = pb.ReplicaRevertRequest(name=snapshot_image(snapshot), created=created)
        self._switched = False
        self._commit = lambda: self._take(self._call("ReplicaRevert", request, long=True).replica)

    def commit_snapshot(self, size_bytes: int) -> None:
        self.commit_revert()

    def commit_revert(self) -> None:
        assert self._commit is not None
        commit, self._commit = self._commit, None
        try:
            commit()
        except ReplicaUnreachable:
            self._switched = True  # for all that is known
            raise
        self._switched = True

    def settle_snapshot(self) -> None:
        """It is as durable as it gets."""

    def abandon_head(self) -> None:
        self._commit = None

    def release_replaced(self) -> None:
        """Its own business."""

    def abandon_promotion(self) -> None:
        """Nothing was prepared."""

    def return_layers(self) -> None:
        """None were lent."""

    reach = make_target = open_target = set_rebuilding = align = _refuses(
        "it cannot be rebuilt from here"
    )
    prepare_promotion = start_promotion = finish_promotion = _refuses("it cannot be rebuilt")
    open_units = begin_units = read_unit = hash_units = write_unit = sync_units = _refuses(
        "its layers cannot be copied"
    )
    layer_stamp = occupied_units = lend_layer = reopen_store = _refuses(
        "it cannot be made equal to another one"
    )
    read_activity = make_activity = forget_activity = _refuses("it keeps no activity log")
    read_progress = write_progress = forget_progress = _refuses("it has no rebuild")
    finish_snapshot = undo_revert = _refuses("a change that was cut short cannot be repaired there")
    open_view = _refuses("its snapshots cannot be read; revert to one, or copy its directory")
    checksum = hash_layer = verify_layer = _refuses("its layers cannot be hashed")
    layer_extents = read_layer = begin_repair = repair_layer = finish_repair = _refuses(
        "its layers cannot be repaired"
    )
    remove_leaf = begin_merge = merge_offsets = merge_step = finish_merge = _refuses(
        "it merges by itself"
    )


def _decode(address: str, info: pb.Replica) -> tuple[wire.RemoteRecords, dict[str, LayerSize]]:
    """Raises MalformedError: says what cannot be."""
    size_bytes = _number(info.size)
    reason = why_bad_size(size_bytes)
    if reason is not None:
        raise MalformedError(f"has a size of {size_bytes}, which {reason}")
    disks: dict[str, Disk] = {}
    sizes: dict[str, LayerSize] = {}
    for told in info.disks.values():
        message = peer_pb2.PeerDisk(
            name=told.name,
            parent=told.parent,
            removed=told.removed,
            user_created=told.user_created,
            created=told.created,
            labels=told.labels,
        )
        disk = wire.decode_disk(message)
        disks[disk.name] = disk
        sizes[disk.name] = LayerSize(size_bytes, _number(told.size))
    for name in disks:
        tuple(walk_up(disks, name))
    if info.head not in disks or not disks[info.head].is_head:
        raise MalformedError(f"has the head {info.head!r:.300}, which is none")
    records = wire.RemoteRecords(
        label=address,
        size_bytes=size_bytes,
        disks=disks,
        chain=tuple(walk_up(disks, info.head))[::-1],
        generation=None,
        encrypted=False,
        rebuilding=False,
        was_dirty=False,
        torn=False,
        written_elsewhere="",
        cleaned=(),
    )
    return records, sizes


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise MalformedError(f"has {text!r:.40} where a number belongs")
    return wire.count(int(text))
