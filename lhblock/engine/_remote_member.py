"""A replica that an ``lhblock replica`` process serves, on this or another host.

Each method is a call of ``lhblock.v1.PeerService``, done there by a ``LocalMember`` of the same
name. What can be read without waiting is what the replica told last: its layers change only because
the engine asks for it. Sectors do not come by here: the core has sockets of its own.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, ClassVar, Final

from google.protobuf.message import Message

from lhblock._native import (
    MERGE_STEP_BYTES,
    PEER_OURS,
    UNIT_BYTES,
    Extent,
    NativeEngine,
    NativePeer,
    NativeUnit,
    NativeVolume,
    PeerEnd,
)
from lhblock.engine import wire
from lhblock.engine._alignment import Alignment
from lhblock.engine._config import RemoteLimits
from lhblock.engine._member import LayerDamage, LayerSize, Member, MergeKind, Store
from lhblock.engine._missed import Witness
from lhblock.engine._peer_client import EngineIdentity, PeerClient
from lhblock.engine._unit_connection import UnitConnection
from lhblock.errors import LhblockError, ReplicaIO, ReplicaUnreachable
from lhblock.replica import (
    ChecksumRecord,
    Disk,
    Generation,
    LayerStamp,
    RebuildProgress,
    check_snapshot_name,
    snapshot_image,
)
from lhblock.rpc.generated import peer_pb2 as pb
from lhblock.settings import RemoteAddress

_ENDS: Final[Mapping[PeerEnd, str]] = {
    PeerEnd.EOF: "its process closed the data connection, or ended",
    PeerEnd.MID_REPLY: "its data connection ended in the middle of a reply",
    PeerEnd.TIMEOUT: "it did not answer a request within {timeout_s:g} s",
    PeerEnd.BAD_MAGIC: "it sent a reply with a wrong magic number",
    PeerEnd.BAD_SEQUENCE: "it answered something that it was not asked",
    PeerEnd.BAD_TYPE: "it sent a reply of a type that there is not",
    PeerEnd.BAD_LENGTH: "it sent a reply of a wrong length",
    PeerEnd.GOODBYE: "it took its leave",
}
_CONNECTION_ENDS: Final = frozenset(
    {PeerEnd.SOCKET_ERROR, PeerEnd.EOF, PeerEnd.MID_REPLY, PeerEnd.TIMEOUT, PeerEnd.GOODBYE}
)
"""Ends that say nothing of what the replica has on its disk."""
_CONNECTION_ERRORS: Final = frozenset(
    {
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
    }
)
"""Errors that say as little."""


class RemoteMember(Member):
    """A replica of another process.

    Args:
      place: where its process answers.
      engine: the C engine.
      identity: who this engine is, for all replicas of the volume.
      limits: how long to wait for what.
      volume: what the process must say its replica belongs to, if it says anything.
    """

    exclusive: ClassVar[bool] = False

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
        self._hello = pb.PeerHello()
        self._hello_s = 0.0
        self._records: wire.RemoteRecords | None = None
        self._sizes: dict[str, LayerSize] = {}
        self._peer: NativePeer | None = None
        self._switched = False
        self._prepared = False  # a head, whether here or there is unknown
        self._promoting = False
        self._published_bytes = 0
        self._unit_connections: list[UnitConnection] = []
        self._lock = threading.Lock()  # for what is known

    @property
    def opened(self) -> bool:
        return self._records is not None

    @property
    def records(self) -> wire.RemoteRecords:
        assert self._records is not None, self.address
        return self._records

    @property
    def has_store(self) -> bool:
        return self._peer is not None

    @property
    def store(self) -> NativePeer:
        assert self._peer is not None, self.address
        return self._peer

    def why_failed(self, error: int, offset_bytes: int) -> str:
        return why_peer_failed(self.store, self._limits, error, offset_bytes)

    def is_out_of_touch(self, error: int) -> bool:
        # It may have ended after it had answered with an error of its disk.
        return (
            error in _CONNECTION_ERRORS
            and PeerEnd(self.store.statistics().end_reason) in _CONNECTION_ENDS
        )

    @property
    def store_ended(self) -> bool:
        return self.store.statistics().end_reason != PeerEnd.NONE

    def witness(self) -> Witness | None:
        hello = self._hello
        if not hello.boot_id:
            return None  # an older lhblock
        return Witness(hello.boot_id, hello.place, hello.up_s, self._hello_s)

    @property
    def switched(self) -> bool:
        return self._switched

    # ---- Calls.

    @property
    def _connection(self) -> PeerClient:
        if self._client is None:
            raise ReplicaIO(self.address, "is not open")
        return self._client

    def _quick(self, name: str, request: Message | None = None) -> Any:
        """Something waits for it: a freeze, or acknowledgements."""
        return self._connection.call(name, request)

    def _slow(self, name: str, request: Message | None = None) -> Any:
        """It reads or syncs what may be much."""
        return self._connection.call(name, request, timeout_s=self._limits.long_timeout_s)

    def _take_tree(self, reply: pb.PeerRecords) -> None:
        """What a call has made of the layers. The rest is what calls of other threads say."""
        told = self._connection.understand(lambda: wire.decode_records(self.address, reply))
        with self._lock:
            self._records = replace(
                self.records, size_bytes=told.size_bytes, disks=told.disks, chain=told.chain
            )

    def _note(self, **changes: Any) -> None:
        with self._lock:
            self._records = replace(self.records, **changes)

    # ---- Opening and closing.

    @contextmanager
    def _connected(self) -> Iterator[PeerClient]:
        """A connection for the block; it stays if the replica is open then."""
        if self._client is None:
            client = PeerClient(self.place, self._identity, self._limits, self._volume)
            try:
                self._hello = client.call("Hello")
                self._hello_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            except BaseException:
                client.close()
                raise
            self._client = client
        try:
            yield self._client
        finally:
            if self._records is None:
                self._client.close()
                self._client = None

    def reach(self) -> None:
        with self._connected():
            return

    def open(self, *, read_only: bool = False) -> None:
        assert self._records is None
        with self._connected() as client:
            reply = self._slow("Open", pb.PeerOpen(read_only=read_only))
            self._records = client.understand(lambda: wire.decode_records(self.address, reply))

    def make_target(self, like: Generation, *, size_bytes: int, encrypted: bool) -> None:
        request = pb.PeerTarget(like=like.encode(), size_bytes=size_bytes, encrypted=encrypted)
        with self._connected():
            self._quick("MakeTarget", request)

    def open_target(
        self, like: Generation, *, size_bytes: int, others: Sequence[str], force: bool
    ) -> None:
        assert self._records is None
        request = pb.PeerTarget(
            like=like.encode(), size_bytes=size_bytes, others=others, force=force
        )
        with self._connected() as client:
            reply = self._slow("OpenTarget", request)
            self._records = client.understand(lambda: wire.decode_records(self.address, reply))

    def open_store(self, *, write_only: bool = False) -> None:
        self._slow("OpenStore", pb.PeerOpenStore(write_only=write_only))
        peer = NativePeer(
            self._engine, self.records.size_bytes, PEER_OURS, self._limits.reply_timeout_ms
        )
        self._connect(peer, wire.HEAD_VIEW)
        self._peer, self._published_bytes = peer, self.records.size_bytes

    def _connect(self, peer: NativePeer, view: int) -> None:
        """Give a peer a connection for each queue; close it when that fails."""
        try:
            for queue in range(self._engine.queues):
                fd = self._connection.connect(self._hello, view)
                try:
                    peer.add_connection(queue, fd)
                except BaseException:
                    os.close(fd)
                    raise
        except BaseException:
            peer.close()
            raise

    def reopen_store(self) -> None:
        self._slow("ReopenStore")

    def open_view(self, images: Sequence[str], size_bytes: int) -> Store:
        view: int = self._slow("OpenView", pb.PeerView(images=images, size_bytes=size_bytes)).id
        peer = _ViewPeer(self, view, self._engine, size_bytes, self._limits.reply_timeout_ms)
        self._connect(peer, view)
        return peer

    def close_view(self, view: int) -> None:
        """Tell the replica that nobody reads a view any more. Blocking.

        It may be gone, or not answer: then it finds out by itself.
        """
        if self._client is not None:
            with suppress(LhblockError):
                self._quick("CloseView", pb.PeerViewId(id=view))

    def serve(self, volume: NativeVolume | None) -> None:
        """Nothing to do: the range locks are the core's, and it knows its peers."""

    def sync(self) -> None:
        self._slow("Sync")

    def close(self, *, clean: bool) -> None:
        with nullcontext() if clean else suppress(LhblockError):
            self._close(pb.PeerClose(clean=clean), self._limits.call_timeout_s)

    def close_synced(self) -> None:
        self._close(pb.PeerClose(clean=True, synced=True), self._limits.long_timeout_s)

    def _close(self, request: pb.PeerClose, timeout_s: float) -> None:
        _ = self.generation_counter  # is remembered
        peer, self._peer = self._peer, None
        opened, self._records = self._records is not None, None
        self._prepared = self._promoting = False
        client, self._client = self._client, None
        self._hang_up()
        try:
            if peer is not None:
                peer.close()
        finally:
            if client is not None:
                try:
                    if opened:
                        client.call("Close", request, timeout_s=timeout_s)
                finally:
                    client.close()

    # ---- What it knows of the volume.

    def write_generation(self, generation: Generation) -> None:
        self._quick("WriteGeneration", pb.PeerGeneration(generation=generation.encode()))
        self._note(generation=replace(generation, head=None))

    def leave_behind(self, generation: Generation) -> None:
        # The connection that was lost may not know that the process is there again.
        client = PeerClient(self.place, self._identity, self._limits, self._volume)
        try:
            client.call("LeaveBehind", pb.PeerGeneration(generation=generation.encode()))
        finally:
            client.close()

    def note_repaired(self) -> None:
        self._quick("NoteRepaired")
        self._note(torn=False, written_elsewhere="")

    def set_rebuilding(self, rebuilding: bool) -> None:
        self._quick("SetRebuilding", pb.PeerFlag(value=rebuilding))
        self._note(rebuilding=rebuilding)

    # ---- Its activity log.

    def read_activity(self) -> bytes:
        data: bytes = self._quick("ReadActivity").data
        return data

    def make_activity(self, log_id: str) -> None:
        self._quick("MakeActivity", pb.PeerText(value=log_id))

    def forget_activity(self) -> None:
        self._quick("ForgetActivity")

    # ---- The tree.

    def layer_size(self, image: str) -> LayerSize:
        size = self._sizes.get(image)
        if size is None:
            raise ReplicaIO(self.address, f"has not told the size of {image} yet")
        return size

    def layer_sizes(self) -> Mapping[str, LayerSize]:
        reply = self._quick("LayerSizes")
        sizes = self._connection.understand(lambda: wire.decode_sizes(reply))
        missing = self.records.disks.keys() - sizes.keys()
        if missing:
            raise ReplicaIO(self.address, f"has lost the layer {min(missing)}")
        self._sizes = sizes
        return sizes

    def mark_removed(self, snapshot: str) -> None:
        self._take_tree(self._quick("MarkRemoved", _snapshot(snapshot)))

    def finish_snapshot(self, disk: Disk, *, size_bytes: int) -> None:
        request = pb.PeerSnapshot(disk=wire.encode_disk(disk), size_bytes=size_bytes)
        self._take_tree(self._slow("FinishSnapshot", request))

    def undo_revert(self, snapshot: str, *, created: str) -> None:
        self._take_tree(self._slow("UndoRevert", _snapshot(snapshot, created=created)))

    def prepare_snapshot(
        self,
        snapshot: str,
        *,
        user_created: bool,
        created: str,
        labels: Mapping[str, str],
        size_bytes: int | None,
    ) -> None:
        check_snapshot_name(snapshot)
        disk = Disk(
            snapshot_image(snapshot), user_created=user_created, created=created, labels=labels
        )
        self._prepare(
            "PrepareSnapshot",
            pb.PeerSnapshot(disk=wire.encode_disk(disk), size_bytes=size_bytes or 0),
        )

    def _prepare(self, name: str, request: pb.PeerSnapshot) -> None:
        self._switched, self._prepared = False, True
        try:
            self._slow(name, request)
        except BaseException:
            # It may be there all the same, if the answer is what was lost.
            with suppress(LhblockError):
                self.abandon_head()
            raise

    def commit_snapshot(self, size_bytes: int) -> None:
        self._commit("CommitSnapshot", pb.PeerSize(bytes=size_bytes), self._limits.call_timeout_s)
        if size_bytes != self._published_bytes:
            self.store.resize(size_bytes)
            self._published_bytes = size_bytes

    def _commit(self, name: str, request: Message | None, timeout_s: float) -> None:
        try:
            reply = self._connection.call(name, request, timeout_s=timeout_s)
        except ReplicaUnreachable:
            self._switched = True  # for all that is known
            raise
        except LhblockError:
            self._switched = True
            with suppress(LhblockError):
                self._switched = self._quick("AbandonHead").value
            raise
        self._switched = True
        self._take_tree(reply)

    def settle_snapshot(self) -> None:
        self._slow("SettleSnapshot")
        self._prepared = False

    def prepare_revert(self, snapshot: str, *, created: str) -> None:
        self._prepare("PrepareRevert", _snapshot(snapshot, created=created))

    def commit_revert(self) -> None:
        self._commit("CommitRevert", None, self._limits.long_timeout_s)
        self._prepared = False

    def abandon_head(self) -> None:
        if self._prepared and not self._switched:
            self._prepared = False
            self._quick("AbandonHead")

    def release_replaced(self) -> None:
        """The replica has done that when it published the new one."""

    # ---- Merges.

    def remove_leaf(self, image: str) -> None:
        self._take_tree(self._slow("RemoveLeaf", pb.PeerLayer(image=image)))

    def begin_merge(self, lower: str, upper: str) -> int:
        token: int = self._slow("BeginMerge", pb.PeerMerge(lower=lower, upper=upper)).token
        return token

    def merge_offsets(self, image: str) -> Sequence[int]:
        return self._steps("MergeOffsets", image, MERGE_STEP_BYTES)

    def _steps(self, name: str, image: str, step_bytes: int) -> list[int]:
        reply = self._slow(name, pb.PeerLayer(image=image))
        end_bytes = self.records.size_bytes
        return self._connection.understand(lambda: wire.decode_steps(reply, step_bytes, end_bytes))

    def merge_step(
        self, kind: MergeKind, lower: str, upper: str, offset_bytes: int, token: int
    ) -> bool:
        request = pb.PeerMerge(
            kind=kind, lower=lower, upper=upper, offset_bytes=offset_bytes, token=token
        )
        done: bool = self._slow("MergeStep", request).value
        return done

    def finish_merge(self, kind: MergeKind, lower: str, upper: str, token: int) -> bool:
        request = pb.PeerMerge(kind=kind, lower=lower, upper=upper, token=token)
        reply = self._slow("FinishMerge", request)
        self._take_tree(reply.records)
        done: bool = reply.done
        return done

    # ---- Checksums.

    def checksum(self, image: str) -> str:
        text: str = self._quick("Checksum", pb.PeerLayer(image=image)).value
        return text[: wire.TEXT_CHARS_MAX]

    def hash_layer(self, image: str, *, rehash: bool) -> None:
        self._slow("HashLayer", pb.PeerHash(image=image, rehash=rehash))

    def verify_layer(self, image: str) -> ChecksumRecord | LayerDamage | None:
        reply = self._slow("VerifyLayer", pb.PeerLayer(image=image))
        if not reply.HasField("record"):
            return None
        record = self._connection.understand(lambda: wire.decode_checksum(reply.record))
        if reply.found:
            return LayerDamage(record, reply.found[: wire.TEXT_CHARS_MAX])
        return record

    def layer_extents(self, image: str) -> Sequence[Extent]:
        extents: list[Extent] = []
        end_bytes = 0
        while True:
            request = pb.PeerRange(image=image, offset_bytes=end_bytes)
            bounds = self._slow("LayerExtents", request).bounds_bytes
            if not bounds:
                return extents
            for offset_bytes, length_bytes in zip(bounds[::2], bounds[1::2], strict=False):
                if offset_bytes < end_bytes or length_bytes <= 0:
                    raise ReplicaIO(self.address, f"sent extents of {image} that make no sense")
                end_bytes = offset_bytes + length_bytes
                extents.append(Extent(offset_bytes, length_bytes))
            if end_bytes > self.records.size_bytes:
                raise ReplicaIO(self.address, f"sent extents beyond the end of {image}")

    def read_layer(self, image: str, offset_bytes: int, length_bytes: int) -> bytes:
        request = pb.PeerRange(image=image, offset_bytes=offset_bytes, length_bytes=length_bytes)
        data: bytes = self._slow("ReadLayer", request).data
        if len(data) > length_bytes:
            raise ReplicaIO(self.address, f"sent more of {image} than it was asked for")
        return data

    def begin_repair(self, image: str) -> None:
        self._quick("BeginRepair", pb.PeerLayer(image=image))

    def repair_layer(self, image: str, offset_bytes: int, data: bytes) -> None:
        self._slow("RepairLayer", pb.PeerWrite(image=image, offset_bytes=offset_bytes, data=data))

    def finish_repair(self, image: str, record: ChecksumRecord) -> None:
        self._slow(
            "FinishRepair", pb.PeerRepaired(image=image, record=wire.encode_checksum(record))
        )

    # ---- Rebuilding.

    def align(
        self,
        plan: Alignment,
        source: Mapping[str, Disk],
        *,
        newest: str,
        sizes: Mapping[str, int],
        size_bytes: int,
        created: str,
    ) -> None:
        request = pb.PeerAlign(
            kept=sorted(plan.kept),
            head_becomes=plan.head_becomes,
            source=[wire.encode_disk(disk) for disk in source.values()],
            newest=newest,
            sizes=wire.encode_sizes({image: LayerSize(size, 0) for image, size in sizes.items()}),
            size_bytes=size_bytes,
            created=created,
        )
        self._take_tree(self._slow("Align", request))

    def layer_stamp(self, image: str) -> LayerStamp:
        return wire.decode_stamp(self._quick("LayerStamp", pb.PeerLayer(image=image)))

    def occupied_units(self, image: str) -> Sequence[int]:
        return self._steps("OccupiedUnits", image, UNIT_BYTES)

    def open_units(self, image: str) -> None:
        self._slow("OpenUnits", pb.PeerLayer(image=image))

    def begin_units(self, image: str, size_bytes: int) -> None:
        self._slow("BeginUnits", pb.PeerRange(image=image, length_bytes=size_bytes))

    @contextmanager
    def _unit_connection(self) -> Iterator[UnitConnection]:
        """A connection for units, kept for the next one when all goes well."""
        client = self._connection
        try:
            connection = self._unit_connections.pop()
        except IndexError:
            fd = client.connect(self._hello, wire.UNITS_VIEW)
            connection = UnitConnection(fd, self.address, self._limits.unit_timeout_s)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._unit_connections.append(connection)
        if client is not self._client:
            self._hang_up()  # it was closed meanwhile

    def _hang_up(self) -> None:
        while self._unit_connections:
            self._unit_connections.pop().close()

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        with self._unit_connection() as connection:
            connection.read(image, offset_bytes, unit)

    def hash_units(
        self,
        image: str,
        offsets_bytes: Sequence[int],
        unit: NativeUnit,
        *,
        shape_only: bool = False,
    ) -> Sequence[int]:
        request = pb.PeerHashUnits(image=image, offsets_bytes=offsets_bytes, shape_only=shape_only)
        hashes: list[int] = list(self._slow("HashUnits", request).hashes)
        if len(hashes) != len(offsets_bytes):
            raise ReplicaIO(
                self.address, f"sent {len(hashes)} hashes of {len(offsets_bytes)} units"
            )
        return hashes

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        with self._unit_connection() as connection:
            return min(connection.write(image, offset_bytes, unit, empty=empty), UNIT_BYTES)

    def sync_units(self, image: str) -> None:
        self._slow("SyncUnits", pb.PeerLayer(image=image))

    def lend_layer(self, image: str) -> None:
        self._slow("LendLayer", pb.PeerLayer(image=image))

    def return_layers(self) -> None:
        self._quick("ReturnLayers")

    def read_progress(self) -> RebuildProgress:
        return RebuildProgress.parse(self._quick("ReadProgress").data)

    def write_progress(self, progress: RebuildProgress) -> None:
        self._slow("WriteProgress", pb.PeerData(data=progress.encode()))

    def forget_progress(self) -> None:
        self._slow("ForgetProgress")

    def prepare_promotion(self) -> None:
        self._promoting = True
        self._slow("PreparePromotion")

    def start_promotion(self) -> None:
        self._quick("StartPromotion")
        self._promoting = False

    def finish_promotion(self) -> None:
        """The replica has done that; what it serves can be read."""

    def abandon_promotion(self) -> None:
        if self._promoting:
            self._promoting = False
            self._quick("AbandonPromotion")


