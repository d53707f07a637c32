"""The FUSE front end: every volume as a file, its snapshots as read-only files.

``_session`` is the only importer of pyfuse3. The tree it shows is described in ``_tree``; what a
volume is it learns through the protocols of ``_volumes``.
"""

from __future__ import annotations

from lhblock.frontend.fuse._mountpoint import release_mountpoint
from lhblock.frontend.fuse._session import serve_fuse
from lhblock.frontend.fuse._tree import volume_file
from lhblock.frontend.fuse._volumes import Relay, SnapshotFile, VolumeFiles, Volumes

__all__ = [
    "Relay",
    "SnapshotFile",
    "VolumeFiles",
    "Volumes",
    "release_mountpoint",
    "serve_fuse",
    "volume_file",
]
