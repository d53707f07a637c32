"""PeerService against callers that are confused, hostile, or somebody else."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from lhblock.engine import EngineOptions, open_engine, wire
from lhblock.errors import (
    LhblockError,
    NativeError,
    ReplicaDamaged,
    ReplicaIO,
    ReplicaNoExtents,
    UsageError,
)
from lhblock.instance._peer_service import DataAddress, PeerService
from lhblock.instance._replica import Replica
from lhblock.replica import ReplicaDirectory, new_set
from lhblock.rpc import PEER, Call, CallFailed, method, methods
from lhblock.rpc.generated import peer_pb2 as pb

SIZE_BYTES = 1 << 20
TIMEOUT_S = 60.0
HEAD = "volume-head-000.img"
CREATED = "2026-11-27T16:00:00Z"


class Caller:
    """An engine, as far as the service can tell."""

    def __init__(self, service: PeerService, engine_id: str) -> None:
        self._handlers = service.handlers
        self._metadata = {wire.ENGINE_KEY: (engine_id,)} if engine_id else {}

    async def call(self, name: str, request: Any = None) -> Any:
        call = Call(method(PEER, name), self._metadata)
        with trio.fail_after(TIMEOUT_S):
            return await self._handlers[name](request or Empty(), call)

    async def refused(self, name: str, request: Any = None) -> str:
        with pytest.raises(CallFailed) as caught:
            await self.call(name, request)
        if caught.value.code == "ABORTED":
            return str(json.loads(str(caught.value))["sentence"])
        assert caught.value.code == "INVALID_ARGUMENT"
        return str(caught.value)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[PeerService]:
    ReplicaDirectory.create(tmp_path / "r", size_bytes=SIZE_BYTES)  # as the process makes it
    async with (
        open_engine(EngineOptions(queues=1, workers=2, driver="pool")) as engine,
        trio.open_nursery() as nursery,
    ):
        replica = Replica(engine, tmp_path / "r", nursery, volume="db")
        yield PeerService(replica, volume="db", data=lambda: DataAddress("tcp", port=1))
        await replica.end_hosting(lambda member: member.close(clean=False))


@pytest.fixture
async def engine(service: PeerService) -> Caller:
    caller = Caller(service, str(uuid.uuid4()))
    await caller.call("Open", pb.PeerOpen())
    await caller.call("OpenStore", pb.PeerOpenStore())
    return caller


def test_every_call_has_a_handler() -> None:
    service = PeerService(None, volume="", data=lambda: DataAddress("tcp"))  # type: ignore[arg-type]
    assert set(service.handlers) == set(methods(PEER))


async def test_nothing_can_be_asked_before_it_is_open_or_without_a_name(
    service: PeerService,
) -> None:
    assert "is not open" in await Caller(service, "e").refused("Sync")
    assert "no lhblock-engine" in await Caller(service, "").refused("Open", pb.PeerOpen())
    assert "no lhblock-engine" in await Caller(service, "e" * 65).refused("Open", pb.PeerOpen())
    hello = await Caller(service, "").call("Hello")
    assert (hello.state, hello.size_bytes, hello.blank) == ("closed", SIZE_BYTES, True)


async def test_session_is_its_engines(service: PeerService, engine: Caller) -> None:
    other = Caller(service, "other")
    for name in ("Sync", "LayerSizes", "Close", "PrepareSnapshot"):
        request = method(PEER, name).request()
        assert "another engine has opened it" in await other.refused(name, request)
    # Nobody is connected, so the first one has gone.
    await other.call("Open", pb.PeerOpen())
    assert "another engine has opened it" in await engine.refused("Sync")


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("BeginMerge", pb.PeerMerge(lower="../secret", upper=HEAD)),
        ("MergeStep", pb.PeerMerge(kind="prune", lower=HEAD, upper="/etc/passwd")),
        ("ReadLayer", pb.PeerRange(image="../../etc/passwd", length_bytes=10)),
        ("RepairLayer", pb.PeerWrite(image="volume.meta", data=b"x")),
        ("VerifyLayer", pb.PeerLayer(image="lhblock.generation")),
        ("OccupiedUnits", pb.PeerLayer(image="")),
        ("LendLayer", pb.PeerLayer(image="volume-snap-x.img")),
        ("OpenView", pb.PeerView(images=["volume-snap-x.img"], size_bytes=SIZE_BYTES)),
        ("RemoveLeaf", pb.PeerLayer(image="x")),
    ],
)
async def test_names_that_are_no_layer_become_no_file(
    engine: Caller, name: str, request_: Any
) -> None:
    assert "has no layer" in await engine.refused(name, request_)


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        ("WriteGeneration", pb.PeerGeneration(generation=b"{}"), "cannot be understood"),
        ("MakeTarget", pb.PeerTarget(like=b"", size_bytes=SIZE_BYTES), "cannot be understood"),
        ("FinishSnapshot", pb.PeerSnapshot(disk=pb.PeerDisk(name="x/y")), "names no image"),
        (
            "PrepareSnapshot",
            pb.PeerSnapshot(disk=pb.PeerDisk(name="volume-snap-../x.img", created=CREATED)),
            "names no image",
        ),
        ("Align", pb.PeerAlign(newest="volume-snap-a.img"), "do not go together"),
        ("HashUnits", pb.PeerHashUnits(image=HEAD, offsets_bytes=[0] * 65), "more than 64"),
        ("ReadLayer", pb.PeerRange(image=HEAD, offset_bytes=1 << 63), "where a length belongs"),
        ("MergeStep", pb.PeerMerge(kind="sideways", lower=HEAD, upper=HEAD), "there is none"),
        ("OpenStore", pb.PeerOpenStore(), "has a store open"),
    ],
)
async def test_requests_that_make_no_sense_are_refused(
    engine: Caller, name: str, request_: Any, says: str
) -> None:
    assert says in await engine.refused(name, request_)
    await engine.call("Sync")


async def test_head_that_nobody_waited_for_is_abandoned_by_the_next(
    tmp_path: Path, engine: Caller
) -> None:
    def snapshot(name: str) -> pb.PeerSnapshot:
        return pb.PeerSnapshot(disk=pb.PeerDisk(name=f"volume-snap-{name}.img", created=CREATED))

    await engine.call("PrepareSnapshot", snapshot("a"))
    await engine.call("PrepareSnapshot", snapshot("b"))
    records = await engine.call("CommitSnapshot", pb.PeerSize(bytes=SIZE_BYTES))
    assert {disk.name for disk in records.disks} == {"volume-snap-b.img", "volume-head-001.img"}
    assert (await engine.call("AbandonHead")).value is True
    await engine.call("SettleSnapshot")
    await engine.call("Close", pb.PeerClose(clean=True, synced=True))
    with ReplicaDirectory.open(tmp_path / "r", read_only=True) as directory:
        assert not directory.was_dirty


async def test_replica_is_made_and_unmade_only_while_it_has_nothing(
    tmp_path: Path, service: PeerService
) -> None:
    caller = Caller(service, "e")
    (generation,) = new_set(1, time=CREATED)
    create = pb.PeerCreate(size_bytes=SIZE_BYTES, generation=generation.encode())
    await caller.call("Create", create)  # over the blank one that is there
    with ReplicaDirectory.open(tmp_path / "r", read_only=True) as directory:
        assert directory.generation is not None
        assert directory.generation.replica_id == generation.replica_id
    create.size_bytes = 2 * SIZE_BYTES
    assert await caller.refused("Create", create)
    await caller.call("Uncreate")
    assert not (tmp_path / "r" / "volume.meta").exists()
    await caller.call("Create", create)
    with (tmp_path / "r" / HEAD).open("r+b") as file:
        file.write(b"data")
    assert "has been written to" in await caller.refused("Uncreate")
    assert (tmp_path / "r" / HEAD).exists()


@pytest.mark.parametrize(
    "error",
    [
        ReplicaDamaged("/d", "its records contradict each other"),
        ReplicaNoExtents("/d", "no lists of extents"),
        NativeError("merge", 28),
        UsageError("no such thing"),
    ],
)
def test_errors_arrive_as_they_left(error: LhblockError) -> None:
    arrived = wire.decode_error("tcp://h:1", wire.encode_error(error))
    assert type(arrived) is type(error)
    if isinstance(error, NativeError):
        assert str(arrived) == str(error)
    else:
        assert getattr(arrived, "sentence", str(arrived)) == getattr(error, "sentence", str(error))


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", '{"kind": 5}', '{"kind": "NativeError", "errno": -1}', "[" * 9999],
)
def test_errors_that_cannot_be_understood_are_errors_all_the_same(text: str) -> None:
    assert isinstance(wire.decode_error("tcp://h:1", text), ReplicaIO)


@pytest.mark.parametrize(
    "records",
    [
        pb.PeerRecords(),
        pb.PeerRecords(size_bytes=4097, head=HEAD, disks=[pb.PeerDisk(name=HEAD)]),
        pb.PeerRecords(size_bytes=4096, head="volume-head-001.img", disks=[pb.PeerDisk(name=HEAD)]),
        pb.PeerRecords(
            size_bytes=4096, head=HEAD, disks=[pb.PeerDisk(name=HEAD, parent="volume-snap-a.img")]
        ),
        pb.PeerRecords(size_bytes=4096, head=HEAD, disks=[pb.PeerDisk(name="../" + HEAD)]),
        pb.PeerRecords(
            size_bytes=4096, head=HEAD, disks=[pb.PeerDisk(name=HEAD)], generation=b"damaged"
        ),
        pb.PeerRecords(
            size_bytes=4096,
            head=HEAD,
            disks=[
                pb.PeerDisk(name=HEAD),
                pb.PeerDisk(name="volume-snap-a.img", parent="volume-snap-b.img"),
                pb.PeerDisk(name="volume-snap-b.img", parent="volume-snap-a.img"),
            ],
        ),
    ],
    ids=["empty", "size", "head", "parent", "name", "generation", "circle"],
)
def test_records_that_make_no_sense_are_doubted(records: pb.PeerRecords) -> None:
    with pytest.raises(ValueError, match=r"has|cannot"):
        wire.decode_records("tcp://h:1", records)


def test_steps_are_in_order_and_within_the_layer() -> None:
    steps = [0, 1 << 20, 2 << 20, 5 << 20]
    message = wire.encode_steps(steps, 1 << 20)
    assert list(message.runs) == [0, 3, 5, 1]
    assert wire.decode_steps(message, 1 << 20, 6 << 20) == steps
    for runs in ([0], [0, 7], [3, 1, 1, 1], [1 << 62, 1]):
        with pytest.raises(ValueError, match="steps"):
            wire.decode_steps(pb.PeerSteps(runs=runs), 1 << 20, 6 << 20)
