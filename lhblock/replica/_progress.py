"""``lhblock.rebuild``: how far the rebuild of this copy is, so that one cut off goes on there.

It is a note that saves work and never a claim: what it says of a layer counts only while both
files are the ones it was written about, and every unit is hashed before the copy is believed. A
note that is damaged is worth as much as none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PROGRESS_NAME = "lhblock.rebuild"

_VERSION = 1


@dataclass(frozen=True)
class LayerStamp:
    """A layer's file at one moment: whoever writes to it, or replaces it, changes this."""

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, state: os.stat_result) -> Self:
        """Take it from a file that was synced."""
        return cls(state.st_ino, state.st_size, state.st_mtime_ns)


@dataclass(frozen=True)
class RebuildProgress:
    """What is done.

    Attributes:
      source: replica id of the one that is copied from.
      done: image to the stamps of the source's file and of ours when they were found equal.
      partial: image that is being copied; "" if none.
      partial_source: stamp of the source's file of it.
      partial_bytes: what lies before this is copied and synced, and not yet verified.
    """

    source: str = ""
    done: Mapping[str, tuple[LayerStamp, LayerStamp]] = field(default_factory=dict)
    partial: str = ""
    partial_source: LayerStamp | None = None
    partial_bytes: int = 0

    def encode(self) -> bytes:
        """The bytes of the file."""
        payload = {
            "version": _VERSION,
            "source": self.source,
            "done": {
                image: [_numbers(theirs), _numbers(ours)]
                for image, (theirs, ours) in self.done.items()
            },
            "partial": self.partial,
            "partial_source": _numbers(self.partial_source),
            "partial_bytes": self.partial_bytes,
        }
        text = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
        return b'{"crc32":%d,"payload":%s}\n' % (zlib.crc32(text), text)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the file; anything that is not right counts as nothing done."""
        try:
            outer = json.loads(data)
            payload = outer["payload"]
            text = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
            if outer["crc32"] != zlib.crc32(text) or payload["version"] != _VERSION:
                return cls()
            partial_source = payload["partial_source"]
            return cls(
                source=str(payload["source"]),
                done={
                    str(image): (_stamp(theirs), _stamp(ours))
                    for image, (theirs, ours) in payload["done"].items()
                },
                partial=str(payload["partial"]),
                partial_source=_stamp(partial_source) if partial_source else None,
                partial_bytes=int(payload["partial_bytes"]),
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return cls()


def _numbers(stamp: LayerStamp | None) -> list[int]:
    return [] if stamp is None else [stamp.inode, stamp.size_bytes, stamp.mtime_ns]


def _stamp(numbers: Any) -> LayerStamp:
    inode, size_bytes, mtime_ns = (int(number) for number in numbers)
    return LayerStamp(inode, size_bytes, mtime_ns)
