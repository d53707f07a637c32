"""``lhblock replica`` as a real process, driven as a Longhorn controller would."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from lhblock.errors import ControlError
from lhblock.replica import peek
from lhblock.rpc import HEALTH, REPLICA, RpcClient
from lhblock.rpc.generated import health_pb2
from lhblock.rpc.generated import replica_pb2 as pb
from tests.live.data_client import (
    ERROR,
    HEADER,
    PING,
    READ,
    RESPONSE,
    UNMAP,
    WRITE,
    DataClient,
    frame,
)

pytestmark = pytest.mark.live

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("LHBLOCK_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
TIMEOUT_S = 60.0
SIZE_BYTES = 16 << 20
BLOCK = 4096
CREATED = "2026-11-23T08:46:13Z"


class ReplicaProcess:
    """A replica process that said it is ready, and a control client to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=TIMEOUT_S)[1]
        self.ready = json.loads(line)
        self.client = RpcClient(self.ready["control"])

    def call(self, name: str, request: Any = None) -> Any:
        reply = self.client.call(REPLICA, name, request or Empty(), timeout_s=TIMEOUT_S)
        return getattr(reply, "replica", reply)

    def open(self) -> pb.Replica:
        info: pb.Replica = self.call("ReplicaOpen", pb.ReplicaOpenRequest())
        return info

    def snapshot(self, name: str) -> None:
        self.call(
            "ReplicaSnapshot",
            pb.ReplicaSnapshotRequest(name=name, user_created=True, created=CREATED),
        )

    def data(self) -> DataClient:
        return DataClient(self.ready["data"])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, log


def start(path: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lhblock", *before, "replica", str(path), *arguments]
    return subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def running(
    path: Path, *arguments: str, size: str = "16m", before: tuple[str, ...] = ()
) -> Iterator[ReplicaProcess]:
    process = start(path, "--size", size, "--listen", "127.0.0.1:0", *arguments, before=before)
    replica = None
    try:
        replica = ReplicaProcess(process)
        yield replica
    finally:
        if replica is not None:
            replica.client.close()
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)


def refused(replica: ReplicaProcess, name: str, request: Any = None) -> ControlError:
    with pytest.raises(ControlError) as caught:
        replica.call(name, request)
    return caught.value


def image(name: str) -> str:
    return f"volume-snap-{name}.img"


# ---- Interoperation.


def test_frames_are_those_of_longhorn_to_the_byte(tmp_path: Path) -> None:
    header = bytes.fromhex  # magic, sequence, type, offset, size, payload
    with running(tmp_path / "r") as replica:
        with replica.data() as data:
            # A controller connects first and opens then.
            assert replica.open().state == "open"
            payload = bytes(range(256)) * 16
            data.send(header("011b 01000000 01000000 0000000000000000 00100000 00100000") + payload)
            assert data.receive().raw == header(
                "011b 01000000 02000000 0000000000000000 00100000 00000000"
            )
            data.send(header("011b 03000000 00000000 0000000000000000 00020000 00000000"))
            assert data.receive().raw == (
                header("011b 03000000 02000000 0000000000000000 00020000 00020000") + payload[:512]
            )
            data.send(header("011b 05000000 06000000 0000000000000000 00000000 00000000"))
            assert data.receive().raw == header(
                "011b 05000000 02000000 0000000000000000 00000000 00000000"
            )
            data.send(header("011b 04000000 07000000 0000000000000000 00200000 00000000"))
            reply = data.receive()
            assert (reply.sequence, reply.kind, reply.payload) == (4, RESPONSE, b"")
            assert data.read(0, BLOCK) == bytes(BLOCK)
            # Unmaps are rounded inwards, and a write counts by its payload.
            data.write(0, payload * 2)
            assert data.ask(UNMAP, offset=512, size=2 * BLOCK - 512).kind == RESPONSE
            assert data.read(0, 2 * BLOCK) == payload + bytes(BLOCK)
            reply = data.ask(WRITE, offset=BLOCK, size=2 * BLOCK, payload=payload)
            assert (reply.kind, reply.size) == (RESPONSE, BLOCK)
            # A ping brings back what it came with.
            assert data.ask(PING, payload=b"echo").payload == b"echo"
        assert replica.call("ReplicaGet").state == "dirty"


