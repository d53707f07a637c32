"""An open volume with several NBD clients, and requests whose history is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import trio

from lhblock.engine import Volume
from tests.model import nbd_client
from tests.model.linearizability import History
from tests.model.nbd_client import ConnectionLost, NbdClient
from tests.model.volumes import VolumeFiles

CLIENTS = 3
LIMIT_S = 60.0

Kind: TypeAlias = Literal["read", "write", "trim", "zero", "flush"]


@dataclass(frozen=True)
class Step:
    """One request to be made.

    Attributes:
      flag: FUA of a write, trim or zero; NO_HOLE as well when ``length`` is odd.
      client: which connection it takes.
    """

    kind: Kind
    offset: int
    length: int
    flag: bool
    client: int


class RequestFailed(AssertionError):
    """A request that had to succeed did not."""


def filled(number: int, length: int) -> bytes:
    """Bytes that say which write they are of: four that look random, repeated, never zero."""
    scrambled = (number + 1) * 2654435761 % 2**32
    tag = bytes(scrambled // 255**place % 255 + 1 for place in range(4))
    return (tag * (length // 4 + 1))[:length]


class ServedVolume:
    """A volume that is open with ``CLIENTS`` connections, every other one with structured replies.

    Attributes:
      volume: as it is open now.
      failures: errors of answers since the last :meth:`open`, and -1 for lost ones.
    """

    def __init__(self, files: VolumeFiles) -> None:
        self.files = files
        self.volume: Volume
        self.clients: list[NbdClient] = []
        self.failures: list[int] = []
        self._opened = AsyncExitStack()
        self._connected = AsyncExitStack()
        self._writes = 0

    async def open(self) -> None:
        self.failures = []
        self.volume = await self._opened.enter_async_context(self.files.open())
        await self.connect()

    async def close(self) -> None:
        await self.disconnect()
        await self._opened.aclose()

    async def connect(self) -> None:
        for number in range(CLIENTS):
            client = nbd_client.connect(self.volume, structured=number % 2 == 0)
            self.clients.append(await self._connected.enter_async_context(client))

    async def disconnect(self) -> None:
        self.clients.clear()
        await self._connected.aclose()

    async def reopen_as_if_killed(self, target: Path) -> None:
        """Go on with a copy of what the kernel has now, made while nothing is in flight."""
        await self.volume.wait_merged()
        copies = [
            self.files.copy_of(index, target / path.name)
            for index, path in enumerate(self.files.paths)
        ]
        await self.close()
        for path in self.files.paths:
            shutil.rmtree(path)
        self.files.paths = copies
        await self.open()

    async def perform(self, step: Step, history: History) -> int:
        """Make one request. Returns the error of its answer, -1 if there was none."""
        client = self.clients[step.client % CLIENTS]
        flags = nbd_client.FUA if step.flag and step.kind in ("write", "trim", "zero") else 0
        command = {
            "read": nbd_client.READ,
            "write": nbd_client.WRITE,
            "trim": nbd_client.TRIM,
            "zero": nbd_client.WRITE_ZEROES,
            "flush": nbd_client.FLUSH,
        }[step.kind]
        data = b""
        if step.kind == "flush":
            request = history.begin_read(0)
        elif step.kind == "read":
            request = history.begin_read(step.offset)
        elif step.kind == "write":
            data = filled(self._writes, step.length)
            self._writes += 1
            request = history.begin_write(step.offset, data)
        else:
            if step.kind == "zero" and step.length % 2:
                flags |= nbd_client.NO_HOLE
            request = history.begin_write(step.offset, bytes(step.length))
        place, length = (0, 0) if step.kind == "flush" else (step.offset, step.length)
        try:
            error, found = await client.request(command, place, length, data=data, flags=flags)
        except ConnectionLost:
            error, found = -1, b""
        if error:
            self.failures.append(error)
        else:
            history.end(request, found if step.kind == "read" else None)
        return error

    async def perform_all(self, steps: Sequence[Step], history: History) -> None:
        """Make requests at the same time."""
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                for step in steps:
                    nursery.start_soon(self.perform, step, history)

    async def read_all(self, history: History) -> bytes:
        """The whole content, as the history's last read.

        Raises:
          RequestFailed: it cannot be read.
        """
        request = history.begin_read(0)
        error, content = await self.clients[0].request(nbd_client.READ, 0, self.volume.size_bytes)
        if error:
            raise RequestFailed(f"reading everything: error {error}")
        history.end(request, content)
        return content

    def usable(self) -> list[int]:
        """Numbers of the replicas that take part."""
        return [n for n, info in enumerate(self.volume.replicas()) if info.mode == "RW"]


async def contents_of(files: VolumeFiles, index: int) -> dict[str, bytes]:
    """What one replica holds, alone: the head under "" and each snapshot under its name."""
    async with files.open(only=[index], read_only=True) as volume:
        found = {"": await volume.read(0, volume.size_bytes)}
        for info in volume.snapshots():
            if not info.removed:
                async with volume.open_view(info.name) as view:
                    found[info.name] = await view.read(0, view.size_bytes)
        return found
