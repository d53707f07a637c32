"""``lhblock serve`` as real processes, on data directories of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from lhblock.errors import ControlError
from lhblock.rpc import CONTROLLER, HEALTH, RpcClient
from lhblock.rpc.generated import controller_pb2, health_pb2
from tests.activation import listen_unix
from tests.live.serving import (
    MIB,
    TIMEOUT_S,
    Serve,
    ToolFailed,
    cli,
    cli_json,
    command,
    nbdsh,
    requires,
    serve,
    tool,
)

pytestmark = pytest.mark.live


def test_a_volume_is_created_served_and_found_again(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "8M") as process:
        (volume,) = process.ready["volumes"]
        assert (volume["name"], volume["created"], volume["state"]) == ("db", True, "healthy")
        nbdsh(process.uri(), "h.pwrite(b'kept' * 1024, 4096)", "h.flush()")
        assert process.stop()[0] == 0
    with serve(data, "db") as process:
        assert process.ready["volumes"][0]["created"] is False
        assert nbdsh(process.uri(), "print(h.pread(4, 4096))") == "bytearray(b'kept')\n"
        assert process.stop(signal.SIGINT)[0] == 0
    assert list((data / "run").iterdir()) == []


def test_several_volumes_share_a_port_and_are_listed_with_snapshots(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "web", "--size", "4M") as process:
        assert cli(data, "snapshot", "create", "web", "s1").stdout == "s1\n"
        address = process.ready["listen"][0]
        listed = json.loads(tool("nbdinfo", "--list", "--json", f"nbd://{address}").stdout)
        names = {item["export-name"]: item["is_read_only"] for item in listed["exports"]}
        assert names == {"db": False, "web": False, "web@s1": True}


def test_a_snapshot_export_keeps_its_content(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        nbdsh(process.uri(), "h.pwrite(b'old', 0)")
        cli(data, "snapshot", "create", "db", "s1")
        nbdsh(process.uri(), "h.pwrite(b'new', 0)")
        assert nbdsh(process.uri("db@s1"), "print(h.pread(3, 0))") == "bytearray(b'old')\n"
        assert nbdsh(process.uri(), "print(h.pread(3, 0))") == "bytearray(b'new')\n"


def test_commands_reach_the_serving_process(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        pid = process.process.pid
        (row,) = cli_json(data, "volume", "ls")["volumes"]
        assert (row["state"], row["pid"]) == ("serving", pid)
        cli(data, "snapshot", "create", "db", "s1")
        cli(data, "snapshot", "create", "db", "s2")
        assert cli_json(data, "volume", "expand", "db", "8M")["size_bytes"] == 8 * MIB
        shown = cli_json(data, "volume", "info", "db")
        assert (shown["serving"], shown["pid"], shown["size_bytes"]) == (True, pid, 8 * MIB)
        cli(data, "snapshot", "rm", "db", "s2", "--wait")
        cli(data, "snapshot", "revert", "db", "s1")
        names = [item["name"] for item in cli_json(data, "snapshot", "ls", "db")["snapshots"]]
        assert "s1" in names
        assert "s2" not in names
        cli(data, "snapshot", "hash", "db", "s1")
        assert cli_json(data, "scrub", "db")["mismatches"] == []
        assert f"process {pid}" in cli(data, "volume", "rm", "db", "--yes", status=1).stderr


def test_revert_is_refused_while_a_client_is_connected(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        cli(data, "snapshot", "create", "db", "s1")
        revert = [*command("snapshot", "revert", "db", "s1", "--data-dir", str(data))]
        said = nbdsh(
            process.uri(),
            "import subprocess",
            f"r = subprocess.run({revert!r}, capture_output=True, text=True)",
            "print(r.returncode, r.stderr)",
        )
        assert said.startswith("1 lhblock: volume db: ")
        assert "connected" in said


def test_the_control_socket_speaks_longhorns_services(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "web", "--size", "4M") as process:
        path = Path(process.ready["control"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (data / "run" / "db.sock").readlink() == Path(path.name)
        address = f"unix:{data / 'run' / 'web.sock'}"
        with RpcClient(address, metadata={"volume-name": "web"}) as client:
            volume = client.call(CONTROLLER, "VolumeGet", Empty(), timeout_s=TIMEOUT_S)
            assert (volume.name, volume.frontend, volume.frontendState) == ("web", "nbd", "up")
            assert volume.endpoint.startswith("nbd://127.0.0.1:")
            check = health_pb2.HealthCheckRequest()
            reply = client.call(HEALTH, "Check", check, timeout_s=TIMEOUT_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        wrong = RpcClient(address, metadata={"volume-name": "no"})
        with wrong, pytest.raises(ControlError, match="incorrect volume name no"):
            wrong.call(HEALTH, "Check", check, timeout_s=TIMEOUT_S)


def test_a_front_end_that_is_shut_down_lets_nobody_in(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        address = f"unix:{process.ready['control']}"
        with RpcClient(address) as client:
            client.call(CONTROLLER, "VolumeFrontendShutdown", Empty(), timeout_s=TIMEOUT_S)
            with pytest.raises(ToolFailed, match="server replied with error"):
                tool("nbdinfo", process.uri())
            request = controller_pb2.VolumeFrontendStartRequest(frontend="nbd")
            client.call(CONTROLLER, "VolumeFrontendStart", request, timeout_s=TIMEOUT_S)
        tool("nbdinfo", process.uri())


def test_a_killed_process_leaves_a_volume_that_opens(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        nbdsh(process.uri(), "h.pwrite(b'safe', 0, nbd.CMD_FLAG_FUA)")
        process.stop(signal.SIGKILL)
    assert (data / "run" / "db.sock").is_symlink()
    assert cli_json(data, "volume", "ls")["volumes"][0]["state"] == "stopped"
    cli(data, "snapshot", "create", "db", "s1")
    with serve(data, "db") as process:
        assert nbdsh(process.uri(), "print(h.pread(4, 0))") == "bytearray(b'safe')\n"


def test_a_second_process_for_a_volume_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        other = cli(data, "serve", "db", "--listen", "127.0.0.1:0", status=1)
        assert f"process {process.process.pid} serves it already" in other.stderr


def test_a_process_that_answers_nothing_is_named(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        (data / "run" / "db.sock").unlink()
        said = cli(data, "snapshot", "create", "db", status=1).stderr
        assert f"process {process.process.pid} has it open and answers no control calls" in said


def test_a_start_that_fails_half_way_leaves_nothing_new(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "old", "--size", "4M")
    (data / "volumes" / "old" / "replica" / "volume.meta").write_text("{")
    failed = cli(data, "serve", "new", "old", "--size", "4M", "--no-tcp", status=1)
    assert "volume.meta" in failed.stderr
    assert [row["name"] for row in cli_json(data, "volume", "ls")["volumes"]] == ["old"]
    assert not (data / "volumes" / "new").exists()
    assert list((data / "run").iterdir()) == []


def test_a_taken_address_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        failed = cli(data, "serve", "db", "--size", "4M", "--listen", address, status=1)
    assert "in use" in failed.stderr
    assert cli_json(data, "volume", "ls")["volumes"] == []


def test_read_only_serves_and_changes_nothing(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "db", "--size", "4M")
    replica = data / "volumes" / "db" / "replica"
    before = {path.name: path.read_bytes() for path in replica.glob("*.meta")}
    with serve(data, "db", "--read-only") as process:
        info = json.loads(tool("nbdinfo", "--json", process.uri()).stdout)
        assert info["exports"][0]["is_read_only"] is True
        assert "read-only" in cli(data, "snapshot", "create", "db", status=1).stderr
        assert cli_json(data, "volume", "ls")["volumes"][0]["state"] == "serving"
        assert process.stop()[0] == 0
    assert {path.name: path.read_bytes() for path in replica.glob("*.meta")} == before


def test_systemd_is_told_ready_and_stopping(tmp_path: Path) -> None:
    path = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(TIMEOUT_S)
        environment = {"NOTIFY_SOCKET": str(path)}
        with serve(tmp_path / "d", "db", "--size", "4M", env=environment) as process:
            ready = notify.recv(4096).decode().splitlines()
            assert ready[:2] == ["READY=1", "STATUS=serving db"]
            assert f"MAINPID={process.process.pid}" in ready
            process.stop()
            assert notify.recv(4096).decode().startswith("STOPPING=1")


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to give its capabilities up")
def test_serving_needs_no_capability(tmp_path: Path) -> None:
    data = tmp_path / "d"
    bare = [requires("setpriv"), "--bounding-set", "-all", "--no-new-privs"]
    with serve(data, "db", "--size", "4M", prefix=bare) as process:
        status = Path(f"/proc/{process.ready['pid']}/status").read_text()
        assert re.search(r"^CapEff:\s*0+$", status, re.MULTILINE)
        nbdsh(process.uri(), "h.pwrite(b'x', 0)", "h.flush()")
        cli(data, "snapshot", "create", "db", "s1")
        cli(data, "volume", "expand", "db", "8M")
        assert process.stop()[0] == 0


def test_a_socket_from_systemd_replaces_the_addresses(tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    launcher = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
        "os.execvp(sys.argv[2], sys.argv[2:])"
    )
    data = tmp_path / "d"
    with listen_unix(path) as listener:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", launcher, str(listener.fileno())),
                *command("serve", "db", "--size", "4M", "--json", "--data-dir", str(data)),
            ],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            served = Serve(process, data)
            assert served.ready["sockets"] == [str(path)]
            assert served.ready["listen"] == []
            tool("nbdinfo", served.uri())
        finally:
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)
    assert path.exists()


def test_the_banner_can_be_pasted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("serve", "db", "--size", "4M", "--no-tcp", "--data-dir", str(tmp_path / "d")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("stop with"):
                break
        socket_path = tmp_path / "d" / "run" / "nbd.sock"
        assert f"nbd+unix:///db?socket={socket_path}" in lines
        assert f"Unix socket: {socket_path}" in lines
        assert f"lhblock attach 'nbd+unix:///db?socket={socket_path}'" in lines
        assert f"nbd-client -unix {socket_path} /dev/nbd0 -N db" in lines
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0


def test_stdio_serves_one_client(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "db", "--size", "4M")
    words = command("serve", "db", "--stdio", "--data-dir", str(data))
    said = tool(
        "nbdsh",
        *("-c", "h.set_export_name('db')"),
        *("-c", f"h.connect_command({words!r})"),
        *("-c", "h.pwrite(b'pipe', 0)"),
        *("-c", "print(h.pread(4, 0))"),
        *("-c", "h.shutdown()"),
    ).stdout
    assert said == "bytearray(b'pipe')\n"
    cli(data, "volume", "rm", "db", "--yes")


def test_bench_measures_a_scratch_volume_and_removes_it(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "db", "--size", "4M")
    report = cli_json(data, "bench", "db", "--seconds", "0.2", "--size", "64M")
    assert (report["target"], len(report["results"])) == ("scratch", 6)
    assert all(item["iops"] > 0 for item in report["results"])
    assert [row["name"] for row in cli_json(data, "volume", "ls")["volumes"]] == ["db"]
    assert {path.name for path in (data / "volumes" / "db").iterdir()} == {
        "replica",
        "volume.json",
    }


def test_bench_leaves_nothing_when_it_is_terminated(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "db", "--size", "4M")
    fio = tmp_path / "bin" / "fio"
    fio.parent.mkdir()
    # Asked for its engines it says yes; asked to measure it terminates the bench and goes on.
    fio.write_text(
        '#!/bin/sh\ncase "$*" in *--enghelp*) exit 0 ;; esac\nkill -TERM $PPID\nexec sleep 600\n'
    )
    fio.chmod(0o755)
    found = subprocess.run(
        command("--data-dir", str(data), "bench", "db", "--size", "64M"),
        env=os.environ | {"PATH": f"{fio.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert found.returncode == 130, found.stderr
    assert list((data / "run").iterdir()) == []
    assert [row["name"] for row in cli_json(data, "volume", "ls")["volumes"]] == ["db"]
    assert not list((data / "volumes" / "db").glob("bench-*"))


def test_bench_reads_a_served_volume_without_writing(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M"):
        report = cli_json(data, "bench", "db", "--here", "--seconds", "0.2")
        assert {item["operation"] for item in report["results"]} == {"read"}
        assert cli_json(data, "volume", "info", "db")["statistics"]["writes"] == 0
        refused = cli(data, "bench", "db", "--here", "--write", status=2)
        assert "--yes" in refused.stderr


def test_a_damaged_replica_among_good_ones_is_left_out(tmp_path: Path) -> None:
    data = tmp_path / "d"
    paths = [tmp_path / f"r{index}" for index in range(3)]
    options = [word for path in paths for word in ("--replica", str(path))]
    cli(data, "volume", "create", "db", "--size", "4M", *options)
    (paths[1] / "volume.meta").write_text("{")
    with serve(data, "db") as process:
        assert process.ready["volumes"][0]["state"] == "degraded"
        nbdsh(process.uri(), "h.pwrite(b'kept', 0)")
        replicas = cli_json(data, "volume", "info", "db")["replicas"]
        assert [item["mode"] for item in replicas] == ["RW", "ERR", "RW"]
        assert "volume.meta" in replicas[1]["error"]


def test_shell_completion_knows_volumes_and_snapshots(tmp_path: Path) -> None:
    data = tmp_path / "d"
    cli(data, "volume", "create", "database", "--size", "4M")
    cli(data, "snapshot", "create", "database", "before")

    def complete(*words: str) -> list[str]:
        done = subprocess.run(
            command(),
            env=os.environ
            | {
                "LHBLOCK_DATA_DIR": str(data),
                "_LHBLOCK_COMPLETE": "bash_complete",
                "COMP_WORDS": " ".join(("lhblock", *words)),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return done.stdout.splitlines()

    assert complete("vol") == ["plain,volume"]
    assert complete("volume", "info", "d") == ["plain,database"]
    assert complete("snapshot", "revert", "database", "b") == ["plain,before"]


def test_replicas_are_added_removed_and_brought_back(tmp_path: Path) -> None:
    data, second, third = tmp_path / "d", tmp_path / "r2", tmp_path / "r3"
    cli(data, "volume", "create", "db", "--size", "8M")
    assert cli_json(data, "replica", "add", "db", str(second))["serving"] is False
    with serve(data, "db", "--rebuild-rate", "256") as process:
        nbdsh(process.uri(), "h.pwrite(b'first' * 100, 4096)")
        cli(data, "replica", "rebuild-status", "db", "--watch")
        assert "replica of db now" in cli(data, "replica", "add", "db", str(third), "--wait").stdout
        rows = cli_json(data, "replica", "ls", "db")["replicas"]
        assert [row["mode"] for row in rows] == ["RW"] * 3
        refused = cli(data, "replica", "add", "db", str(third), status=1)
        assert "already" in refused.stderr
        cli(data, "replica", "rm", "db", str(second))
        nbdsh(process.uri(), "h.pwrite(b'later', 0)")
        cli(data, "replica", "add", "db", str(second), "--wait")
        assert cli_json(data, "volume", "info", "db")["state"] == "healthy"
        assert process.stop()[0] == 0
    for path in (second, third):
        other = tmp_path / f"only-{path.name}"
        cli(other, "volume", "create", "copy", "--replica", str(path))
        with serve(other, "copy", "--force") as process:
            text = nbdsh(process.uri("copy"), "print(h.pread(5, 0), h.pread(5, 4096))")
            assert "later" in text
            assert "first" in text


def test_a_stopped_volume_takes_and_gives_replicas(tmp_path: Path) -> None:
    data, second = tmp_path / "d", tmp_path / "r2"
    cli(data, "volume", "create", "db", "--size", "8M")
    cli(data, "replica", "add", "db", str(second), "--wait")
    rows = cli_json(data, "replica", "ls", "db")["replicas"]
    assert [row["mode"] for row in rows] == ["RW"] * 2
    assert cli_json(data, "replica", "rebuild-status", "db")["rebuilds"] == []
    cli(data, "replica", "rm", "db", str(second))
    first = cli_json(data, "replica", "ls", "db")["replicas"]
    assert len(first) == 1
    last = cli(data, "replica", "rm", "db", first[0]["path"], status=1)
    assert "last usable replica" in last.stderr
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miau")
    foreign = cli(data, "replica", "add", "db", str(tmp_path / "photos"), status=1)
    assert "cat.jpg" in foreign.stderr
