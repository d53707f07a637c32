"""``volume.meta`` and the disk records: read as Longhorn reads them, written as it writes them.

Reading is Go's: only the first JSON value counts, unknown keys are skipped, keys match in any case,
a missing or null key keeps its default. A value of the wrong type is damage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from lhblock.replica._names import is_head, is_image, snapshot_of, why_unusable

BLOCK_BYTES = 4096
SIZE_BYTES_MAX = 1 << 63
LAYERS_MAX = 250
"""Files of a live chain, and disks of a directory, head included."""

_SECTOR_BYTES = 512
_OURS_KEY = "Lhblock"
_NO_LABELS: Mapping[str, str] = MappingProxyType({})
_WHITE = re.compile(r"[ \t\r\n]*")


class MalformedError(ValueError):
    """A metadata file cannot be understood; the text names the value."""


@dataclass(frozen=True)
class Disk:
    """One layer: an image file and what its record says. The name is always the file's name."""

    name: str
    parent: str = ""
    removed: bool = False
    user_created: bool = False
    created: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_LABELS, hash=False)

    @property
    def snapshot(self) -> str:
        """The snapshot's name, or ``volume-head``."""
        return snapshot_of(self.name)

    @property
    def is_head(self) -> bool:
        """Whether this is a head image."""
        return is_head(self.name)


@dataclass(frozen=True)
class VolumeMeta:
    """What ``volume.meta`` says.

    Attributes:
      ours: it is as we left it in use. Longhorn writes it anew whenever it opens a replica, and
        knows only its own keys.
    """

    size_bytes: int = 0
    head: str = ""
    dirty: bool = False
    rebuilding: bool = False
    error: str = ""
    parent: str = ""
    backing_file: str = ""
    encrypted: bool = False
    ours: bool = False


def why_bad_size(size_bytes: int) -> str | None:
    """Say why a volume cannot have this size, None when it can."""
    if size_bytes <= 0:
        return "is not positive"
    if size_bytes > SIZE_BYTES_MAX - BLOCK_BYTES:
        return "is beyond what a file can hold"
    if size_bytes % BLOCK_BYTES:
        return f"is not a multiple of {BLOCK_BYTES}"
    return None


