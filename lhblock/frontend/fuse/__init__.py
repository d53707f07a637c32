"""The FUSE front end: every volume as a file, its snapshots as read-only files.

``_session`` is the only importer of pyfuse3. The tree it shows is described in ``_tree``; what a
volume is it learns through the protocols of ``_volumes``.
"""

from __future__ import annotations

from lhblock.frontend.fuse._mount_root import MountRoot, open_mount_root
from lhblock.frontend.fuse._mountpoint import mounted, prepare_mountpoint
from lhblock.frontend.fuse._session import serve_fuse, serve_mount
from lhblock.frontend.fuse._tree import volume_file
from lhblock.frontend.fuse._volumes import Relay, SnapshotFile, VolumeFiles, Volumes

__all__ = [
    "MountRoot",
    "Relay",
    "SnapshotFile",
    "VolumeFiles",
    "Volumes",
    "mounted",
    "open_mount_root",
    "prepare_mountpoint",
    "serve_fuse",
    "serve_mount",
    "volume_file",
]
