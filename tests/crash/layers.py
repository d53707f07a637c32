"""A replica directory with known content in every layer, and a reader that needs no native code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from lhblock.replica import ReplicaDirectory, snapshot_image

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK
CREATED = "2026-11-23T08:46:13Z"

View = tuple[str, ...]


def write_layer(path: Path, image: str, blocks: dict[int, str], discards: Sequence[int]) -> None:
    """Put tags into blocks of an image and bits into its discard file."""
    with (path / image).open("r+b") as file:
        for number, tag in blocks.items():
            file.seek(number * BLOCK)
            file.write(tag.encode().ljust(BLOCK, b"."))
    if discards:
        bits = bytearray(BLOCKS // 8)
        for number in discards:
            bits[number // 8] |= 1 << number % 8
        (path / ReplicaDirectory.discard_name(image)).write_bytes(bits)


def data_blocks(file: Path) -> dict[int, bytes]:
    """The blocks an image has, by number."""
    found: dict[int, bytes] = {}
    with file.open("rb") as opened:
        end, position = os.fstat(opened.fileno()).st_size, 0
        while position < end:
            try:
                position = os.lseek(opened.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(opened.fileno(), position, os.SEEK_HOLE)
            for offset in range(position, hole, BLOCK):
                found[offset // BLOCK] = os.pread(opened.fileno(), BLOCK, offset)
            position = hole
    return found


def discarded(path: Path, image: str) -> set[int]:
    """The blocks whose discard bit is set."""
    file = path / ReplicaDirectory.discard_name(image)
    bits = file.read_bytes() if file.exists() else b""
    return {n for n in range(len(bits) * 8) if bits[n // 8] >> n % 8 & 1}


def view(directory: ReplicaDirectory, name: str) -> View:
    """What a reader of ``name`` (an image or a snapshot) finds in each block."""
    content = [""] * BLOCKS
    for disk in directory.ancestry(name):
        for number in discarded(directory.path, disk.name):
            content[number] = ""
        for number, data in data_blocks(directory.path / disk.name).items():
            content[number] = data.rstrip(b".\0").decode()
    return tuple(content)


def views(directory: ReplicaDirectory) -> dict[str, View]:
    """The view of every snapshot that is not removed, and of the head."""
    return {
        disk.snapshot: view(directory, disk.name)
        for disk in directory.disks.values()
        if not disk.removed
    }


def snapshot(directory: ReplicaDirectory, name: str, **more: object) -> None:
    """Freeze the head under a name."""
    assert not more
    head = directory.prepare_snapshot(name, user_created=True, created=CREATED, labels={"of": name})
    head.commit()
    head.settle()


def fill_head(directory: ReplicaDirectory, tag: str, own: int, discards: Sequence[int]) -> None:
    """Write a block of the layer's own, one that all layers share, and discard some."""
    blocks = {own: tag, 20: f"shared-{tag}", 40 + own: tag}
    write_layer(directory.path, directory.head.name, blocks, discards)


def build(path: Path) -> None:
    """a <- b (removed) <- c <- d <- head, with c <- f beside d, and e (removed) beside b.

    Every layer has data of its own and hides some of the layers below, by data and by discards;
    c also has a discard bit under its own data, as a write after a discard leaves it.
    """
    ReplicaDirectory.create(path, size_bytes=SIZE)
    with ReplicaDirectory.open(path) as directory:
        fill_head(directory, "a", 1, [])
        snapshot(directory, "a")
        fill_head(directory, "e", 5, [])
        snapshot(directory, "e")
        revert(directory, "a")
        fill_head(directory, "b", 2, [41])
        snapshot(directory, "b")
        fill_head(directory, "c", 3, [42, 43, 2])
        snapshot(directory, "c")
        fill_head(directory, "f", 6, [])
        snapshot(directory, "f")
        revert(directory, "c")
        fill_head(directory, "d", 4, [3])
        snapshot(directory, "d")
        fill_head(directory, "h", 7, [44])
        directory.mark_removed("b")
        directory.mark_removed("e")


def revert(directory: ReplicaDirectory, name: str) -> None:
    """Give the head up for a snapshot."""
    head = directory.prepare_revert(name, created=CREATED)
    head.commit()
    head.settle()


def merge_up(path: Path, lower: str, upper: str) -> None:
    """What the native core does before ``unlink_disk``: upper gets what it lacks of lower."""
    hidden = discarded(path, upper) | set(data_blocks(path / upper))
    moved = {
        number: data.rstrip(b".").decode()
        for number, data in data_blocks(path / lower).items()
        if number not in hidden
    }
    write_layer(path, upper, moved, sorted(discarded(path, upper) | discarded(path, lower)))


def merge_down(path: Path, lower: str, upper: str) -> None:
    """What the native core does before ``adopt_merged``: lower gets what upper has."""
    above, below = data_blocks(path / upper), data_blocks(path / lower)
    kept = {n: data for n, data in below.items() if n not in discarded(path, upper)} | above
    bits = (discarded(path, lower) | discarded(path, upper)) - set(kept)
    # Rewriting from nothing is how the blocks discarded above become holes.
    os.truncate(path / lower, 0)
    os.truncate(path / lower, SIZE)
    with contextlib.suppress(FileNotFoundError):
        (path / ReplicaDirectory.discard_name(lower)).unlink()
    tags = {number: data.rstrip(b".").decode() for number, data in kept.items()}
    write_layer(path, lower, tags, sorted(bits))


def clone(source: Path, target: Path) -> None:
    """Copy a directory with its holes and hard links."""
    target.mkdir(mode=0o700)
    seen: dict[int, Path] = {}
    for each in source.iterdir():
        state = each.stat()
        copy = target / each.name
        if state.st_ino in seen:
            copy.hardlink_to(seen[state.st_ino])
            continue
        seen[state.st_ino] = copy
        copy.touch(mode=state.st_mode & 0o777)
        os.truncate(copy, state.st_size)
        with copy.open("r+b") as file, each.open("rb") as original:
            for number in data_blocks(each):
                file.seek(number * BLOCK)
                file.write(os.pread(original.fileno(), BLOCK, number * BLOCK))
        os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))


def image(name: str) -> str:
    """Short for ``snapshot_image``."""
    return snapshot_image(name)
