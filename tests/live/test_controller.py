"""``lhblock controller`` and ``lhblock replica``: processes that talk over TCP only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from lhblock.errors import ControlError
from lhblock.rpc import CONTROLLER, RpcClient
from lhblock.rpc.generated import controller_pb2 as pb
from tests.live.hosts import Host, options, start_hosts, wait_modes
from tests.live.serving import MIB, TIMEOUT_S, ToolFailed, cli, cli_json, command, nbdsh, tool

pytestmark = pytest.mark.live

SIZE = "32M"


class Controller:
    """A controller process that says that it is ready, and a client of its control service."""

    def __init__(self, process: subprocess.Popen[str], volume: str) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=TIMEOUT_S)[1]
        self.process = process
        self.ready: dict[str, Any] = json.loads(line)
        self.volume = volume
        self.socket = self.ready["sockets"][0]
        self.client = RpcClient(self.ready["controller"], metadata={"volume-name": volume})

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.volume}?socket={self.socket}"

    def call(self, name: str, request: Message | None = None) -> Any:
        return self.client.call(CONTROLLER, name, request or Empty(), timeout_s=TIMEOUT_S)

    def modes(self) -> dict[str, str]:
        return {
            item.address.address: pb.ReplicaMode.Name(item.mode)
            for item in self.call("ReplicaList").replicas
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(number)
        self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode


def start(data_dir: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*before, "controller", *arguments, "--listen", "127.0.0.1:0", "--json"),
        env=os.environ | {"LHBLOCK_DATA_DIR": str(data_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def controller(
    data_dir: Path, *arguments: str, before: tuple[str, ...] = ()
) -> Iterator[Controller]:
    process = start(data_dir, "db", *arguments, before=before)
    try:
        yield Controller(process, "db")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Three replica processes, each with a blank replica as `--size` makes it."""
    with start_hosts(tmp_path, 3, "--size", SIZE) as started:
        yield started


def test_three_replicas_from_the_first_start_to_the_last(tmp_path: Path, hosts: list[Host]) -> None:
    data, image, back = tmp_path / "data", tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(32 * MIB))
    addresses = [host.address for host in hosts]
    with controller(data, "--size", SIZE, "--frontend", "nbd", *options(hosts)) as first:
        assert first.modes() == dict.fromkeys(addresses, "RW")
        tool("nbdcopy", "--flush", str(image), first.uri)
        cli(data, "snapshot", "create", "db", "full")
        hosts[1].kill()
        nbdsh(first.uri, "h.zero(1 << 20, 0)", "h.flush()")
        assert wait_modes(data, "RW", "ERR", "RW")[addresses[1]]["error"]
        assert cli_json(data, "volume", "info", "db")["state"] == "degraded"
        hosts[1].start()
        wait_modes(data, "RW", "RW", "RW")
        cli(data, "volume", "expand", "db", "64M")
        assert first.call("VolumeGet").size == 64 * MIB
        assert first.stop() == 0
    for host in hosts:
        host.kill()
        host.start()
    with controller(data, "--frontend", "nbd", *options(hosts)) as second:
        assert second.modes() == dict.fromkeys(addresses, "RW")
        tool("nbdcopy", second.uri.replace("/db?", "/db@full?"), str(back))
        assert back.read_bytes() == image.read_bytes()
        assert nbdsh(second.uri, "print(h.pread(1 << 20, 0) == bytes(1 << 20))") == "True\n"
        assert second.stop() == 0


def test_replicas_and_the_front_end_come_and_go(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    first, second, third = (host.address for host in hosts)
    with controller(data) as engine:
        closed = engine.call("VolumeGet")
        assert (closed.size, closed.replicaCount, closed.frontendState) == (0, 0, "")
        assert engine.modes() == {}
        with pytest.raises(ControlError, match="is stopped"):
            engine.call("VolumeSnapshot", pb.VolumeSnapshotRequest(name="s"))
        start_ = pb.VolumeStartRequest(replicaAddresses=[first, second], size=32 * MIB)
        assert engine.call("VolumeStart", start_).replicaCount == 2
        assert engine.call("VolumeStart", start_).replicaCount == 2
        with pytest.raises(ControlError, match="unsupported frontend type: x"):
            engine.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="x"))
        up = engine.call("VolumeFrontendStart", pb.VolumeFrontendStartRequest(frontend="nbd"))
        assert (up.frontendState, up.endpoint) == ("up", engine.uri)
        nbdsh(engine.uri, "h.pwrite(b'a' * 4096, 0)", "h.flush()")

        created = engine.call(
            "ControllerReplicaCreate", pb.ControllerReplicaCreateRequest(address=third)
        )
        assert created.address.address == third
        verified = engine.call("ReplicaVerifyRebuild", pb.ReplicaAddress(address=third))
        assert verified.mode == pb.RW
        with pytest.raises(ControlError, match="to prepare rebuild"):
            engine.call("ReplicaPrepareRebuild", pb.ReplicaAddress(address=third))
        with pytest.raises(ControlError, match="cannot set to mode WO"):
            engine.call("ReplicaUpdate", replica(third, pb.WO))
        assert engine.call("ReplicaUpdate", replica(third, pb.RW)).mode == pb.RW

        engine.call("ReplicaDelete", pb.ReplicaAddress(address=first))
        engine.call("ReplicaDelete", pb.ReplicaAddress(address=first))
        assert engine.modes() == {second: "RW", third: "RW"}
        with pytest.raises(ControlError, match="cannot find the replica with address"):
            engine.call("ReplicaGet", pb.ReplicaAddress(address=first))

        down = engine.call("VolumeShutdown")
        assert (down.size, down.replicaCount, down.frontendState) == (32 * MIB, 0, "down")
        with pytest.raises(ControlError, match="duplicate replica addresses"):
            engine.call("VolumeStart", pb.VolumeStartRequest(replicaAddresses=[third, third]))
        again = pb.VolumeStartRequest(replicaAddresses=[third, second])
        assert engine.call("VolumeStart", again).frontendState == "up"
        assert nbdsh(engine.uri, "print(h.pread(1, 4095))") == "bytearray(b'a')\n"


