"""What lies in a replica directory, before anything is decided about it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lhblock.errors import (
    ReplicaDamaged,
    ReplicaForeign,
    ReplicaNotFound,
    ReplicaStale,
    ReplicaUnsupported,
)
from lhblock.replica import _names as names
from lhblock.replica._atomic import read_small, stat_file
from lhblock.replica._metadata import (
    BLOCK_BYTES,
    LAYERS_MAX,
    Disk,
    MalformedError,
    VolumeMeta,
    parse_disk,
    parse_volume,
    walk_up,
    why_bad_size,
)

ENTRIES_MAX = 16384
"""A directory with more entries is no replica: 250 disks have a few files each."""

_OWN_PREFIX = "lhblock."
_HARMLESS = frozenset({"lost+found"})


@dataclass(frozen=True)
class Survey:
    """One look at a directory.

    A record that cannot be read is kept as its error: it may belong to a leftover, and those are
    removed without being understood.
    """

    names: frozenset[str]
    volume_bytes: bytes
    images: Mapping[str, os.stat_result]
    records: Mapping[str, Disk | MalformedError]

    def heads(self) -> list[str]:
        """The names of all head images present."""
        return sorted(name for name in self.images if names.is_head(name))


@dataclass(frozen=True)
class View:
    """A directory that makes sense: every disk has its image, every parent is there."""

    volume: VolumeMeta
    disks: Mapping[str, Disk]
    chain: tuple[Disk, ...]


def list_names(path: Path, dir_fd: int) -> frozenset[str]:
    """The names in the directory.

    Raises:
      ReplicaForeign: there are more than a replica can have.
    """
    found: set[str] = set()
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            found.add(entry.name)
            if len(found) > ENTRIES_MAX:
                raise ReplicaForeign(path, f"has more than {ENTRIES_MAX} entries: it is no replica")
    return frozenset(found)


def foreign_names(found: frozenset[str]) -> list[str]:
    """Names that neither a replica nor a file system's root directory brings along."""
    return sorted(
        name for name in found if name not in _HARMLESS and not name.startswith(_OWN_PREFIX)
    )


def is_unfinished_create(dir_fd: int, found: frozenset[str]) -> bool:
    """Whether a creation ended early here: one empty first head, and never a ``volume.meta``."""
    own = {names.FIRST_HEAD, names.record_name(names.FIRST_HEAD)}
    own |= {f"{name}.tmp" for name in (names.VOLUME_META, *own)}
    strangers = foreign_names(found)
    if not strangers or not set(strangers) <= own:
        return False
    image = stat_file(dir_fd, names.FIRST_HEAD)
    return image is None or (stat.S_ISREG(image.st_mode) and image.st_blocks == 0)


def require_replica(path: Path, dir_fd: int) -> None:
    """Look whether this is a replica directory at all, before anything is put into it.

    Raises:
      ReplicaNotFound: it is empty, or its creation never ended.
      ReplicaForeign: it holds something else.
    """
    found = list_names(path, dir_fd)
    strangers = foreign_names(found)
    if not strangers:
        raise ReplicaNotFound(path, "the directory holds no replica")
    if is_unfinished_create(dir_fd, found):
        raise ReplicaNotFound(path, "holds no replica: its creation ended early; create it again")
    if names.VOLUME_META not in found and not any(names.is_image(name) for name in found):
        raise ReplicaForeign(
            path, f"holds {strangers[0]!r} but no replica; give a replica or an empty directory"
        )


def take_survey(path: Path, dir_fd: int) -> Survey:
    """Read all of a directory's metadata.

    Raises:
      ReplicaDamaged: an image is no regular file.
      ReplicaUnsupported: an image has a name that is not safe to use.
      OSError: something cannot be read.
    """
    found = list_names(path, dir_fd)
    images: dict[str, os.stat_result] = {}
    records: dict[str, Disk | MalformedError] = {}
    for name in sorted(found):
        if names.is_image(name):
            if (reason := names.why_unusable(name)) is not None:
                raise ReplicaUnsupported(path, f"image {name!r} {reason}; rename the snapshot")
            state = stat_file(dir_fd, name)
            if state is None or not stat.S_ISREG(state.st_mode):
                raise ReplicaDamaged(path, f"image {name!r} is not a regular file")
            images[name] = state
        image = name.removesuffix(".meta")
        if image != name and names.is_image(image):
            try:
                records[image] = parse_disk(image, read_small(dir_fd, name) or b"")
            except MalformedError as error:
                records[image] = error
    volume_bytes = read_small(dir_fd, names.VOLUME_META) or b""
    return Survey(found, volume_bytes, images, records)


