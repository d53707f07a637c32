"""One replica of an open volume, as the engine sees it: wherever it is.

Everything the engine wants of a replica is a method here, and its arguments could go over a wire:
names of layers, records, numbers, and a unit of data. What they become is the member's own
business; :mod:`lhblock.engine._local_member` has a directory of this host. Methods that block say
so; the replica set runs them in threads. None knows of other replicas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, Protocol, TypeAlias

from lhblock._native import Extent, NativePeer, NativeStore, NativeUnit, NativeVolume
from lhblock.engine._alignment import Alignment
from lhblock.engine._limits import SnapshotUsage
from lhblock.engine._missed import Missed, Witness
from lhblock.errors import ReplicaError
from lhblock.replica import ChecksumRecord, Disk, Generation, LayerStamp, RebuildProgress

Store: TypeAlias = NativeStore | NativePeer
MergeKind: TypeAlias = Literal["prune", "merge-up", "merge-down"]


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


class Records(Protocol):
    """What an open replica's metadata say. ``ReplicaDirectory`` is one and tells the meaning."""

    @property
    def label(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def encrypted(self) -> bool: ...
    @property
    def rebuilding(self) -> bool: ...
    @property
    def disks(self) -> Mapping[str, Disk]: ...
    @property
    def chain(self) -> tuple[Disk, ...]: ...
    @property
    def head(self) -> Disk: ...
    @property
    def generation(self) -> Generation | None: ...
    @property
    def was_dirty(self) -> bool: ...
    @property
    def torn(self) -> bool: ...
    @property
    def written_elsewhere(self) -> str: ...
    @property
    def cleaned(self) -> tuple[str, ...]: ...

    def children(self, name: str) -> tuple[Disk, ...]: ...


@dataclass(frozen=True)
class LayerSize:
    """A layer's file.

    Attributes:
      image_bytes: apparent size: the volume's when it was the head.
      allocated_bytes: space it takes.
    """

    image_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class LayerDamage:
    """A layer that is not what its checksum record says.

    Attributes:
      record: what it should be.
      found: the checksum of what is there.
    """

    record: ChecksumRecord
    found: str


class Member(ABC):
    """One replica of an open volume.

    Attributes:
      address: what messages call it, and what the user configured.
      name: the short form of it, for a history that has little room.
      state: see :class:`MemberState`; only the replica set and the opening change it.
      error: why it is not usable; "" otherwise.
      dropped_by_core: C reported the failure and holds acknowledgements for the fence.
      missed: since it left, if it took part before; only the replica set changes it.
      exclusive: nobody else can open it while this process lives, whatever else fails.
      merges_itself: removed layers are its own business.
    """

    exclusive: ClassVar[bool] = True
    merges_itself: ClassVar[bool] = False

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        self.name = name
        self.state = MemberState.LEFT
        self.error = ""
        self.dropped_by_core = False
        self.missed: Missed | None = None
        self._last_counter = 0

    # ---- What is known of it without asking.

    @property
    def key(self) -> str:
        """What two spellings of one address have in common."""
        return self.address

    @property
    @abstractmethod
    def opened(self) -> bool:
        """Whether it is open."""

    @property
    @abstractmethod
    def records(self) -> Records:
        """Its metadata as they are now; only while it is open."""

    @property
    @abstractmethod
    def has_store(self) -> bool:
        """Whether it is open for sector I/O."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """What a volume publishes; only while there is one."""

    @property
    def generation(self) -> Generation:
        """What an open member knows of the volume; every member that takes part has one."""
        generation = self.records.generation
        assert generation is not None, self.address
        return generation

    @property
    def generation_counter(self) -> int:
        """Counter of the newest generation the replica is known to hold; 0 if unknown."""
        if self.opened and self.records.generation is not None:
            self._last_counter = self.records.generation.counter
        return self._last_counter

    @abstractmethod
    def layer_size(self, image: str) -> LayerSize:
        """The size of a layer as far as it is known here; does not wait for another host.

        Raises:
          ReplicaError: there is no such layer (any more).
        """

    @abstractmethod
    def why_failed(self, error: int, offset_bytes: int) -> str:
        """What to say of a failure of the store that the core reported; ``error`` is an errno."""

    def is_out_of_touch(self, error: int) -> bool:
        """Whether a failure that the core reported says nothing of its disk, only of the way."""
        return False

    @property
    def store_ended(self) -> bool:
        """Whether the store is of no use any more, which the core says only of published ones."""
        return False

    def witness(self) -> Witness | None:
        """What its host says of itself, as far as it is known; does not wait for another host."""
        return None

    @property
    @abstractmethod
    def switched(self) -> bool:
        """Whether the head that was prepared last may be the head on its disk."""

    # ---- Opening and closing. All blocking.

    @abstractmethod
    def reach(self) -> None:
        """Make sure that somebody is there, as far as that can be told without opening it.

        Raises:
          ReplicaUnreachable: nobody answers.
        """

    @abstractmethod
    def open(self, *, read_only: bool = False) -> None:
        """Lock it, check it, clean it up; it has no store yet.

        Raises:
          ReplicaError: it cannot be used; it is as it was.
        """

    @abstractmethod
    def make_target(self, like: Generation, *, size_bytes: int, encrypted: bool) -> None:
        """Make a replica that is to be rebuilt, marked, if there is none yet. Not open.

        Args:
          like: generation of a replica of the volume.

        Raises:
          ReplicaError: it cannot be made, or something else is there.
        """

    @abstractmethod
    def open_target(
        self, like: Generation, *, size_bytes: int, others: Sequence[str], force: bool
    ) -> None:
        """Open it for a rebuild, and mark it, durably, so that nobody believes it.

        Args:
          like: generation of a replica that is complete.
          size_bytes: of the volume.
          others: replica ids that the volume uses.
          force: also take one that is not the volume's, or has writes that the others have not;
            they are lost.

        Raises:
          ReplicaForeign, ReplicaStale: it must not be touched; it is as it was.
          ReplicaError: it cannot be opened, or marked.
        """

    @abstractmethod
    def open_store(self, *, write_only: bool = False) -> None:
        """Open the live chain for sector I/O: reads every extent map.

        Raises:
          NativeError, ReplicaError: nothing is left open.
        """

    @abstractmethod
    def reopen_store(self) -> None:
        """Open the chain anew, because layers were written under it. Nothing serves it."""

    @abstractmethod
    def open_view(self, images: Sequence[str], size_bytes: int) -> Store:
        """Open some layers, oldest first, to be read; the caller closes what it gets.

        Raises:
          NativeError, ReplicaError: nothing is left open.
        """

    @abstractmethod
    def serve(self, volume: NativeVolume | None) -> None:
        """Tell whether a volume publishes the store, and which. Does not block."""

    @abstractmethod
    def sync(self) -> None:
        """Put everything written so far on stable storage.

        Raises:
          NativeError, ReplicaError: it may not be there.
        """

    @abstractmethod
    def close(self, *, clean: bool) -> None:
        """Close it; nothing publishes the store any more. Harmless when closed.

        Raises:
          ReplicaError: it counts as dirty.
        """

    @abstractmethod
    def close_synced(self) -> None:
        """Close it cleanly, if all it has can be put on stable storage; else dirty.

        Raises:
          NativeError, ReplicaError: it counts as dirty.
        """

    def leave(self, reason: str) -> None:
        """Not to be used: close what is open and remember why.

        For members that never took part since the volume was opened.
        """
        self._last_counter = self.generation_counter
        self.state = MemberState.LEFT
        self.error = reason
        was_dirty = self.opened and self.records.was_dirty
        # With a store it may have been made equal halfway: nobody may believe it without comparing.
        self.close(clean=not was_dirty and not self.has_store)

    # ---- What it knows of the volume. All blocking, durable when they return.

    @abstractmethod
    def write_generation(self, generation: Generation) -> None:
        """See ``ReplicaDirectory.write_generation``."""

    def leave_behind(self, generation: Generation) -> None:  # noqa: B027
        """Record on a member that was lost, and may be there again, that it is left behind.

        Its session, if there is one, ends with it. One that is ``exclusive`` has nothing to record:
        nobody else could believe it meanwhile.

        Args:
          generation: of the members that go on; this one is none of them.

        Raises:
          ReplicaLocked, ReplicaStale: another engine has taken it.
          ReplicaError: it is not there.
        """

    @abstractmethod
    def note_repaired(self) -> None:
        """See ``ReplicaDirectory.note_repaired``."""

    @abstractmethod
    def set_rebuilding(self, rebuilding: bool) -> None:
        """See ``ReplicaDirectory.set_rebuilding``."""

    # ---- Its activity log. All blocking, durable when they return.

    @abstractmethod
    def read_activity(self) -> bytes:
        """The file of its activity log; empty when there is none.

        Raises:
          ReplicaError: it cannot be read.
        """

    @abstractmethod
    def make_activity(self, log_id: str) -> None:
        """Replace the log by one in which all is cold. No store of it has written to one yet.

        Raises:
          ReplicaError: the old one is still there.
        """

    @abstractmethod
    def forget_activity(self) -> None:
        """Remove the log: it may differ from others anywhere.

        Raises:
          ReplicaError: it is still there.
        """

    # ---- The tree. All blocking.

    def usage(self) -> SnapshotUsage:
        """Count disks and allocated bytes for the limits."""
        records, sizes = self.records, self.layer_sizes()
        chain = [disk for disk in records.chain[:-1] if not disk.removed]
        head = records.head.name
        return SnapshotUsage(
            count=sum(not disk.removed for disk in records.disks.values() if disk.name != head),
            total=len(records.disks),
            chain_bytes=sum(sizes[disk.name].allocated_bytes for disk in chain),
            head_bytes=sizes[head].allocated_bytes,
        )

    @abstractmethod
    def layer_sizes(self) -> Mapping[str, LayerSize]:
        """Sizes of all layers, by image name."""

    @abstractmethod
    def mark_removed(self, snapshot: str) -> None:
        """See ``ReplicaDirectory.mark_removed``."""

    @abstractmethod
    def finish_snapshot(self, disk: Disk, *, size_bytes: int) -> None:
        """Take a snapshot that others have, while there is no store; durable when it returns."""

    @abstractmethod
    def undo_revert(self, snapshot: str, *, created: str) -> None:
        """Have an empty head on a snapshot, while there is no store; durable when it returns."""

    @abstractmethod
    def prepare_snapshot(
        self,
        snapshot: str,
        *,
        user_created: bool,
        created: str,
        labels: Mapping[str, str],
        size_bytes: int | None,
    ) -> None:
        """Sync what there is, and make the next head ready, while I/O goes on.

        Raises:
          LhblockError: nothing is left of it.
        """

    @abstractmethod
    def commit_snapshot(self, size_bytes: int) -> None:
        """Make the head that was prepared the head. I/O is frozen. Not durable yet.

        Raises:
          LhblockError: :attr:`switched` says whether that may have happened on its disk.
        """

    @abstractmethod
    def settle_snapshot(self) -> None:
        """Put the snapshot's data, and then its name, on stable storage.

        Raises:
          LhblockError: one of both may not be there.
        """

    @abstractmethod
    def prepare_revert(self, snapshot: str, *, created: str) -> None:
        """Make an empty head on a snapshot ready.

        Raises:
          LhblockError: nothing is left of it.
        """

    @abstractmethod
    def commit_revert(self) -> None:
        """Make the head that was prepared the head, durably, and open the chain anew.

        I/O is frozen. :meth:`release_replaced` follows when the new store is published.

        Raises:
          LhblockError: :attr:`switched` says whether that may have happened on its disk.
        """

    @abstractmethod
    def abandon_head(self) -> None:
        """Remove a head that was prepared and is not :attr:`switched`; harmless otherwise.

        Raises:
          LhblockError: something is left of it; the next open removes it.
        """

    @abstractmethod
    def release_replaced(self) -> None:
        """Close the store that another one has taken the place of; it is not published now."""

    # ---- Removed layers are merged away, a step at a time. All blocking.

    @abstractmethod
    def remove_leaf(self, image: str) -> None:
        """Delete a removed layer without children. It can be begun again."""

    @abstractmethod
    def begin_merge(self, lower: str, upper: str) -> int:
        """Make a removed layer and its only child ready for the calls below.

        Returns:
          A number that they take: when it is out of date, layers were opened anew, and the calls
          do nothing and return False.
        """

    @abstractmethod
    def merge_offsets(self, image: str) -> Sequence[int]:
        """Begins of the steps in which a frozen layer has anything."""

    @abstractmethod
    def merge_step(
        self, kind: MergeKind, lower: str, upper: str, offset_bytes: int, token: int
    ) -> bool:
        """One step of a walk; it can be begun again."""

    @abstractmethod
    def finish_merge(self, kind: MergeKind, lower: str, upper: str, token: int) -> bool:
        """After all steps: delete ``lower``, or let ``upper`` have its file."""

    # ---- Checksums. All blocking.

    @abstractmethod
    def checksum(self, image: str) -> str:
        """The recorded checksum of a layer's data; "" when there is none that counts."""

    @abstractmethod
    def hash_layer(self, image: str, *, rehash: bool) -> None:
        """Record the checksum of a frozen layer; see ``hash_image``."""

    @abstractmethod
    def verify_layer(self, image: str) -> ChecksumRecord | LayerDamage | None:
        """The record if it is right; the damage if not, which is then recorded; None if there is
        no record that counts."""

    @abstractmethod
    def layer_extents(self, image: str) -> Sequence[Extent]:
        """Data extents of a layer's file, in order."""

    @abstractmethod
    def read_layer(self, image: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Read a layer's file; shorter at its end."""

    @abstractmethod
    def begin_repair(self, image: str) -> None:
        """Make sure that a damaged layer is still what its checksum record was made of.

        Raises:
          ReplicaIO: it was changed meanwhile.
        """

    @abstractmethod
    def repair_layer(self, image: str, offset_bytes: int, data: bytes) -> None:
        """Write what differs into the file of a layer that is marked as damaged, in place."""

    @abstractmethod
    def finish_repair(self, image: str, record: ChecksumRecord) -> None:
        """Sync a layer that was repaired, and take the mark away if it has its checksum.

        Raises:
          ReplicaIO: it has not.
        """

    # ---- Rebuilding: it becomes another replica's. All blocking.

    @abstractmethod
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
        """See :func:`lhblock.engine._alignment.align`."""

    @abstractmethod
    def layer_stamp(self, image: str) -> LayerStamp:
        """What changes when anybody writes to a frozen layer's file."""

    @abstractmethod
    def occupied_units(self, image: str) -> Sequence[int]:
        """Offsets of the units in which a frozen layer has data or discards."""

    @abstractmethod
    def open_units(self, image: str) -> None:
        """Make a frozen layer ready for the calls below."""

    @abstractmethod
    def begin_units(self, image: str, size_bytes: int) -> None:
        """Make a frozen layer ready to be written, and this long."""

    @abstractmethod
    def read_unit(self, image: str, offset_bytes: int, unit: NativeUnit) -> None:
        """Read a unit of a frozen layer. Several threads may."""

    @abstractmethod
    def hash_units(
        self,
        image: str,
        offsets_bytes: Sequence[int],
        unit: NativeUnit,
        *,
        shape_only: bool = False,
    ) -> Sequence[int]:
        """Hashes of some units of a frozen layer. Several threads may.

        Args:
          unit: memory to work with.
        """

    @abstractmethod
    def write_unit(self, image: str, offset_bytes: int, unit: NativeUnit, *, empty: bool) -> int:
        """Make a frozen layer equal to a unit; return the bytes that changed. Several threads may,
        with different units.

        Args:
          empty: the layer is known to have no data there.
        """

    @abstractmethod
    def sync_units(self, image: str) -> None:
        """Put what was written to a frozen layer on stable storage."""

    @abstractmethod
    def lend_layer(self, image: str) -> None:
        """Let the calls above have any layer, the head too, while nothing serves it."""

    @abstractmethod
    def return_layers(self) -> None:
        """That is over. What was written shows after :meth:`reopen_store`."""

    @abstractmethod
    def read_progress(self) -> RebuildProgress:
        """See ``ReplicaDirectory.read_progress``."""

    @abstractmethod
    def write_progress(self, progress: RebuildProgress) -> None:
        """See ``ReplicaDirectory.write_progress``."""

    @abstractmethod
    def forget_progress(self) -> None:
        """See ``ReplicaDirectory.forget_progress``."""

    @abstractmethod
    def prepare_promotion(self) -> None:
        """Open the complete chain beside the store that is written, but for its start.

        Raises:
          NativeError, ReplicaError: nothing is left of it.
        """

    @abstractmethod
    def start_promotion(self) -> None:
        """Sync what was written, and let what was prepared see it. I/O is frozen."""

    @abstractmethod
    def finish_promotion(self) -> None:
        """Have that store from now on; :meth:`release_replaced` follows. Never fails."""

    @abstractmethod
    def abandon_promotion(self) -> None:
        """Forget what was prepared; harmless when nothing is."""


def sentence(error: BaseException) -> str:
    """The part of an error to show beside a replica's address."""
    if isinstance(error, ReplicaError):
        return error.sentence
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
