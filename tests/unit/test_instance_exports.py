"""What the front end is offered, also when one of the volumes has failed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lhblock.engine import EngineOptions, open_engine
from lhblock.errors import FrontendError, VolumeFaulted
from lhblock.instance import Registry, create_volume
from lhblock.instance._exports import VolumeExports
from lhblock.instance._served import ServedVolume, open_served
from lhblock.settings import DataDir

SIZE_BYTES = 1 << 20


@asynccontextmanager
async def two_volumes(tmp_path: Path) -> AsyncIterator[dict[str, ServedVolume]]:
    """``db`` and ``web``, offered, with a snapshot ``s1`` each."""
    registry = Registry(DataDir(tmp_path / "data"))
    records = [await create_volume(registry, name, size_bytes=SIZE_BYTES) for name in ("db", "web")]
    async with (
        open_engine(EngineOptions(queues=1, workers=2, driver="pool")) as engine,
        open_served(engine, records[0]) as db,
        open_served(engine, records[1]) as web,
    ):
        for served in (db, web):
            served.frontend_up = True
            await served.volume.create_snapshot("s1")
        yield {"db": db, "web": web}


async def test_volumes_and_their_snapshots_are_listed_and_opened(tmp_path: Path) -> None:
    async with two_volumes(tmp_path) as volumes:
        exports = VolumeExports(volumes)
        assert [item.name for item in exports.list()] == ["db", "db@s1", "web", "web@s1"]
        async with exports.open("db") as export, exports.open("web@s1") as view:
            assert not export.read_only
            assert view.read_only
            assert export.size_bytes == view.size_bytes == SIZE_BYTES


async def test_a_volume_that_failed_is_listed_as_such_and_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    async with two_volumes(tmp_path) as volumes:
        exports = VolumeExports(volumes)
        volumes["db"].volume._replicas.fault("its disk is gone")
        listed = {item.name: item.description for item in exports.list()}
        assert list(listed) == ["db", "web", "web@s1"]
        assert listed["db"] == "1 MiB, faulted"
        for name in ("db", "db@s1"):
            with pytest.raises(VolumeFaulted, match="its disk is gone"):
                async with exports.open(name):
                    pytest.fail("it must not open")
        async with exports.open("web"):
            pass


async def test_a_front_end_that_is_down_offers_nothing(tmp_path: Path) -> None:
    async with two_volumes(tmp_path) as volumes:
        exports = VolumeExports(volumes)
        volumes["db"].frontend_up = False
        assert [item.name for item in exports.list()] == ["web", "web@s1"]
        with pytest.raises(FrontendError, match="its front end is shut down"):
            async with exports.open("db@s1"):
                pytest.fail("it must not open")
