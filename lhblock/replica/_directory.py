"""One replica directory: its disks, and the operations on them that survive a crash at any step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lhblock.errors import (
    ReplicaDamaged,
    ReplicaIO,
    ReplicaUnsupported,
    UsageError,
)
from lhblock.replica import _names as names
from lhblock.replica._atomic import (
    create_file,
    keep_spare,
    read_small,
    stat_file,
    sync_directory,
    unlink_if_there,
    write_durable,
)
from lhblock.replica._cleanup import (
    clear_way,
    finish_adoption,
    plan_cleanup,
    remove_disk_files,
    run_cleanup,
)
from lhblock.replica._create import Probe, check_probe, create_replica, open_directory
from lhblock.replica._generation import GENERATION_NAME, Generation, HeadFingerprint
from lhblock.replica._lock import DirectoryLock, acquire_lock
from lhblock.replica._metadata import (
    LAYERS_MAX,
    Disk,
    MalformedError,
    VolumeMeta,
    encode_disk,
    encode_volume,
    walk_up,
    why_bad_size,
)
from lhblock.replica._pending import PendingHead, Switch
from lhblock.replica._progress import PROGRESS_NAME, RebuildProgress
from lhblock.replica._survey import (
    View,
    decide_volume,
    make_view,
    refuse_unusable,
    require_replica,
    take_survey,
)

EXPANSION_LABEL = "replica-expansion"
ACTIVITY_NAME = "lhblock.activity"


class ReplicaDirectory:
    """A replica directory that is open and locked.

    All methods block on the disk and none is thread-safe: one operation at a time, and while a
    ``PendingHead`` is neither settled nor aborted nothing else changes the directory.

    Attributes:
      path: the directory, for messages.
      dir_fd: its descriptor, valid until ``close``.
      read_only: nothing is changed, leftovers are passed over.
      was_dirty: the last user did not close it.
      cleaned: a sentence for each leftover that open removed or repaired.
      torn: a crash met a change of the tree here, so that a snapshot in the making may lack data
        that others have. Kept until ``note_repaired``.
      written_elsewhere: why another program must have written to it since our last close; empty if
        none. Kept until ``note_repaired``.
    """

    def __init__(self, path: Path, dir_fd: int, lock: DirectoryLock, *, read_only: bool) -> None:
        """Not for callers: use ``open``."""
        self.path = path
        self.dir_fd = dir_fd
        self.read_only = read_only
        self.was_dirty = False
        self.cleaned: tuple[str, ...] = ()
        self.torn = False
        self.written_elsewhere = ""
        self._lock = lock
        self._volume = VolumeMeta()
        self._disks: dict[str, Disk] = {}
        self._chain: tuple[Disk, ...] = ()
        self._generation: Generation | None = None
        self._pending: PendingHead | None = None
        self._closed = False

    # ---- Making, opening, closing.

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        size_bytes: int,
        generation: Generation | None = None,
        encrypted: bool = False,
        rebuilding: bool = False,
        probe: Probe | None = None,
    ) -> None:
        """Make a replica of zeros, durable when it returns. The directory may exist if it is empty.

        Args:
          size_bytes: a positive multiple of 4096.
          generation: written too, so that the directory belongs to its set from the first moment.
          encrypted: noted for Longhorn: the content will be a LUKS volume.
          rebuilding: it lacks the volume's data from the first moment, and is never believed
            before a rebuild ends.
          probe: tells whether extents can be listed there.

        Raises:
          UsageError: the size cannot be.
          ReplicaForeign: there is something in the directory.
          ReplicaNotFound: the parent directory does not exist.
          ReplicaUnsupported: the file system cannot do it.
          ReplicaIO: a system call failed. Nothing is left behind in any of these cases.
        """
        create_replica(
            path,
            size_bytes=size_bytes,
            generation=generation,
            encrypted=encrypted,
            rebuilding=rebuilding,
            probe=probe,
        )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        read_only: bool = False,
        unfinished: bool = False,
        probe: Probe | None = None,
    ) -> ReplicaDirectory:
        """Lock and check a directory, remove what interrupted operations left, and mark it dirty.

        A directory that is refused is left as it was found.

        Args:
          unfinished: also open a copy whose rebuild never finished, to go on with that.
          probe: tells whether extents can be listed there.

        Raises:
          ReplicaNotFound, ReplicaForeign: there is no replica.
          ReplicaLocked: another process has it.
          ReplicaDamaged: the metadata contradicts itself; names the file and the value.
          ReplicaUnsupported: a backing file, too many layers, no extent lists.
          ReplicaStale: a rebuild never finished.
          ReplicaIO: a system call failed, on a full disk for instance.
        """
        dir_fd = open_directory(path)
        lock: DirectoryLock | None = None
        try:
            with _doing(path, "read the directory"):
                require_replica(path, dir_fd)
            lock = acquire_lock(path, dir_fd, exclusive=not read_only)
            directory = cls(path, dir_fd, lock, read_only=read_only)
            directory._take_up(probe, unfinished=unfinished)
        except BaseException:
            if lock is not None:
                lock.release()
            os.close(dir_fd)
            raise
        return directory

    def _take_up(self, probe: Probe | None, *, unfinished: bool) -> None:
        with _doing(self.path, "read its metadata"):
            survey = take_survey(self.path, self.dir_fd)
            volume = decide_volume(self.path, survey)
            refuse_unusable(
                self.path, replace(volume, rebuilding=volume.rebuilding and not unfinished)
            )
            plan = plan_cleanup(self.path, self.dir_fd, survey, volume)
            view = make_view(self.path, survey, volume, plan.hidden)
            self._generation = self._read_generation()
            self._probe_head(volume.head, probe)
            self._refuse_short_head(volume)
        self.was_dirty = volume.dirty
        self.torn = bool(plan.steps) or (self._generation is not None and self._generation.torn)
        self.written_elsewhere = self._why_written_elsewhere(volume)
        self._set_view(view)
        discards = [name for name in survey.names if names.image_of_discard(name) is not None]
        if self.read_only:
            if self.written_elsewhere and discards:
                raise ReplicaUnsupported(
                    self.path,
                    f"{self.written_elsewhere} and its discards are out of date; open it for "
                    "writing once",
                )
            return
        self._mark_open(survey.volume_bytes)
        with _doing(self.path, "clean it up"):
            cleaned = run_cleanup(self.dir_fd, plan, survey)
            if plan.steps:
                survey = take_survey(self.path, self.dir_fd)
                view = make_view(self.path, survey, self._volume, frozenset())
                self._set_view(view)
            self.cleaned = cleaned + self._repair(volume, discards)
            keep_spare(self.dir_fd)

    def _mark_open(self, volume_bytes: bytes) -> None:
        """Write down that it is in use, and what was found, before anything else is changed.

        ``Dirty`` first: a generation without a fingerprint in a directory that is not dirty means
        that another program has closed it.
        """
        with _doing(self.path, "mark it as in use"):
            foreign = self._volume.dirty and not self._volume.ours
            if foreign and unlink_if_there(self.dir_fd, ACTIVITY_NAME):
                # Another program has used it, and crashed like us; it knows of no log. This is
                # durable before the next line hides that.
                sync_directory(self.dir_fd)
            marked = replace(self._volume, dirty=True, error="", parent=self.head.parent, ours=True)
            # A full disk can be opened again after a crash, because then there is nothing to write.
            if encode_volume(marked) != volume_bytes:
                self._write_volume(marked)
            self._volume = marked
            if self._generation is not None:
                opened = self._with_doubts(replace(self._generation, head=None))
                if opened != self._generation:
                    self._store_generation(opened)

    def _with_doubts(self, generation: Generation) -> Generation:
        return replace(generation, torn=self.torn, written_elsewhere=self.written_elsewhere)

    def _repair(self, volume: VolumeMeta, discards: list[str]) -> tuple[str, ...]:
        """What is no leftover but has to be put right before writing."""
        done: list[str] = []
        if volume.error:
            done.append(f"cleared the error {volume.error!r:.200}: all images are sound")
        # We do not count writes, and Longhorn would take a counter that stood still for an old
        # replica.
        if unlink_if_there(self.dir_fd, names.REVISION_COUNTER):
            done.append(f"removed {names.REVISION_COUNTER}, which only Longhorn keeps up to date")
        if self.written_elsewhere:
            # Whoever wrote did not know of discards: its readers saw the volume without them.
            for name in discards:
                if unlink_if_there(self.dir_fd, name):
                    done.append(f"removed {name}: {self.written_elsewhere}")
        if done:
            sync_directory(self.dir_fd)
        return tuple(done)

    def _refuse_short_head(self, volume: VolumeMeta) -> None:
        """A head has its full size before it becomes the head, so a shorter one lost data."""
        state = stat_file(self.dir_fd, volume.head)
        if state is not None and state.st_size < volume.size_bytes:
            raise ReplicaDamaged(
                self.path,
                f"{volume.head} has {state.st_size} bytes and the volume {volume.size_bytes}: it "
                "was cut short and what stood beyond is lost. Restore the file; or, if no other "
                "replica has the data and zeros will do, run "
                f"`truncate -s {volume.size_bytes}` on it",
            )

    def _probe_head(self, head: str, probe: Probe | None) -> None:
        fd = self._open_image(head, os.O_RDONLY)
        try:
            check_probe(self.path, probe, fd)
        finally:
            os.close(fd)

    def _open_image(self, image: str, flags: int) -> int:
        return os.open(image, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.dir_fd)

    def _set_view(self, view: View) -> None:
        self._volume = view.volume
        self._disks = dict(view.disks)
        self._chain = view.chain

    def _why_written_elsewhere(self, volume: VolumeMeta) -> str:
        if self._generation is None:
            return ""
        if self._generation.written_elsewhere:
            return self._generation.written_elsewhere
        before = self._generation.head
        if before is None:
            # We never clear Dirty without leaving a fingerprint.
            return "" if volume.dirty else "another program has used it since our last crash"
        with _doing(self.path, "look at its head"):
            state = os.stat(volume.head, dir_fd=self.dir_fd, follow_symlinks=False)
        if before.matches(HeadFingerprint.of(volume.head, state)):
            return ""
        return "another program has written to it since we closed it"

    def close(self, *, clean: bool = True) -> None:
        """Unlock the directory; a second call does nothing. All image files are closed and synced
        before.

        Args:
          clean: note that nothing is under way: ``Dirty`` becomes false, the head's state is kept
            to notice other programs. Without it the next open finds the directory dirty.

        Raises:
          ReplicaIO: the note could not be written; the directory is closed and counts as dirty.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if clean and not self.read_only and self._pending is None:
                with _doing(self.path, "note the clean close"):
                    self._write_clean()
        finally:
            self._lock.release()
            os.close(self.dir_fd)

    def _write_clean(self) -> None:
        if self._generation is not None:
            fd = self._open_image(self._volume.head, os.O_RDONLY)
            try:
                # fdatasync leaves times behind: without this a power loss would look like a foreign
                # write.
                os.fsync(fd)
                fingerprint = HeadFingerprint.of(self._volume.head, os.fstat(fd))
            finally:
                os.close(fd)
            self._store_generation(replace(self._generation, head=fingerprint))
        self._write_volume(replace(self._volume, dirty=False))

    def __enter__(self) -> ReplicaDirectory:
        """Close at the end of the block, clean unless it ends by an exception."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close it."""
        self.close(clean=kind is None)

    # ---- Looking.

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        """The volume's size."""
        return self._volume.size_bytes

    @property
    def backing_file(self) -> str:
        """The base image's path; always empty as long as those are refused."""
        return self._volume.backing_file

    @property
    def encrypted(self) -> bool:
        """Whether Longhorn noted that the content is a LUKS volume."""
        return self._volume.encrypted

    @property
    def rebuilding(self) -> bool:
        """Whether it is noted that this copy lacks data."""
        return self._volume.rebuilding

    @property
    def disks(self) -> Mapping[str, Disk]:
        """All layers by image name, side branches and removed ones included."""
        return MappingProxyType(self._disks)

    @property
    def chain(self) -> tuple[Disk, ...]:
        """The live chain, oldest first, head last."""
        return self._chain

    @property
    def head(self) -> Disk:
        """The layer that is written."""
        return self._chain[-1]

    @property
    def generation(self) -> Generation | None:
        """The generation; None when it was never ours."""
        return self._generation

    def children(self, name: str) -> tuple[Disk, ...]:
        """The disks whose parent is ``name``, an image or a snapshot."""
        image = self._image(name)
        return tuple(disk for disk in self._disks.values() if disk.parent == image)

    def ancestry(self, name: str) -> tuple[Disk, ...]:
        """``name`` (an image or a snapshot) and what lies below it, oldest first.

        Raises:
          UsageError: there is none of that name.
        """
        return tuple(walk_up(self._disks, self._disk(name).name))[::-1]

    @staticmethod
    def discard_name(image: str) -> str:
        """The name of an image's discard file."""
        return names.discard_name(image)

    def _image(self, name: str) -> str:
        return name if name in self._disks else names.snapshot_image(name)

    def _disk(self, name: str) -> Disk:
        disk = self._disks.get(self._image(name))
        if disk is None:
            raise UsageError(f"replica {self.path} has no snapshot {name!r}")
        return disk

    # ---- New heads.

    def prepare_snapshot(
        self,
        name: str,
        *,
        user_created: bool,
        created: str,
        labels: Mapping[str, str] | None = None,
        size_bytes: int | None = None,
    ) -> PendingHead:
        """Make the head ready that follows a snapshot of the present one. I/O goes on.

        Args:
          created: the time, as ``created_text`` gives it.
          size_bytes: the size of the new head, for an expansion.

        Raises:
          UsageError: the name or the size cannot be, or the name is taken.
          ReplicaUnsupported: the chain is at its limit.
          ReplicaIO: a system call failed, for want of space perhaps. Nothing is left behind.
        """
        names.check_snapshot_name(name)
        image = names.snapshot_image(name)
        if image in self._disks:
            raise UsageError(f"replica {self.path} has a snapshot {name!r} already")
        size_bytes = self.size_bytes if size_bytes is None else size_bytes
        reason = why_bad_size(size_bytes)
        if reason is None and size_bytes < self.size_bytes:
            reason = f"is less than the present {self.size_bytes}"
        if reason is not None:
            raise UsageError(f"volume size {size_bytes} {reason}")
        old = self.head
        frozen = replace(
            old, name=image, user_created=user_created, created=created, labels=dict(labels or {})
        )
        return self._prepare(old, frozen, image, created, size_bytes)

    def prepare_expansion(self, size_bytes: int, *, created: str) -> PendingHead:
        """Make a larger head ready, as Longhorn does it: on top of a snapshot of its own.

        Raises: as ``prepare_snapshot``.
        """
        return self.prepare_snapshot(
            f"expand-{size_bytes}",
            user_created=False,
            created=created,
            labels={EXPANSION_LABEL: str(size_bytes)},
            size_bytes=size_bytes,
        )

    def prepare_revert(self, name: str, *, created: str) -> PendingHead:
        """Make an empty head ready on top of a snapshot; the commit gives up the present head's
        data.

        Raises:
          UsageError: there is no such snapshot, or it is removed.
          ReplicaIO: a system call failed. Nothing is left behind.
        """
        target = self._disk(name)
        if target.is_head or target.removed:
            raise UsageError(f"replica {self.path}: {name!r} is no snapshot one can revert to")
        return self._prepare(self.head, None, target.name, created, self.size_bytes)

    def _prepare(
        self, old: Disk, frozen: Disk | None, parent: str, created: str, size_bytes: int
    ) -> PendingHead:
        self._check_idle()
        if frozen is not None and len(self._disks) >= LAYERS_MAX:
            raise ReplicaUnsupported(
                self.path, f"has {LAYERS_MAX} images, the most there can be; remove snapshots first"
            )
        head = Disk(names.next_head(old.name), parent=parent, created=created)
        volume = replace(self._volume, head=head.name, parent=parent, size_bytes=size_bytes)
        switch = Switch(old, head, frozen, volume)
        pending = PendingHead(
            self.path, self.dir_fd, switch, committed=self._on_commit, ended=self._on_end
        )
        with _doing(self.path, f"prepare the head {head.name}"):
            for new in (head, frozen):
                if new is not None:
                    clear_way(self.dir_fd, new.name, self._disks)
            pending.prepare()
        self._pending = pending
        return pending

    def _on_commit(self, switch: Switch) -> None:
        del self._disks[switch.old.name]
        if switch.frozen is not None:
            self._disks[switch.frozen.name] = switch.frozen
        self._disks[switch.head.name] = switch.head
        self._volume = switch.volume
        self._relink_chain()

    def _on_end(self) -> None:
        self._pending = None

    # ---- Removing.

    def mark_removed(self, name: str) -> None:
        """Mark a snapshot as removed, durable when it returns; its data goes later.

        Raises:
          UsageError: there is no such snapshot, or it is the head.
          ReplicaIO: the record cannot be written.
        """
        self._check_idle()
        disk = self._disk(name)
        if disk.is_head:
            raise UsageError(f"replica {self.path}: the head {disk.name} cannot be removed")
        if not disk.removed:
            self._write_disk(replace(disk, removed=True))

    def unlink_disk(self, image: str, *, force: bool = False) -> None:
        """Remove a disk and its files. Its only child, if it has one, no longer needs it.

        Args:
          force: several children need it no longer either: their content is void.

        Raises:
          UsageError: there is no such disk, it is the head, or it has several children.
          ReplicaIO: a system call failed; as far as it came, nothing is lost.
        """
        self._check_idle()
        disk = self._disk(image)
        children = self.children(disk.name)
        if disk.is_head or (len(children) > 1 and not force):
            raise UsageError(
                f"replica {self.path}: {disk.name} is the head or has several children "
                f"({len(children)}); it cannot be unlinked"
            )
        # From here on a crash leaves a removed leaf, which is recognised whatever of it is left.
        self.mark_removed(disk.name)
        for child in children:
            self._write_disk(replace(child, parent=disk.parent))
            if child.is_head:
                with _doing(self.path, "write volume.meta"):
                    self._write_volume(replace(self._volume, parent=disk.parent))
        with _doing(self.path, f"remove {disk.name}"):
            remove_disk_files(self.dir_fd, disk.name)
        del self._disks[disk.name]
        self._relink_chain()

    def adopt_merged(self, lower: str, upper: str) -> None:
        """Let ``upper`` have ``lower``'s file, into which ``upper``'s data has been merged and
        synced.

        ``lower`` is removed, ``upper`` its only child and not the head. Afterwards ``lower`` is
        gone.

        Raises:
          UsageError: there is no such disk.
          ReplicaDamaged: ``lower``'s file is shorter than ``upper``'s.
          ReplicaIO: a system call failed; the next open finishes what has begun.
        """
        self._check_idle()
        below, above = self._disk(lower), self._disk(upper)
        assert below.removed
        assert not above.is_head
        assert [child.name for child in self.children(below.name)] == [above.name]
        with _doing(self.path, f"merge {below.name} into {above.name}"):
            self._give_image(below.name, above.name)
            finish_adoption(self.dir_fd, below, above)
        del self._disks[below.name]
        self._disks[above.name] = replace(above, parent=below.parent)
        self._relink_chain()

    def _give_image(self, lower: str, upper: str) -> None:
        """Make ``upper`` a second name of ``lower``'s file; its discards follow, never precede it.

        While both names lead to one file and ``upper`` is still ``lower``'s child, every read finds
        what it found before: data wins over a discard bit, and the merged file has the data of
        both.
        """
        lower_size_bytes, upper_size_bytes = (
            os.stat(name, dir_fd=self.dir_fd, follow_symlinks=False).st_size
            for name in (lower, upper)
        )
        if lower_size_bytes < upper_size_bytes:
            raise ReplicaDamaged(
                self.path,
                f"image {lower} has {lower_size_bytes} bytes, less than the {upper_size_bytes} of "
                f"{upper} that were merged into it",
            )
        link = f"{upper}.tmp"
        unlink_if_there(self.dir_fd, link)
        os.link(lower, link, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd, follow_symlinks=False)
        os.rename(link, upper, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
        sync_directory(self.dir_fd)
        if stat_file(self.dir_fd, names.discard_name(lower)) is None:
            unlink_if_there(self.dir_fd, names.discard_name(upper))

    # ---- Rebuilding: the tree becomes another replica's.

    def add_disk(self, disk: Disk, *, size_bytes: int) -> None:
        """Add an empty layer beside the live chain, durable when it returns.

        Only while ``rebuilding``: an empty layer that should have data reads as older data.

        Args:
          disk: its parent is there, its name is free.

        Raises:
          ReplicaUnsupported: there are too many layers.
          ReplicaIO: a system call failed; what is left of it is set aside or removed next time.
        """
        self._check_idle()
        assert self.rebuilding
        assert not disk.is_head
        assert disk.name not in self._disks
        assert disk.parent == "" or disk.parent in self._disks
        if len(self._disks) >= LAYERS_MAX:
            raise ReplicaUnsupported(self.path, f"has {LAYERS_MAX} images, the most there can be")
        with _doing(self.path, f"add {disk.name}"):
            clear_way(self.dir_fd, disk.name, self._disks)
            # The record last: one without an image would be damage.
            for name, length in ((names.discard_name(disk.name), 0), (disk.name, size_bytes)):
                fd = create_file(self.dir_fd, name)
                try:
                    os.ftruncate(fd, length)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            sync_directory(self.dir_fd)
        self._write_disk(disk)

    def rewrite_disk(self, disk: Disk) -> None:
        """Replace the record of a layer, durable when it returns. Only while ``rebuilding``.

        Raises:
          ReplicaIO: the old record is still there.
        """
        self._check_idle()
        assert self.rebuilding
        assert disk.name in self._disks
        assert disk.parent == "" or disk.parent in self._disks
        if self._disks[disk.name] == disk:
            return
        self._write_disk(disk)
        if disk.name == self._volume.head and disk.parent != self._volume.parent:
            with _doing(self.path, "write volume.meta"):
                self._write_volume(replace(self._volume, parent=disk.parent))

    def read_progress(self) -> RebuildProgress:
        """How far the last rebuild came; nothing when there was none, or its note is damaged."""
        with _doing(self.path, f"read {PROGRESS_NAME}"):
            return RebuildProgress.parse(read_small(self.dir_fd, PROGRESS_NAME) or b"")

    def write_progress(self, progress: RebuildProgress) -> None:
        """Note how far a rebuild is, durable when it returns.

        Raises:
          ReplicaIO: the old note is still there.
        """
        with _doing(self.path, f"write {PROGRESS_NAME}"):
            write_durable(self.dir_fd, PROGRESS_NAME, progress.encode(), mode=0o600, spare=False)

    def forget_progress(self) -> None:
        """Remove the note; it is over.

        Raises:
          ReplicaIO: it is still there, and says nothing about a replica that is complete.
        """
        with _doing(self.path, f"remove {PROGRESS_NAME}"):
            unlink_if_there(self.dir_fd, PROGRESS_NAME)

    # ---- The activity log. Its content is the core's business.

    def read_activity(self) -> bytes:
        """The file of the activity log; empty when there is none.

        Raises:
          ReplicaIO: it cannot be read.
        """
        with _doing(self.path, f"read {ACTIVITY_NAME}"):
            return read_small(self.dir_fd, ACTIVITY_NAME) or b""

    def write_activity(self, data: bytes) -> None:
        """Replace it, durable when it returns.

        Raises:
          ReplicaIO: the old one is still there.
        """
        assert not self.read_only
        with _doing(self.path, f"write {ACTIVITY_NAME}"):
            write_durable(self.dir_fd, ACTIVITY_NAME, data, mode=0o600, spare=False)

    def forget_activity(self) -> None:
        """Remove it, durable when it returns: the replica may differ anywhere from now on.

        Raises:
          ReplicaIO: it is still there.
        """
        assert not self.read_only
        with _doing(self.path, f"remove {ACTIVITY_NAME}"):
            if unlink_if_there(self.dir_fd, ACTIVITY_NAME):
                sync_directory(self.dir_fd)

    # ---- Volume state.

    def reload(self) -> None:
        """Read all records again, because another program has put disks beside the head.

        The head stays the file it was; its parent is what its record says now.

        Raises:
          ReplicaDamaged, ReplicaUnsupported: what is there makes no sense; the old view is kept.
          ReplicaIO: a system call failed.
        """
        self._check_idle()
        with _doing(self.path, "read its metadata"):
            survey = take_survey(self.path, self.dir_fd)
            view = make_view(self.path, survey, self._volume, frozenset())
        parent = view.disks[self._volume.head].parent
        if parent != self._volume.parent:
            with _doing(self.path, "write volume.meta"):
                self._write_volume(replace(self._volume, parent=parent))
        self._set_view(replace(view, volume=self._volume))

    def write_generation(self, generation: Generation) -> None:
        """Replace the generation, durable when it returns.

        What this directory knows of itself (``head``, ``torn``, ``written_elsewhere``) is not taken
        from the argument.

        Raises:
          ReplicaIO: the old one is still there.
        """
        assert not self.read_only
        with _doing(self.path, "write its generation"):
            self._store_generation(self._with_doubts(replace(generation, head=None)))

    def note_repaired(self) -> None:
        """Forget ``torn`` and ``written_elsewhere``, durable when it returns.

        For a caller who has made this replica equal to the others, or knows that it is alone. Until
        then every open finds them again, so that a crash, or a refusal by ``choose``, in between
        does not hide them.

        Raises:
          ReplicaIO: the next open will find them again.
        """
        assert not self.read_only
        if not (self.torn or self.written_elsewhere):
            return
        self.torn, self.written_elsewhere = False, ""
        if self._generation is not None:
            self.write_generation(self._generation)

    def set_rebuilding(self, rebuilding: bool) -> None:
        """Note that this copy is, or is no longer, incomplete; durable when it returns.

        Raises:
          ReplicaIO: the note cannot be written.
        """
        self._check_idle()
        with _doing(self.path, "write volume.meta"):
            self._write_volume(replace(self._volume, rebuilding=rebuilding))

    def _store_generation(self, generation: Generation) -> None:
        write_durable(self.dir_fd, GENERATION_NAME, generation.encode(), mode=0o600)
        self._generation = generation

    def _read_generation(self) -> Generation | None:
        data = read_small(self.dir_fd, GENERATION_NAME)
        if data is None:
            return None
        try:
            return Generation.parse(data)
        except MalformedError as error:
            raise ReplicaDamaged(
                self.path,
                f"{GENERATION_NAME} {error}; if this is the only copy, remove that file",
            ) from error

    def _write_volume(self, volume: VolumeMeta) -> None:
        write_durable(self.dir_fd, names.VOLUME_META, encode_volume(volume))
        self._volume = volume

    def _write_disk(self, disk: Disk) -> None:
        with _doing(self.path, f"write {disk.name}.meta"):
            write_durable(self.dir_fd, names.record_name(disk.name), encode_disk(disk))
        self._disks[disk.name] = disk
        self._relink_chain()

    def _relink_chain(self) -> None:
        self._chain = tuple(walk_up(self._disks, self._volume.head))[::-1]

    def _check_idle(self) -> None:
        assert not self._closed
        assert not self.read_only
        assert self._pending is None, "a prepared head is neither settled nor aborted"


@contextlib.contextmanager
def _doing(path: Path, what: str) -> Iterator[None]:
    """Turn a failed system call into a sentence."""
    try:
        yield
    except OSError as error:
        name = f" ({error.filename})" if isinstance(error.filename, str) else ""
        raise ReplicaIO(path, f"cannot {what}{name}: {error.strerror}") from error
