"""The process behind an attached NBD device: new sockets for the kernel when the old ones die.

The kernel says on netlink that a connection of a device died. The keeper then connects anew, as
often as it takes, and hands over as many sockets as the device has; the kernel takes those it
needs. Requests wait meanwhile, so that a file system notices nothing but the time. A request that
was under way is sent again when its time limit is over.

The keeper does not touch the device itself: it would wait for its own work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import syslog
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Final

from lhblock.device import _kernel_nbd as kernel
from lhblock.device._host import Host, unused
from lhblock.device._kind import Attached
from lhblock.device._nbd import (
    SETTLE_POLL_S,
    SETTLE_S,
    attached,
    check_size,
    device_number,
    find,
    lock_path,
    open_family,
    require_root,
    say_hello,
)
from lhblock.device._nbd_client import Export
from lhblock.device._netlink import DATAGRAM_BYTES_MAX, parse_messages
from lhblock.device._target import AttachOptions, Target, unpack
from lhblock.errors import DeviceBusy, DeviceError, LhblockError
from lhblock.frontend.nbd._protocol import NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_READ_ONLY

CHECK_S: Final = 1.0  # how often it is looked whether the device is still ours
RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 2.0
EVENTS_MAX: Final = 1024  # read at once

Log = Callable[[str], None]


@contextmanager
def held_lock(host: Host, target: Target) -> Iterator[None]:
    """Be the one keeper of a volume, with the process number in the lock for people to see.

    Waits a little for a keeper that ends.

    Raises:
      DeviceError: another keeps it.
    """
    path = lock_path(host, target.identity)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DeviceError(f"cannot make {path}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + SETTLE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DeviceError(
                        f"another process keeps the device of {target.volume} attached"
                    ) from error
                time.sleep(SETTLE_POLL_S)
        os.truncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
        yield
    finally:
        os.close(fd)


@contextmanager
def stop_signals() -> Iterator[socket.socket]:
    """A socket that is readable after SIGTERM or SIGINT."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


