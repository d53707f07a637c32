"""Leftovers that Longhorn, or a crash, left in a replica directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lhblock.errors import ReplicaDamaged, ReplicaIO
from lhblock.replica import ReplicaDirectory
from lhblock.replica import _cleanup as cleanup

SIZE = 64 * 4096
T = "2026-11-23T08:46:13Z"
HEAD = "volume-head-002.img"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """a <- b <- head 002, with data in each."""
    made = tmp_path / "replica"
    ReplicaDirectory.create(made, size_bytes=SIZE)
    with ReplicaDirectory.open(made) as directory:
        for name in "ab":
            write(made / directory.head.name, name)
            pending = directory.prepare_snapshot(name, user_created=True, created=T)
            pending.commit()
            pending.settle()
        write(made / directory.head.name, "head")
    return made


def write(file: Path, tag: str) -> None:
    with file.open("r+b") as opened:
        opened.write(tag.encode().ljust(4096))


def add_disk(path: Path, image: str, *, data: str = "", parent: str = "", **record: object) -> None:
    (path / image).touch()
    os.truncate(path / image, SIZE)
    if data:
        write(path / image, data)
    (path / f"{image}.meta").write_text(json.dumps({"Parent": parent} | record))


def sides(path: Path, image: str) -> None:
    """The side files a disk may have."""
    (path / f"{image}.checksum").write_text("{}")
    (path / ReplicaDirectory.discard_name(image)).write_bytes(b"\1")


def names(path: Path) -> set[str]:
    ours = {"lhblock.lock", "lhblock.spare"}
    return {each.name for each in path.iterdir()} - ours


def reopened(path: Path) -> tuple[str, ...]:
    """Open for reading (nothing changes), then for writing; returns what was cleaned."""
    before = names(path)
    with ReplicaDirectory.open(path, read_only=True) as directory:
        seen = set(directory.disks)
        assert directory.cleaned == ()
    assert names(path) == before
    with ReplicaDirectory.open(path) as directory:
        cleaned = directory.cleaned
        assert seen >= set(directory.disks)
    with ReplicaDirectory.open(path) as directory:
        assert directory.cleaned == ()
    return cleaned


def test_a_head_that_never_came_into_use_goes(path: Path) -> None:
    before = names(path)
    add_disk(path, "volume-head-003.img", parent="volume-snap-never.img")
    sides(path, "volume-head-003.img")
    (cleaned,) = reopened(path)
    assert "never came into use" in cleaned
    assert names(path) == before


def test_a_snapshot_that_shares_the_heads_file_goes(path: Path) -> None:
    before = names(path)
    (path / "volume-snap-s.img").hardlink_to(path / HEAD)
    (path / "volume-snap-s.img.meta").hardlink_to(path / f"{HEAD}.meta")
    sides(path, "volume-snap-s.img")
    (cleaned,) = reopened(path)
    assert "not completed" in cleaned
    assert names(path) == before
    assert (path / HEAD).read_bytes().startswith(b"head")


def test_a_link_to_the_head_without_a_record_goes(path: Path) -> None:
    before = names(path)
    (path / "volume-snap-s.img").hardlink_to(path / HEAD)
    assert len(reopened(path)) == 1
    assert names(path) == before


def test_the_stale_head_of_a_completed_snapshot_goes_and_its_data_stays(path: Path) -> None:
    before = names(path)
    (path / "volume-head-001.img").hardlink_to(path / "volume-snap-b.img")
    (path / "volume-head-001.img.meta").write_text('{"Parent":"volume-snap-a.img"}')
    (cleaned,) = reopened(path)
    assert "second name" in cleaned
    assert names(path) == before
    assert (path / "volume-snap-b.img").read_bytes().startswith(b"b")
    assert (path / "volume-snap-b.img").stat().st_nlink == 1


def test_the_head_before_a_revert_goes(path: Path) -> None:
    before = names(path)
    add_disk(path, "volume-head-001.img", data="given up", parent="volume-snap-a.img")
    (cleaned,) = reopened(path)
    assert "before a revert" in cleaned
    assert names(path) == before


def test_a_head_with_data_that_nothing_explains_is_set_aside(path: Path) -> None:
    before = names(path)
    for image in ("volume-head-003.img", "volume-head-007.img"):
        add_disk(path, image, data=image, parent="volume-snap-a.img")
        sides(path, image)
    cleaned = reopened(path)
    assert any("set aside volume-head-003.img" in each for each in cleaned)
    for number in ("003", "007"):
        aside = path / f"lhblock.aside.head-{number}.0"
        assert aside.read_bytes().startswith(f"volume-head-{number}.img".encode())
        assert (path / f"{aside.name}.record").exists()
    assert {each for each in names(path) if not each.startswith("lhblock.aside.")} == before


def test_setting_aside_finds_another_name(path: Path) -> None:
    for _ in range(2):
        add_disk(path, "volume-head-007.img", data="x", parent="volume-snap-a.img")
        reopened(path)
    assert {each for each in names(path) if "aside" in each} == {
        f"lhblock.aside.head-007.{number}{ending}"
        for number in (0, 1)
        for ending in ("", ".record")
    }


def test_transient_files_go(path: Path) -> None:
    before = names(path)
    transient = {
        "volume.meta.tmp",
        "volume-snap-a.img.meta.tmp",
        "volume-snap-a.img.checksum..tmp",
        "volume-snap-a.img.checksum.tmp",
        "lhblock.generation.tmp",
        "volume-delta-backup-1.img",
        "volume-snap-a.img.snap_tmp",
        "volume-snap-a.img.snap_tmp.meta",
    }
    for name in transient:
        (path / name).write_text("half")
    cleaned = reopened(path)
    assert len(cleaned) == len(transient)
    assert names(path) == before


def test_files_that_are_not_ours_stay(path: Path) -> None:
    strangers = {
        "notes.tmp",
        "x.meta",
        "volume-snap-c.img",
        "lhblock.future",
        "volume-snap-z.img.tmp",
    }
    for name in strangers:
        (path / name).write_text("keep me")
    assert reopened(path) == ()
    assert strangers <= names(path)
    assert all((path / name).read_text() == "keep me" for name in strangers)


def test_side_files_without_an_image_go(path: Path) -> None:
    before = names(path)
    for image in ("volume-snap-gone.img", "volume-head-005.img"):
        sides(path, image)
    sides(path, "volume-snap-a.img")
    assert len(reopened(path)) == 4
    assert names(path) == before | {"volume-snap-a.img.checksum", "lhblock.discard.snap-a"}


def test_a_removed_leaf_without_an_image_goes_and_a_kept_one_is_damage(path: Path) -> None:
    before = names(path)
    record = path / "volume-snap-x.img.meta"
    record.write_text('{"Parent":"volume-snap-a.img","Removed":true}')
    (cleaned,) = reopened(path)
    assert "a removed snapshot whose image is gone" in cleaned
    assert names(path) == before
    record.write_text('{"Parent":"volume-snap-a.img","Removed":false}')
    with pytest.raises(ReplicaDamaged, match=r"volume-snap-x\.img is missing"):
        ReplicaDirectory.open(path)


def merge_a_into_b(path: Path) -> None:
    """Longhorn's replace, after the link and before the record."""
    meta = path / "volume-snap-a.img.meta"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"Removed": True}))
    (path / "volume-snap-b.img").unlink()
    (path / "volume-snap-b.img").hardlink_to(path / "volume-snap-a.img")


