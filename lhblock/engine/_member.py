"""One replica of an open volume: its directory and its store.

Methods here are blocking and know nothing of other replicas; the replica set runs them in threads.
A member's layers are addressed by image name in Python and by id in C; the table between the two
lives here and changes only under the volume's structure lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from lhblock._native import UNIT_BYTES, NativeEngine, NativeStore, NativeUnit, NativeVolume
from lhblock.engine._limits import SnapshotUsage
from lhblock.engine._occupied import occupied_steps
from lhblock.errors import NativeError, ReplicaError, ReplicaIO
from lhblock.replica import (
    Disk,
    Generation,
    LayerStamp,
    PendingHead,
    ReplicaDirectory,
    valid_checksum,
)


class MemberState(Enum):
    """Where a replica stands.

    ``USABLE`` takes part. ``REBUILDING`` gets every change and answers no reads, while what it
    lacks is copied; nothing depends on it. ``FAILING`` missed something and the others do not say
    so yet, so acknowledgements wait. ``LEFT`` is named stale by the others, or was never let in.
    """

    USABLE = "usable"
    REBUILDING = "rebuilding"
    FAILING = "failing"
    LEFT = "left"


class Member:
    """One replica of an open volume.

    Attributes:
      path: the directory, as configured.
      state: see :class:`MemberState`; only the replica set changes it.
      error: why it is not usable; "" otherwise.
      dropped_by_core: C reported the failure and holds acknowledgements for the fence.
      layers: image name to layer id, side layers included.
      side_images: those of ``layers`` that are not in the live chain.
      epoch: changes when layer ids become void, because the store was opened anew.
    """

    def __init__(self, path: Path, directory: ReplicaDirectory | None, error: str = "") -> None:
        self._directory = directory
        self._store: NativeStore | None = None
        self.path = path
        self.state = MemberState.LEFT if directory is None else MemberState.USABLE
        self.error = error
        self.dropped_by_core = False
        self.layers: dict[str, int] = {}
        self.side_images: set[str] = set()
        self.epoch = 0
        self._last_counter = 0

    @property
    def directory(self) -> ReplicaDirectory:
        """The open directory; only for members that were let in."""
        assert self._directory is not None, self.path
        return self._directory

    @property
    def store(self) -> NativeStore:
        """The open store; only for members that were let in."""
        assert self._store is not None, self.path
        return self._store

    @property
    def opened(self) -> bool:
        """Whether the directory is open."""
        return self._directory is not None

    @property
    def has_store(self) -> bool:
        """Whether the store is open."""
        return self._store is not None

    @property
    def generation(self) -> Generation:
        """What an open member knows of the volume; every member that takes part has one."""
        generation = self.directory.generation
        assert generation is not None, self.path
        return generation

    @property
    def generation_counter(self) -> int:
        """Counter of the newest generation the replica is known to hold; 0 if unknown."""
        if self._directory is not None and self._directory.generation is not None:
            self._last_counter = self._directory.generation.counter
        return self._last_counter

    def leave(self, reason: str) -> None:
        """Not to be used: close what is open and remember why. Blocking.

        For members that never took part since the volume was opened.
        """
        self._last_counter = self.generation_counter
        self.state = MemberState.LEFT
        self.error = reason
        was_dirty = self._directory is not None and self._directory.was_dirty
        # With a store it may have been made equal halfway: nobody may believe it without comparing.
        self.close(clean=not was_dirty and not self.has_store)

    def open_store(self, engine: NativeEngine, flags: int) -> None:
        """Open the live chain for sector I/O. Blocking: reads every extent map.

        Raises:
          NativeError: nothing is left open.
        """
        self._store, self.layers = open_chain(
            engine, self.directory, self.directory.chain, self.directory.size_bytes, flags
        )
        self.side_images = set()
        self.epoch += 1

    # ---- Units of frozen layers, for a rebuild.

    def layer_stamp(self, image: str) -> LayerStamp:
        """What changes when anybody writes to a frozen layer's file."""
        return LayerStamp.of(self._stat(image))

    def occupied_units(self, image: str) -> list[int]:
        """Offsets of the units in which a frozen layer has data or discards. Blocking."""
        with self._doing("read", image):
            return occupied_steps(self.directory.dir_fd, image, UNIT_BYTES)

    def checksum(self, image: str) -> str:
        """The recorded checksum of a layer's data; "" when there is none that counts. Blocking."""
        with self._doing("read", image):
            record = valid_checksum(self.directory.dir_fd, image)
        return "" if record is None or record.silently_corrupted else record.checksum

    def open_units(self, image: str) -> None:
        """Make a frozen layer ready for the calls below. Blocking."""
        self.side_layer(image)

    def begin_units(self, image: str, size_bytes: int) -> None:
        """Make a frozen layer ready to be written, and this long. Blocking."""
        with self._doing("prepare", image):
            self.store.begin_units(self.layers[image], size_bytes)

    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        """Read a unit of a frozen layer. Blocking; several threads may."""
        with self._doing("read", image):
            self.store.read_unit(self.layers[image], offset_bytes, unit)

    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        """Make a frozen layer equal to a unit; return the bytes that changed. Blocking; several
        threads may, with different units.

        Args:
          empty: the layer is known to have no data there.
        """
        with self._doing("write", image):
            return self.store.write_unit(self.layers[image], offset_bytes, unit, empty=empty)

    def sync_units(self, image: str) -> None:
        """Put what was written to a frozen layer on stable storage. Blocking."""
        with self._doing("sync", image):
            self.store.sync_units(self.layers[image])

    @contextmanager
    def _doing(self, what: str, image: str) -> Iterator[None]:
        try:
            yield
        except (OSError, NativeError) as error:
            raise ReplicaIO(self.path, f"cannot {what} {image}: {sentence(error)}") from error

    def take_up(self, directory: ReplicaDirectory) -> None:
        """Have a directory, opened for a rebuild. It has none yet."""
        assert self._directory is None
        self._directory = directory

    def begin_promotion(
        self, engine: NativeEngine, flags: int
    ) -> tuple[NativeStore, dict[str, int]]:
        """Open the complete chain beside the store that is written, but for its start.

        Blocking: reads the extent maps of the layers below the head.

        Raises:
          NativeError: nothing is left open.
        """
        store = NativeStore(engine, self.directory.dir_fd, self.directory.size_bytes, flags)
        try:
            layers = {
                disk.name: store.add_layer(disk.name, ReplicaDirectory.discard_name(disk.name))
                for disk in self.directory.chain
            }
        except BaseException:
            store.close()
            raise
        return store, layers

    def end_promotion(self, store: NativeStore, layers: dict[str, int]) -> NativeStore:
        """Use the store from now on; return the old one, which the caller closes."""
        old, self._store = self.store, store
        self.layers = layers
        self.side_images = set()
        self.epoch += 1
        return old

    def swap_store(self, engine: NativeEngine, flags: int) -> NativeStore:
        """Open the chain anew, after a revert; return the old store, which the caller closes."""
        old = self.store
        self.open_store(engine, flags)
        return old

    def prepare_head(self, pending: PendingHead) -> None:
        """Tell the store about the next head. Undoes the directory's half when it fails."""
        try:
            self.store.prepare_head(pending.image, pending.discard)
        except BaseException:
            pending.abort()
            raise

    def head_switched(self, old_image: str, new_id: int) -> None:
        """Rename the frozen head in the table and enter the new one."""
        head = self.directory.head
        frozen_id = self.layers.pop(old_image)
        self.layers[head.parent] = frozen_id
        self.layers[head.name] = new_id
        self.store.rename_discard(frozen_id, ReplicaDirectory.discard_name(head.parent))

    def usage(self) -> SnapshotUsage:
        """Count disks and allocated bytes for the limits."""
        directory = self.directory
        chain = [disk for disk in directory.chain[:-1] if not disk.removed]
        head = directory.head.name
        return SnapshotUsage(
            count=sum(not disk.removed for disk in directory.disks.values() if disk.name != head),
            total=len(directory.disks),
            chain_bytes=sum(self.allocated_bytes(disk.name) for disk in chain),
            head_bytes=self.allocated_bytes(head),
        )

    def allocated_bytes(self, image: str) -> int:
        """Space a layer takes."""
        return self._stat(image).st_blocks * 512

    def image_bytes(self, image: str) -> int:
        """Apparent size of a layer: the volume's size when it was the head."""
        return self._stat(image).st_size

    def modified_ns(self, image: str) -> int:
        """When a layer's file was last written, in nanoseconds since the epoch."""
        return self._stat(image).st_mtime_ns

    def _stat(self, image: str) -> os.stat_result:
        try:
            return os.stat(image, dir_fd=self.directory.dir_fd, follow_symlinks=False)
        except OSError as error:
            raise ReplicaIO(self.path, f"cannot look at {image}: {error.strerror}") from error

    def side_layer(self, image: str) -> int:
        """Id of a layer, opening it beside the live chain if it is not in it."""
        if image not in self.layers:
            discard = ReplicaDirectory.discard_name(image)
            self.layers[image] = self.store.add_side_layer(image, discard)
            self.side_images.add(image)
        return self.layers[image]

    def drop_side_layers(self, volume: NativeVolume | None) -> None:
        """Close every layer that is not in the live chain."""
        for image in sorted(self.side_images):
            self.store.drop_layer(volume, self.layers.pop(image))
        self.side_images = set()

    def close(self, *, clean: bool) -> None:
        """Close the store and the directory. The volume does not publish the store any more."""
        store, self._store = self._store, None
        directory, self._directory = self._directory, None
        try:
            if store is not None:
                store.close()
        finally:
            if directory is not None:
                directory.close(clean=clean)


def open_chain(
    engine: NativeEngine,
    directory: ReplicaDirectory,
    chain: tuple[Disk, ...],
    size_bytes: int,
    flags: int,
) -> tuple[NativeStore, dict[str, int]]:
    """Open layers, oldest first, as one store; return it and its layer ids. Blocking.

    Raises:
      NativeError: nothing is left open.
    """
    store = NativeStore(engine, directory.dir_fd, size_bytes, flags)
    try:
        layers = {
            disk.name: store.add_layer(disk.name, ReplicaDirectory.discard_name(disk.name))
            for disk in chain
        }
        store.start()
    except BaseException:
        store.close()
        raise
    return store, layers


def sentence(error: BaseException) -> str:
    """The part of an error to show beside a replica's address."""
    if isinstance(error, ReplicaError):
        return error.sentence
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