def decide_volume(path: Path, survey: Survey) -> VolumeMeta:
    """Read ``volume.meta``, or reconstruct a lost one from the only head there is.

    Raises:
      ReplicaDamaged: it cannot be read, or is lost and there is not exactly one head.
    """
    if survey.volume_bytes:
        try:
            return parse_volume(survey.volume_bytes)
        except MalformedError as error:
            raise ReplicaDamaged(path, f"volume.meta {error}") from error
    heads = survey.heads()
    if len(heads) != 1:
        raise ReplicaDamaged(
            path,
            f"volume.meta is lost and there are {len(heads)} head images ({', '.join(heads)}) "
            "instead of one to tell the live data by; restore volume.meta",
        )
    record = survey.records.get(heads[0])
    if not isinstance(record, Disk):
        raise ReplicaDamaged(path, f"volume.meta and {heads[0]}.meta are both lost; restore one")
    size_bytes = survey.images[heads[0]].st_size
    return VolumeMeta(size_bytes=size_bytes, head=heads[0], parent=record.parent, dirty=True)


def refuse_unusable(path: Path, volume: VolumeMeta) -> None:
    """Refuse what is sane but cannot be served.

    Raises:
      ReplicaStale: a rebuild of this copy never finished.
      ReplicaUnsupported: a backing file, or a size that is not whole blocks.
      ReplicaDamaged: the size cannot be.
    """
    if volume.rebuilding:
        raise ReplicaStale(
            path, "its rebuild never finished, so it lacks data; rebuild it from another copy"
        )
    if volume.backing_file:
        raise ReplicaUnsupported(
            path,
            f"needs the backing file {volume.backing_file!r}; volumes on a backing file are not "
            "supported yet",
        )
    if (reason := why_bad_size(volume.size_bytes)) is not None:
        kind = ReplicaUnsupported if volume.size_bytes > 0 else ReplicaDamaged
        raise kind(path, f"volume.meta has Size = {volume.size_bytes}, which {reason}")


def make_view(path: Path, survey: Survey, volume: VolumeMeta, hidden: frozenset[str]) -> View:
    """Check everything that is not a leftover and put it in order.

    Args:
      hidden: images (with their records) that count as absent.

    Raises:
      ReplicaDamaged: names the file and the value that cannot be.
      ReplicaUnsupported: more layers than a chain may have.
    """
    disks: dict[str, Disk] = {}
    for image, record in survey.records.items():
        if image in hidden:
            continue
        if isinstance(record, MalformedError):
            raise ReplicaDamaged(path, f"{image}.meta {record}")
        if image not in survey.images:
            raise ReplicaDamaged(
                path,
                f"image {image} is missing although {image}.meta is there; restore it from "
                "another copy of the volume",
            )
        disks[image] = record
    if volume.head in survey.images and volume.head not in disks and volume.head not in hidden:
        raise ReplicaDamaged(path, f"{volume.head}.meta is missing, the record of the live data")
    if volume.head not in disks:
        raise ReplicaDamaged(
            path, f"volume.meta has Head = {volume.head!r}, but that image is missing"
        )
    _check_sizes(path, survey, volume, disks)
    try:
        chain = tuple(walk_up(disks, volume.head))[::-1]
        for name in disks:
            for _ in walk_up(disks, name):
                pass
    except MalformedError as error:
        raise ReplicaDamaged(path, str(error)) from error
    if len(chain) > LAYERS_MAX:
        raise ReplicaUnsupported(
            path,
            f"the live chain has {len(chain)} images, more than {LAYERS_MAX}; remove snapshots",
        )
    return View(volume, disks, chain)


def _check_sizes(path: Path, survey: Survey, volume: VolumeMeta, disks: Mapping[str, Disk]) -> None:
    for image in disks:
        size_bytes = survey.images[image].st_size
        if size_bytes % BLOCK_BYTES:
            raise ReplicaDamaged(
                path, f"image {image} has {size_bytes} bytes, not a multiple of {BLOCK_BYTES}"
            )
        if image == volume.head:
            continue
        if size_bytes == 0:
            raise ReplicaDamaged(
                path,
                f"image {image} is empty: it was lost and made anew; restore it from another copy "
                "of the volume",
            )
        if size_bytes > volume.size_bytes:
            raise ReplicaDamaged(
                path,
                f"image {image} has {size_bytes} bytes, more than the Size = {volume.size_bytes} "
                "in volume.meta",
            )
