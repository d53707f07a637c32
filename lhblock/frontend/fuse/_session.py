"""The only importer of pyfuse3: a mount, from the first request to the last.

pyfuse3 has one session in a process, so there is one mount in a process. It answers names and
attributes; I/O of volumes and snapshots is answered by the relay and never comes here.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyfuse3
import structlog
import trio

from lhblock.errors import LhblockError, NativeError, VolumeBusy
from lhblock.frontend.fuse._mountpoint import mounted, prepare_mountpoint
from lhblock.frontend.fuse._tree import Inodes, Kind, Node, volume_entries
from lhblock.frontend.fuse._volumes import Relay, SnapshotFile, Volumes

_log = structlog.get_logger("lhblock.frontend.fuse")

# Requests that are not I/O of a volume or snapshot; the socket holds what is more.
_WORKERS_MAX: Final = 16
_IDLE_WORKERS: Final = 4
_SOCKET_BYTES: Final = 256 << 10
# Volumes and snapshots come and go without the kernel being told.
_NAMES_VALID_S: Final = 1.0
_BLOCK_BYTES: Final = 4096
_MODES: Final = {
    Kind.VOLUME: stat.S_IFREG | 0o600,
    Kind.STATUS: stat.S_IFREG | 0o400,
    Kind.SNAPSHOT: stat.S_IFREG | 0o400,
}
_DIRECTORY_MODE: Final = stat.S_IFDIR | 0o755


async def serve_fuse(
    directory: Path,
    volumes: Volumes,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Show volumes in a directory until cancelled, or until somebody unmounts it.

    Raises:
      FrontendError: the directory cannot be mounted on.

    Cancelled: requests in progress are answered, then it is unmounted. Files that are still open
    answer with errors from then on.
    """
    await prepare_mountpoint(directory)
    async with mounted(directory) as kernel_fd:
        await serve_mount(kernel_fd, directory, volumes, task_status=task_status)


