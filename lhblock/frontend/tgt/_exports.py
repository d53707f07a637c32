"""The exports that tgtd's backing store connects to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lhblock.frontend.nbd import Connection, Export, ExportDescription, Exports


class UnitExports:
    """Exports with one connection each at a time.

    tgtd sends again what had no answer when a connection, or tgtd itself, died. The next
    connection is let in when everything is done that was asked for on the last, so a write that is
    sent again never overwrites a newer one.
    """

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._turns: dict[str, trio.Lock] = {}
        self._connections: dict[str, _Closable] = {}

    def list(self) -> list[ExportDescription]:
        return self._exports.list()

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Export]:
        turn = self._turns.setdefault(name, trio.Lock())
        async with turn, self._exports.open(name) as export:
            try:
                yield _UnitExport(export, name, self._connections)
            finally:
                self._connections.pop(name, None)

    def reconnect(self, name: str) -> None:
        """Have tgtd connect again, which is how it learns a new size."""
        connection = self._connections.get(name)
        close = getattr(connection, "close", None)
        if close is not None:
            close()


_Closable = Connection


class _UnitExport:
    def __init__(self, export: Export, name: str, connections: dict[str, _Closable]) -> None:
        self._export = export
        self._name = name
        self._connections = connections

    @property
    def size_bytes(self) -> int:
        return self._export.size_bytes

    @property
    def read_only(self) -> bool:
        return self._export.read_only

    @property
    def description(self) -> str:
        return self._export.description

    def attach(self, fd: int, *, structured: bool, base_allocation_id: int | None) -> Connection:
        connection = self._export.attach(
            fd, structured=structured, base_allocation_id=base_allocation_id
        )
        self._connections[self._name] = connection
        return connection
