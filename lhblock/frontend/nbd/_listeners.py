"""Sockets that wait for clients: opened on TCP and Unix addresses, or handed over by systemd."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError

from ._protocol import NBD_DEFAULT_PORT
from ._tls_keys import TlsKeys
from ._uri import NbdUri, format_address

BACKLOG: Final = 128
UNIX_PATH_BYTES_MAX: Final = 107  # sun_path without its terminator
ACTIVATION_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
ACTIVATION_FDS_MAX: Final = 64
DIRECTORY_LOCK_WAIT_S: Final = 2.0
_DIRECTORY_LOCK_POLL_S: Final = 0.01
ACCEPT_RETRY_S: Final = 0.1

_STARVED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# accept(2): errors of the connection that was about to be accepted, not of the listener.
_ABORTED: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    }
)

_log = structlog.get_logger(__name__)


class Listener:
    """A listening socket and what to call it. Close it once; closing again does nothing.

    Attributes:
      address: ``host:port`` or a path, for messages.
      name: its ``LISTEN_FDNAMES`` entry when systemd opened it, else empty.
      tls: whoever accepts clients here speaks TLS with these keys; None is plain NBD.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str = "",
        socket_file: tuple[Path, int, int] | None = None,
    ) -> None:
        sock.setblocking(False)
        self.socket = trio.socket.from_stdlib_socket(sock)
        self.name = name
        self.tls: TlsKeys | None = None
        self._socket_file = socket_file  # path, device and inode of what close() removes
        self._bound = sock.getsockname()
        self._family = sock.family
        self.address = self._describe()

    def _describe(self) -> str:
        if self._family == socket.AF_UNIX:
            return os.fsdecode(self._bound) or "(unnamed unix socket)"
        return format_address(self._bound[0], self._bound[1])

    @property
    def port(self) -> int:
        """The TCP port; 0 for a Unix socket."""
        return 0 if self._family == socket.AF_UNIX else int(self._bound[1])

    def uri(self, export: str = "") -> NbdUri:
        """How a client on this machine reaches an export here."""
        if self._family == socket.AF_UNIX:
            return NbdUri(export=export, socket_path=os.fsdecode(self._bound))
        host, port = self._bound[0], self._bound[1]
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = loopback.get(host, host)
        if self.tls is None:
            return NbdUri(export=export, host=host, port=port)
        return NbdUri(
            export=export,
            host=host,
            port=port,
            tls=True,
            user=self.tls.user,
            tls_files=self.tls.client_files,
        )

    def fileno(self) -> int:
        """The descriptor, for a process that accepts clients in our stead."""
        return self.socket.fileno()

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        """Wait for a client; return its socket and address.

        Errors that pass, a want of descriptors for instance, are waited out.

        Raises:
          FrontendError: the listener failed for good.

        Cancelled: nobody was accepted.
        """
        starved = False
        while True:
            try:
                return await self.socket.accept()
            except OSError as error:
                if error.errno in _ABORTED:
                    continue
                if error.errno not in _STARVED:
                    raise FrontendError(
                        f"cannot accept clients on {self.address}: {error.strerror}"
                    ) from error
                # The client stays in the backlog. Say it once, not ten times a second.
                if not starved:
                    _log.warning(
                        "cannot accept clients for now",
                        address=self.address,
                        reason=error.strerror,
                    )
                starved = True
                await trio.sleep(ACCEPT_RETRY_S)

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still the one made here."""
        if self._socket_file is not None:
            # Before the socket is closed: while it answers nobody else replaces the file.
            path, device, inode = self._socket_file
            self._socket_file = None
            try:
                found = path.lstat()
                if (found.st_dev, found.st_ino) == (device, inode):
                    path.unlink()
            except OSError:
                # Gone, or the directory is: nothing is left to tidy.
                pass
        self.socket.close()


async def open_tcp_listeners(
    host: str = "127.0.0.1", port: int = NBD_DEFAULT_PORT
) -> list[Listener]:
    """Listen on every address that ``host`` means; port 0 lets the kernel choose one.

    An empty host means every address of the machine.

    Raises:
      FrontendError: the host is unknown, or one of its addresses cannot be had. Nothing is left
        listening.
    """
    shown = format_address(host or "*", port)
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise FrontendError(
            f"cannot listen on {shown}: {host!r} is not an address of this machine ({error})"
        ) from error
    listeners: list[Listener] = []
    missing: OSError | None = None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                # A kernel without IPv6 still resolves names to it.
                missing = error
                continue
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
                listeners.append(Listener(sock))
            except OSError as error:
                sock.close()
                raise _tcp_error(format_address(str(address[0]), port), port, error) from error
        if not listeners:
            raise FrontendError(f"cannot listen on {shown}: {missing}") from missing
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _tcp_error(shown: str, port: int, error: OSError) -> FrontendError:
    if error.errno == errno.EADDRINUSE:
        advice = (
            "the port is in use; stop the program that has it "
            f"(`ss -ltnp 'sport = :{port}'` names it) or listen on another port"
        )
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "permission denied; ports below 1024 need root or CAP_NET_BIND_SERVICE"
    elif error.errno == errno.EADDRNOTAVAIL:
        advice = "this machine does not have that address; `ip address` lists those it has"
    else:
        advice = error.strerror or str(error)
    return FrontendError(f"cannot listen on {shown}: {advice}")


async def open_unix_listener(path: Path) -> Listener:
    """Listen on a Unix socket that only its owner can connect to.

    A missing directory is made with mode 0700. A socket file that is already there is replaced
    only when nobody answers on it; any other file is left alone.

    Raises:
      FrontendError: the path is too long, taken or not permitted.

    Cancelled: nothing was made, except perhaps the directory.
    """
    path = Path.cwd() / path
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise FrontendError(
            f"cannot listen on {path}: the path of a Unix socket has at most "
            f"{UNIX_PATH_BYTES_MAX} bytes; choose a shorter one"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _directory_lock(path.parent):
            _remove_stale(path)
            return _bind_unix(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"you may not write to {path.parent}; choose another path or become its owner"
        else:
            advice = error.strerror or str(error)
        raise FrontendError(f"cannot listen on {path}: {advice}") from error


@asynccontextmanager
async def _directory_lock(directory: Path) -> AsyncIterator[None]:
    """Keep two starting servers from both finding, and both replacing, one stale socket."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up_at = trio.current_time() + DIRECTORY_LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if trio.current_time() > give_up_at:
                    raise FrontendError(
                        f"another process keeps the directory {directory} locked; "
                        f"`fuser -v {directory}` names it"
                    ) from None
            await trio.sleep(_DIRECTORY_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FrontendError(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # On a Unix socket this never waits: a full backlog is EAGAIN.
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except PermissionError:
            raise
        except OSError:
            # It may be busy or of another kind, but somebody has it.
            pass
    raise FrontendError(
        f"cannot listen on {path}: another process answers there; stop it "
        f"(`ss -lxp src {path}` names it) or choose another path"
    )


def _bind_unix(path: Path) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() gives the file the mode of the socket, so it is never open to others.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(os.fspath(path))
        made = path.lstat()
        sock.listen(BACKLOG)
        return Listener(sock, socket_file=(path, made.st_dev, made.st_ino))
    except BaseException:
        sock.close()
        raise


def adopt_activation_listeners(
    environ: MutableMapping[str, str], *, first_fd: int = ACTIVATION_FIRST_FD
) -> list[Listener]:
    """Take the listening sockets that systemd passed to this process.

    The variables are removed from ``environ``, so that neither a second call nor a child takes
    the descriptors for its own. Variables meant for another process give an empty list. Socket
    files stay when such a listener is closed: systemd owns them.

    Raises:
      FrontendError: the variables contradict themselves, or a descriptor is no listening stream
        socket. Descriptors adopted so far are closed.
    """
    pid = environ.pop("LISTEN_PID", None)
    count_text = environ.pop("LISTEN_FDS", None)
    names_text = environ.pop("LISTEN_FDNAMES", "")
    environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or count_text is None:
        return []
    if not (count_text.isascii() and count_text.isdigit()) or not (
        1 <= int(count_text[:6]) <= ACTIVATION_FDS_MAX
    ):
        raise FrontendError(
            f"LISTEN_FDS is {count_text!r}; expected 1 to {ACTIVATION_FDS_MAX} sockets"
        )
    count = int(count_text)
    names = names_text.split(":") if names_text else []
    if names and len(names) != count:
        raise FrontendError(f"LISTEN_FDNAMES has {len(names)} names for {count} sockets")
    listeners: list[Listener] = []
    try:
        for index in range(count):
            name = names[index] if names else ""
            listeners.append(_adopt(first_fd + index, name))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _adopt(fd: int, name: str) -> Listener:
    what = f"socket activation passed descriptor {fd}" + (f" ({name})" if name else "")
    try:
        os.set_inheritable(fd, False)
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise FrontendError(f"{what}, which is not open: {error.strerror}") from error
    if not is_socket:
        raise FrontendError(f"{what}, which is not a socket")
    sock = socket.socket(fileno=fd)
    good = (
        sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        and sock.type == socket.SOCK_STREAM
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    )
    if not good:
        sock.close()
        raise FrontendError(
            f"{what}, which is not a listening stream socket; use ListenStream= and Accept=no"
        )
    return Listener(sock, name=name)
