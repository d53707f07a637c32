"""nbdkit plugin: volumes of lhblock behind nbdkit's filters and TLS.

    nbdkit python plugins/nbdkit/lhblock.py volume=db

Runs in the Python that nbdkit embeds, which is the system's, with Debian's python3-libnbd and
nothing of lhblock: what it wants to know it asks the command `lhblock`, and data goes over the Unix
socket of the process that serves the volume. When none does, the plugin starts one, for as long as
nbdkit runs. docs/operating/nbdkit.md is its manual.
"""

from __future__ import annotations

import ctypes
import errno
import json
import queue
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import nbd
import nbdkit

API_VERSION: Final = 2

PARAMETERS: Final = """\
volume=NAME        Volume to serve; or uri=.
uri=URI            NBD URI of a server that is there already: nbd+unix:// or nbd://.
snapshot=NAME      Serve this snapshot of the volume, read-only.
data-dir=DIR       Where volumes are kept; as lhblock's --data-dir.
lhblock=COMMAND    The command, if it is neither beside this file nor in PATH.
connections=N      Connections to the server for each client of ours, 1-16 (default 4):
                   so many of its requests are in progress at a time.
retry=SECONDS      How long requests wait for a server that went away (default 60). Only on a
                   Unix socket: what a host that lost power forgot must not look flushed."""

CONNECTIONS_MAX: Final = 16
START_SECONDS_MAX: Final = 120
STOP_SECONDS_MAX: Final = 60
RETRY_PAUSE_SECONDS: Final = 0.2
EXTENTS_MAX: Final = 1 << 16  # of one answer
EXPORTS_MAX: Final = 10000  # as nbdkit
PR_SET_PDEATHSIG: Final = 1

# Where the command is in a checkout, and in an installation that has this file in its share/.
_HERE: Final = Path(__file__).resolve().parent
_COMMANDS: Final = (_HERE / "../../.venv/bin/lhblock", _HERE / "../../../bin/lhblock")

_settings: dict[str, Any] = {
    "volume": None,
    "uri": None,
    "snapshot": None,
    "data-dir": None,
    "lhblock": None,
    "connections": 4,
    "retry": 60,
}
_server: Server


class Refused(Exception):
    """What the user asked for cannot be; the text says why."""


_T = TypeVar("_T")
_Buffer = bytes | bytearray | memoryview
_format_exception = traceback.format_exception


def _sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> list[str]:
    if isinstance(error, (Refused, nbd.Error, OSError, subprocess.SubprocessError)):
        return [str(error)]
    return _format_exception(kind, error, trace)


# nbdkit prints what this returns. In its interpreter there is nobody else to mind.
traceback.format_exception = _sentence  # type: ignore[assignment]


# ---- What nbdkit asks before there are clients.


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def dump_plugin() -> None:
    print(f"lhblock_libnbd={nbd.NBD().get_version()}")
    print(f"lhblock_command={_command() or ''}")


def config(key: str, value: str) -> None:
    if key not in _settings:
        raise Refused(f"lhblock: unknown parameter {key!r}; there are:\n{PARAMETERS}")
    if key in ("connections", "retry"):
        _settings[key] = _number(key, value, 1 if key == "connections" else 0)
    else:
        if not value:
            raise Refused(f"lhblock: {key}= needs a value")
        _settings[key] = str(Path(value).absolute()) if key == "data-dir" else value


def config_complete() -> None:
    if (_settings["volume"] is None) == (_settings["uri"] is None):
        raise Refused("lhblock: say either volume=NAME or uri=URI")
    uri = _settings["uri"]
    if uri is not None and not uri.startswith(("nbd://", "nbd+unix://")):
        raise Refused(f"lhblock: uri={uri}: not one of nbd:// or nbd+unix://")


def get_ready() -> None:
    """Find out, while there is a terminal to tell it to, whether there is such a volume."""
    global _server
    if _settings["uri"] is not None:
        _server = Server(_settings["uri"])
        return
    name = _settings["volume"]
    found = json.loads(_lhblock("volume", "info", name, "--json"))
    uri = next((uri for uri in found["uris"] if uri.startswith("nbd+unix:")), None)
    if uri is not None:
        _server = Server(uri, volume=name)
    elif found["serving"]:
        raise Refused(f"lhblock: volume {name}: process {found['pid']} offers it on no Unix socket")
    else:
        _server = OwnServer(name)


def after_fork() -> None:
    _server.start()