def test_requests_of_any_alignment_on_two_connections(tmp_path: Path) -> None:
    model = bytearray(64 << 10)
    with running(tmp_path / "r") as replica, replica.data() as one, replica.data() as other:
        replica.open()
        for step, (offset, length) in enumerate([(1, 5), (4000, 200), (8192, 4096), (511, 9000)]):
            data = bytes([step + 1]) * length
            (one if step % 2 else other).write(offset, data)
            model[offset : offset + length] = data
        assert one.read(0, len(model)) == model
        assert other.read(510, 1000) == model[510:1510]
        # Replies come on the connection of their request, by sequence.
        for sequence in range(100, 132):
            one.send(frame(READ, sequence, offset=sequence * 16, size=16))
        replies = {reply.sequence: reply for reply in (one.receive() for _ in range(32))}
        assert set(replies) == set(range(100, 132))
        assert all(r.payload == model[s * 16 : s * 16 + 16] for s, r in replies.items())


def test_while_closed_every_request_gets_an_error_and_the_connection_stays(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "r") as replica, replica.data() as data:
        reply = data.ask(PING)
        assert reply.text == "ping failure: replica state closed"
        assert reply.raw[:26].hex() == frame(ERROR, 1, payload=reply.payload)[:26].hex()
        assert data.ask(READ, offset=BLOCK, size=BLOCK).text == "replica no longer exist"
        assert data.ask(WRITE, offset=BLOCK, payload=bytes(3 * BLOCK)).offset == BLOCK
        assert data.ask(UNMAP, size=BLOCK).text == "replica no longer exist"
        data.send(frame(99, 7, payload=b"ignored"))
        # The same connection goes on once the replica is open, also in the middle of a frame.
        late = frame(READ, 50, size=BLOCK)
        data.send(late[:10])
        replica.open()
        data.send(late[10:])
        assert data.receive().kind in (ERROR, RESPONSE)
        data.write(0, b"a" * BLOCK)
        assert data.read(0, BLOCK) == b"a" * BLOCK
        # Closing ends connections that the core has; new ones are refused as before.
        assert replica.call("ReplicaClose").state == "closed"
        assert data.is_closed()
        with replica.data() as again:
            assert again.ask(READ, size=BLOCK).text == "replica no longer exist"
            assert replica.open().state == "open"
            assert again.read(0, BLOCK) == b"a" * BLOCK


def test_snapshot_revert_expand_and_delete_while_the_data_connection_works(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "r") as replica, replica.data() as data:
        replica.open()
        data.write(0, b"a" * BLOCK)
        replica.snapshot("s1")
        data.write(0, b"b" * BLOCK)
        data.write(BLOCK, b"c" * BLOCK)
        replica.snapshot("s2")
        replica.call("ReplicaExpand", pb.ReplicaExpandRequest(size=2 * SIZE_BYTES))
        data.write(2 * SIZE_BYTES - BLOCK, b"z" * BLOCK)
        assert data.read(0, 2 * BLOCK) == b"b" * BLOCK + b"c" * BLOCK
        request = pb.ReplicaRevertRequest(name=image("s1"), created=CREATED)
        info = replica.call("ReplicaRevert", request)
        assert info.parent == image("s1")
        assert data.read(0, 2 * BLOCK) == b"a" * BLOCK + bytes(BLOCK)
        replica.call("DiskMarkAsRemoved", pb.DiskMarkAsRemovedRequest(name="s2"))
        replica.call("ReplicaReload")
        assert data.read(0, BLOCK) == b"a" * BLOCK
        replica.call("ReplicaDelete")
        assert data.is_closed()
        assert replica.call("ReplicaGet").state == "initial"
        assert list((tmp_path / "r").iterdir()) == []