class Keeper:
    """Keeps one volume attached. Use within `held_lock`."""

    def __init__(self, host: Host, target: Target, options: AttachOptions, log: Log) -> None:
        self._host = host
        self._target = target
        self._options = options
        self._log = log
        self._family = open_family()
        self._events = self._family.join(kernel.EVENTS)
        self._size_bytes = 0
        self._index = -1
        self._away = False

    def close(self) -> None:
        self._events.close()
        self._family.close()

    def start(self) -> Attached:
        """Make the device, or take over one whose keeper is gone.

        Raises:
          DeviceError: nobody serves the volume, or the kernel refuses.
        """
        found = find(self._host, self._target.identity)
        if found is not None:
            self._index, self._size_bytes = device_number(found.device), found.size_bytes
            self._hand_over()
        else:
            self._connect()
        self._wait_for_node()
        now = attached(self._host, self._index, self._target.identity)
        return replace(now, made=found is None)

    def run(self, stop: socket.socket) -> None:
        """Keep the device until it is detached, or `stop` is readable."""
        pending, delay_s = False, RETRY_FIRST_S
        while True:
            timeout_s = delay_s if pending else CHECK_S
            readable, _, _ = select.select([self._events, stop], [], [], timeout_s)
            if stop in readable or not self._ours():
                return
            if self._events in readable:
                pending = self._read_events() or pending
            if not pending:
                continue
            if self._restored():
                pending, delay_s = False, RETRY_FIRST_S
            else:
                delay_s = min(delay_s * 2, RETRY_MAX_S)

    def leave(self) -> None:
        """Detach if nothing uses the device. DeviceBusy: it stays, and nobody keeps it."""
        if self._ours():
            with unused(self._host, self._host.devices / f"nbd{self._index}"):
                kernel.disconnect(self._family, self._index)

    def _ours(self) -> bool:
        shown = kernel.identities(self._host.sysfs).get(self._index)
        return shown == self._target.identity

    def _connect(self) -> None:
        with ExitStack() as stack:
            fds, export = self._connections(stack)
            flags = export.flags
            if self._options.read_only:
                flags |= NBD_FLAG_READ_ONLY
            try:
                self._index = kernel.connect(
                    self._family,
                    fds,
                    size_bytes=export.size_bytes,
                    flags=flags,
                    timeout_s=self._options.timeout_s,
                    away_s=self._options.away_s,
                    identity=self._target.identity,
                )
            except OSError as error:
                raise DeviceError(
                    f"the kernel makes no device of {self._target.volume}: {error.strerror};"
                    " in a container, attach on its host"
                ) from error
            self._size_bytes = export.size_bytes
        if not self._ours():
            kernel.disconnect(self._family, self._index)
            raise DeviceError(
                f"kernel {os.uname().release} does not keep the name of what is attached;"
                " Linux 5.14 or newer does"
            )

    def _connections(self, stack: ExitStack) -> tuple[list[int], Export]:
        fd, export = say_hello(self._target)
        stack.callback(os.close, fd)
        fds = [fd]
        if export.flags & NBD_FLAG_CAN_MULTI_CONN:
            for _ in range(self._options.connections - 1):
                fd, _ = say_hello(self._target)
                stack.callback(os.close, fd)
                fds.append(fd)
        return fds, export

    def _hand_over(self) -> None:
        with ExitStack() as stack:
            fds, export = self._connections(stack)
            check_size(self._target, self._size_bytes, export.size_bytes)
            try:
                kernel.reconfigure(
                    self._family,
                    self._index,
                    fds,
                    size_bytes=export.size_bytes,
                    identity=self._target.identity,
                )
            except OSError as error:
                raise DeviceError(
                    f"the kernel takes no new connections to {self._target.volume}:"
                    f" {error.strerror}"
                ) from error
            self._size_bytes = export.size_bytes

    def _restored(self) -> bool:
        try:
            self._hand_over()
        except DeviceError as error:
            if not self._away:
                self._log(f"{self._target.volume}: {error}; trying until it answers")
            self._away = True
            return False
        self._away = False
        self._log(f"{self._target.volume}: connected again")
        return True

    def _read_events(self) -> bool:
        """True if one of them is about our device, or some were lost."""
        about_us = False
        for _ in range(EVENTS_MAX):
            try:
                datagram = self._events.recv(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                about_us = True
                continue
            for _, _, payload in parse_messages(datagram):
                about_us = about_us or kernel.dead_link(payload) == self._index
        return about_us

    def _wait_for_node(self) -> None:
        path = self._host.devices / f"nbd{self._index}"
        deadline = time.monotonic() + SETTLE_S
        while not path.is_block_device():
            if time.monotonic() > deadline:
                kernel.disconnect(self._family, self._index)
                raise DeviceError(f"the kernel made {path.name}, but {path} does not appear")
            time.sleep(SETTLE_POLL_S)


def keep(
    host: Host,
    target: Target,
    options: AttachOptions,
    *,
    on_ready: Callable[[Attached], None],
    log: Log,
) -> None:
    """Attach, and keep the device until it is detached or this process is told to end.

    Told to end by SIGTERM or SIGINT it detaches; a device in use stays, without a keeper, and
    `lhblock attach` gives it one again.

    Args:
      on_ready: called once, when the device is there.

    Raises:
      DeviceBusy: told to end, and something uses the device.
      DeviceError: it cannot be attached.
    """
    require_root()
    with stop_signals() as stop, held_lock(host, target):
        keeper = Keeper(host, target, options, log)
        try:
            on_ready(keeper.start())
            keeper.run(stop)
            keeper.leave()
        finally:
            keeper.close()


def main(line: str) -> int:
    """The keeper as a process of its own: one line of JSON on standard output, then silence."""
    target, options = unpack(line)
    ready = False

    def on_ready(device: Attached) -> None:
        nonlocal ready
        answer = {
            "device": str(device.device),
            "size_bytes": device.size_bytes,
            "made": device.made,
        }
        print(json.dumps(answer), flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(null, stream.fileno())
        os.close(null)
        ready = True

    syslog.openlog("lhblock-attach", syslog.LOG_PID, syslog.LOG_DAEMON)
    # No directory is kept busy by a process that may run for months.
    os.chdir("/")
    try:
        keep(Host(), target, options, on_ready=on_ready, log=syslog.syslog)
    except DeviceBusy as error:
        syslog.syslog(f"{error}; it stays attached, and nobody reconnects it")
    except LhblockError as error:
        if ready:
            syslog.syslog(str(error))
        else:
            with suppress(OSError):
                print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0
