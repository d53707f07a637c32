"""Directories written by the real Longhorn engine hold here what they held there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lhblock.engine import Volume
from tests.model.volumes import VolumeFiles

pytestmark = pytest.mark.model

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("LHBLOCK_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))


@pytest.fixture(params=["basic", "expanded", "unmapped"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[VolumeFiles, dict[str, Any]]:
    fixture = FIXTURES / f"longhorn-replica-{request.param}"
    subprocess.run(
        ["tar", "--zstd", "-C", str(tmp_path), "-xf", str(fixture / "replica.tar.zst")], check=True
    )
    manifest: dict[str, Any] = json.loads((fixture / "manifest.json").read_text())
    return VolumeFiles([tmp_path / request.param], manifest["volume_size"]), manifest


async def check(volume: Volume, manifest: dict[str, Any]) -> None:
    """Compare the head and every snapshot that is not removed with the manifest's hashes."""
    size_bytes = manifest["volume_size"]
    for image, expected in manifest["images"].items():
        if expected["removed"]:
            continue
        if image == manifest["head"]:
            content = await volume.read(0, size_bytes)
        else:
            name = image.removeprefix("volume-snap-").removesuffix(".img")
            async with volume.open_view(name) as view:
                content = await view.read(0, view.size_bytes)
        content += bytes(size_bytes - len(content))
        assert hashlib.sha256(content).hexdigest() == expected["full_image_sha256"], image


async def test_longhorns_volume_and_snapshots_read_as_its_manifest_says(
    foreign: tuple[VolumeFiles, dict[str, Any]],
) -> None:
    files, manifest = foreign
    async with files.open(read_only=True) as volume:
        assert volume.size_bytes == manifest["volume_size"]
        await check(volume, manifest)


async def test_longhorns_removed_snapshots_are_merged_without_changing_anything(
    foreign: tuple[VolumeFiles, dict[str, Any]],
) -> None:
    files, manifest = foreign
    async with files.open() as volume:
        await volume.wait_merged()
        assert not [info.name for info in volume.snapshots() if info.removed]
        await check(volume, manifest)
    async with files.open() as volume:
        await check(volume, manifest)


async def test_longhorns_volume_can_be_gone_back_to_each_snapshot(
    foreign: tuple[VolumeFiles, dict[str, Any]],
) -> None:
    files, manifest = foreign
    async with files.open() as volume:
        for image, expected in manifest["images"].items():
            name = image.removeprefix("volume-snap-").removesuffix(".img")
            if expected["removed"] or image == manifest["head"]:
                continue
            await volume.revert_snapshot(name)
            content = await volume.read(0, manifest["volume_size"])
            assert hashlib.sha256(content).hexdigest() == expected["full_image_sha256"], image