def test_changes_of_the_tree_under_load_lose_no_write(tmp_path: Path) -> None:
    blocks, rounds = 64, 12
    model: dict[int, bytes] = {}
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(data: DataClient) -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                block = number * 7 % blocks
                content = number.to_bytes(8, "little") * (BLOCK // 8)
                data.write(block * BLOCK, content)
                model[block] = content
                assert data.read(block * BLOCK, BLOCK) == content
        except BaseException as error:
            errors.append(error)

    with running(tmp_path / "r") as replica, replica.data() as data, replica.data() as reader:
        replica.open()
        writer = threading.Thread(target=write, args=(data,))
        writer.start()
        try:
            for number in range(rounds):
                replica.snapshot(f"s{number}")
                if number % 3 == 1:
                    request = pb.DiskMarkAsRemovedRequest(name=f"s{number - 1}")
                    replica.call("DiskMarkAsRemoved", request)
                if number % 3 == 2:
                    replica.call("ReplicaReload")
                    size = SIZE_BYTES + (number << 20)
                    replica.call("ReplicaExpand", pb.ReplicaExpandRequest(size=size))
        finally:
            stop.set()
            writer.join(TIMEOUT_S)
        assert errors == []
        assert len(model) == blocks
        for block, content in model.items():
            assert reader.read(block * BLOCK, BLOCK) == content
        # What was marked is merged away, and nothing is seen to move.
        replica.call("ReplicaClose")
        replica.open()
    with running(tmp_path / "r") as replica, replica.data() as data:
        replica.open()
        for block, content in model.items():
            assert data.read(block * BLOCK, BLOCK) == content


def test_a_directory_of_longhorn_is_opened_and_read(tmp_path: Path) -> None:
    fixture = FIXTURES / "longhorn-replica-basic"
    subprocess.run(
        ["tar", "--zstd", "-C", str(tmp_path), "-xf", str(fixture / "replica.tar.zst")], check=True
    )
    manifest = json.loads((fixture / "manifest.json").read_text())
    with running(tmp_path / "basic") as replica, replica.data() as data:
        info = replica.open()
        digest = hashlib.sha256()
        for offset in range(0, int(info.size), 1 << 20):
            digest.update(data.read(offset, min(1 << 20, int(info.size) - offset)))
        assert digest.hexdigest() == manifest["images"][manifest["head"]]["full_image_sha256"]
        # Longhorn marked snap-e as removed and left the rest to a purge.
        assert list(info.chain[1:]) == [image("snap-c"), image("snap-a")]
        assert not (tmp_path / "basic" / "revision.counter").exists()


# ---- The process.


def test_kill_and_restart_keep_what_was_acknowledged(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica, replica.data() as data:
        replica.open()
        data.write(0, b"a" * BLOCK)
        replica.snapshot("s1")
        data.write(0, b"b" * BLOCK)
        replica.stop(signal.SIGKILL)
        assert data.is_closed()
    meta = peek(tmp_path / "r")
    assert meta is not None
    assert meta.dirty
    with running(tmp_path / "r") as replica, replica.data() as data:
        assert (replica.ready["state"], replica.ready["created"]) == ("closed", False)
        assert replica.open().state == "dirty"
        assert data.read(0, BLOCK) == b"b" * BLOCK
        status, _ = replica.stop()
        assert status == 0
    meta = peek(tmp_path / "r")
    assert meta is not None
    assert not meta.dirty


def test_callers_for_another_replica_are_refused_on_every_service(tmp_path: Path) -> None:
    with running(
        tmp_path / "r",
        "--replica-instance-name=i",
        "--disableRevCounter=true",
        "--sync-agent=false",
        "--sync-agent-port-count",
        "7",
        "--snapshot-max-count",
        "5",
        "--snapshot-max-size",
        "0",
        "--unmap-mark-disk-chain-removed",
        before=("--volume-name", "db"),
    ) as replica:
        info = replica.open()
        assert (info.remain_snapshots, info.unmap_mark_disk_chain_removed) == (5, True)
        check = health_pb2.HealthCheckRequest(service="anything")
        assert replica.client.call(HEALTH, "Check", check, timeout_s=TIMEOUT_S).status == 1
        with RpcClient(replica.ready["control"], metadata={"volume-name": "web"}) as stranger:
            for service, name, request in (
                (REPLICA, "ReplicaGet", Empty()),
                (HEALTH, "Check", check),
            ):
                with pytest.raises(ControlError) as caught:
                    stranger.call(service, name, request, timeout_s=TIMEOUT_S)
                assert caught.value.code == "FAILED_PRECONDITION"
                assert str(caught.value) == "incorrect volume name web; check replica address"


def test_errors_carry_longhorns_codes_over_the_wire(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica:
        replica.open()
        error = refused(replica, "ReplicaOpen", pb.ReplicaOpenRequest())
        assert (error.code, str(error)) == ("UNKNOWN", "replica is already open")
        error = refused(replica, "ReplicaExpand", pb.ReplicaExpandRequest(size=BLOCK))
        assert error.code == "INTERNAL"
        assert json.loads(str(error))["code"] == "FunctionFailedWithoutRollback"


def test_wrong_options_are_one_sentence(tmp_path: Path) -> None:
    for arguments, status, words in (
        (["--listen", "127.0.0.1"], 2, "invalid address"),
        (["--data-server-protocol", "rdma"], 2, "unsupported protocol: rdma"),
        (["--data-server-protocol", "unix"], 2, "--volume-name"),
        (["--backing-file", "base.qcow2"], 2, "backing file"),
        (["--sync-agent=maybe"], 2, "true or false"),
        (["--size", "5000"], 2, "multiple of 4096"),
        (["--listen", "127.0.0.1:65535"], 2, "65535"),
    ):
        process = start(tmp_path / "r", *arguments)
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == status, log
        assert words in log
        assert "Traceback" not in log


def test_a_port_that_is_taken_ends_the_process(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica:
        process = start(tmp_path / "s", "--size", "16m", "--listen", replica.ready["control"])
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert "cannot listen" in log


# ---- Hostile peers.


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(frame(READ, 1, size=BLOCK, magic=0), id="magic"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n", id="http"),
        pytest.param(frame(WRITE, 1, size=1 << 31, payload_bytes=1 << 31), id="huge"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_dropped_alone(
    tmp_path: Path, hostile: bytes, opened: bool
) -> None:
    with running(tmp_path / "r") as replica, replica.data() as good, replica.data() as bad:
        if opened:
            replica.open()
        bad.send(hostile)
        assert bad.is_closed()
        assert good.ask(PING).kind == (RESPONSE if opened else ERROR)
        status, log = replica.stop()
        assert status == 0
        assert "data connection ended" in log
        assert "peer sent a request" in log


def test_ranges_outside_the_volume_are_errors_and_change_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica, replica.data() as data:
        replica.open()
        for offset in (-1, -BLOCK, -(1 << 63), SIZE_BYTES, SIZE_BYTES - 1, (1 << 63) - 1):
            for kind, fields in (
                (READ, {"size": BLOCK}),
                (UNMAP, {"size": BLOCK}),
                (WRITE, {"payload": b"x" * BLOCK}),
            ):
                reply = data.ask(kind, offset=offset, **fields)
                assert reply.text == "unexpected EOF"
                assert reply.offset == offset
        assert data.ask(READ, offset=0, size=0xFFFFFFFF).kind == ERROR
        head = tmp_path / "r" / replica.call("ReplicaGet").head
        assert head.stat().st_size == SIZE_BYTES
        assert data.read(SIZE_BYTES - BLOCK, BLOCK) == bytes(BLOCK)


def test_frames_cut_off_and_unknown_types_harm_nobody(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica, replica.data() as good:
        replica.open()
        whole = frame(WRITE, 1, payload=b"x" * BLOCK)
        for cut in (1, HEADER.size - 1, HEADER.size, HEADER.size + 100, len(whole) - 1):
            with replica.data() as bad:
                bad.send(whole[:cut])
        for kind in (2, 3, 4, 5, 8, 99, 0xFFFFFFFF):
            good.send(frame(kind, 9, payload=b"payload"))
        assert good.ask(PING, payload=b"still here").payload == b"still here"
        assert good.read(0, BLOCK) == bytes(BLOCK)


def test_connections_beyond_the_limit_are_closed(tmp_path: Path) -> None:
    with running(tmp_path / "r") as replica:
        replica.open()
        clients = [replica.data() for _ in range(64)]
        try:
            assert all(client.ask(PING).kind == RESPONSE for client in clients)
            with replica.data() as extra:
                assert extra.is_closed()
        finally:
            for client in clients:
                client.socket.close()


# ---- Unix socket.


def test_data_connections_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    arguments = ("--data-server-protocol", "unix", "--data-socket", str(path))
    for number in (signal.SIGKILL, signal.SIGTERM):
        # The second start finds the socket file of the first, which was killed.
        with running(tmp_path / "r", *arguments) as replica:
            assert replica.ready["data"] == str(path)
            with replica.data() as data:
                replica.open()
                data.write(0, b"u" * BLOCK)
                assert data.read(0, BLOCK) == b"u" * BLOCK
            replica.stop(number)
    assert not path.exists()
