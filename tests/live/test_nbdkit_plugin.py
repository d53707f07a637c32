"""The plugin for nbdkit's Python: stopped and served volumes, filters, and what goes wrong."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.activation import activated, listen_unix
from tests.live.serving import (
    MIB,
    TIMEOUT_S,
    TOOL_ENVIRONMENT,
    ToolFailed,
    cli,
    cli_json,
    nbdsh,
    requires,
    serve,
    tool,
)

pytestmark = [pytest.mark.live, pytest.mark.interop]

PLUGIN = Path(__file__).resolve().parents[2] / "plugins" / "nbdkit" / "lhblock.py"


def arguments(data: Path, *parameters: str, filters: Sequence[str] = ()) -> list[str]:
    chosen = [f"--filter={name}" for name in filters]
    command = Path(sys.executable).with_name("lhblock")
    about = [f"data-dir={data}", f"lhblock={command}"]
    return [requires("nbdkit"), "-f", *chosen, "python", str(PLUGIN), *about, *parameters]


@contextmanager
def plugin(
    data: Path, *parameters: str, name: str = "nbdkit", filters: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """nbdkit with the plugin for as long as the block lasts: the head of a URI, and the process."""
    path = data.parent / f"{name}.sock"
    with (
        listen_unix(path) as listener,
        activated(
            arguments(data, *parameters, filters=filters), listener, data.parent / f"{name}.log"
        ) as process,
    ):
        yield f"nbd+unix:///EXPORT?socket={path}", process
    path.unlink()


def export(uri: str, name: str = "") -> str:
    return uri.replace("EXPORT", name)


def create(data: Path, *options: str) -> None:
    with serve(data, "db", "--size", "8M", *options):
        pass


def refused(data: Path, *parameters: str) -> str:
    done = subprocess.run(
        arguments(data, *parameters),
        env=TOOL_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "d"


def test_a_stopped_volume_is_opened_and_closed_again(data: Path) -> None:
    create(data)
    with plugin(data, "volume=db") as (uri, _):
        said = tool("nbdinfo", export(uri)).stdout
        for line in (
            "export-size: 8388608",
            "can_cache: true",
            "can_fast_zero: true",
            "can_flush: true",
            "can_fua: true",
            "can_multi_conn: true",
            "can_trim: true",
            "can_zero: true",
            "block_size_minimum: 1",
            "block_size_preferred: 4096",
        ):
            assert line in said
        nbdsh(export(uri), "h.pwrite(b'a' * 5000, 1234)", "h.flush()")
        # Its own server answers commands, too.
        cli(data, "snapshot", "create", "db", "s1")
        assert cli_json(data, "volume", "info", "db")["serving"]
    info = cli_json(data, "volume", "info", "db")
    assert not info["serving"]
    assert info["state"] == "healthy"
    with serve(data, "db") as process:
        assert nbdsh(process.uri(), "print(h.pread(5000, 1234) == b'a' * 5000)") == "True\n"


def test_a_served_volume_is_reached_by_several(data: Path) -> None:
    with (
        serve(data, "db", "--size", "8M") as process,
        plugin(data, "volume=db", name="one") as (one, _),
        plugin(data, "uri=" + process.ready["volumes"][0]["uris"][-1], name="two") as (two, _),
    ):
        nbdsh(export(one), "h.pwrite(b'a' * 4096, 0, nbd.CMD_FLAG_FUA)")
        assert nbdsh(export(two, "db"), "print(h.pread(1, 4095))") == "bytearray(b'a')\n"
        cli(data, "snapshot", "create", "db", "s1")
        nbdsh(export(two), "h.trim(4096, 0)", "h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)")
        assert nbdsh(export(one, "db@s1"), "print(h.pread(1, 0))") == "bytearray(b'a')\n"
        assert nbdsh(export(one), "print(h.pread(1, 0))") == "bytearray(b'\\x00')\n"
        assert tool("nbdinfo", "--map", export(one)).stdout.split()[:4] == [
            "0",
            "8192",
            "3",
            "hole,zero",
        ]
        listed = tool("nbdinfo", "--list", export(one)).stdout
        assert 'export="db"' in listed
        assert 'export="db@s1"' in listed
        assert "is_read_only: true" in tool("nbdinfo", export(one, "db@s1")).stdout
        with pytest.raises(ToolFailed, match="has no export named"):
            nbdsh(export(one, "other"), "h.flush()")


def test_one_snapshot(data: Path) -> None:
    with serve(data, "db", "--size", "8M") as process:
        nbdsh(process.uri(), "h.pwrite(b'a' * 4096, 0)")
        cli(data, "snapshot", "create", "db", "s1")
        nbdsh(process.uri(), "h.pwrite(b'b' * 4096, 0)")
    with plugin(data, "volume=db", "snapshot=s1") as (uri, _):
        assert nbdsh(export(uri), "print(h.is_read_only(), h.pread(1, 0))") == (
            "True bytearray(b'a')\n"
        )
        assert 'export="db"' not in tool("nbdinfo", "--list", export(uri)).stdout


def test_images_go_in_and_out(data: Path, tmp_path: Path) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(3 * MIB) + bytes(4 * MIB) + os.urandom(MIB))
    create(data)
    with plugin(data, "volume=db", "connections=8") as (uri, _):
        tool("nbdcopy", "--requests=32", str(image), export(uri))
        tool("nbdcopy", export(uri), str(back))
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", export(uri), str(image))
        tool(
            "qemu-io",
            "-f",
            "raw",
            "-c",
            "write -P 7 1000 70000",
            "-c",
            "discard 0 65536",
            "-c",
            "read -P 7 65536 4096",
            "-c",
            "read -P 0 0 65536",
            export(uri),
        )
    assert back.read_bytes() == image.read_bytes()


def test_checksums_of_many_requests_in_flight(data: Path) -> None:
    create(data)
    with plugin(data, "volume=db") as (uri, _):
        tool(
            "fio", "--name=job", "--thread", "--ioengine=nbd", f"--uri={export(uri)}", "--size=8M",
            "--rw=randwrite", "--bsrange=512-16k", "--bs_unaligned", "--iodepth=16",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
        )  # fmt: skip


def test_filters(data: Path) -> None:
    create(data)
    with plugin(data, "volume=db", filters=["cow", "readahead"]) as (uri, _):
        nbdsh(export(uri), "h.pwrite(b'x' * 4096, 0)", "assert h.pread(1, 0) == b'x'")
    with plugin(
        data, "error=ENOSPC", "error-pwrite-rate=100%", "delay-read=1ms", "volume=db",
        filters=["error", "delay"],
    ) as (uri, _):  # fmt: skip
        said = nbdsh(
            export(uri),
            "print(h.pread(1, 0))",
            "try: h.pwrite(b'x', 0)\nexcept nbd.Error as error: print(error.errno)",
        )
    assert said == "bytearray(b'\\x00')\nENOSPC\n"


def test_a_killed_nbdkit_leaves_no_server(data: Path) -> None:
    create(data)
    with plugin(data, "volume=db") as (uri, process):
        nbdsh(export(uri), "h.pwrite(b'k' * 4096, 0)")
        server = os.pidfd_open(cli_json(data, "volume", "info", "db")["pid"])
        process.send_signal(signal.SIGKILL)
        assert select.select([server], [], [], TIMEOUT_S)[0]
        os.close(server)
    with serve(data, "db") as again:
        assert nbdsh(again.uri(), "print(h.pread(1, 4095))") == "bytearray(b'k')\n"


# Holds a connection, lets the server be killed and started, and goes on.
CLIENT = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pwrite(b"a" * 4096, 0)
print("written", flush=True)
sys.stdin.readline()
assert h.pread(4096, 0) == b"a" * 4096
h.pwrite(b"b" * 4096, 4096)
h.flush()
print("done", flush=True)
"""


