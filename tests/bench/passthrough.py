"""The least that a file system on pyfuse3 can do: one file, read and written where it is.

python -m tests.bench.passthrough IMAGE DIR
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

NAME = b"image"
_INODE = 2


class PassThrough(pyfuse3.Operations):
    """One file under the root, with every request done at once in the trio thread."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o600
        entry.st_size = 0 if is_root else os.fstat(self._fd).st_size
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_INODE, ctx)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=self._fd, direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(fh, buf, off)


def main() -> None:
    """Serve until the directory is unmounted."""
    image, directory = sys.argv[1:]
    pyfuse3.init(PassThrough(os.open(image, os.O_RDWR)), directory, {"fsname=passthrough"})
    trio.run(pyfuse3.main)
    pyfuse3.close()


if __name__ == "__main__":
    main()
