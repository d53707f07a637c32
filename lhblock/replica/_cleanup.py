"""Leftovers of interrupted operations: which they are, and how they go away.

``plan_cleanup`` only looks; ``run_cleanup`` acts. docs/internals/replica-directory.md has the table
of crash states and says for each rule why it cannot remove the only copy of data. Two of them hold
everywhere: an image goes away only when its data is reachable under another name, or it has none,
or it is the head that a revert gave up; and any other image in the way is renamed, never removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lhblock.errors import ReplicaDamaged
from lhblock.replica import _names as names
from lhblock.replica._atomic import stat_file, sync_directory, unlink_if_there, write_durable
from lhblock.replica._metadata import Disk, VolumeMeta, encode_disk
from lhblock.replica._survey import Survey

ASIDE_MAX = 1000
"""Images set aside under one name; beyond that somebody has to look."""

_TRANSIENT = re.compile(
    r"volume\.meta\.tmp|lhblock\.generation\.tmp|lhblock\.rebuild\.tmp|lhblock\.activity\.tmp"
    r"|volume-(?:head|snap)-.+\.img\.meta\.tmp"
    r"|volume-(?:head|snap)-.+\.img\.checksum\.\.?tmp"
    r"|volume-delta-.+\.img(?:\.meta(?:\.tmp)?)?"
    r"|volume-snap-.+\.img\.snap_tmp(?:\.meta(?:\.tmp)?)?",
    re.DOTALL,
)
_LINK = re.compile(r"volume-snap-.+\.img\.tmp", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One thing to do. The steps of a plan run in order, and each may be repeated after a crash."""

    action: Literal["unlink", "aside", "adopt"]
    name: str
    sentence: str
    upper: str = ""


@dataclass(frozen=True)
class Plan:
    """What clean-up would do, and which disks do not count meanwhile."""

    steps: tuple[Step, ...]
    hidden: frozenset[str]