async def serve_mount(
    kernel_fd: int,
    directory: Path,
    volumes: Volumes,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer a mount that somebody made, until cancelled or unmounted.

    Args:
      kernel_fd: ``/dev/fuse``, which is closed at the end.
      directory: for messages; it is not looked at.

    Cancelled: requests in progress are answered. The mount stays, dead, unless whoever made it
    unmounts it.
    """
    files = _Files(volumes)
    try:
        ours, theirs = _socket_pair()
    except OSError:
        os.close(kernel_fd)
        raise
    with theirs:
        async with volumes.open_relay(kernel_fd, ours.detach()) as relay:
            # libfuse takes "/dev/fd/N" for a descriptor that is mounted already, and closes it.
            pyfuse3.init(files, f"/dev/fd/{theirs.detach()}", set())
            try:
                await _serve(directory, relay, task_status)
            finally:
                with trio.CancelScope(shield=True):
                    pyfuse3.close(unmount=False)
                    still_open = await files.close()
    if still_open:
        _log.warning("unmounted with open files", directory=str(directory), files=still_open)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """What stands for ``/dev/fuse``: our end and pyfuse3's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    theirs.setblocking(False)
    return ours, theirs


async def _serve(directory: Path, relay: Relay, task_status: trio.TaskStatus[None]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_work)
        try:
            task_status.started()
            _log.info("mounted", directory=str(directory))
            await relay.ended()
        finally:
            pyfuse3.terminate()


async def _work() -> None:
    # Not cancelled but told to stop, so that no request stays without an answer.
    with trio.CancelScope(shield=True):
        await pyfuse3.main(min_tasks=_IDLE_WORKERS, max_tasks=_WORKERS_MAX)


@dataclass(eq=False)
class _Handle:
    """One open file."""

    node: Node
    stack: AsyncExitStack
    text: bytes = b""


class _Files(pyfuse3.Operations):
    """The operations of the kernel, on the tree of `_tree`."""

    def __init__(self, volumes: Volumes) -> None:
        super().__init__()
        self._volumes = volumes
        self._inodes = Inodes()
        self._handles: dict[int, _Handle] = {}
        self._listings: dict[int, Sequence[tuple[str, Node]]] = {}
        self._last_handle = 0
        self._mounted_ns = time.time_ns()

    async def close(self) -> int:
        """Close what is open and return how many files that were."""
        handles = list(self._handles.values())
        self._handles.clear()
        for handle in handles:
            await handle.stack.aclose()
        return len(handles)

    # ---- Names.

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        parent = self._node(parent_inode)
        text = os.fsdecode(name)
        if text in (".", ".."):
            node = parent if text == "." else parent.parent
        else:
            found = dict(await self._list(parent)).get(text)
            if found is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            node = found
        attributes = await self._attributes(node)
        self._inodes.add_lookup(attributes.st_ino)
        return attributes

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            self._inodes.forget(inode, lookups)

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        return await self._attributes(self._node(inode))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        now = await self._attributes(self._node(inode))
        resized = fields.update_size and attr.st_size != now.st_size
        if resized or fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return now

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        listing = await self._list(self._node(inode))
        self._last_handle += 1
        self._listings[self._last_handle] = listing
        return self._last_handle

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        for number in range(start_id, len(listing)):
            name, node = listing[number]
            try:
                attributes = await self._attributes(node)
            except pyfuse3.FUSEError:
                continue  # it went away in the meantime
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, number + 1):
                break
            self._inodes.add_lookup(attributes.st_ino)

    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK_BYTES
        data.f_namemax = 255
        return data

    # ---- Files.

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._node(inode)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and (node.kind is not Kind.VOLUME or await self._is_read_only(node)):
            raise pyfuse3.FUSEError(errno.EROFS)
        handle = _Handle(node, AsyncExitStack())
        self._last_handle = number = self._last_handle + 1
        with _system_errors(node):
            if node.kind is Kind.STATUS:
                handle.text = await self._volumes.status(node.volume)
            else:
                await handle.stack.enter_async_context(
                    self._volumes.open(
                        node.volume,
                        node.snapshot or None,
                        handle=number,
                        writable=writes,
                        fua=bool(flags & os.O_DSYNC),
                    )
                )
        self._handles[number] = handle
        # Others write to the volume too, and what the kernel kept of it would be out of date.
        is_frozen = node.kind is Kind.SNAPSHOT
        return pyfuse3.FileInfo(fh=number, direct_io=not is_frozen, keep_cache=is_frozen)

    # READ, WRITE, FSYNC, FALLOCATE and LSEEK of volumes and snapshots are the relay's.

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._handles[fh].text[off : off + size]

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Of what can only be read."""

    async def flush(self, fh: int) -> None:
        """Nothing is written late, so closing a descriptor has nothing to do."""

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if handle is not None:
            await handle.stack.aclose()

    # ---- What they share.

    def _node(self, inode: int) -> Node:
        try:
            return self._inodes.node(inode)
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def _list(self, node: Node) -> list[tuple[str, Node]]:
        with _system_errors(node):
            if node.kind is Kind.ROOT:
                names = await self._volumes.names()
                return [(name, Node(Kind.VOLUME_DIRECTORY, name)) for name in names]
            if node.kind is Kind.VOLUME_DIRECTORY:
                return list(volume_entries(node.volume).items())
            if node.kind is Kind.SNAPSHOTS:
                snapshots = await self._snapshots(node.volume)
                return [
                    (name, Node(Kind.SNAPSHOT, node.volume, name, snapshot.created))
                    for name, snapshot in snapshots.items()
                ]
        raise pyfuse3.FUSEError(errno.ENOTDIR)

    async def _snapshots(self, volume: str) -> Mapping[str, SnapshotFile]:
        found = await self._volumes.find(volume)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return {snapshot.name: snapshot for snapshot in found.snapshots}

    async def _is_read_only(self, node: Node) -> bool:
        found = await self._volumes.find(node.volume)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return found.read_only

    async def _size_bytes(self, node: Node) -> int:
        if node.kind is Kind.ROOT:
            return 0
        found = await self._volumes.find(node.volume)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        match node.kind:
            case Kind.VOLUME:
                return found.size_bytes
            case Kind.STATUS:
                return len(await self._volumes.status(node.volume))
            case Kind.SNAPSHOT:
                for snapshot in found.snapshots:
                    if (snapshot.name, snapshot.created) == (node.snapshot, node.created):
                        return snapshot.size_bytes
                raise pyfuse3.FUSEError(errno.ENOENT)
            case _:
                return 0

    async def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        with _system_errors(node):
            size_bytes = await self._size_bytes(node)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._inodes.number(node)
        entry.st_mode = _MODES.get(node.kind, _DIRECTORY_MODE)
        entry.st_nlink = 2 if node.kind.is_directory else 1
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_size = size_bytes
        entry.st_blocks = -(-size_bytes // 512)
        entry.st_blksize = _BLOCK_BYTES
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mounted_ns
        entry.entry_timeout = _NAMES_VALID_S
        # A volume grows and its status changes; nothing else has attributes that do.
        entry.attr_timeout = 0 if node.kind in (Kind.VOLUME, Kind.STATUS) else _NAMES_VALID_S
        return entry


@contextmanager
def _system_errors(node: Node) -> Iterator[None]:
    """Say what a failure means in the one way the kernel understands."""
    try:
        yield
    except NativeError as error:
        raise pyfuse3.FUSEError(error.errno) from error
    except VolumeBusy as error:
        raise pyfuse3.FUSEError(errno.EBUSY) from error
    except LhblockError as error:
        _log.warning("request failed", volume=node.volume, file=node.kind.value, reason=str(error))
        raise pyfuse3.FUSEError(errno.EIO) from error
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