def why_peer_failed(peer: NativePeer, limits: RemoteLimits, error: int, offset_bytes: int) -> str:
    """What to say of the failure of a peer that the core reported; ``error`` is an errno."""
    end = PeerEnd(peer.statistics().end_reason)
    if end is PeerEnd.NONE:
        return f"I/O at {offset_bytes}: {os.strerror(error)}"
    return _ENDS.get(end, "its data connection failed: {error}").format(
        error=os.strerror(error), timeout_s=limits.reply_timeout_ms / 1000
    )


def _snapshot(name: str, *, created: str = "") -> pb.PeerSnapshot:
    return pb.PeerSnapshot(disk=pb.PeerDisk(name=snapshot_image(name), created=created))


class _ViewPeer(NativePeer):
    """The peer of a snapshot that the replica has opened to be read: both are closed together."""

    def __init__(
        self,
        member: RemoteMember,
        view: int,
        engine: NativeEngine,
        size_bytes: int,
        reply_timeout_ms: int,
    ) -> None:
        super().__init__(engine, size_bytes, PEER_OURS, reply_timeout_ms)
        self._member = member
        self._view = view

    def close(self) -> None:
        """Close its connections, and the view. Blocking."""
        if not self.closed:
            super().close()
            self._member.close_view(self._view)
