"""``lhblock.v1.PeerService``: one of our own engines drives the replica of this process.

Nearly every call is one method of the engine's ``Member``, done here on a directory. What comes in
is checked before it becomes a file name or an offset; the order of calls is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import structlog
import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from lhblock import __version__
from lhblock.engine import (
    MERGE_STEP_BYTES,
    UNIT_BYTES,
    Alignment,
    HostedReplica,
    LayerDamage,
    LocalMember,
    MergeKind,
    NativeUnit,
    Witness,
    run_copy,
    run_fence,
    wire,
)
from lhblock.errors import LhblockError, ReplicaIO, ReplicaLocked, ReplicaStale, UsageError
from lhblock.instance._replica import Replica
from lhblock.replica import Generation, MalformedError, RebuildProgress, snapshot_of
from lhblock.rpc import Call, CallFailed, Handler, Handlers
from lhblock.rpc.generated import peer_pb2 as pb

ENGINE_CHARS_MAX: Final = 64
GONE_WAIT_S: Final = 2.0
GONE_POLL_S: Final = 0.02

_MERGES: Final[Mapping[str, MergeKind]] = {
    "prune": "prune",
    "merge-up": "merge-up",
    "merge-down": "merge-down",
}

_log = structlog.get_logger("lhblock.instance")

Act = Callable[[LocalMember, Any], Message | None]


@dataclass(frozen=True)
class DataAddress:
    """Where data connections go: a port of the host of the control calls, or a Unix socket."""

    protocol: Literal["tcp", "unix"]
    port: int = 0
    socket: Path | None = None


class PeerService:
    """The handlers. `handlers` is the table for `lhblock.rpc.serve_rpc`.

    Args:
      volume: whose replica it is said to be; may be empty.
      data: called for each Hello.
    """

    def __init__(self, replica: Replica, *, volume: str, data: Callable[[], DataAddress]) -> None:
        self._replica = replica
        self._volume = volume
        self._data = data

    @property
    def handlers(self) -> Handlers:
        plain: dict[str, Act] = {
            "Sync": lambda member, _: member.sync(),
            "LayerSizes": lambda member, _: pb.PeerSizes(
                layers=wire.encode_sizes(member.layer_sizes())
            ),
            "ReadActivity": lambda member, _: pb.PeerData(data=member.read_activity()),
            "MakeActivity": lambda member, request: member.make_activity(
                wire.decode_uuid(request.value)
            ),
            "ForgetActivity": lambda member, _: member.forget_activity(),
            "SettleSnapshot": lambda member, _: member.settle_snapshot(),
            "AbandonHead": _abandon_head,
            "BeginMerge": lambda member, request: pb.PeerMergeToken(
                token=member.begin_merge(
                    _image(member, request.lower), _image(member, request.upper)
                )
            ),
            "MergeOffsets": lambda member, request: wire.encode_steps(
                member.merge_offsets(_image(member, request.image)), MERGE_STEP_BYTES
            ),
            "MergeStep": _merge_step,
            "FinishMerge": _finish_merge,
            "Checksum": lambda member, request: pb.PeerText(
                value=member.checksum(_image(member, request.image))
            ),
            "BeginRepair": lambda member, request: member.begin_repair(
                _image(member, request.image)
            ),
            "RepairLayer": lambda member, request: member.repair_layer(
                _image(member, request.image), wire.count(request.offset_bytes), request.data
            ),
            "FinishRepair": lambda member, request: member.finish_repair(
                _image(member, request.image), wire.decode_checksum(request.record)
            ),
            "OpenUnits": lambda member, request: member.open_units(_image(member, request.image)),
            "LendLayer": lambda member, request: member.lend_layer(_image(member, request.image)),
            "ReturnLayers": lambda member, _: member.return_layers(),
            "PreparePromotion": lambda member, _: member.prepare_promotion(),
            "AbandonPromotion": lambda member, _: member.abandon_promotion(),
            "PrepareSnapshot": _prepare_snapshot,
            "PrepareRevert": _prepare_revert,
        }
        records: dict[str, Act] = {
            "MarkRemoved": lambda member, request: member.mark_removed(
                snapshot_of(request.disk.name)
            ),
            "FinishSnapshot": lambda member, request: member.finish_snapshot(
                wire.decode_disk(request.disk), size_bytes=wire.count(request.size_bytes)
            ),
            "UndoRevert": lambda member, request: member.undo_revert(
                snapshot_of(request.disk.name), created=request.disk.created
            ),
            "RemoveLeaf": lambda member, request: member.remove_leaf(_image(member, request.image)),
            "Align": _align,
        }
        fence: dict[str, Act] = {
            "WriteGeneration": lambda member, request: member.write_generation(
                Generation.parse(request.generation)
            ),
            "NoteRepaired": lambda member, _: member.note_repaired(),
            "SetRebuilding": lambda member, request: member.set_rebuilding(request.value),
        }
        # These read or copy for long, and nothing else waits for them.
        copy: dict[str, Act] = {
            "HashLayer": lambda member, request: member.hash_layer(
                _image(member, request.image), rehash=request.rehash
            ),
            "VerifyLayer": _verify,
            "LayerExtents": _extents,
            "ReadLayer": lambda member, request: pb.PeerData(
                data=member.read_layer(
                    _image(member, request.image),
                    wire.count(request.offset_bytes),
                    min(request.length_bytes, wire.DATA_BYTES_MAX),
                )
            ),
            "LayerStamp": lambda member, request: wire.encode_stamp(
                member.layer_stamp(_image(member, request.image))
            ),
            "OccupiedUnits": lambda member, request: wire.encode_steps(
                member.occupied_units(_image(member, request.image)), UNIT_BYTES
            ),
            "BeginUnits": lambda member, request: member.begin_units(
                _image(member, request.image), wire.count(request.length_bytes)
            ),
            "HashUnits": _hash_units,
            "SyncUnits": lambda member, request: member.sync_units(_image(member, request.image)),
            "ReadProgress": lambda member, _: pb.PeerData(data=member.read_progress().encode()),
            "WriteProgress": lambda member, request: member.write_progress(
                RebuildProgress.parse(request.data)
            ),
            "ForgetProgress": lambda member, _: member.forget_progress(),
        }
        special: dict[str, Handler] = {
            "Create": self._create,
            "Uncreate": self._uncreate,
            "Open": self._open,
            "MakeTarget": self._make_target,
            "OpenTarget": self._open_target,
            "Close": self._close,
            "LeaveBehind": self._leave_behind,
            "OpenStore": self._open_store,
            "ReopenStore": self._reopen_store,
            "OpenView": self._open_view,
            "CloseView": self._close_view,
            "CommitSnapshot": self._commit_snapshot,
            "CommitRevert": self._commit_revert,
            "StartPromotion": self._start_promotion,
        }
        return {
            "Hello": self._hello,
            **{name: _told(handler) for name, handler in special.items()},
            **{name: _told(partial(self._change, act)) for name, act in plain.items()},
            **{name: _told(partial(self._change_records, act)) for name, act in records.items()},
            **{name: _told(partial(self._fence, act)) for name, act in fence.items()},
            **{name: _told(partial(self._copy, act)) for name, act in copy.items()},
        }

    # ---- Whose call it is.

    def _engine_id(self, call: Call) -> str:
        engine_id = call.value(wire.ENGINE_KEY)
        if not engine_id or len(engine_id) > ENGINE_CHARS_MAX:
            raise CallFailed("INVALID_ARGUMENT", f"no {wire.ENGINE_KEY} in the call's metadata")
        return engine_id

    def _hosted(self, call: Call) -> HostedReplica:
        """The session of the caller."""
        hosted = self._replica.hosted
        if hosted is None:
            raise ReplicaIO(self._replica.path, "is not open; its process was started anew")
        if hosted.engine_id != self._engine_id(call):
            raise ReplicaLocked(self._replica.path, "another engine has opened it")
        return hosted

    async def _refuse_in_use(self, call: Call) -> None:
        """Another engine that is connected keeps it; one that is not has gone.

        One that was killed a moment ago may not be known to have gone.
        """
        hosted = self._replica.hosted
        if hosted is None or hosted.engine_id == self._engine_id(call):
            return
        with trio.move_on_after(GONE_WAIT_S):
            # Nobody tells when the last one ends, and this is asked once in a while only.
            while hosted.connections:  # noqa: ASYNC110
                await trio.sleep(GONE_POLL_S)
        if hosted.connections:
            raise ReplicaLocked(
                self._replica.path, f"is in use by engine {hosted.engine_id}; stop that one first"
            )

    # ---- Kinds of calls.

    async def _change(self, act: Act, request: Any, call: Call) -> Message:
        hosted = self._hosted(call)
        return await hosted.change(lambda: act(hosted.member, request)) or Empty()

    async def _change_records(self, act: Act, request: Any, call: Call) -> Message:
        hosted = self._hosted(call)

        def change() -> pb.PeerRecords:
            act(hosted.member, request)
            return wire.encode_records(hosted.member.records)

        return await hosted.change(change)

    async def _fence(self, act: Act, request: Any, call: Call) -> Message:
        hosted = self._hosted(call)
        return await hosted.run(run_fence, lambda: act(hosted.member, request)) or Empty()

    async def _copy(self, act: Act, request: Any, call: Call) -> Message:
        hosted = self._hosted(call)
        return await hosted.run(run_copy, lambda: act(hosted.member, request)) or Empty()

    # ---- The session.

    async def _hello(self, _request: Empty, _call: Call) -> pb.PeerHello:
        # Without the lock: whoever opens or closes it may take long.
        blank = False
        hosted = self._replica.hosted
        if hosted is not None and hosted.member.opened:
            state, size_bytes = "open", hosted.member.records.size_bytes
        elif self._replica.opened is not None:
            state, size_bytes = self._replica.state, self._replica.opened.size_bytes
        else:
            found, meta = await self._replica.look()
            state, size_bytes = found, meta.size_bytes
            if state == "closed":
                blank = await self._replica.is_blank()
        data = self._data()
        witness = await trio.to_thread.run_sync(_witness, self._replica.path)
        return pb.PeerHello(
            version=__version__,
            state=state,
            size_bytes=size_bytes,
            data_protocol=data.protocol,
            data_socket="" if data.socket is None else str(data.socket),
            data_port=data.port,
            volume_name=self._volume,
            blank=blank,
            boot_id=witness.boot_id,
            place=witness.place,
            up_s=witness.up_s,
        )

    async def _create(self, request: pb.PeerCreate, _call: Call) -> Message:
        async with self._replica.lock:
            await self._replica.create_as(
                wire.count(request.size_bytes),
                Generation.parse(request.generation),
                encrypted=request.encrypted,
            )
        return Empty()

    async def _uncreate(self, _request: Empty, _call: Call) -> Message:
        async with self._replica.lock:
            await self._replica.uncreate()
        return Empty()

    async def _open(self, request: pb.PeerOpen, call: Call) -> Message:
        return await self._host(
            call, lambda member: member.open(read_only=request.read_only), request.read_only
        )

    async def _make_target(self, request: pb.PeerTarget, call: Call) -> Message:
        like = Generation.parse(request.like)

        def make(member: LocalMember) -> None:
            member.make_target(
                like, size_bytes=wire.count(request.size_bytes), encrypted=request.encrypted
            )

        async with self._replica.lock:
            await self._refuse_in_use(call)
            await self._replica.with_member(make)
        return Empty()

    async def _open_target(self, request: pb.PeerTarget, call: Call) -> Message:
        like = Generation.parse(request.like)

        def open_target(member: LocalMember) -> None:
            member.open_target(
                like,
                size_bytes=wire.count(request.size_bytes),
                others=list(request.others),
                force=request.force,
            )

        return await self._host(call, open_target, False)

    async def _leave_behind(self, request: pb.PeerGeneration, call: Call) -> Message:
        theirs = Generation.parse(request.generation)

        def record(member: LocalMember) -> None:
            member.open()
            try:
                generation = member.records.generation
                if (
                    generation is None
                    or generation.volume_id != theirs.volume_id
                    or theirs.knows(generation.counter, generation.generation) is not True
                ):
                    raise ReplicaStale(member.path, "another engine has opened it since")
                if generation.generation != theirs.generation:
                    member.write_generation(replace(theirs, replica_id=generation.replica_id))
            finally:
                member.close(clean=False)

        async with self._replica.lock:
            hosted = self._replica.hosted
            if hosted is not None and hosted.engine_id != self._engine_id(call):
                raise ReplicaLocked(
                    self._replica.path, f"engine {hosted.engine_id} has opened it since"
                )
            await self._replica.end_hosting(lambda member: member.close(clean=False))
            await self._replica.with_member(record)
        return Empty()

    async def _host(
        self, call: Call, open_member: Callable[[LocalMember], None], read_only: bool
    ) -> Message:
        async with self._replica.lock:
            await self._refuse_in_use(call)
            hosted = await self._replica.host(
                self._engine_id(call), open_member, read_only=read_only
            )
            return wire.encode_records(hosted.member.records)

    async def _close(self, request: pb.PeerClose, call: Call) -> Message:
        def close(member: LocalMember) -> None:
            if request.synced and member.has_store:
                member.close_synced()
            else:
                member.close(clean=request.clean)

        async with self._replica.lock:
            self._hosted(call)
            await self._replica.end_hosting(close)
        return Empty()

    async def _open_store(self, request: pb.PeerOpenStore, call: Call) -> Message:
        await self._hosted(call).open_store(write_only=request.write_only)
        return Empty()

    async def _reopen_store(self, _request: Empty, call: Call) -> Message:
        hosted = self._hosted(call)
        await hosted.switch(hosted.member.open_store)
        return Empty()

    async def _open_view(self, request: pb.PeerView, call: Call) -> Message:
        hosted = self._hosted(call)
        images = [_image(hosted.member, image) for image in request.images]
        return pb.PeerViewId(id=await hosted.open_view(images, wire.count(request.size_bytes)))

    async def _close_view(self, request: pb.PeerViewId, call: Call) -> Message:
        await self._hosted(call).close_view(request.id)
        return Empty()

    # ---- Switches.

    async def _commit_snapshot(self, request: pb.PeerSize, call: Call) -> Message:
        hosted = self._hosted(call)
        size_bytes = wire.count(request.bytes)
        await hosted.switch(lambda: hosted.member.commit_snapshot(size_bytes))
        return wire.encode_records(hosted.member.records)

    async def _commit_revert(self, _request: Empty, call: Call) -> Message:
        hosted = self._hosted(call)
        await hosted.switch(hosted.member.commit_revert)
        return wire.encode_records(hosted.member.records)

    async def _start_promotion(self, _request: Empty, call: Call) -> Message:
        hosted = self._hosted(call)

        def promote() -> None:
            # At once, and not when the engine has recorded it: a copy that is still marked can be
            # read here, but nobody asks it to.
            hosted.member.start_promotion()
            hosted.member.finish_promotion()

        await hosted.switch(promote)
        return Empty()


def _told(handler: Handler) -> Handler:
    """Errors of ours go to the engine as what they are."""

    async def handle(request: Any, call: Call) -> Message:
        try:
            return await handler(request, call)
        except MalformedError as error:
            raise CallFailed("INVALID_ARGUMENT", f"the request {error}") from error
        except (LhblockError, OSError) as error:
            raise CallFailed("ABORTED", wire.encode_error(error)) from error

    return handle


def _image(member: LocalMember, name: str) -> str:
    """The name of a layer there is: it becomes a file name."""
    if name not in member.records.disks:
        raise UsageError(f"replica {member.path} has no layer {name!r:.300}")
    return name


def _prepare_snapshot(member: LocalMember, request: pb.PeerSnapshot) -> None:
    disk = wire.decode_disk(request.disk)
    member.abandon_head()  # of a call that the engine did not wait for
    member.prepare_snapshot(
        disk.snapshot,
        user_created=disk.user_created,
        created=disk.created,
        labels=disk.labels,
        size_bytes=wire.count(request.size_bytes) or None,
    )


def _prepare_revert(member: LocalMember, request: pb.PeerSnapshot) -> None:
    member.abandon_head()
    member.prepare_revert(snapshot_of(request.disk.name), created=request.disk.created)


def _abandon_head(member: LocalMember, _request: Empty) -> Message:
    member.abandon_head()
    return pb.PeerFlag(value=member.switched)


def _merge_step(member: LocalMember, request: pb.PeerMerge) -> Message:
    done = member.merge_step(
        _kind(request.kind),
        _image(member, request.lower),
        _image(member, request.upper),
        wire.count(request.offset_bytes),
        request.token,
    )
    return pb.PeerFlag(value=done)


def _finish_merge(member: LocalMember, request: pb.PeerMerge) -> Message:
    done = member.finish_merge(
        _kind(request.kind),
        _image(member, request.lower),
        _image(member, request.upper),
        request.token,
    )
    return pb.PeerMerged(done=done, records=wire.encode_records(member.records))


def _kind(text: str) -> MergeKind:
    if text not in _MERGES:
        raise MalformedError(f"has the merge {text!r:.40}, of which there is none")
    return _MERGES[text]


def _align(member: LocalMember, request: pb.PeerAlign) -> None:
    source = {disk.name: disk for disk in map(wire.decode_disk, request.source)}
    sizes = {size.image: wire.count(size.image_bytes) for size in request.sizes}
    if request.newest not in source or source.keys() - sizes.keys():
        raise MalformedError("has layers that do not go together")
    member.align(
        Alignment(frozenset(request.kept), request.head_becomes),
        source,
        newest=request.newest,
        sizes=sizes,
        size_bytes=wire.count(request.size_bytes),
        created=request.created,
    )


def _verify(member: LocalMember, request: pb.PeerLayer) -> Message:
    checked = member.verify_layer(_image(member, request.image))
    if checked is None:
        return pb.PeerVerified()
    if isinstance(checked, LayerDamage):
        return pb.PeerVerified(record=wire.encode_checksum(checked.record), found=checked.found)
    return pb.PeerVerified(record=wire.encode_checksum(checked))


def _extents(member: LocalMember, request: pb.PeerRange) -> Message:
    reply = pb.PeerExtents()
    for extent in member.layer_extents(_image(member, request.image)):
        if extent.offset_bytes + extent.length_bytes > request.offset_bytes:
            reply.bounds_bytes.extend((extent.offset_bytes, extent.length_bytes))
            if len(reply.bounds_bytes) >= 2 * wire.EXTENTS_MAX:
                break
    return reply


def _hash_units(member: LocalMember, request: pb.PeerHashUnits) -> Message:
    if len(request.offsets_bytes) > wire.UNITS_MAX:
        raise MalformedError(f"has more than {wire.UNITS_MAX} units")
    offsets = [wire.count(offset) for offset in request.offsets_bytes]
    with NativeUnit() as unit:
        hashes = member.hash_units(
            _image(member, request.image), offsets, unit, shape_only=request.shape_only
        )
    return pb.PeerHashes(hashes=hashes)


def _witness(directory: Path) -> Witness:
    try:
        return Witness.of(directory)
    except OSError:  # there is no directory yet
        return Witness("", "", 0.0, 0.0)
