"""The directory of mount-fuse, without a mount in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lhblock.frontend.fuse._mount_root import MountRoot


def links(root: MountRoot) -> dict[str, str]:
    return {path.name: str(path.readlink()) for path in sorted(root.path.iterdir())}


def test_who_came_first_shows_a_volume_of_two(tmp_path: Path) -> None:
    # Two processes may serve one volume read-only.
    root = MountRoot(tmp_path)
    root.show("serve-2", ["db", "logs"])
    root.show("serve-1", ["db", "web"])
    assert links(root) == {"db": ".serve-2/db", "logs": ".serve-2/logs", "web": ".serve-1/web"}
    assert list(root.volumes) == ["db", "logs", "web"]
    root.hide("serve-2")
    assert links(root) == {"db": ".serve-1/db", "web": ".serve-1/web"}
    root.show("serve-1", [])
    assert links(root) == {}


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    root = MountRoot(tmp_path)
    (tmp_path / "db").mkdir()
    with pytest.raises(FileExistsError):
        root.show("serve-1", ["db"])
    root.hide("serve-1")
    assert (tmp_path / "db").is_dir()
    root.show("serve-1", ["web"])
    (tmp_path / "web").unlink()
    (tmp_path / "web").touch()
    root.hide("serve-1")
    assert (tmp_path / "web").is_file()


async def test_the_place_of_a_server_is_removed(tmp_path: Path) -> None:
    root = MountRoot(tmp_path)
    root.point("serve-1", tmp_path / "elsewhere")
    root.mountpoint("serve-2").mkdir()
    for key in ("serve-1", "serve-2", "serve-3"):
        await root.remove(key)
    assert links(root) == {}
