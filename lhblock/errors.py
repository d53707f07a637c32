"""Everything that can go wrong, as one tree.

    LhblockError
    ├ UsageError                      a wrong argument; exit status 2
    ├ NoBackend                       a controller can use no replica; exit status 61
    ├ VolumeError(volume)             something about a volume; exit status 1
    │   ├ VolumeNotFound · VolumeExists · VolumeBusy · VolumeFaulted · NotServing · NoQuorum
    │   ├ SnapshotNotFound · SnapshotExists · SnapshotBusy · SnapshotLimit
    │   └ SizeError
    ├ ReplicaError(replica)           something about one replica directory
    │   ├ ReplicaNotFound · ReplicaForeign · ReplicaDamaged · ReplicaLocked
    │   ├ ReplicaUnsupported (ReplicaNoExtents)
    │   └ ReplicaStale · ReplicaIO · ReplicaUnreachable
    ├ FrontendError                   listening, handshakes
    ├ DeviceError                     attaching to this host: block devices, file systems on them
    │   └ DeviceUnavailable · DeviceBusy · DeviceForeign · NotAttached · NotBlank
    ├ ControlError(code)              the control service of a serving process answered an error
    └ NativeError(operation, errno)   the C core returned -errno; whoever knows the object wraps it

Each class is a sentence: what was wrong, with the value, and what to do. Context is added once, by
the layer that knows it: ``raise ReplicaIO(path, "cannot write its generation") from error``.
"""

from __future__ import annotations

import os


class LhblockError(Exception):
    """Root of the tree. ``str()`` is the sentence shown to the user."""

    exit_status = 1


class UsageError(LhblockError):
    """A wrong argument. Nothing was done."""

    exit_status = 2


class NoBackend(LhblockError):
    """A controller can use none of the replicas it was started with."""

    exit_status = 61  # what Longhorn's managers look for


class VolumeError(LhblockError):
    """Something about one volume."""

    def __init__(self, volume: str, sentence: str) -> None:
        super().__init__(f"volume {volume}: {sentence}")
        self.volume = volume
        self.sentence = sentence


class VolumeNotFound(VolumeError):
    """No volume of this name is recorded in the data directory."""


class NoQuorum(VolumeError):
    """Too few of its replicas are there to know that no other one is newer, or in use elsewhere."""


class VolumeExists(VolumeError):
    """The name is taken."""


class VolumeBusy(VolumeError):
    """Somebody uses the volume in a way that excludes the operation."""


class VolumeFaulted(VolumeError):
    """No usable replica is left."""


class NotServing(VolumeError):
    """The operation needs a serving process and none answers."""


class SnapshotNotFound(VolumeError):
    """No snapshot of this name."""


class SnapshotExists(VolumeError):
    """The snapshot name is taken."""


class SnapshotBusy(VolumeError):
    """The snapshot is exported or being merged."""


class SnapshotLimit(VolumeError):
    """The chain is as long, or holds as much, as the limits allow."""


class SizeError(VolumeError):
    """A volume size that cannot be."""


class ReplicaError(LhblockError):
    """Something about one replica directory."""

    def __init__(self, replica: str | os.PathLike[str], sentence: str) -> None:
        super().__init__(f"replica {os.fspath(replica)}: {sentence}")
        self.replica = os.fspath(replica)
        self.sentence = sentence


class ReplicaNotFound(ReplicaError):
    """The directory is missing or holds no replica."""


class ReplicaForeign(ReplicaError):
    """The directory holds something that is not a replica, or not of this volume."""


class ReplicaDamaged(ReplicaError):
    """The metadata contradicts itself or cannot be read."""


class ReplicaLocked(ReplicaError):
    """Another process has the directory open."""


class ReplicaUnsupported(ReplicaError):
    """The file system or the format lacks something that is needed."""


class ReplicaNoExtents(ReplicaUnsupported):
    """The file system cannot tell data from holes."""


class ReplicaStale(ReplicaError):
    """The replica missed writes that others have."""


class ReplicaIO(ReplicaError):
    """A system call on the directory failed."""


class ReplicaUnreachable(ReplicaError):
    """The process that serves it does not answer, or not in time. What it was asked may be done."""


class FrontendError(LhblockError):
    """A front end cannot listen or a handshake cannot go on."""


class DeviceError(LhblockError):
    """Something about a block device of this host, or a file system on it."""


class DeviceUnavailable(DeviceError):
    """The host has nothing that could make a block device of a volume."""


class DeviceBusy(DeviceError):
    """The device is mounted, or something else holds it."""


class DeviceForeign(DeviceError):
    """The device is not one of ours."""


class NotAttached(DeviceError):
    """No device of this host shows the volume."""


class NotBlank(DeviceError):
    """A file system was to be made where something is already."""


class ControlError(LhblockError):
    """A serving process answered a control call with an error."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class NativeError(LhblockError):
    """The C core returned -errno."""

    def __init__(self, operation: str, errno: int) -> None:
        super().__init__(f"{operation}: {os.strerror(errno)}")
        self.operation = operation
        self.errno = errno
