"""Directories written by the real Longhorn engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lhblock.errors import ReplicaUnsupported
from lhblock.replica import ReplicaDirectory, hash_image, read_checksum, valid_checksum

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("LHBLOCK_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
CREATED = "2026-11-23T08:46:13Z"

# Oldest first: what the operations listed in each manifest leave in the live chain.
CHAINS = {
    "basic": ("snap-a", "snap-c", "snap-e", "volume-head"),
    "expanded": ("s1", "expand-16777216", "s2", "volume-head"),
    "unmapped": ("s1", "s2", "volume-head"),
}


def extract(name: str, into: Path) -> tuple[Path, dict[str, Any]]:
    fixture = FIXTURES / f"longhorn-replica-{name}"
    subprocess.run(
        ["tar", "--zstd", "-C", str(into), "-xf", str(fixture / "replica.tar.zst")], check=True
    )
    manifest: dict[str, Any] = json.loads((fixture / "manifest.json").read_text())
    return into / name, manifest


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


@pytest.mark.parametrize("name", CHAINS)
def test_a_longhorn_directory_has_the_disks_of_its_manifest(name: str, tmp_path: Path) -> None:
    path, manifest = extract(name, tmp_path)
    with ReplicaDirectory.open(path) as directory:
        assert directory.size_bytes == manifest["volume_size"]
        assert directory.head.name == manifest["head"]
        assert tuple(disk.snapshot for disk in directory.chain) == CHAINS[name]
        assert set(directory.disks) == set(manifest["images"])
        for image, expected in manifest["images"].items():
            disk = directory.disks[image]
            assert disk.parent == expected["parent"]
            assert disk.removed == expected["removed"]
            assert disk.user_created == expected["user_created"]
            assert dict(disk.labels) == (expected["labels"] or {})
        assert not directory.was_dirty
        counted = "revision.counter" in manifest["files"]
        assert len(directory.cleaned) == int(counted)


@pytest.mark.parametrize("name", CHAINS)
def test_opening_and_closing_leaves_longhorns_files_as_they_were(name: str, tmp_path: Path) -> None:
    path, _ = extract(name, tmp_path)
    before = files(path)
    before.pop("revision.counter", None)
    ReplicaDirectory.open(path).close()
    after = files(path)
    assert {key: after.pop(key) for key in before} == before
    assert all(key.startswith("lhblock.") for key in after)


@pytest.mark.parametrize("name", CHAINS)
def test_read_only_changes_nothing_but_the_lock_file(name: str, tmp_path: Path) -> None:
    path, _ = extract(name, tmp_path)
    before = files(path)
    with ReplicaDirectory.open(path, read_only=True) as directory:
        assert tuple(disk.snapshot for disk in directory.chain) == CHAINS[name]
    after = files(path)
    assert after.pop("lhblock.lock") == b""
    assert after == before


@pytest.mark.parametrize("name", CHAINS)
def test_snapshots_and_reverts_work_on_a_longhorn_directory(name: str, tmp_path: Path) -> None:
    path, manifest = extract(name, tmp_path)
    with ReplicaDirectory.open(path) as directory:
        pending = directory.prepare_snapshot("ours", user_created=True, created=CREATED)
        pending.commit()
        pending.settle()
        assert directory.chain[-2].snapshot == "ours"
        frozen = directory.disks["volume-snap-ours.img"]
        assert frozen.parent == manifest["images"][manifest["head"]]["parent"]
        pending = directory.prepare_revert("ours", created=CREATED)
        pending.commit()
        pending.settle()
    with ReplicaDirectory.open(path) as directory:
        assert directory.cleaned == ()
        assert directory.head.parent == "volume-snap-ours.img"


def test_a_backing_file_is_refused_and_the_directory_left_alone(tmp_path: Path) -> None:
    path, manifest = extract("backing", tmp_path)
    backing_file = manifest["files"]["volume.meta"]["json"]["BackingFilePath"]
    before = files(path)
    with pytest.raises(ReplicaUnsupported, match="backing file") as caught:
        ReplicaDirectory.open(path)
    assert backing_file in str(caught.value)
    after = files(path)
    after.pop("lhblock.lock")
    assert after == before


def test_a_longhorn_checksum_record_is_read_and_known_to_be_out_of_date(tmp_path: Path) -> None:
    path, _ = extract("basic", tmp_path)
    image = "volume-snap-snap-a.img"
    with ReplicaDirectory.open(path) as directory:
        record = read_checksum(directory.dir_fd, image)
        assert record is not None
        assert record.checksum == "b79d50dd5b1b4680"
        assert record.change_time == "2026-11-23 09:17:33.706165899 +0000 UTC"
        # Extracting the archive changed the ctime.
        assert valid_checksum(directory.dir_fd, image) is None
        hashed = hash_image(directory.dir_fd, image, lambda fd, size: 0xAB, now=CREATED)
        assert hashed is not None
        assert valid_checksum(directory.dir_fd, image) == hashed
        assert hashed.checksum == "00000000000000ab"