def _same_file(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    return one is not None and other is not None and os.path.samestat(one, other)


class _Planner:
    def __init__(self, path: Path, dir_fd: int, survey: Survey, volume: VolumeMeta) -> None:
        self.path = path
        self.dir_fd = dir_fd
        self.survey = survey
        self.volume = volume
        self.steps: list[Step] = []
        self.hidden: set[str] = set()
        self.extra_heads = sorted(
            image
            for image in (*survey.images, *survey.records)
            if names.is_head(image) and image != volume.head
        )

    def staying(self) -> Mapping[str, Disk]:
        return {
            image: record
            for image, record in self.survey.records.items()
            if isinstance(record, Disk) and image not in self.hidden
        }

    def children(self, parent: str) -> list[str]:
        return [disk.name for disk in self.staying().values() if disk.parent == parent]

    def unlink(self, name: str, sentence: str) -> None:
        if name in self.survey.names:
            self.steps.append(Step("unlink", name, sentence))

    def drop_disk(self, image: str, sentence: str, *, record_first: bool) -> None:
        """Remove a disk whose image may go.

        Which of image and record goes first decides what a crash in between leaves: a record
        without an image is a leftover only when the disk is removed, an image without a record only
        when its data is shared.
        """
        self.hidden.add(image)
        first, last = names.record_name(image), image
        if not record_first:
            first, last = last, first
        self.unlink(first, sentence)
        self.unlink(names.checksum_name(image), sentence)
        self.unlink(names.discard_name(image), sentence)
        self.unlink(last, sentence)

    def plan_extra_heads(self) -> None:
        self.hidden.update(self.extra_heads)
        snapshots = [
            state for image, state in self.survey.images.items() if not names.is_head(image)
        ]
        live = self.survey.images.get(self.volume.head)
        for image in dict.fromkeys(self.extra_heads):
            state = self.survey.images.get(image)
            if state is None:
                sentence = f"record of {image}, which is gone"
            elif any(_same_file(state, other) for other in (live, *snapshots)):
                sentence = f"{image}, a second name of a frozen layer"
            elif state.st_blocks == 0:
                sentence = f"{image}, a head without data that never came into use"
            elif names.next_head(image) == self.volume.head:
                sentence = f"{image}, the head before a revert"
            else:
                self.steps.append(
                    Step("aside", image, f"set aside {image}, a head that is not the live one")
                )
                self.unlink(names.checksum_name(image), f"removed the checksum of {image}")
                self.unlink(names.discard_name(image), f"removed the discards of {image}")
                continue
            self.drop_disk(image, f"removed {sentence}", record_first=False)

    def plan_uncommitted_links(self) -> None:
        live = self.survey.images.get(self.volume.head)
        for image, state in self.survey.images.items():
            if names.is_head(image) or not _same_file(state, live):
                continue
            if children := self.children(image):
                raise ReplicaDamaged(
                    self.path,
                    f"snapshot image {image} is the same file as the live {self.volume.head}, and "
                    f"{children[0]} needs it",
                )
            self.drop_disk(
                image, f"removed {image}, a snapshot that was not completed", record_first=True
            )

    def plan_removed_leaves(self) -> None:
        for disk in list(self.staying().values()):
            if disk.name in self.survey.images or disk.is_head or not disk.removed:
                continue
            if not self.children(disk.name):
                self.drop_disk(
                    disk.name,
                    f"removed the record of {disk.name}, a removed snapshot whose image is gone",
                    record_first=False,
                )

    def plan_shared_images(self) -> None:
        """Finish merges that ended between giving the merged image its new name and the rest."""
        groups: dict[tuple[int, int], list[str]] = {}
        for image, state in self.survey.images.items():
            if image not in self.hidden and image != self.volume.head and state.st_nlink > 1:
                groups.setdefault((state.st_dev, state.st_ino), []).append(image)
        for group in groups.values():
            disks = self.staying()
            recorded = [disks[image] for image in group if image in disks]
            for image in group:
                if image not in self.survey.records and recorded:
                    self.drop_disk(
                        image, f"removed {image}, a second name of a layer", record_first=True
                    )
            if len(recorded) > 1:
                self._plan_merged_pair(recorded)

    def _plan_merged_pair(self, pair: list[Disk]) -> None:
        if len(pair) == 2:
            for lower, upper in (pair, pair[::-1]):
                if not lower.removed:
                    continue
                children = self.children(lower.name)
                if upper.parent == lower.name and children == [upper.name]:
                    sentence = f"finished merging {lower.name} into {upper.name}"
                    self.steps.append(Step("adopt", lower.name, sentence, upper=upper.name))
                    return
                if upper.parent == lower.parent and not children:
                    self.drop_disk(
                        lower.name,
                        f"removed {lower.name}, merged into {upper.name}",
                        record_first=False,
                    )
                    return
        listed = ", ".join(disk.name for disk in pair)
        raise ReplicaDamaged(self.path, f"the images {listed} are one file but separate layers")

    def plan_files(self) -> None:
        kept = {*self.survey.images, *self.survey.records} - self.hidden
        images = list(self.survey.images.values())
        for name in sorted(self.survey.names):
            if _TRANSIENT.fullmatch(name):
                self.unlink(name, f"removed {name}, a file that was never completed")
            elif _LINK.fullmatch(name):
                state = stat_file(self.dir_fd, name)
                if any(_same_file(state, other) for other in images):
                    self.unlink(name, f"removed {name}, a second name of a layer")
            else:
                self._plan_side_file(name, kept)

    def _plan_side_file(self, name: str, kept: set[str]) -> None:
        owner = names.image_of_discard(name)
        if owner is None and name.endswith(".checksum") and names.is_image(name[:-9]):
            owner = name[:-9]
        # Those of hidden disks are in the plan already.
        if owner is not None and owner not in kept and owner not in self.hidden:
            self.unlink(name, f"removed {name}, whose image is gone")


def plan_cleanup(path: Path, dir_fd: int, survey: Survey, volume: VolumeMeta) -> Plan:
    """Decide what in a directory is left over. Nothing is changed.

    Raises:
      ReplicaDamaged: images share one file in a way that no interrupted operation leaves.
    """
    planner = _Planner(path, dir_fd, survey, volume)
    planner.plan_extra_heads()
    planner.plan_uncommitted_links()
    planner.plan_removed_leaves()
    planner.plan_shared_images()
    planner.plan_files()
    return Plan(tuple(planner.steps), frozenset(planner.hidden))


def run_cleanup(dir_fd: int, plan: Plan, survey: Survey) -> tuple[str, ...]:
    """Carry out a plan, durable when it returns. Returns one sentence per leftover.

    Raises:
      OSError: as far as it came, nothing is lost; the next open goes on.
    """
    for step in plan.steps:
        if step.action == "unlink":
            unlink_if_there(dir_fd, step.name)
        elif step.action == "aside":
            set_aside(dir_fd, step.name)
        else:
            lower, upper = survey.records[step.name], survey.records[step.upper]
            assert isinstance(lower, Disk)
            assert isinstance(upper, Disk)
            finish_adoption(dir_fd, lower, upper)
    if plan.steps:
        sync_directory(dir_fd)
    return tuple(dict.fromkeys(step.sentence for step in plan.steps))


def set_aside(dir_fd: int, image: str) -> None:
    """Give an image, and its record, a name under which neither we nor Longhorn use it.

    Raises:
      OSError: it cannot be renamed, or ``ASIDE_MAX`` are there already.
    """
    stem = "lhblock.aside." + image.removeprefix("volume-").removesuffix(".img")
    for number in range(ASIDE_MAX):
        target = f"{stem}.{number}"
        if stat_file(dir_fd, target) is None and stat_file(dir_fd, f"{target}.record") is None:
            break
    else:
        raise FileExistsError(17, f"{ASIDE_MAX} images were set aside already", image)
    # The record first: a head without a record is still set aside, a lone record would be removed.
    record = names.record_name(image)
    if stat_file(dir_fd, record) is not None:
        os.rename(record, f"{target}.record", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    os.rename(image, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    sync_directory(dir_fd)


def clear_way(dir_fd: int, image: str, others: Mapping[str, Disk]) -> None:
    """Free the name of an image, and those of its side files, for a new disk.

    Called for names that no disk has. An image that is in the way goes when it has no data or
    shares it with one of ``others``; else it is set aside.
    """
    state = stat_file(dir_fd, image)
    if state is not None:
        shared = any(_same_file(state, stat_file(dir_fd, other)) for other in others)
        if shared or state.st_blocks == 0:
            unlink_if_there(dir_fd, image)
        else:
            set_aside(dir_fd, image)
    for name in (names.record_name(image), names.checksum_name(image), names.discard_name(image)):
        unlink_if_there(dir_fd, name)


def finish_adoption(dir_fd: int, lower: Disk, upper: Disk) -> None:
    """The part of ``adopt_merged`` after ``upper``'s name leads to ``lower``'s file.

    The merged discard bits are in ``lower``'s discard file. When that is gone it has been renamed
    already, or never was: then ``upper``'s own is right, or says of blocks without data in the
    merged file what is true there, so it stays.
    """
    lower_discard, upper_discard = names.discard_name(lower.name), names.discard_name(upper.name)
    if stat_file(dir_fd, lower_discard) is not None:
        os.rename(lower_discard, upper_discard, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        sync_directory(dir_fd)
    relinked = replace(upper, parent=lower.parent)
    write_durable(dir_fd, names.record_name(upper.name), encode_disk(relinked))
    unlink_if_there(dir_fd, names.checksum_name(upper.name))
    remove_disk_files(dir_fd, lower.name)


def remove_disk_files(dir_fd: int, image: str) -> None:
    """Remove a disk that is marked removed and has no children; durable when it returns.

    The record goes last: a removed leaf's record without an image is a leftover, whereas an image
    without a record might be somebody's only copy.
    """
    unlink_if_there(dir_fd, image)
    unlink_if_there(dir_fd, names.checksum_name(image))
    unlink_if_there(dir_fd, names.discard_name(image))
    unlink_if_there(dir_fd, names.record_name(image))
    sync_directory(dir_fd)