def test_a_replica_that_is_set_to_err_is_brought_back(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with controller(data, "--size", SIZE, *options(hosts)) as engine:
        before = generations(data)
        engine.call("ReplicaUpdate", replica(hosts[2].address, pb.ERR))
        wait_modes(data, "RW", "RW", "RW")
        (after,) = generations(data)
        assert after > max(before)


def generations(data_dir: Path) -> set[int]:
    return {row["generation"] for row in cli_json(data_dir, "replica", "ls", "db")["replicas"]}


def replica(address: str, mode: Any) -> pb.ControllerReplica:
    return pb.ControllerReplica(address=pb.ReplicaAddress(address=address), mode=mode)


def test_what_longhorns_manager_starts_is_started(tmp_path: Path, hosts: list[Host]) -> None:
    arguments = [
        *("--frontend", "nbd", "--size", str(32 * MIB), "--current-size", str(32 * MIB)),
        *("--enable-backend", "tcp", "--upgrade", "--disableRevCounter", "--salvageRequested"),
        *("--engine-replica-timeout", "8", "--data-server-protocol", "tcp"),
        *("--unmap-mark-snap-chain-removed", "--snapshot-max-count", "20"),
        *("--snapshot-max-size", "1g", "--file-sync-http-client-timeout", "30"),
        *("--rebuild-sync-concurrent-limit", "3"),
        *options(hosts),
    ]
    with controller(
        tmp_path / "data", *arguments, before=("--engine-instance-name", "db-e-0")
    ) as engine:
        volume = engine.call("VolumeGet")
        assert (volume.snapshot_max_count, volume.snapshot_max_size) == (20, 1 << 30)
        assert volume.unmap_mark_snap_chain_removed
        assert engine.call("ReplicaRebuildConcurrentSyncLimitGet").limit == 3
        for metadata, sentence in (
            ({"volume-name": "other"}, "incorrect volume name other; check controller address"),
            ({"instance-name": "x"}, "incorrect instance name x; check controller address"),
        ):
            with (
                RpcClient(engine.ready["controller"], metadata=metadata) as stranger,
                pytest.raises(ControlError, match=sentence),
            ):
                stranger.call(CONTROLLER, "VolumeGet", Empty(), timeout_s=TIMEOUT_S)


def refused(data_dir: Path, *arguments: str) -> tuple[int, str]:
    process = start(data_dir, *arguments)
    said = process.communicate(timeout=TIMEOUT_S)[1]
    assert "Traceback" not in said
    return process.returncode, said


def test_no_replica_that_can_be_used(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with controller(data, "--size", SIZE, *options(hosts)) as engine:
        engine.stop()
    for host in hosts:
        host.kill()
    status, said = refused(data, "db", *options(hosts))
    assert status == 61
    assert "no available backend due to replica error from the addresses [tcp://" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("db", "--frontend", "rest"), "unsupported frontend type: rest"),
        (("db", "--enable-backend", "s3"), "Unsupported backend: s3"),
        (("db", "--rebuild-sync-concurrent-limit", "0"), "must be a positive integer"),
        (("d b",), "invalid volume name"),
        (("db", "--replica", "tcp://127.0.0.1"), "tcp://127.0.0.1"),
        (("db", "--upgrade=maybe"), "give true or false"),
    ],
)
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    status, said = refused(tmp_path / "data", *arguments)
    assert status == 2, said
    assert sentence in said


def test_iscsi_comes_and_goes_with_the_front_end(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with controller(data, "--size", SIZE, "--frontend", "tgt-iscsi", *options(hosts)) as served:
        uri = served.call("VolumeGet").endpoint
        assert uri.startswith("iscsi://127.0.0.1:")
        assert uri.endswith("/iqn.2019-10.io.longhorn:db/1")
        tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", uri)
        assert served.call("VolumeFrontendShutdown").frontendState == "down"
        with pytest.raises(ToolFailed):
            tool("qemu-io", "-f", "raw", "-c", "read 0 64k", uri)
        request = pb.VolumeFrontendStartRequest(frontend="tgt-iscsi")
        again = served.call("VolumeFrontendStart", request).endpoint
        said = tool("qemu-io", "-f", "raw", "-c", "read -P 7 0 64k", again).stdout
        assert "verification" not in said
        served.call("VolumeShutdown")
        assert served.stop() == 0
