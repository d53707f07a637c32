"""The serving process, the volumes of a data directory, and the way commands reach them.

Names are imported when first used: what lists volumes must not load an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lhblock.instance._channel import (
        VolumeChannel,
        first_sentence,
        open_channel,
        served_channel,
    )
    from lhblock.instance._controller_process import (
        ControllerOptions,
        ControllerReady,
        run_controller,
    )
    from lhblock.instance._creation import create_volume, uncreate_volume
    from lhblock.instance._features import machine_features
    from lhblock.instance._logging import configure_logging
    from lhblock.instance._mount_fuse import MountFuseReady, run_mount_fuse
    from lhblock.instance._notify import Notifier
    from lhblock.instance._registry import Registry, ReplicaRecord, VolumeRecord
    from lhblock.instance._removal import removable, remove_replica
    from lhblock.instance._replica_process import ReplicaOptions, ReplicaReady, run_replica
    from lhblock.instance._serve import Ready, ReadyVolume, run_serve
    from lhblock.instance._serving import (
        Holder,
        answering_address,
        remove_dead_sockets,
        serving,
    )
    from lhblock.instance._settings import ServeSettings, serve_settings

_HOMES = {
    "ControllerOptions": "_controller_process",
    "ControllerReady": "_controller_process",
    "Holder": "_serving",
    "MountFuseReady": "_mount_fuse",
    "Notifier": "_notify",
    "Ready": "_serve",
    "ReadyVolume": "_serve",
    "Registry": "_registry",
    "ReplicaOptions": "_replica_process",
    "ReplicaReady": "_replica_process",
    "ReplicaRecord": "_registry",
    "ServeSettings": "_settings",
    "VolumeChannel": "_channel",
    "VolumeRecord": "_registry",
    "answering_address": "_serving",
    "configure_logging": "_logging",
    "create_volume": "_creation",
    "first_sentence": "_channel",
    "machine_features": "_features",
    "open_channel": "_channel",
    "removable": "_removal",
    "remove_dead_sockets": "_serving",
    "remove_replica": "_removal",
    "run_controller": "_controller_process",
    "run_mount_fuse": "_mount_fuse",
    "run_replica": "_replica_process",
    "run_serve": "_serve",
    "serve_settings": "_settings",
    "served_channel": "_channel",
    "serving": "_serving",
    "uncreate_volume": "_creation",
}

__all__ = [
    "ControllerOptions",
    "ControllerReady",
    "Holder",
    "MountFuseReady",
    "Notifier",
    "Ready",
    "ReadyVolume",
    "Registry",
    "ReplicaOptions",
    "ReplicaReady",
    "ReplicaRecord",
    "ServeSettings",
    "VolumeChannel",
    "VolumeRecord",
    "answering_address",
    "configure_logging",
    "create_volume",
    "first_sentence",
    "machine_features",
    "open_channel",
    "removable",
    "remove_dead_sockets",
    "remove_replica",
    "run_controller",
    "run_mount_fuse",
    "run_replica",
    "run_serve",
    "serve_settings",
    "served_channel",
    "serving",
    "uncreate_volume",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
