"""Listening sockets: opening, replacing, adopting, and saying why not."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lhblock.errors import FrontendError
from lhblock.frontend.nbd import (
    Listener,
    adopt_activation_listeners,
    open_tcp_listeners,
    open_unix_listener,
)


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


async def test_tcp_port_zero_listens_and_names_the_port_it_got() -> None:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    host, port = listener.socket.getsockname()
    assert listener.address == f"{host}:{port}"
    assert str(listener.uri("db")) == f"nbd://127.0.0.1:{port}/db"
    with socket.create_connection((host, port)):
        pass
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


async def test_ipv6_loopback_is_listened_on_when_asked() -> None:
    (listener,) = await open_tcp_listeners("::1", 0)
    port = listener.socket.getsockname()[1]
    assert listener.address == f"[::1]:{port}"
    assert str(listener.uri()) == f"nbd://[::1]:{port}/"
    listener.close()


async def test_every_address_has_a_loopback_uri() -> None:
    listeners = await open_tcp_listeners("", 0)
    for listener in listeners:
        assert listener.uri().host in ("127.0.0.1", "::1")
        listener.close()


async def test_port_in_use_is_named_with_a_way_to_find_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FrontendError) as caught:
            await open_tcp_listeners("127.0.0.1", port)
    assert f"127.0.0.1:{port}: the port is in use" in str(caught.value)
    assert f"ss -ltnp 'sport = :{port}'" in str(caught.value)


async def test_address_of_another_machine_is_refused() -> None:
    # From the block reserved for documentation.
    with pytest.raises(FrontendError, match=r"192\.0\.2\.1:0: this machine does not have"):
        await open_tcp_listeners("192.0.2.1", 0)


async def test_host_that_is_no_address_is_refused() -> None:
    with pytest.raises(FrontendError, match="'no such host' is not an address"):
        await open_tcp_listeners("no such host", 0)


async def test_unix_socket_is_private_and_removed_on_close(tmp_path: Path) -> None:
    path = tmp_path / "run" / "nbd.sock"
    listener = await open_unix_listener(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert can_connect(path)
    assert str(listener.uri("db")) == f"nbd+unix:///db?socket={path}"
    listener.close()
    listener.close()
    assert not path.exists()


async def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = await open_unix_listener(path)
    assert can_connect(path)
    listener.close()


async def test_socket_that_answers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    first = await open_unix_listener(path)
    with pytest.raises(FrontendError, match="another process answers there"):
        await open_unix_listener(path)
    assert can_connect(path)
    first.close()


async def test_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(FrontendError, match="another process answers there"):
            await open_unix_listener(path)
        assert path.exists()


async def test_of_two_servers_starting_over_one_stale_socket_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    won: list[Listener] = []
    lost: list[FrontendError] = []

    async def start() -> None:
        try:
            won.append(await open_unix_listener(path))
        except FrontendError as error:
            lost.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(start)
    assert (len(won), len(lost)) == (1, 3)
    assert can_connect(path)
    won[0].close()


async def test_directory_locked_for_long_is_said(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(FrontendError, match=f"keeps the directory {tmp_path} locked"):
            await open_unix_listener(tmp_path / "nbd.sock")
    finally:
        os.close(fd)


async def test_ordinary_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(FrontendError, match="is not a socket"):
        await open_unix_listener(path)
    assert path.read_text() == "data"


async def test_file_put_in_place_of_our_socket_survives_close(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    listener = await open_unix_listener(path)
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"


async def test_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 108)
    with pytest.raises(FrontendError, match="at most 107 bytes"):
        await open_unix_listener(path)


async def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FrontendError, match="Not a directory"):
        await open_unix_listener(tmp_path / "file" / "run" / "nbd.sock")


def activation(count: int = 1, **more: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "HOME": "/", **more}


async def test_activated_socket_is_adopted_with_its_name() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    os.set_inheritable(server.fileno(), True)
    port = server.getsockname()[1]
    environ = activation(LISTEN_FDNAMES="nbd")
    (listener,) = adopt_activation_listeners(environ, first_fd=server.detach())
    assert environ == {"HOME": "/"}
    assert (listener.name, listener.address) == ("nbd", f"127.0.0.1:{port}")
    assert not os.get_inheritable(listener.socket.fileno())
    assert not os.get_blocking(listener.socket.fileno())
    assert adopt_activation_listeners(environ) == []
    listener.close()


async def test_adopted_unix_socket_file_is_left_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    (listener,) = adopt_activation_listeners(activation(), first_fd=server.detach())
    assert listener.uri().socket_path == str(path)
    listener.close()
    assert path.exists()


async def test_sockets_for_another_process_are_not_touched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ = activation(LISTEN_PID=str(os.getpid() + 1), LISTEN_FDNAMES="a")
        assert adopt_activation_listeners(environ, first_fd=server.fileno()) == []
        assert environ == {"HOME": "/"}
        assert server.getsockname()[1]


@pytest.mark.parametrize("count", ["", "0", "-1", "x", "65", "9" * 30])
async def test_count_that_cannot_be_is_refused(count: str) -> None:
    with pytest.raises(FrontendError, match="expected 1 to 64 sockets"):
        adopt_activation_listeners({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


async def test_names_that_do_not_match_the_count_are_refused() -> None:
    with pytest.raises(FrontendError, match="2 names for 1 sockets"):
        adopt_activation_listeners(activation(LISTEN_FDNAMES="a:b"))


async def test_descriptor_that_is_not_listening_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(FrontendError, match="which is not a socket"):
        adopt_activation_listeners(activation(), first_fd=fd)
    os.close(fd)
    with pytest.raises(FrontendError, match="which is not open"):
        adopt_activation_listeners(activation(), first_fd=fd)
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(FrontendError, match="not a listening stream socket"):
        adopt_activation_listeners(activation(), first_fd=datagram.detach())
    connected, other = socket.socketpair()
    with other, pytest.raises(FrontendError, match="not a listening stream socket"):
        adopt_activation_listeners(activation(), first_fd=connected.detach())


CHILD = """
import os, socket, sys
import trio
from lhblock.frontend.nbd import adopt_activation_listeners
os.environ["LISTEN_PID"] = str(os.getpid())
async def main():
    for listener in adopt_activation_listeners(os.environ):
        print(listener.name, listener.socket.fileno(), listener.address)
trio.run(main)
"""


def test_descriptors_are_counted_from_three_as_systemd_does() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        sources = [one.fileno(), two.fileno()]

        def place() -> None:
            # Out of the way first, as either may be number 3 or 4.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in sources]
            for number, fd in enumerate(high, start=3):
                os.dup2(fd, number, inheritable=True)

        ran = subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            preexec_fn=place,
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        ports = [s.getsockname()[1] for s in (one, two)]
    assert ran.stdout.splitlines() == [f"a 3 127.0.0.1:{ports[0]}", f"b 4 127.0.0.1:{ports[1]}"]
