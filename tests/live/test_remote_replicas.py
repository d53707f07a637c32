"""``lhblock serve`` with replicas in processes of their own, which are killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lhblock.replica import ReplicaDirectory
from tests.live.hosts import SIZE, Host, options, rows, start_hosts, wait_modes
from tests.live.serving import MIB, TIMEOUT_S, Serve, ToolFailed, cli, cli_json, nbdsh, serve, tool
from tests.model.volumes import VolumeFiles

pytestmark = pytest.mark.live


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with start_hosts(tmp_path, 2) as started:
        yield started


LOAD = """
import os
data = open({image!r}, "rb").read()
while True:
    for offset in range(0, len(data), 1 << 18):
        h.pwrite(data[offset : offset + (1 << 18)], offset)
    h.flush()
    if os.path.exists({over!r}):
        break
"""


@contextmanager
def load(served: Serve, image: Path) -> Iterator[list[str]]:
    """Write an image into the volume again and again, whole; the list has what went wrong.

    On one connection, for each of them is some lines of log that nobody reads meanwhile.
    """
    over = image.with_suffix(".over")
    failures: list[str] = []

    def run() -> None:
        try:
            nbdsh(served.uri(), LOAD.format(image=str(image), over=str(over)))
        except ToolFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not cli_json(served.data_dir, "volume", "info", "db")["statistics"]["writes"]:
            assert thread.is_alive(), failures
        yield failures
    finally:
        over.touch()
        thread.join(TIMEOUT_S)
        over.unlink()


def assert_alike(paths: list[Path], image: Path) -> None:
    """Every replica, read by itself, has the image. No process has them open."""
    contents = trio.run(VolumeFiles(paths, image.stat().st_size).contents)
    for content in contents:
        assert content == image.read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(32 * MIB))
    return path


def test_killed_replica_comes_back_and_no_client_notices(
    tmp_path: Path, hosts: list[Host], image: Path
) -> None:
    data, local = tmp_path / "data", tmp_path / "local"
    with serve(data, "db", "--size", SIZE, *options(hosts, local)) as served:
        with load(served, image) as failures:
            cli(data, "snapshot", "create", "db", "s1")
            hosts[0].kill()
            row = wait_modes(data, "ERR", "RW", "RW")[hosts[0].address]
            assert "connection" in row["error"]
            assert row["lag"] == 1
            hosts[0].start()
            wait_modes(data, "RW", "RW", "RW")
        assert failures == []
        assert served.stop()[0] == 0
    for host in hosts:
        host.kill()
    assert_alike([hosts[0].path, hosts[1].path, local], image)


def test_killed_replica_is_given_what_it_missed_and_no_more(
    tmp_path: Path, hosts: list[Host], image: Path
) -> None:
    data, local = tmp_path / "data", tmp_path / "local"
    with serve(data, "db", "--size", SIZE, *options(hosts, local)) as served:
        tool("nbdcopy", str(image), served.uri())
        hosts[0].kill()
        # 16 pieces of a granule of the map, far from each other.
        writes = [f"h.pwrite(os.urandom(65536), {at} << 21)" for at in range(16)]
        nbdsh(served.uri(), "import os", *writes, "h.flush()")
        hosts[0].start()
        wait_modes(data, "RW", "RW", "RW")
        tool("nbdcopy", served.uri(), str(image))
        code, log = served.stop()
    assert code == 0
    (line,) = [line for line in map(json.loads, log.splitlines()) if "compared" in line]
    assert line["compared"] == "changes"
    assert line["copied_bytes"] == 16 * 65536
    for host in hosts:
        host.kill()
    assert_alike([hosts[0].path, hosts[1].path, local], image)


def test_replica_that_answers_nothing_is_dropped_after_the_time_out(
    tmp_path: Path, hosts: list[Host], image: Path
) -> None:
    data = tmp_path / "data"
    arguments = ["db", "--size", SIZE, *options(hosts), "--replica-timeout", "1"]
    with serve(data, *arguments) as served:
        with load(served, image) as failures:
            hosts[1].signal(signal.SIGSTOP)
            row = wait_modes(data, "RW", "ERR")[hosts[1].address]
            assert "within 1 s" in row["error"]
            hosts[1].signal(signal.SIGCONT)
            wait_modes(data, "RW", "RW")
        assert failures == []
        assert served.stop()[0] == 0
    for host in hosts:
        host.kill()
    assert_alike([host.path for host in hosts], image)


def test_killed_engine_leaves_replicas_that_the_next_one_makes_equal(
    tmp_path: Path, hosts: list[Host], image: Path
) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, *options(hosts)) as served:
        nbdsh(served.uri(), "h.pwrite(b'k' * 65536, 0)", "h.flush()")
        with load(served, image):
            cli(data, "snapshot", "create", "db", "s1")
            served.stop(signal.SIGKILL)
    with serve(data, "db") as served:
        wait_modes(data, "RW", "RW")
        tool("nbdcopy", served.uri(), str(tmp_path / "head"))
        tool("nbdcopy", served.uri("db@s1"), str(tmp_path / "s1"))
        assert served.stop()[0] == 0
    for host in hosts:
        host.kill()
    assert_alike([host.path for host in hosts], tmp_path / "head")
    for host in hosts:
        with ReplicaDirectory.open(host.path, read_only=True) as directory:
            assert not directory.was_dirty


def test_replicas_that_were_restarted_are_opened_again(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, *options(hosts)) as served:
        nbdsh(served.uri(), "h.pwrite(b'abc', 5)")
        assert served.stop()[0] == 0
    for host in hosts:
        assert host.process.stop()[0] == 0
        host.start()
    assert cli_json(data, "volume", "info", "db")["state"] == "healthy"
    with serve(data, "db", "--read-only") as served:
        assert nbdsh(served.uri(), "print(h.pread(3, 5))").strip() == "bytearray(b'abc')"
        with pytest.raises(ToolFailed):
            nbdsh(served.uri(), "h.pwrite(b'x', 0)")


def test_replica_that_does_not_answer_is_left_out_and_brought_back(
    tmp_path: Path, hosts: list[Host]
) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, *options(hosts)) as served:
        assert served.stop()[0] == 0
    hosts[1].kill()
    with serve(data, "db") as served:
        row = wait_modes(data, "RW", "ERR")[hosts[1].address]
        assert "Connection refused" in row["error"]
        nbdsh(served.uri(), "h.pwrite(b'new', 0)")
        hosts[1].start()
        wait_modes(data, "RW", "RW")
        assert served.stop()[0] == 0
    hosts[0].kill()
    with serve(data, "db") as served:
        assert nbdsh(served.uri(), "print(h.pread(3, 0))").strip() == "bytearray(b'new')"
        served.stop()
    hosts[1].kill()
    said = cli(data, "volume", "info", "db", status=1).stderr
    assert "no replica is usable" in said
    assert "Connection refused" in said


def test_replica_in_use_elsewhere_and_of_another_volume_are_refused(
    tmp_path: Path, hosts: list[Host]
) -> None:
    data = tmp_path / "data"
    with serve(tmp_path / "more", "web", "--size", SIZE, *options(hosts[1:])) as served:
        served.stop()
    with serve(data, "db", "--size", SIZE, *options(hosts[:1])):
        said = cli(tmp_path / "other", "serve", "db", *options(hosts[:1]), status=1).stderr
        assert "is 'open' and cannot be used" in said
        add = ["replica", "add", "db", hosts[1].address, "--wait"]
        assert "is not a replica of this volume" in cli(data, *add, status=1).stderr
        cli(data, *add, "--force")
        assert [row["mode"] for row in rows(data).values()] == ["RW", "RW"]


def test_process_of_another_volume_is_refused_and_nothing_is_left(
    tmp_path: Path, hosts: list[Host]
) -> None:
    data, local = tmp_path / "data", tmp_path / "local"
    other = Host(tmp_path / "other", "--volume-name", "web")
    try:
        arguments = [*options([hosts[0], other]), "--replica", str(local)]
        said = cli(data, "serve", "db", "--size", SIZE, *arguments, status=1).stderr
        assert "incorrect volume name db" in said
        other.kill()
        said = cli(data, "serve", "db", "--size", SIZE, *arguments, status=1).stderr
        assert "does not answer" in said
    finally:
        other.kill()
    assert not local.exists()
    assert not (hosts[0].path / "volume.meta").exists()
    assert cli_json(data, "volume", "ls")["volumes"] == []


def test_volume_that_cannot_be_served_takes_its_new_replicas_away(
    tmp_path: Path, hosts: list[Host]
) -> None:
    with serve(tmp_path / "data", "web", "--size", SIZE) as served:
        address = served.ready["listen"][0]
        arguments = ["--size", SIZE, *options(hosts), "--listen", address]
        cli(tmp_path / "other", "serve", "db", *arguments, status=1)
    for host in hosts:
        assert not (host.path / "volume.meta").exists()


def test_replicas_that_their_processes_made_are_taken_with_a_new_directory(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path / "r0", "--size", SIZE)
    try:
        data, local = tmp_path / "data", tmp_path / "local"
        with serve(data, "db", "--size", SIZE, *options([host], local)) as served:
            nbdsh(served.uri(), "h.pwrite(b'abc', 5)")
            cli(data, "snapshot", "create", "db", "s1")
            nbdsh(served.uri(), "h.pwrite(b'xyz', 5)")
            cli(data, "volume", "expand", "db", "64M")
            served.stop()
        cli(data, "snapshot", "revert", "db", "s1")
        cli(data, "snapshot", "create", "db", "s2")
        cli(data, "snapshot", "rm", "db", "s1", "--wait")
        with serve(data, "db", "--read-only") as served:
            assert nbdsh(served.uri(), "print(h.pread(3, 5))").strip() == "bytearray(b'abc')"
            assert nbdsh(served.uri(), "print(h.get_size())").strip() == str(64 * MIB)
    finally:
        host.kill()
