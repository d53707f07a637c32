"""The checked-in generated code is what the .proto files give."""

from __future__ import annotations

from pathlib import Path

import pytest

import lhblock.rpc
from lhblock.rpc import CONTROLLER, HEALTH, VOLUME, methods
from lhblock.rpc.generate import generate
from lhblock.rpc.generated import controller_pb2 as pb

GENERATED = Path(lhblock.rpc.__file__).parent / "generated"


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools makes the code")
    made = {path.name: path.read_bytes() for path in generate(tmp_path / "generated")}
    kept = {path.name: path.read_bytes() for path in GENERATED.iterdir() if path.is_file()}
    assert made == kept, "run make proto"


@pytest.mark.parametrize(
    ("service", "count"),
    [(CONTROLLER, 24), (HEALTH, 3), (VOLUME, 9)],
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