def created_text(time_s: float) -> str:
    """A time since the epoch as records have it: UTC, whole seconds."""
    return datetime.fromtimestamp(int(time_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def first_object(data: bytes) -> dict[str, object]:
    """Decode the first JSON value, which must be an object; its keys come back in lower case."""

    def refuse_constant(text: str) -> object:
        raise ValueError(text)

    text = data.decode(errors="replace")
    start = _WHITE.match(text)
    assert start is not None
    try:
        value, _ = json.JSONDecoder(parse_constant=refuse_constant).raw_decode(text, start.end())
    except (ValueError, RecursionError) as error:
        raise MalformedError("is not JSON") from error
    if not isinstance(value, dict):
        raise MalformedError(f"holds a JSON {type(value).__name__} instead of an object")
    # A later key wins over an earlier one that differs in case only, as in Go.
    return {key.lower(): item for key, item in value.items()}


def text_member(members: Mapping[str, object], key: str) -> str:
    """The text under ``key``, empty when missing or null."""
    value = members.get(key.lower())
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedError(f"has {key} = {value!r:.80}, which is no text")
    # Half of a surrogate pair has no place in a file name or in UTF-8.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def flag_member(members: Mapping[str, object], key: str) -> bool:
    """The flag under ``key``, false when missing or null."""
    value = members.get(key.lower())
    if value is None:
        return False
    if not isinstance(value, bool):
        raise MalformedError(f"has {key} = {value!r:.80}, which is neither true nor false")
    return value


def _integer(members: Mapping[str, object], key: str) -> int:
    value = members.get(key.lower())
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedError(f"has {key} = {value!r:.80}, which is no integer")
    if not -SIZE_BYTES_MAX <= value < SIZE_BYTES_MAX:
        raise MalformedError(f"has {key} of more than 64 bits")
    return value


def _image(members: Mapping[str, object], key: str, *, head: bool) -> str:
    value = text_member(members, key)
    if value == "" and not head:
        return ""
    if not is_image(value) or is_head(value) != head:
        kind = "head image" if head else "snapshot image"
        raise MalformedError(f"has {key} = {value!r:.300}, which names no {kind}")
    if (reason := why_unusable(value)) is not None:
        raise MalformedError(f"has {key} = {value!r:.300}, which {reason}")
    return value


def parse_volume(data: bytes) -> VolumeMeta:
    """Read ``volume.meta``.

    Raises:
      MalformedError: names the value that cannot be. The size is checked by the caller, who knows
        whether an odd one is damage or merely unsupported.
    """
    members = first_object(data)
    return VolumeMeta(
        size_bytes=_integer(members, "Size"),
        head=_image(members, "Head", head=True),
        dirty=flag_member(members, "Dirty"),
        rebuilding=flag_member(members, "Rebuilding"),
        error=text_member(members, "Error"),
        parent=_image(members, "Parent", head=False),
        backing_file=text_member(members, "BackingFilePath"),
        encrypted=flag_member(members, "Encrypted"),
        ours=flag_member(members, _OURS_KEY),
    )


def parse_disk(image: str, data: bytes) -> Disk:
    """Read the record of ``image``. Its ``Name`` is ignored: Longhorn leaves old names there.

    Raises:
      MalformedError: names the value that cannot be.
    """
    members = first_object(data)
    labels = members.get("labels")
    if labels is not None and not isinstance(labels, dict):
        raise MalformedError(f"has Labels = {labels!r:.80}, which is no object")
    texts = {key: text_member({key.lower(): value}, key) for key, value in (labels or {}).items()}
    return Disk(
        name=image,
        parent=_image(members, "Parent", head=False),
        removed=flag_member(members, "Removed"),
        user_created=flag_member(members, "UserCreated"),
        created=text_member(members, "Created"),
        labels=MappingProxyType(texts) if texts else _NO_LABELS,
    )


_GO_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_GO_ESCAPED = re.compile("[<>&\u2028\u2029]")


def encode_go(value: object) -> bytes:
    """One compact line as Go's JSON encoder writes it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return (_GO_ESCAPED.sub(lambda match: _GO_ESCAPES[match[0]], text) + "\n").encode()


def encode_volume(meta: VolumeMeta) -> bytes:
    """The bytes of ``volume.meta``; those of a replica that we have closed are Longhorn's."""
    assert why_bad_size(meta.size_bytes) is None, meta.size_bytes
    assert is_head(meta.head), meta.head
    return encode_go(
        {
            "Size": meta.size_bytes,
            "Head": meta.head,
            "Dirty": meta.dirty,
            "Rebuilding": meta.rebuilding,
            "Error": meta.error,
            "Parent": meta.parent,
            "SectorSize": _SECTOR_BYTES,
            "BackingFilePath": meta.backing_file,
            "Encrypted": meta.encrypted,
            **({_OURS_KEY: True} if meta.dirty else {}),
        }
    )


def encode_disk(disk: Disk) -> bytes:
    """The bytes of a disk record."""
    assert is_image(disk.name), disk.name
    assert not is_head(disk.parent), disk.parent
    return encode_go(
        {
            "Name": disk.name,
            "Parent": disk.parent,
            "Removed": disk.removed,
            "UserCreated": disk.user_created,
            "Created": disk.created,
            "Labels": {key: disk.labels[key] for key in sorted(disk.labels)} or None,
        }
    )


def walk_up(disks: Mapping[str, Disk], name: str) -> Iterator[Disk]:
    """Yield ``name`` and its ancestors, newest first.

    Raises:
      MalformedError: a parent is missing or the chain is a circle.
    """
    seen: set[str] = set()
    child = ""
    while name:
        if name in seen:
            raise MalformedError(f"{child}.meta has Parent = {name!r}, which closes a circle")
        disk = disks.get(name)
        if disk is None:
            raise MalformedError(f"{child}.meta has Parent = {name!r}, which is missing")
        yield disk
        seen.add(name)
        child, name = name, disk.parent
