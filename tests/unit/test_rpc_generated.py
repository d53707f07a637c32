"""The checked-in generated code is what the .proto files give."""

from __future__ import annotations

from pathlib import Path

import pytest

import lhblock.rpc
from lhblock.rpc import CONTROLLER, HEALTH, REPLICA, VOLUME, methods
from lhblock.rpc.generate import generate
from lhblock.rpc.generated import controller_pb2 as pb
from lhblock.rpc.generated import replica_pb2

GENERATED = Path(lhblock.rpc.__file__).parent / "generated"


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools makes the code")
    made = {path.name: path.read_bytes() for path in generate(tmp_path / "generated")}
    kept = {path.name: path.read_bytes() for path in GENERATED.iterdir() if path.is_file()}
    assert made == kept, "run make proto"


@pytest.mark.parametrize(
    ("service", "count"),
    [(CONTROLLER, 24), (HEALTH, 3), (REPLICA, 18), (VOLUME, 12)],
)
def test_every_method_is_declared(service: str, count: int) -> None:
    assert len(methods(service)) == count


# Read back from a running controller of Longhorn: what its clients put on the wire.
@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("Volume", "name size replicaCount endpoint frontend frontendState isExpanding"
         " last_expansion_error last_expansion_failed_at unmap_mark_snap_chain_removed"
         " snapshot_max_count snapshot_max_size"),
        ("VolumeSnapshotRequest", "name labels freezeFilesystem"),
        ("VolumeStartRequest", "replicaAddresses size currentSize"),
        ("ControllerReplica", "address mode"),
        ("ReplicaAddress", "address instanceName"),
        ("Metrics", "readThroughput writeThroughput readLatency writeLatency readIOPS writeIOPS"),
        ("VersionOutput", "version gitCommit buildDate cliAPIVersion cliAPIMinVersion"
         " controllerAPIVersion controllerAPIMinVersion dataFormatVersion dataFormatMinVersion"),
    ],
)  # fmt: skip
def test_field_numbers_are_those_of_longhorn(message: str, fields: str) -> None:
    found = pb.DESCRIPTOR.message_types_by_name[message].fields
    numbered = {field.number: field.name for field in found}
    assert numbered == dict(enumerate(fields.split(), start=1))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("Replica", "dirty rebuilding head parent size sector_size backing_file state chain disks"
         " remain_snapshots revision_counter last_modify_time head_file_size"
         " revision_counter_disabled unmap_mark_disk_chain_removed snapshot_count_usage"
         " snapshot_size_usage snapshot_count_total"),
        ("DiskInfo", "name parent children removed user_created created size labels"),
        ("ReplicaOpenRequest", "is_upgrade expected_backend_size"),
        ("ReplicaSnapshotRequest", "name user_created created labels"),
        ("ReplicaRevertRequest", "name created"),
        ("DiskRemoveRequest", "name force"),
        ("DiskReplaceRequest", "target source"),
        ("PrepareRemoveAction", "action source target"),
    ],
)  # fmt: skip
def test_field_numbers_of_the_replica_are_those_of_longhorn(message: str, fields: str) -> None:
    found = replica_pb2.DESCRIPTOR.message_types_by_name[message].fields
    numbered = {field.number: field.name for field in found}
    assert numbered == dict(enumerate(fields.split(), start=1))
