"""Names of the files in a replica directory, and what may be one."""

from __future__ import annotations

import re

from lhblock.errors import UsageError

VOLUME_META = "volume.meta"
REVISION_COUNTER = "revision.counter"
FIRST_HEAD = "volume-head-000.img"

SNAPSHOT_NAME_CHARS_MAX = 200
IMAGE_NAME_BYTES_MAX = 246
"""A record is written as ``<image>.meta.tmp``, which must fit in 255 bytes."""

_HEAD = re.compile(r"volume-head-([0-9]{3,9})\.img")
_SNAPSHOT = re.compile(r"volume-snap-(.+)\.img", re.DOTALL)
_NEW_SNAPSHOT = re.compile(r"[A-Za-z0-9_.-]+")


def is_head(name: str) -> bool:
    """Whether ``name`` is the name of a head image."""
    return _HEAD.fullmatch(name) is not None


def is_image(name: str) -> bool:
    """Whether ``name`` is the name of a layer, a head or a snapshot, as Longhorn gives them."""
    return is_head(name) or _SNAPSHOT.fullmatch(name) is not None


def why_unusable(image: str) -> str | None:
    """Say why a well-formed image name cannot be used here, None when it can.

    Names that Longhorn's users gave are odd at times. They are taken as they are unless a file
    derived from them would be misread, by us or by Longhorn.
    """
    try:
        length_bytes = len(image.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    if length_bytes > IMAGE_NAME_BYTES_MAX:
        return f"has {length_bytes} bytes, more than {IMAGE_NAME_BYTES_MAX}"
    if "/" in image or "\0" in image:
        return "holds a '/' or a NUL"
    match = _SNAPSHOT.fullmatch(image)
    if match is not None and "volume-head" in match[1]:
        return "is a snapshot's but holds 'volume-head'"
    if match is not None and match[1].endswith(".meta"):
        return "makes a snapshot name that ends in '.meta'"
    return None


def snapshot_image(snapshot: str) -> str:
    """The image file of a snapshot."""
    return f"volume-snap-{snapshot}.img"


def snapshot_of(image: str) -> str:
    """The snapshot an image belongs to; ``volume-head`` for a head."""
    match = _SNAPSHOT.fullmatch(image)
    return "volume-head" if match is None else match[1]


def next_head(head: str) -> str:
    """The head that follows ``head``: the last decimal digit counts, so 009, 010, 001, ..."""
    match = _HEAD.fullmatch(head)
    assert match is not None, head
    return f"volume-head-{int(match[1][-1]) + 1:03d}.img"


def record_name(image: str) -> str:
    """The disk record of an image."""
    return f"{image}.meta"


def checksum_name(image: str) -> str:
    """The hash record of an image."""
    return f"{image}.checksum"


def discard_name(image: str) -> str:
    """The file of discarded blocks of an image."""
    assert is_image(image), image
    return "lhblock.discard." + image.removeprefix("volume-").removesuffix(".img")


def image_of_discard(name: str) -> str | None:
    """The image a discard file belongs to, None for any other file."""
    prefix = "lhblock.discard."
    if not name.startswith(prefix):
        return None
    image = f"volume-{name.removeprefix(prefix)}.img"
    return image if is_image(image) else None


def check_snapshot_name(snapshot: str) -> None:
    """Refuse a name that a new snapshot cannot have.

    Raises:
      UsageError: says the rule that is broken.
    """
    if not 1 <= len(snapshot) <= SNAPSHOT_NAME_CHARS_MAX:
        raise UsageError(
            f"snapshot name of {len(snapshot)} characters: use 1 to {SNAPSHOT_NAME_CHARS_MAX}"
        )
    if _NEW_SNAPSHOT.fullmatch(snapshot) is None:
        raise UsageError(
            f"snapshot name {snapshot!r}: use letters, digits and the signs _ . - only"
        )
    if "volume-head" in snapshot:
        raise UsageError(
            f"snapshot name {snapshot!r} holds 'volume-head', the name of the live data"
        )
    if snapshot.endswith(".meta"):
        raise UsageError(
            f"snapshot name {snapshot!r} ends in '.meta', the ending of metadata files"
        )
