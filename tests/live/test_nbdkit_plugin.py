"""The plugins for nbdkit, in Python and in C: served volumes, filters, and what goes wrong; stopped
volumes, which are for Python alone."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "plugins" / "nbdkit" / "lhblock.py"
MODULE = REPOSITORY / "lhblock" / "frontend" / "nbd" / "nbdkit-lhblock-plugin.so"
SANITIZED = REPOSITORY / "build" / "asan" / "nbdkit-lhblock-plugin.so"


def plugin_words(kind: str, data: Path) -> list[str]:
    """The plugin and where its volumes are."""
    if kind == "python":
        command = Path(sys.executable).with_name("lhblock")
        return ["python", str(SCRIPT), f"data-dir={data}", f"lhblock={command}"]
    module = SANITIZED if kind == "c-asan" else MODULE
    if not module.exists():
        pytest.skip("requires the plugin in C: run `make nbdkit-plugin`")
    return [str(module), f"data-dir={data}"]


def arguments(
    data: Path, *parameters: str, kind: str = "python", filters: Sequence[str] = ()
) -> list[str]:
    chosen = [f"--filter={name}" for name in filters]
    words = [requires("nbdkit"), "-f", *chosen, *plugin_words(kind, data), *parameters]
    if kind != "c-asan":
        return words
    runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    # What nbdkit has in use when it ends is no leak of ours.
    return ["env", f"LD_PRELOAD={runtime}", "ASAN_OPTIONS=detect_leaks=0", *words]


@contextmanager
def plugin(
    data: Path,
    *parameters: str,
    kind: str = "python",
    name: str = "nbdkit",
    filters: Sequence[str] = (),
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """nbdkit with the plugin for as long as the block lasts: the head of a URI, and the process."""
    path = data.parent / f"{name}.sock"
    command = arguments(data, *parameters, kind=kind, filters=filters)
    with (
        listen_unix(path) as listener,
        activated(command, listener, data.parent / f"{name}.log") as process,
    ):
        yield f"nbd+unix:///EXPORT?socket={path}", process
    path.unlink()


def export(uri: str, name: str = "") -> str:
    return uri.replace("EXPORT", name)


def create(data: Path, *options: str) -> None:
    with serve(data, "db", "--size", "8M", *options):
        pass


def refused(data: Path, *parameters: str, kind: str = "python") -> str:
    done = subprocess.run(
        arguments(data, *parameters, kind=kind),
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


@pytest.fixture(params=["python", "c", "c-asan"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ABILITIES = (
    "export-size: 8388608",
    "can_cache: true",
    "can_fast_zero: true",
    "can_flush: true",
    "can_fua: true",
    "can_multi_conn: true",
    "can_trim: true",
    "can_zero: true",
    "is_rotational: false",
    "block_size_minimum: 1",
    "block_size_preferred: 4096",
    "block_size_maximum: 33554432",
    "description: 8 MiB, healthy",
    "base:allocation",
)


def test_a_stopped_volume_is_opened_and_closed_again(data: Path) -> None:
    create(data)
    with plugin(data, "volume=db") as (uri, _):
        said = tool("nbdinfo", export(uri)).stdout
        for line in ABILITIES:
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


def test_a_served_volume_is_reached_by_several(data: Path, kind: str) -> None:
    with serve(data, "db", "--size", "8M") as process, ExitStack() as stack:
        anything = "uri=" + process.ready["volumes"][0]["uris"][-1]
        everything = [anything] if kind == "python" else []
        one, _ = stack.enter_context(plugin(data, "volume=db", kind=kind, name="one"))
        two, _ = stack.enter_context(plugin(data, *everything, kind=kind, name="two"))
        said = tool("nbdinfo", export(one)).stdout
        for line in ABILITIES:
            assert line in said
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


def assert_only_the_snapshot(uri: str) -> None:
    assert nbdsh(export(uri), "print(h.is_read_only(), h.pread(1, 0))") == "True bytearray(b'a')\n"
    listed = tool("nbdinfo", "--list", export(uri)).stdout
    assert 'export="db@s1"' in listed
    assert 'export="db"' not in listed


def test_one_snapshot(data: Path) -> None:
    with serve(data, "db", "--size", "8M") as process:
        nbdsh(process.uri(), "h.pwrite(b'a' * 4096, 0)")
        cli(data, "snapshot", "create", "db", "s1")
        nbdsh(process.uri(), "h.pwrite(b'b' * 4096, 0)")
        with plugin(data, "volume=db@s1", kind="c") as (uri, _):
            assert_only_the_snapshot(uri)
    with plugin(data, "volume=db", "snapshot=s1") as (uri, _):
        assert_only_the_snapshot(uri)


def test_images_go_in_and_out(data: Path, tmp_path: Path, kind: str) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(3 * MIB) + bytes(4 * MIB) + os.urandom(MIB))
    many = ["connections=8"] if kind == "python" else []
    with (
        serve(data, "db", "--size", "8M"),
        plugin(data, "volume=db", *many, kind=kind) as (uri, _),
    ):
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


def test_checksums_of_many_requests_in_flight(data: Path, kind: str) -> None:
    with serve(data, "db", "--size", "8M"), plugin(data, "volume=db", kind=kind) as (uri, _):
        tool(
            "fio", "--name=job", "--thread", "--ioengine=nbd", f"--uri={export(uri)}", "--size=8M",
            "--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned", "--iodepth=16",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
        )  # fmt: skip


def test_filters(data: Path, kind: str) -> None:
    with serve(data, "db", "--size", "8M") as process:
        with plugin(data, "volume=db", kind=kind, filters=["cow", "readahead"]) as (uri, _):
            nbdsh(export(uri), "h.pwrite(b'x' * 4096, 0)", "assert h.pread(1, 0) == b'x'")
        assert nbdsh(process.uri(), "print(h.pread(1, 0))") == "bytearray(b'\\x00')\n"
        with plugin(
            data, "error=ENOSPC", "error-pwrite-rate=100%", "delay-read=1ms", "volume=db",
            kind=kind, filters=["error", "delay"],
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


def test_clients_wait_for_a_server_that_is_started_again(data: Path, kind: str) -> None:
    with (
        serve(data, "db", "--size", "8M") as first,
        plugin(data, "volume=db", kind=kind) as (uri, _),
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
        with serve(data, "db") as second:
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


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (("volume=nope",), "no volume 'nope' is served here"),
        (("volume=db", "volum=db"), "unknown parameter 'volum'"),
        (("volume=",), "volume= needs a name"),
        (("volume=db", "retry=soon"), "error: retry: "),
        (("volume=db", "retry=86401"), "retry=86401: a number from 0 to 86400"),
        (("volume=db", "socket=/nowhere"), "say one of socket= and data-dir=, once"),
    ],
)
def test_what_cannot_be_in_c_gets_a_sentence(
    data: Path, parameters: tuple[str, ...], sentence: str
) -> None:
    with serve(data, "db", "--size", "8M"):
        assert sentence in refused(data, *parameters, kind="c")


def test_a_stopped_volume_in_c_gets_a_sentence(data: Path) -> None:
    create(data)
    assert "no server is there; 'lhblock serve' starts one" in refused(data, "volume=db", kind="c")


GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


EXPORT_INFO = struct.pack(">HQH", 0, 8 * MIB, 0b1101)
META = struct.pack(">I", 1) + b"base:allocation"
CONTEXT = option_reply(8, 1) + option_reply(10, 4, META) + option_reply(10, 1)
HANDSHAKE = GREETING + CONTEXT + option_reply(7, 3, EXPORT_INFO) + option_reply(7, 1)


def chunk(kind: int, data: bytes, cookie: int = 1, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data


def data_at(offset: int, count: int) -> bytes:
    return struct.pack(">Q", offset) + b"z" * count


def ask_a_fake(tmp_path: Path, said: bytes) -> str:
    """Read 512 bytes at 4096 of a server that says the same to everybody; the cookie is 1."""

    def answer(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

    path = tmp_path / "d" / "run" / "nbd.sock"
    path.parent.mkdir(parents=True)
    with listen_unix(path) as listener:
        answering = threading.Thread(target=answer, args=(listener,))
        answering.start()
        try:
            with plugin(tmp_path / "d", "retry=0", kind="c-asan") as (uri, process):
                try:
                    return nbdsh(export(uri, "db"), "print(h.pread(512, 4096) == b'z' * 512)")
                finally:
                    assert process.poll() is None
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            answering.join()


@pytest.mark.parametrize(
    "said",
    [
        chunk(1, data_at(4096, 512)),
        chunk(1, data_at(4352, 256), flags=0) + chunk(1, data_at(4096, 256)),
        chunk(1, data_at(4096, 512), flags=0) + chunk(0, b""),
    ],
)
def test_a_server_may_answer_in_pieces(tmp_path: Path, said: bytes) -> None:
    assert ask_a_fake(tmp_path, HANDSHAKE + said) == "True\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"x" * 100,
        GREETING + option_reply(8, 1) + option_reply(10, 4, b"1234"),
        GREETING + option_reply(8, 2),
        GREETING + CONTEXT + option_reply(7, 3, b"\0"),
        GREETING + CONTEXT + option_reply(7, 3, EXPORT_INFO + b"x"),
        GREETING + CONTEXT + option_reply(7, 1),  # no size
        GREETING + CONTEXT + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31),
        HANDSHAKE + b"y" * 100,
        HANDSHAKE + struct.pack(">IIQ", 0x67446698, 0, 1),  # as if it were a write
        HANDSHAKE + chunk(1, data_at(4096, 513)),
        HANDSHAKE + chunk(1, data_at(4095, 512)),
        HANDSHAKE + chunk(1, data_at(1 << 63, 512)),
        HANDSHAKE + chunk(1, data_at(4096, 511)),
        HANDSHAKE + 2 * chunk(1, data_at(4096, 512), flags=0),
        HANDSHAKE + chunk(1, b"short"),
        HANDSHAKE + chunk(0, b""),  # all of nothing
        HANDSHAKE + chunk(5, struct.pack(">III", 1, 512, 0)),  # what was not asked
        HANDSHAKE + chunk(0x8001, struct.pack(">IH", 0, 0)),  # an error that is none
        HANDSHAKE + chunk(0x8001, b"e"),
        HANDSHAKE + chunk(1, data_at(4096, 512), cookie=2),
        HANDSHAKE + struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, 1, 0xFFFFFFFF),
        HANDSHAKE + chunk(1, data_at(4096, 512))[:-50],
    ],
)
def test_a_server_that_talks_nonsense_harms_nobody(tmp_path: Path, said: bytes) -> None:
    with pytest.raises(ToolFailed):
        ask_a_fake(tmp_path, said)