def test_clients_wait_for_a_server_that_is_started_again(data: Path, tmp_path: Path) -> None:
    socket = str(tmp_path / "serve.sock")
    with (
        serve(data, "db", "--size", "8M", "--socket", socket) as first,
        plugin(data, "volume=db") as (uri, _),
        subprocess.Popen(
            ["/usr/bin/python3", "-c", CLIENT, export(uri)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as client,
    ):
        assert client.stdin
        assert client.stdout
        assert client.stdout.readline() == "written\n"
        first.stop(signal.SIGKILL)
        client.stdin.write("\n")
        client.stdin.flush()
        with serve(data, "db", "--socket", socket) as second:
            assert client.stdout.readline() == "done\n"
            said = nbdsh(second.uri(), "print(h.pread(1, 0), h.pread(1, 8191))")
            assert said == "bytearray(b'a') bytearray(b'b')\n"


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ((), "say either volume=NAME or uri=URI"),
        (("volume=db", "uri=nbd://localhost"), "say either volume=NAME or uri=URI"),
        (("volume=nope",), "volume nope: there is none"),
        (("volume=db", "volum=db"), "unknown parameter 'volum'"),
        (("volume=db", "connections=0"), "connections=0: a number from 1 to 16"),
        (("volume=db", "retry=soon"), "retry=soon: a number"),
        (("uri=http://localhost",), "not one of nbd:// or nbd+unix://"),
        (("volume=db", "lhblock=/nowhere/lhblock"), "/nowhere/lhblock"),
    ],
)
def test_what_cannot_be_gets_a_sentence(
    data: Path, parameters: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(data, *parameters)
