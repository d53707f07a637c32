"""A majority of three replicas that is lost at once, and engines that compete for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.hosts import SIZE, Host, options, rows, start_hosts, wait_modes
from tests.live.serving import TIMEOUT_S, Serve, ToolFailed, cli, cli_json, nbdsh, serve

pytestmark = pytest.mark.live


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with start_hosts(tmp_path, 3) as started:
        yield started


def kill_at_once(served: Serve, hosts: list[Host]) -> None:
    """The engine sees that all are gone, and not one after the other."""
    served.process.send_signal(signal.SIGSTOP)
    for host in hosts:
        host.kill()
    served.process.send_signal(signal.SIGCONT)


@contextmanager
def writing(served: Serve) -> Iterator[list[str]]:
    """A write that goes on beside the block; the list has "done", or what went wrong."""
    outcome: list[str] = []

    def run() -> None:
        try:
            nbdsh(served.uri(), "h.pwrite(b'w' * 4096, 0)", "h.flush()")
            outcome.append("done")
        except ToolFailed as error:
            outcome.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(TIMEOUT_S)


def test_writes_wait_for_a_majority_that_comes_back(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, "--quorum-wait", "50", *options(hosts)) as served:
        nbdsh(served.uri(), "h.pwrite(b'a' * 4096, 4096)", "h.flush()")
        kill_at_once(served, hosts[1:])
        with writing(served) as outcome:
            hosts[1].start()
        assert outcome == ["done"]
        hosts[2].start()
        wait_modes(data, "RW", "RW", "RW")
        said = nbdsh(served.uri(), "print(h.pread(1, 0), h.pread(1, 4096))")
        assert said == "bytearray(b'w') bytearray(b'a')\n"
        history = cli_json(data, "volume", "info", "db")["history"]
        assert any(entry["left"] == 2 and entry["members"] == 1 for entry in history)


def test_a_majority_that_stays_away_faults_the_volume(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, "--quorum-wait", "1", *options(hosts)) as served:
        kill_at_once(served, hosts[1:])
        with writing(served) as outcome:
            pass
        assert outcome != ["done"]
        assert cli_json(data, "volume", "info", "db")["state"] == "faulted"
        status, said = served.stop()
        assert status == 0
        assert "1 of 3 replicas are left, 2 are needed" in said
    refused = cli(data, "serve", "db", status=1).stderr
    assert "bring" in refused
    assert "--force" in refused
    hosts[1].start()
    hosts[2].start()
    with serve(data, "db"):
        assert [row["mode"] for row in rows(data).values()] == ["RW", "RW", "RW"]


def test_the_last_two_of_three_go_on_one_after_the_other(tmp_path: Path, hosts: list[Host]) -> None:
    data = tmp_path / "data"
    with serve(data, "db", "--size", SIZE, *options(hosts)) as served:
        for host, modes in ((hosts[2], ("RW", "RW", "ERR")), (hosts[1], ("RW", "ERR", "ERR"))):
            host.kill()
            nbdsh(served.uri(), "h.pwrite(b'b' * 4096, 0)", "h.flush()")
            wait_modes(data, *modes)
        served.stop()
    hosts[0].kill()
    for host in hosts[1:]:
        host.start()
    # They are two of the first three, but the first one went on without them.
    assert "to know whether" in cli(data, "serve", "db", status=1).stderr
    hosts[0].start()
    with serve(data, "db") as served:
        assert nbdsh(served.uri(), "print(h.pread(1, 0))") == "bytearray(b'b')\n"


def test_an_engine_that_lost_the_majority_to_another_stops(
    tmp_path: Path, hosts: list[Host]
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    with serve(data, "db", "--size", SIZE, *options(hosts)) as first:
        nbdsh(first.uri(), "h.pwrite(b'a' * 4096, 0)", "h.flush()")
        first.process.send_signal(signal.SIGSTOP)
        for host in hosts[1:]:
            host.kill()
            host.start()
        with serve(other, "db", *options(hosts[1:])) as second:
            nbdsh(second.uri(), "h.pwrite(b'b' * 4096, 0)", "h.flush()")
            first.process.send_signal(signal.SIGCONT)
            with writing(first) as outcome:
                pass
            assert outcome != ["done"]
            status, said = first.stop()
            assert status == 0
            assert "has opened it since" in said
            assert nbdsh(second.uri(), "print(h.pread(1, 0))") == "bytearray(b'b')\n"
            second.stop()
    # The replica that only the first one had is stale, and is believed by nobody.
    with serve(data, "db") as again:
        assert nbdsh(again.uri(), "print(h.pread(1, 0))") == "bytearray(b'b')\n"
