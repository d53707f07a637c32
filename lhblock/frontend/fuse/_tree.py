"""The names of the mount, and the numbers the kernel knows them by.

DIR/VOLUME/volume             the volume
DIR/VOLUME/status.json        its state
DIR/VOLUME/snapshots/NAME     a snapshot
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

ROOT_INODE: Final = 1

VOLUME: Final = "volume"
STATUS: Final = "status.json"
SNAPSHOTS: Final = "snapshots"


class Kind(Enum):
    """What a name stands for."""

    ROOT = "root"
    VOLUME_DIRECTORY = "volume directory"
    VOLUME = "volume"
    STATUS = "status"
    SNAPSHOTS = "snapshots"
    SNAPSHOT = "snapshot"

    @property
    def is_directory(self) -> bool:
        return self in (Kind.ROOT, Kind.VOLUME_DIRECTORY, Kind.SNAPSHOTS)


@dataclass(frozen=True)
class Node:
    """One file or directory. `created` tells snapshots of one name apart."""

    kind: Kind
    volume: str = ""
    snapshot: str = ""
    created: str = ""

    @property
    def parent(self) -> Node:
        """The directory it is in; the root's is the root."""
        match self.kind:
            case Kind.SNAPSHOT:
                return Node(Kind.SNAPSHOTS, self.volume)
            case Kind.VOLUME | Kind.STATUS | Kind.SNAPSHOTS:
                return Node(Kind.VOLUME_DIRECTORY, self.volume)
            case _:
                return ROOT


ROOT: Final = Node(Kind.ROOT)


def volume_entries(volume: str) -> dict[str, Node]:
    """What is in the directory of a volume."""
    return {
        VOLUME: Node(Kind.VOLUME, volume),
        STATUS: Node(Kind.STATUS, volume),
        SNAPSHOTS: Node(Kind.SNAPSHOTS, volume),
    }


def volume_file(directory: Path, volume: str) -> Path:
    """Where the file of a volume is."""
    return directory / volume / VOLUME


class Inodes:
    """Numbers of nodes, kept for as long as the kernel or an open file refers to them.

    A number is never given twice, so an old one can only be stale, not another file.
    """

    def __init__(self) -> None:
        self._numbers = {ROOT: ROOT_INODE}
        self._nodes = {ROOT_INODE: ROOT}
        self._lookups = {ROOT_INODE: 1}
        self._next = itertools.count(ROOT_INODE + 1)

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, inode: int) -> Node:
        """The node of a number the kernel has; :class:`KeyError` if it has been forgotten."""
        return self._nodes[inode]

    def number(self, node: Node) -> int:
        """The number of a node; it is forgotten again unless :meth:`add_lookup` follows."""
        return self._numbers.get(node) or self._give(node)

    def add_lookup(self, inode: int) -> None:
        """The kernel was told a number once more."""
        self._lookups[inode] = self._lookups.get(inode, 0) + 1

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel dropped so many references."""
        left = self._lookups.get(inode, 0) - lookups
        if left > 0 or inode == ROOT_INODE:
            self._lookups[inode] = max(left, 1)
            return
        self._lookups.pop(inode, None)
        node = self._nodes.pop(inode, None)
        if node is not None:
            del self._numbers[node]

    def _give(self, node: Node) -> int:
        inode = next(self._next)
        self._numbers[node] = inode
        self._nodes[inode] = node
        return inode
