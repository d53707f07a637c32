"""A power loss in the middle of a write takes nothing that was flushed long before.

A file system in an image file is shut down by its own ioctl, without writing its journal. It
allocates space before it writes there; when the journal commits in between, the head is left with
unwritten extents.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lhblock import _lhblock  # type: ignore[attr-defined,unused-ignore]
from tests.loop import require_loop_devices

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
WITHOUT_LOG_FLUSH = 2
BLOCK = 4096
BLOCKS = 256
SIZE = BLOCK * BLOCKS
OLD, ZEROS = b"o" * BLOCK, bytes(BLOCK)

ffi, lib = _lhblock.ffi, _lhblock.lib


class Disk:
    """An ext4 that can lose power."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk.img"
        self.path = directory / "mounted"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", self.image], check=True)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.path], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.path], check=True)

    def cut(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    require_loop_devices()
    disk = Disk(tmp_path)
    disk.mount()
    yield disk
    if os.path.ismount(disk.path):
        disk.unmount()


@pytest.fixture
def engine() -> Iterator[Any]:
    options = ffi.new("struct lhb_engine_options *", {"queues": 1, "workers_max": 4})
    engine = ffi.new("lhb_engine **")
    assert lib.lhb_engine_open(options, engine) == 0
    yield engine[0]
    lib.lhb_engine_close(engine[0])


class Served:
    """A store of the layers base and head behind a volume."""

    def __init__(self, engine: Any, directory: Path) -> None:
        fd = os.open(directory, os.O_RDONLY)
        store, volume = ffi.new("lhb_store **"), ffi.new("lhb_volume **")
        assert lib.lhb_store_open(engine, fd, SIZE, 0, store) == 0
        os.close(fd)
        self.store = store[0]
        self.layers = [
            lib.lhb_store_add_layer(self.store, name, b"discard." + name)
            for name in (b"base", b"head")
        ]
        assert lib.lhb_store_start(self.store) == 0
        assert lib.lhb_volume_open(engine, SIZE, 0, volume) == 0
        self.volume = volume[0]
        stores = ffi.new("lhb_store *[1]", [self.store])
        assert lib.lhb_volume_publish(self.volume, stores, ffi.NULL, 1) == 0

    def close(self) -> None:
        lib.lhb_volume_close(self.volume)
        lib.lhb_store_close(self.store)

    def read(self) -> list[bytes]:
        data = ffi.new("char[]", SIZE)
        assert lib.lhb_volume_io(self.volume, 0, 0, 0, SIZE, data) == 0
        content = ffi.buffer(data, SIZE)[:]
        return [content[at : at + BLOCK] for at in range(0, SIZE, BLOCK)]


def make_layers(path: Path) -> None:
    for name, content in (("base", OLD * BLOCKS), ("head", b"")):
        with (path / name).open("wb") as file:
            file.write(content)
            file.truncate(SIZE)
            os.fsync(file.fileno())


def test_space_of_a_write_that_never_came_shows_what_is_below(disk: Disk, engine: Any) -> None:
    make_layers(disk.path)
    served = Served(engine, disk.path)
    with (disk.path / "head").open("rb+") as head:
        # What the journal has when it commits between a write's allocation and its end.
        os.posix_fallocate(head.fileno(), 7 * BLOCK, 5 * BLOCK)
        os.fsync(head.fileno())
    trimmed = lib.lhb_volume_io(served.volume, 3, 0, 20 * BLOCK, 2 * BLOCK, ffi.NULL)
    assert trimmed == 0
    assert lib.lhb_volume_io(served.volume, 2, 0, 0, 0, ffi.NULL) == 0
    disk.cut()
    served.close()
    disk.unmount()
    disk.mount()
    served = Served(engine, disk.path)
    try:
        got = served.read()
    finally:
        served.close()
    assert [at for at, data in enumerate(got) if data == ZEROS] == [20, 21]
    assert [at for at, data in enumerate(got) if data != OLD] == [20, 21]
