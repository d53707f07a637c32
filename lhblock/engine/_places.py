"""Where replicas are, and the members that stand for them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from lhblock._native import STORE_DIRECT, STORE_READ_ONLY, NativeEngine
from lhblock.engine._config import VolumeConfig
from lhblock.engine._local_member import LocalMember
from lhblock.engine._member import Member
from lhblock.engine._peer_client import EngineIdentity
from lhblock.engine._plain_member import PlainMember
from lhblock.engine._remote_member import RemoteMember
from lhblock.settings import RemoteAddress

Place: TypeAlias = Path | RemoteAddress


class Members:
    """Makes the members of one volume, which share what the engine is to them.

    Args:
      engine: the C engine.
      config: the volume.

    Attributes:
      store_flags: how stores of this host are opened.
      identity: who this engine is to replicas elsewhere, from this open on.
    """

    def __init__(self, engine: NativeEngine, config: VolumeConfig) -> None:
        self._engine = engine
        self._config = config
        self.store_flags = STORE_DIRECT if config.cache == "none" else 0
        if config.read_only:
            self.store_flags |= STORE_READ_ONLY
        self.identity = EngineIdentity()

    def make(self, place: Place) -> Member:
        """The member for a replica, which is not opened."""
        if isinstance(place, Path):
            return LocalMember(place, self._engine, self.store_flags)
        return RemoteMember(
            place, self._engine, self.identity, self._config.remote, volume=self._config.name
        )

    def make_plain(self, place: RemoteAddress) -> PlainMember:
        """The member for a replica process that was found to speak Longhorn's protocol only."""
        return PlainMember(
            place, self._engine, self.identity, self._config.remote, volume=self._config.name
        )


def address_of(place: Place) -> str:
    """What two spellings of one place have in common."""
    return str(place.absolute() if isinstance(place, Path) else place)
