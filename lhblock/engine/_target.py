"""The directory that a rebuild writes to: whether it may be touched, and how it is marked first."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lhblock._native import probe_fiemap
from lhblock.errors import ReplicaForeign, ReplicaStale, ReplicaUnsupported
from lhblock.replica import UNSERVED, Generation, ReplicaDirectory, has_room, never_counted


def probe(fd: int) -> int:
    """Whether a file system lists extents; for ``ReplicaDirectory``."""
    return -probe_fiemap(fd)


def make_target(path: Path, *, like: Generation, size_bytes: int, encrypted: bool) -> None:
    """Make a directory that is to be rebuilt, if there is none yet. Blocking.

    It is marked from its first moment, so it is never believed.

    Args:
      like: generation of a replica of the volume.

    Raises:
      ReplicaError: it cannot be made, or the directory holds something else.
    """
    if path.exists() and not has_room(path) and (path / "volume.meta").exists():
        return
    generation = replace(
        like,
        replica_id=str(uuid.uuid4()),
        counter=UNSERVED,
        head=None,
        torn=False,
        written_elsewhere="",
    )
    ReplicaDirectory.create(
        path,
        size_bytes=size_bytes,
        generation=generation,
        encrypted=encrypted,
        rebuilding=True,
        probe=probe,
    )


def open_target(
    path: Path, like: Generation, *, size_bytes: int, others: Sequence[str], force: bool
) -> ReplicaDirectory:
    """Open a directory for a rebuild, and mark it, durably, so that nobody believes it. Blocking.

    Args:
      like: generation of a replica that is complete.
      size_bytes: of the volume.
      others: replica ids that the volume uses.
      force: also take one that is not the volume's, or has writes that the others have not; they
        are lost.

    Raises:
      ReplicaForeign, ReplicaStale: it must not be touched; it is as it was.
      ReplicaError: it cannot be opened, or marked.
    """
    directory = ReplicaDirectory.open(path, unfinished=True, probe=probe)
    try:
        _refuse_larger(directory, size_bytes)
        if not force:
            _refuse(directory, like, others)
        generation = directory.generation
        if not directory.rebuilding:
            directory.set_rebuilding(True)
        if (
            generation is None
            or generation.volume_id != like.volume_id
            or generation.replica_id in others
        ):
            directory.write_generation(
                replace(like, replica_id=str(uuid.uuid4()), counter=UNSERVED)
            )
    except BaseException:
        directory.close(clean=not directory.was_dirty)
        raise
    return directory


def _refuse_larger(directory: ReplicaDirectory, size_bytes: int) -> None:
    if directory.size_bytes > size_bytes:
        raise ReplicaUnsupported(
            directory.path,
            f"has {directory.size_bytes} bytes, more than the volume's {size_bytes}; give an empty "
            "directory",
        )


def _refuse(directory: ReplicaDirectory, theirs: Generation, others: Sequence[str]) -> None:
    generation = directory.generation
    if generation is None or generation.volume_id != theirs.volume_id:
        raise ReplicaForeign(
            directory.path,
            "is not a replica of this volume; `lhblock replica add --force` overwrites it",
        )
    if generation.replica_id in others:
        raise ReplicaForeign(
            directory.path,
            "is a copy of a replica that the volume uses; `lhblock replica add --force` makes it "
            "one of its own",
        )
    if directory.rebuilding:
        return  # whatever it has, nobody was told that it has it
    if directory.written_elsewhere:
        raise ReplicaStale(
            directory.path,
            f"{directory.written_elsewhere}; `lhblock replica add --force` gives up what was "
            "written",
        )
    apart = any(
        theirs.replica_id in entry.left and theirs.knows(entry.counter, entry.uuid) is not True
        for entry in generation.history
    )
    if never_counted(generation, theirs):
        return  # nobody was told either
    if apart or theirs.knows(generation.counter, generation.generation) is not True:
        raise ReplicaStale(
            directory.path,
            f"its generation {generation.counter} is not one that the volume came from, so it may "
            "have writes that the others have not; `lhblock replica add --force` gives them up",
        )