def cleanup() -> None:
    _server.stop()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    # Those of this volume: a server may have others, which were not asked for.
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(_server.uri)
    found: list[tuple[str, str]] = []

    def note(name: str, description: str) -> int:
        if len(found) < EXPORTS_MAX and _offered(name):
            found.append((name, description))
        return 0

    handle.opt_list(note)
    handle.opt_abort()
    return found


def default_export(readonly: bool, is_tls: bool) -> str:
    return _server.export(_settings["snapshot"])


def _offered(name: str) -> bool:
    snapshot = _settings["snapshot"]
    if name == _server.export(snapshot):
        return True
    # A server that was named without an export offers all it has.
    return snapshot is None and (not _server.volume or name.startswith(f"{_server.volume}@"))


# ---- The server behind us.


class Server:
    """A process that serves the volume, ours or not."""

    def __init__(self, uri: str, volume: str | None = None) -> None:
        self.uri = uri
        self.retries = uri.startswith("nbd+unix:")
        if volume is None:
            # libnbd reads the export's name in the URI.
            handle = nbd.NBD()
            handle.set_opt_mode(True)
            handle.connect_uri(uri)
            volume = handle.get_export_name()
            handle.opt_abort()
        self.volume = volume

    def export(self, snapshot: str | None) -> str:
        return self.volume if snapshot is None else f"{self.volume}@{snapshot}"

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class OwnServer(Server):
    """`lhblock serve` on a socket that nobody else knows, for as long as nbdkit runs."""

    def __init__(self, volume: str) -> None:
        self.uri = ""
        self.retries = False  # whoever kills our server gets errors, not a volume that hangs
        self.volume = volume
        self._directory: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="lhblock-nbdkit-")
        socket = f"{self._directory}/nbd.sock"
        arguments = ["serve", self.volume, "--no-tcp", "--socket", socket, "--json"]
        self._process = subprocess.Popen(
            _arguments(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=_end_with_parent,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(STOP_SECONDS_MAX)
            self.stop()
            raise Refused(f"lhblock: 'lhblock serve {self.volume}' ended with status {status}")
        (volume,) = json.loads(line)["volumes"]
        self.uri = next(uri for uri in volume["uris"] if uri.startswith("nbd+unix:"))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _end_with_parent() -> None:
    # A volume must not stay open because nbdkit was killed. SIGTERM closes it cleanly.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _lhblock(*arguments: str) -> str:
    """Run a command of lhblock and return what it printed."""
    done = subprocess.run(
        _arguments(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS_MAX,
    )
    if done.returncode != 0:
        raise Refused(done.stderr.strip() or f"lhblock ended with status {done.returncode}")
    return done.stdout


def _arguments(*arguments: str) -> list[str]:
    command = _command()
    if command is None:
        raise Refused("lhblock: no command 'lhblock' in PATH; name it with lhblock=COMMAND")
    options = [] if _settings["data-dir"] is None else ["--data-dir", _settings["data-dir"]]
    return [command, *arguments, *options]


def _command() -> str | None:
    if _settings["lhblock"] is not None:
        return _settings["lhblock"]
    near = next((path for path in _COMMANDS if path.exists()), None)
    return shutil.which("lhblock") if near is None else str(near)


def _number(key: str, value: str, least: int) -> int:
    most = CONNECTIONS_MAX if key == "connections" else 24 * 3600
    if not value.isascii() or not value.isdigit() or not least <= int(value) <= most:
        raise Refused(f"lhblock: {key}={value}: a number from {least} to {most} is needed")
    return int(value)


# ---- One client.


class Client:
    """An export as one client of nbdkit sees it, over several connections to the server.

    libnbd's handles do one request at a time here. A request takes the handle that was returned
    last, so that a client which sends one request after the other uses one connection.
    """

    def __init__(self, export: str) -> None:
        self._export = export
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self.first = self._connect()  # tells what the export can do
        for _ in range(_settings["connections"] - 1):
            self._idle.put(None)  # connected when needed
        self._idle.put(self.first)
        self._count = _settings["connections"]

    def close(self) -> None:
        for _ in range(self._count):
            handle = self._idle.get()
            if handle is not None and handle.aio_is_ready():
                handle.shutdown()

    def request(self, act: Callable[[Any], _T]) -> _T:
        """Run `act` with a handle, and again with a new one when the server went away meanwhile.

        What was answered before is in the server's page cache at least, and every request can be
        repeated: it says what the range is to hold.
        """
        handle = self._idle.get()
        try:
            deadline = None
            while True:
                try:
                    if handle is None:
                        handle = self._connect()
                    return act(handle)
                except nbd.Error as error:
                    if handle is not None and handle.aio_is_ready():
                        raise  # the server's answer
                    handle = None
                    if not _server.retries:
                        raise
                    now = time.monotonic()
                    deadline = now + _settings["retry"] if deadline is None else deadline
                    if now >= deadline:
                        nbdkit.debug(f"lhblock: gave up waiting for the server: {error}")
                        raise
                    time.sleep(RETRY_PAUSE_SECONDS)
        except nbd.Error as error:
            nbdkit.set_error(error.errnum if handle is not None and error.errnum else errno.EIO)
            raise
        finally:
            self._idle.put(handle)

    def _connect(self) -> Any:
        handle = nbd.NBD()
        # nbdkit has checked the ranges, and the server does it again.
        handle.set_strict_mode(0)
        handle.set_opt_mode(True)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.set_full_info(True)
        handle.connect_uri(_server.uri)
        handle.set_export_name(self._export)
        handle.opt_go()
        return handle


def open(readonly: bool) -> Client:
    name = nbdkit.export_name()
    chosen = _server.export(_settings["snapshot"])
    if name and not _offered(name):
        nbdkit.set_error(errno.ENOENT)
        raise Refused(f"lhblock: no export {name!r} here, only {chosen!r}")
    return Client(name or chosen)


def close(client: Client) -> None:
    client.close()


def get_size(client: Client) -> int:
    return client.first.get_size()


def block_size(client: Client) -> tuple[int, int, int]:
    first = client.first
    sizes = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
    least, preferred, most = (first.get_block_size(size) for size in sizes)
    return (least or 1, preferred or 4096, most or 32 << 20)


def export_description(client: Client) -> str:
    return client.first.get_export_description()


def can_write(client: Client) -> bool:
    return not client.first.is_read_only()


def can_multi_conn(client: Client) -> bool:
    return client.first.can_multi_conn()


def can_flush(client: Client) -> bool:
    return client.first.can_flush()


def can_fua(client: Client) -> int:
    return nbdkit.FUA_NATIVE if client.first.can_fua() else nbdkit.FUA_NONE


def can_trim(client: Client) -> bool:
    return client.first.can_trim()


def can_zero(client: Client) -> bool:
    return client.first.can_zero()


def can_fast_zero(client: Client) -> bool:
    return client.first.can_fast_zero()


def can_cache(client: Client) -> int:
    return nbdkit.CACHE_NATIVE if client.first.can_cache() else nbdkit.CACHE_NONE


def can_extents(client: Client) -> bool:
    return client.first.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)


def is_rotational(client: Client) -> bool:
    return client.first.is_rotational()


def pread(client: Client, buf: memoryview, offset: int, flags: int) -> None:
    buf[:] = client.request(lambda handle: handle.pread(len(buf), offset))


def pwrite(client: Client, buf: _Buffer, offset: int, flags: int) -> None:
    client.request(lambda handle: handle.pwrite(buf, offset, _fua(flags)))


def flush(client: Client, flags: int) -> None:
    client.request(lambda handle: handle.flush())


def trim(client: Client, count: int, offset: int, flags: int) -> None:
    client.request(lambda handle: handle.trim(count, offset, _fua(flags)))


def zero(client: Client, count: int, offset: int, flags: int) -> None:
    asked = _fua(flags)
    if not flags & nbdkit.FLAG_MAY_TRIM:
        asked |= nbd.CMD_FLAG_NO_HOLE
    if flags & nbdkit.FLAG_FAST_ZERO:
        asked |= nbd.CMD_FLAG_FAST_ZERO
    client.request(lambda handle: handle.zero(count, offset, asked))


def cache(client: Client, count: int, offset: int, flags: int) -> None:
    client.request(lambda handle: handle.cache(count, offset))


def extents(client: Client, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    asked = nbd.CMD_FLAG_REQ_ONE if flags & nbdkit.FLAG_REQ_ONE else 0
    found: list[tuple[int, int, int]] = []

    def note(context: str, start: int, entries: list[int], error: Any) -> int:
        # Pairs of length and state; base:allocation is the only context that was asked for.
        for length, state in zip(entries[::2], entries[1::2], strict=False):
            if len(found) < EXTENTS_MAX:
                found.append((start, length, state))
            start += length
        return 0

    def ask(handle: Any) -> None:
        found.clear()
        handle.block_status(count, offset, note, asked)

    client.request(ask)
    return found


def _fua(flags: int) -> int:
    return nbd.CMD_FLAG_FUA if flags & nbdkit.FLAG_FUA else 0
