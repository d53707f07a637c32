"""A replica that is a directory of this host: the directory and its store.

A member's layers are addressed by image name in Python and by id in C; the table between the two
lives here and changes only under the volume's structure lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lhblock._native import (
    MERGE_STEP_BYTES,
    STORE_READ_ONLY,
    STORE_WRITE_ONLY,
    UNIT_BYTES,
    Extent,
    NativeEngine,
    NativeStore,
    NativeUnit,
    NativeVolume,
    encode_activity,
)
from lhblock.engine import _layer_file as files
from lhblock.engine._alignment import Alignment, align
from lhblock.engine._member import LayerDamage, LayerSize, Member, MergeKind, Store, sentence
from lhblock.engine._occupied import occupied_steps
from lhblock.engine._target import make_target, open_target, probe
from lhblock.errors import NativeError, ReplicaIO
from lhblock.replica import (
    ChecksumRecord,
    Disk,
    Generation,
    LayerStamp,
    PendingHead,
    RebuildProgress,
    ReplicaDirectory,
    valid_checksum,
)


class LocalMember(Member):
    """A replica directory of this host.

    Args:
      path: the directory, as configured.
      engine: the C engine.
      store_flags: how its stores are opened: ``STORE_DIRECT``, ``STORE_READ_ONLY``.
    """

    def __init__(self, path: Path, engine: NativeEngine, store_flags: int) -> None:
        super().__init__(str(path), path.name)
        self.path = path
        self._engine = engine
        self._flags = store_flags
        self._directory: ReplicaDirectory | None = None
        self._store: NativeStore | None = None
        self._volume: NativeVolume | None = None
        self._pending: PendingHead | None = None
        self._switched = False
        self._promoted: tuple[NativeStore, dict[str, int]] | None = None
        self._replaced: list[NativeStore] = []
        self._lent: dict[str, tuple[NativeStore, int]] = {}
        self._layers: dict[str, int] = {}  # side layers included
        self._side_images: set[str] = set()  # those that are not in the live chain
        self._epoch = 0  # changes when layer ids become void

    @property
    def key(self) -> str:
        return str(self.path.absolute())

    @property
    def opened(self) -> bool:
        return self._directory is not None

    @property
    def records(self) -> ReplicaDirectory:
        return self.directory

    @property
    def directory(self) -> ReplicaDirectory:
        """The open directory."""
        assert self._directory is not None, self.path
        return self._directory

    @property
    def has_store(self) -> bool:
        return self._store is not None

    @property
    def store(self) -> NativeStore:
        assert self._store is not None, self.path
        return self._store

    def why_failed(self, error: int, offset_bytes: int) -> str:
        return f"I/O at {offset_bytes}: {os.strerror(error)}"

    @property
    def switched(self) -> bool:
        return self._switched

    # ---- Opening and closing.

    def reach(self) -> None:
        """It is here."""

    def open(self, *, read_only: bool = False, unfinished: bool = False) -> None:
        """As for every member; also a copy whose rebuild never ended, if ``unfinished``."""
        assert self._directory is None
        self._directory = ReplicaDirectory.open(
            self.path, read_only=read_only, unfinished=unfinished, probe=probe
        )

    def make_target(self, like: Generation, *, size_bytes: int, encrypted: bool) -> None:
        make_target(self.path, like=like, size_bytes=size_bytes, encrypted=encrypted)

    def open_target(
        self, like: Generation, *, size_bytes: int, others: Sequence[str], force: bool
    ) -> None:
        assert self._directory is None
        self._directory = open_target(
            self.path, like, size_bytes=size_bytes, others=others, force=force
        )

    def open_store(self, *, write_only: bool = False) -> None:
        flags = self._flags | (STORE_WRITE_ONLY if write_only else 0)
        images = [disk.name for disk in self.directory.chain]
        store, layers = self._open_started(images, self.directory.size_bytes, flags)
        self._have_store(store, layers)

    def _open_started(
        self, images: Sequence[str], size_bytes: int, flags: int
    ) -> tuple[NativeStore, dict[str, int]]:
        store, layers = self._open_chain(images, size_bytes, flags)
        try:
            store.start()
        except BaseException:
            store.close()
            raise
        return store, layers

    def _open_chain(
        self, images: Sequence[str], size_bytes: int, flags: int
    ) -> tuple[NativeStore, dict[str, int]]:
        """Open layers, oldest first, as one store that is not started; with the layers' ids."""
        store = NativeStore(self._engine, self.directory.dir_fd, size_bytes, flags)
        try:
            layers = {
                image: store.add_layer(image, ReplicaDirectory.discard_name(image))
                for image in images
            }
        except BaseException:
            store.close()
            raise
        return store, layers

    def _have_store(self, store: NativeStore, layers: dict[str, int]) -> None:
        if self._store is not None:
            self._replaced.append(self._store)
        self._store = store
        self._layers = layers
        self._side_images = set()
        self._epoch += 1

    def reopen_store(self) -> None:
        self.open_store()
        self.release_replaced()

    def open_view(self, images: Sequence[str], size_bytes: int) -> Store:
        return self._open_started(images, size_bytes, self._flags | STORE_READ_ONLY)[0]

    def serve(self, volume: NativeVolume | None) -> None:
        self._volume = volume

    def sync(self) -> None:
        self.store.sync()

    def release_replaced(self) -> None:
        while self._replaced:
            self._replaced.pop().close()

    def close(self, *, clean: bool) -> None:
        self.release_replaced()
        self.return_layers()
        self.abandon_promotion()
        self._pending = None
        store, self._store = self._store, None
        directory, self._directory = self._directory, None
        try:
            if store is not None:
                store.close()
        finally:
            if directory is not None:
                directory.close(clean=clean)

    def close_synced(self) -> None:
        clean = False
        try:
            self._drop_side_layers()
            self.sync()
            clean = True
        finally:
            self.close(clean=clean)

    # ---- What it knows of the volume.

    def write_generation(self, generation: Generation) -> None:
        self.directory.write_generation(generation)

    def note_repaired(self) -> None:
        self.directory.note_repaired()

    def set_rebuilding(self, rebuilding: bool) -> None:
        self.directory.set_rebuilding(rebuilding)

    # ---- Its activity log.

    def read_activity(self) -> bytes:
        return self.directory.read_activity()

    def make_activity(self, log_id: str) -> None:
        self.directory.write_activity(encode_activity(log_id, self.directory.size_bytes))

    def forget_activity(self) -> None:
        self.directory.forget_activity()

    # ---- The tree.

    def layer_size(self, image: str) -> LayerSize:
        state = self._stat(image)
        return LayerSize(state.st_size, state.st_blocks * 512)

    def layer_sizes(self) -> Mapping[str, LayerSize]:
        sizes = {}
        for image in list(self.directory.disks):
            try:
                sizes[image] = self.layer_size(image)
            except ReplicaIO:
                if image in self.directory.disks:
                    raise  # else it has gone in this moment
        return sizes

    def modified_ns(self, image: str) -> int:
        """When a layer's file was last written, in nanoseconds since the epoch."""
        return self._stat(image).st_mtime_ns

    def _stat(self, image: str) -> os.stat_result:
        try:
            return os.stat(image, dir_fd=self.directory.dir_fd, follow_symlinks=False)
        except OSError as error:
            raise ReplicaIO(self.path, f"cannot look at {image}: {error.strerror}") from error

    def mark_removed(self, snapshot: str) -> None:
        self.directory.mark_removed(snapshot)

    def finish_snapshot(self, disk: Disk, *, size_bytes: int) -> None:
        pending = self.directory.prepare_snapshot(
            disk.snapshot,
            user_created=disk.user_created,
            created=disk.created,
            labels=disk.labels,
            size_bytes=size_bytes,
        )
        pending.commit()
        pending.settle()

    def undo_revert(self, snapshot: str, *, created: str) -> None:
        pending = self.directory.prepare_revert(snapshot, created=created)
        pending.commit()
        pending.settle()

    def prepare_snapshot(
        self,
        snapshot: str,
        *,
        user_created: bool,
        created: str,
        labels: Mapping[str, str],
        size_bytes: int | None,
    ) -> None:
        self.store.sync()  # what is synced now does not have to be while flushes wait
        pending = self.directory.prepare_snapshot(
            snapshot,
            user_created=user_created,
            created=created,
            labels=labels,
            size_bytes=size_bytes,
        )
        try:
            self.store.prepare_head(pending.image, pending.discard)
        except BaseException:
            pending.abort()
            raise
        self._pending, self._switched = pending, False

    def commit_snapshot(self, size_bytes: int) -> None:
        old_image = self.directory.head.name
        self._commit()
        new_id = self.store.commit_head(size_bytes)
        head = self.directory.head
        frozen_id = self._layers.pop(old_image)
        self._layers[head.parent] = frozen_id
        self._layers[head.name] = new_id
        self.store.rename_discard(frozen_id, ReplicaDirectory.discard_name(head.parent))

    def _commit(self) -> PendingHead:
        assert self._pending is not None
        self._pending.commit()
        self._switched = True
        return self._pending

    def settle_snapshot(self) -> None:
        assert self._pending is not None
        # In this order: a leftover of the commit tells a later open that the snapshot's data may
        # differ between replicas, so it goes when the data is durable.
        self.store.sync()
        self._pending.settle()
        self._pending = None

    def prepare_revert(self, snapshot: str, *, created: str) -> None:
        pending = self.directory.prepare_revert(snapshot, created=created)
        self._pending, self._switched = pending, False

    def commit_revert(self) -> None:
        self._commit().settle()
        self._pending = None
        self.open_store()

    def abandon_head(self) -> None:
        if self._pending is None or self._switched:
            return
        pending, self._pending = self._pending, None
        self.store.abandon_head()
        pending.abort()

    # ---- Merges.

    def remove_leaf(self, image: str) -> None:
        self._drop_side_layers()
        self.directory.unlink_disk(image)

    def _side_layer(self, image: str) -> int:
        """Id of a layer, opening it beside the live chain if it is not in it."""
        if image not in self._layers:
            discard = ReplicaDirectory.discard_name(image)
            self._layers[image] = self.store.add_side_layer(image, discard)
            self._side_images.add(image)
        return self._layers[image]

    def _drop_side_layers(self) -> None:
        for image in sorted(self._side_images):
            self.store.drop_layer(self._volume, self._layers.pop(image))
        self._side_images = set()

    def begin_merge(self, lower: str, upper: str) -> int:
        self._side_layer(lower)
        self._side_layer(upper)
        return self._epoch

    def merge_offsets(self, image: str) -> Sequence[int]:
        return occupied_steps(self.directory.dir_fd, image)

    def merge_step(
        self, kind: MergeKind, lower: str, upper: str, offset_bytes: int, token: int
    ) -> bool:
        if token != self._epoch:
            return False
        end_bytes = max(self.layer_size(lower).image_bytes, self.layer_size(upper).image_bytes)
        length_bytes = min(MERGE_STEP_BYTES, end_bytes - offset_bytes)
        step = (self._layers[lower], self._layers[upper], offset_bytes, length_bytes)
        if kind == "prune":
            self.store.merge_prune(*step)
        elif kind == "merge-up":
            self.store.merge_up(self._volume, *step)
        else:
            self.store.merge_down(*step)
        return True

    def finish_merge(self, kind: MergeKind, lower: str, upper: str, token: int) -> bool:
        if token != self._epoch:
            return False
        if kind == "merge-up":
            self._finish_up(lower)
        else:
            self._finish_down(lower, upper)
        return True

    def _finish_up(self, lower: str) -> None:
        """Nothing is needed from the lower layer any more: forget it and delete it."""
        if lower not in self._side_images:
            self.store.drop_layer(self._volume, self._layers.pop(lower))
        self._drop_side_layers()
        self.directory.unlink_disk(lower)

    def _finish_down(self, lower: str, upper: str) -> None:
        """The lower file holds everything: it becomes the upper layer's."""
        lower_id, upper_id = self._layers[lower], self._layers[upper]
        self.store.merge_down_finish(lower_id, upper_id)
        self.directory.adopt_merged(lower, upper)
        if lower not in self._side_images:
            self.store.replace_layer(self._volume, lower_id, upper_id)
            del self._layers[lower]
        self._drop_side_layers()

    # ---- Checksums.

    def checksum(self, image: str) -> str:
        with self._doing("read", image):
            record = valid_checksum(self.directory.dir_fd, image)
        return "" if record is None or record.silently_corrupted else record.checksum

    def hash_layer(self, image: str, *, rehash: bool) -> None:
        with self._doing("hash", image):
            files.hash_layer(self.directory.dir_fd, image, rehash=rehash)

    def verify_layer(self, image: str) -> ChecksumRecord | LayerDamage | None:
        with self._doing("verify", image):
            return files.verify_layer(self.directory.dir_fd, image)

    def layer_extents(self, image: str) -> Sequence[Extent]:
        with self._doing("read", image):
            return files.layer_extents(self.directory.dir_fd, image)

    def read_layer(self, image: str, offset_bytes: int, length_bytes: int) -> bytes:
        with self._doing("read", image):
            return files.read_layer(self.directory.dir_fd, image, offset_bytes, length_bytes)

    def begin_repair(self, image: str) -> None:
        with self._doing("repair", image):
            right = files.begin_repair(self.directory.dir_fd, image)
        if not right:
            raise ReplicaIO(self.path, f"{image} was changed meanwhile")

    def repair_layer(self, image: str, offset_bytes: int, data: bytes) -> None:
        with self._doing("repair", image):
            files.repair_layer(self.directory.dir_fd, image, offset_bytes, data)

    def finish_repair(self, image: str, record: ChecksumRecord) -> None:
        with self._doing("repair", image):
            found = files.finish_repair(self.directory.dir_fd, image, record)
        if found != record.checksum:
            raise ReplicaIO(self.path, f"{image} still reads {found}, not {record.checksum}")

    # ---- Rebuilding.

    def align(
        self,
        plan: Alignment,
        source: Mapping[str, Disk],
        *,
        newest: str,
        sizes: Mapping[str, int],
        size_bytes: int,
        created: str,
    ) -> None:
        align(
            self.directory,
            plan,
            source,
            newest=newest,
            sizes=sizes,
            size_bytes=size_bytes,
            created=created,
        )

    def layer_stamp(self, image: str) -> LayerStamp:
        return LayerStamp.of(self._stat(image))

    def occupied_units(self, image: str) -> Sequence[int]:
        with self._doing("read", image):
            return occupied_steps(self.directory.dir_fd, image, UNIT_BYTES)

    def open_units(self, image: str) -> None:
        self._side_layer(image)

    def begin_units(self, image: str, size_bytes: int) -> None:
        with self._doing("prepare", image):
            store, layer = self._unit_layer(image)
            store.begin_units(layer, size_bytes)

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        with self._doing("read", image):
            store, layer = self._unit_layer(image)
            store.read_unit(layer, offset_bytes, unit)

    def hash_units(
        self,
        image: str,
        offsets_bytes: Sequence[int],
        unit: NativeUnit,
        *,
        shape_only: bool = False,
    ) -> Sequence[int]:
        hashes = []
        for offset_bytes in offsets_bytes:
            self.read_unit(image, offset_bytes, unit)
            hashes.append(unit.hash(shape_only=shape_only))
        return hashes

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        with self._doing("write", image):
            store, layer = self._unit_layer(image)
            return store.write_unit(layer, offset_bytes, unit, empty=empty)

    def sync_units(self, image: str) -> None:
        with self._doing("sync", image):
            store, layer = self._unit_layer(image)
            store.sync_units(layer)

    def lend_layer(self, image: str) -> None:
        if image not in self._lent:
            store, layers = self._open_chain([image], self.directory.size_bytes, self._flags)
            self._lent[image] = store, layers[image]

    def return_layers(self) -> None:
        while self._lent:
            self._lent.popitem()[1][0].close()

    def _unit_layer(self, image: str) -> tuple[NativeStore, int]:
        if image in self._lent:
            return self._lent[image]
        if self._store is None or image not in self._layers:
            raise ReplicaIO(self.path, f"{image} was not opened to be copied")
        return self._store, self._layers[image]

    def reconcile(
        self, image: str, source: LocalMember, source_image: str, ranges: Sequence[Extent]
    ) -> int:
        """Make any layer, the head too, equal to one of another directory; neither serves.

        Args:
          ranges: where; see :func:`~lhblock.engine._equal.make_equal`.

        Returns:
          Bytes changed. :meth:`reopen_store` must follow.
        """
        return self.store.reconcile_layer(
            self._layers[image], source.store, source._layers[source_image], ranges
        )

    def read_progress(self) -> RebuildProgress:
        return self.directory.read_progress()

    def write_progress(self, progress: RebuildProgress) -> None:
        self.directory.write_progress(progress)

    def forget_progress(self) -> None:
        self.directory.forget_progress()

    def prepare_promotion(self) -> None:
        images = [disk.name for disk in self.directory.chain]
        self._promoted = self._open_chain(images, self.directory.size_bytes, self._flags)

    def start_promotion(self) -> None:
        assert self._promoted is not None
        self.store.sync()
        self._promoted[0].start()

    def finish_promotion(self) -> None:
        assert self._promoted is not None
        (store, layers), self._promoted = self._promoted, None
        self._have_store(store, layers)

    def abandon_promotion(self) -> None:
        if self._promoted is not None:
            (store, _), self._promoted = self._promoted, None
            store.close()

    @contextmanager
    def _doing(self, what: str, image: str) -> Iterator[None]:
        try:
            yield
        except (OSError, NativeError) as error:
            raise ReplicaIO(self.path, f"cannot {what} {image}: {sentence(error)}") from error