def test_a_merge_is_finished_when_the_child_has_the_merged_file(path: Path) -> None:
    merge_a_into_b(path)
    (path / "lhblock.discard.snap-a").write_bytes(b"merged")
    (path / "lhblock.discard.snap-b").write_bytes(b"old")
    assert reopened(path) == ("finished merging volume-snap-a.img into volume-snap-b.img",)
    assert (path / "lhblock.discard.snap-b").read_bytes() == b"merged"
    assert not (path / "lhblock.discard.snap-a").exists()
    with ReplicaDirectory.open(path) as directory:
        assert [disk.snapshot for disk in directory.chain] == ["b", "volume-head"]
        assert directory.disks["volume-snap-b.img"].user_created
    assert (path / "volume-snap-b.img").stat().st_nlink == 1


def test_a_merge_whose_discards_were_renamed_keeps_them(path: Path) -> None:
    merge_a_into_b(path)
    (path / "lhblock.discard.snap-b").write_bytes(b"merged")
    reopened(path)
    assert (path / "lhblock.discard.snap-b").read_bytes() == b"merged"


def test_a_merge_that_longhorn_relinked_is_finished(path: Path) -> None:
    merge_a_into_b(path)
    (path / "volume-snap-b.img.meta").write_text('{"Parent":""}')
    (cleaned,) = reopened(path)
    assert "merged into volume-snap-b.img" in cleaned
    assert "volume-snap-a.img" not in names(path)
    assert (path / "volume-snap-b.img").read_bytes().startswith(b"a")


def test_an_open_stops_where_a_merge_would_drop_a_snapshot_that_is_kept(path: Path) -> None:
    (path / "volume-snap-b.img").unlink()
    (path / "volume-snap-b.img").hardlink_to(path / "volume-snap-a.img")
    with pytest.raises(ReplicaDamaged, match="one file but separate layers"):
        ReplicaDirectory.open(path)


def test_a_second_name_of_a_layer_without_a_record_goes(path: Path) -> None:
    before = names(path)
    (path / "volume-snap-copy.img").hardlink_to(path / "volume-snap-a.img")
    (path / "volume-snap-b.img.tmp").hardlink_to(path / "volume-snap-a.img")
    assert len(reopened(path)) == 2
    assert names(path) == before


def test_images_linked_from_outside_are_no_leftovers(path: Path, tmp_path: Path) -> None:
    (tmp_path / "backup.img").hardlink_to(path / "volume-snap-a.img")
    assert reopened(path) == ()


def test_setting_aside_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "ASIDE_MAX", 0)
    add_disk(path, "volume-head-007.img", data="x", parent="volume-snap-a.img")
    with pytest.raises(ReplicaIO, match="set aside already"):
        ReplicaDirectory.open(path)
    assert (path / "volume-head-007.img").exists()
