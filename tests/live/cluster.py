"""Replica processes and an engine in network namespaces of their own, and what may befall them.

Each replica has a link to the engine that is nobody else's, and a small file system that is nobody
else's, so a link can be cut in one direction and a disk can fill up without harm to the others.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.live.serving import TIMEOUT_S, Serve, ToolFailed, requires, start, tool
from tests.loop import require_loop_devices
from tests.unit.nbd_client import EXPORT_NAME, GREETING, option

VOLUME = "db"
DISK_BYTES = 8 << 20
PORT = 10000  # of a namespace that has no other process
NOBODY = "02:00:00:00:00:01"  # a link address that neither end of a link has
SLOW = ("rate", "4mbit", "burst", "16kb", "latency", "400ms")
FIXED_NEWSTYLE_NO_ZEROES = 3


def require_namespaces() -> None:
    """Skip a test on a machine that cannot."""
    require_loop_devices()
    requires("tc")
    name = f"lhb-{secrets.token_hex(4)}"
    try:
        tool("ip", "netns", "add", name)
    except ToolFailed as error:
        pytest.skip(f"requires network namespaces: {error}")
    tool("ip", "netns", "del", name)


class Node:
    """A replica process with its link and its disk, each of which may fail.

    Every fault has a method, and :meth:`heal` ends all of them.
    """

    def __init__(self, index: int, directory: Path, prefix: str, stack: ExitStack) -> None:
        self._engine = f"{prefix}-e"
        self._namespace = f"{prefix}-{index}"
        self._link = f"r{index}"
        self._ours, self._theirs = f"10.0.{index}.1", f"10.0.{index}.2"
        self._disk = directory / f"disk{index}"
        self.path = self._disk / "replica"
        self.address = f"tcp://{self._theirs}:{PORT}"
        self._process: subprocess.Popen[str] | None = None
        self._make_link(stack)
        self._make_disk(stack)
        stack.callback(self.kill)
        self.start()

    def _make_link(self, stack: ExitStack) -> None:
        tool("ip", "netns", "add", self._namespace)
        stack.callback(tool, "ip", "netns", "del", self._namespace)
        ends = ((self._engine, self._link, self._ours), (self._namespace, "wire", self._theirs))
        (one, name, _), (other, peer, _) = ends
        tool(
            *("ip", "link", "add", name, "netns", one, "type", "veth"),
            *("peer", "name", peer, "netns", other),
        )
        for namespace, device, address in ends:
            tool("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device)
            tool("ip", "-n", namespace, "link", "set", device, "up")
            tool("ip", "-n", namespace, "link", "set", "lo", "up")

    def _make_disk(self, stack: ExitStack) -> None:
        image = self._disk.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        self._disk.mkdir()
        tool("mkfs.ext4", "-q", "-m", "0", str(image))
        tool("mount", "-o", "loop", str(image), str(self._disk))
        stack.callback(tool, "umount", "--lazy", str(self._disk))

    def start(self) -> None:
        """Start the process if there is none, and wait until it is ready."""
        if self._process is not None:
            return
        command = [
            *("ip", "netns", "exec", self._namespace, sys.executable, "-m", "lhblock"),
            *("replica", str(self.path), "--size", "64K", "--json"),
            *("--listen", self.address.removeprefix("tcp://")),
        ]
        with self._disk.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._disk.with_suffix(".log").read_text()
        assert json.loads(line)["control"] == self.address.removeprefix("tcp://")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=TIMEOUT_S)
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def cut(self) -> None:
        """Nothing passes, in either direction."""
        tool("ip", "-n", self._namespace, "link", "set", "wire", "down")

    def cut_requests(self) -> None:
        """What the engine sends is lost; what the replica sends arrives."""
        self._mislead(self._engine, self._link, self._theirs)

    def cut_replies(self) -> None:
        """What the replica sends is lost; what the engine sends arrives."""
        self._mislead(self._namespace, "wire", self._ours)

    def _mislead(self, namespace: str, device: str, address: str) -> None:
        neighbour = ("ip", "-n", namespace, "neigh", "replace", address, "lladdr", NOBODY)
        tool(*neighbour, "dev", device, "nud", "permanent")

    def slow_down(self) -> None:
        """A link of half a megabyte a second. Delay alone needs netem, which our kernel lacks."""
        tool("tc", "-n", self._engine, "qdisc", "replace", "dev", self._link, "root", "tbf", *SLOW)

    def fill(self) -> None:
        """Leave no space on the disk."""
        with (self._disk / "filler").open("ab", buffering=0) as file:
            for piece in (1 << 16, 1 << 12):
                try:
                    while True:
                        file.write(b"f" * piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def heal(self) -> None:
        (self._disk / "filler").unlink(missing_ok=True)
        for namespace, device, address in (
            (self._engine, self._link, self._theirs),
            (self._namespace, "wire", self._ours),
        ):
            for words in (
                ("ip", "-n", namespace, "neigh", "del", address, "dev", device),
                ("tc", "-n", namespace, "qdisc", "del", "dev", device, "root"),
            ):
                subprocess.run(words, capture_output=True, check=False)  # most were not there
        tool("ip", "-n", self._namespace, "link", "set", "wire", "up")
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.start()


class Cluster:
    """The replicas, and the engine, which may be killed and started again."""

    def __init__(self, directory: Path, count: int, stack: ExitStack) -> None:
        prefix = f"lhb-{secrets.token_hex(4)}"
        self._engine = f"{prefix}-e"
        self.data = directory / "data"
        tool("ip", "netns", "add", self._engine)
        stack.callback(tool, "ip", "netns", "del", self._engine)
        self.nodes = [Node(index, directory, prefix, stack) for index in range(count)]
        self._log = stack.enter_context((directory / "engine.log").open("a"))
        self.served: Serve | None = None
        stack.callback(self.kill_engine)

    def start_engine(self, *arguments: str) -> None:
        self.served = Serve(
            start(
                self.data,
                *(VOLUME, "--listen", "127.0.0.1:0", "--replica-timeout", "1"),
                *("--quorum-wait", "120", *arguments),
                prefix=["ip", "netns", "exec", self._engine],
            ),
            self.data,
        )

    def kill_engine(self) -> None:
        self._end_engine(signal.SIGKILL)

    def stop_engine(self) -> None:
        assert self._end_engine(signal.SIGTERM) == 0

    def _end_engine(self, number: int) -> int:
        if self.served is None:
            return 0
        status, said = self.served.stop(number)
        self._log.write(said)
        self._log.flush()
        self.served = None
        return status

    def connect(self) -> socket.socket:
        """A connection to the volume that is past its handshake, without structured replies."""
        assert self.served is not None
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(self.served.ready["sockets"][0])
        with connection.makefile("rb", buffering=0) as stream:
            assert stream.read(len(GREETING)) == GREETING
            hello = struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES)
            connection.sendall(hello + option(EXPORT_NAME, VOLUME.encode()))
            assert len(stream.read(10) or b"") == 10  # size and flags
        connection.settimeout(None)
        return connection


@contextmanager
def start_cluster(directory: Path, count: int) -> Iterator[Cluster]:
    """For as long as the block lasts; nothing of it is left."""
    require_namespaces()
    with ExitStack() as stack:
        cluster = Cluster(directory, count, stack)
        places = (word for node in cluster.nodes for word in ("--replica", node.address))
        cluster.start_engine("--size", "64K", *places)
        yield cluster


def keep_seed(kept: Path, seed: int) -> None:
    """Note a seed that failed, so that the next run begins with it."""
    kept.parent.mkdir(exist_ok=True)
    with kept.open("a") as file:
        print(seed, file=file)


def seeds_to_run(variable: str, kept: Path, usual: int) -> list[int]:
    """Those that failed before, and ``usual`` others or as many as the environment asks for.

    The variable has a number of seeds, or ``=SEED`` for that one alone.
    """
    asked = os.environ.get(variable, str(usual))
    if asked.startswith("="):
        return [int(asked[1:])]
    failed = [int(line) for line in kept.read_text().split()] if kept.exists() else []
    return list(dict.fromkeys([*failed, *range(1, int(asked) + 1)]))
