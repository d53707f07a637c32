"""Volumes as block devices of this host: attach, detach, file systems on them.

Everything here is blocking and imports neither trio nor the engine: a keeper process stays for as
long as its device does, and should be small.
"""

from __future__ import annotations

from lhblock.device._attach import (
    attach,
    attached_devices,
    choose,
    detach,
    kind_names,
)
from lhblock.device._filesystem import FILE_SYSTEMS, check_wishes, make, mount
from lhblock.device._host import Host
from lhblock.device._iscsi import ISCSI_DEVICE, rescan
from lhblock.device._keeper import keep
from lhblock.device._kind import Attached
from lhblock.device._nbd import Nbd
from lhblock.device._target import AttachOptions, Target, uri_identity, volume_identity

__all__ = [
    "FILE_SYSTEMS",
    "ISCSI_DEVICE",
    "AttachOptions",
    "Attached",
    "Host",
    "Nbd",
    "Target",
    "attach",
    "attached_devices",
    "check_wishes",
    "choose",
    "detach",
    "keep",
    "kind_names",
    "make",
    "mount",
    "rescan",
    "uri_identity",
    "volume_identity",
]
