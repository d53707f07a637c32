"""A stopped volume, worked on in a thread of the command: it is closed whatever happens."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NoReturn

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from lhblock.errors import ControlError, LhblockError
from lhblock.instance import Registry, create_volume, first_sentence, open_channel
from lhblock.instance._volume_service import VolumeService
from lhblock.rpc import CONTROLLER, VOLUME, Call
from lhblock.rpc.generated import controller_pb2, volume_pb2
from lhblock.settings import DataDir


@pytest.fixture
def where(tmp_path: Path) -> DataDir:
    found = DataDir(tmp_path / "data")

    async def create() -> None:
        await create_volume(Registry(found), "db", size_bytes=1 << 20)

    trio.run(create)
    return found


def open_again(where: DataDir) -> None:
    """Fails unless the volume is closed."""
    with open_channel(where, "db") as channel:
        assert channel.call(CONTROLLER, "VolumeGet", Empty()).name == "db"


def test_a_stopped_volume_answers_the_same_calls(where: DataDir) -> None:
    with open_channel(where, "db") as channel:
        assert not channel.served
        channel.call(CONTROLLER, "VolumeSnapshot", controller_pb2.VolumeSnapshotRequest(name="s1"))
        listed = channel.call(VOLUME, "SnapshotList", Empty())
        assert [item.name for item in listed.snapshots] == ["s1", "volume-head"]
    open_again(where)


def test_an_error_names_the_volume_and_leaves_it_open(where: DataDir) -> None:
    with open_channel(where, "db") as channel:
        with pytest.raises(ControlError, match=r"^volume db: cannot find job x") as caught:
            channel.call(VOLUME, "JobGet", volume_pb2.JobGetRequest(id="x"))
        assert caught.value.code == "NOT_FOUND"
        assert channel.call(CONTROLLER, "VolumeGet", Empty()).size == 1 << 20


def test_an_exception_of_the_caller_closes_the_volume(where: DataDir) -> None:
    with pytest.raises(KeyboardInterrupt), open_channel(where, "db"):
        raise KeyboardInterrupt
    assert "volume" not in {thread.name for thread in threading.enumerate()}
    open_again(where)


def test_an_interrupt_while_it_opens_closes_the_volume(
    where: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_event: threading.Event, timeout: float | None = None) -> bool:
        monkeypatch.undo()
        raise KeyboardInterrupt

    # Thread.start() waits for an event too, so the interrupt comes after it.
    start = threading.Thread.start

    def start_then_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "volume":
            monkeypatch.setattr(threading.Event, "wait", interrupted)

    monkeypatch.setattr(threading.Thread, "start", start_then_interrupt)
    with pytest.raises(KeyboardInterrupt), open_channel(where, "db"):
        pytest.fail("it must not open")
    assert "volume" not in {thread.name for thread in threading.enumerate()}
    open_again(where)


def test_a_volume_that_cannot_be_opened_is_its_sentence(where: DataDir) -> None:
    (where.volume("db") / "replica" / "volume.meta").write_text("{")
    with pytest.raises(LhblockError, match=r"volume\.meta"), open_channel(where, "db"):
        pytest.fail("it must not open")


def test_a_defect_that_ends_the_volume_ends_the_call_that_waits(
    where: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defect() -> None:
        raise RuntimeError("a defect")

    async def status_get(service: VolumeService, _request: Empty, call: Call) -> NoReturn:
        service._choice.volume(call).nursery.start_soon(defect)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(VolumeService, "status_get", status_get)

    def use() -> None:
        with open_channel(where, "db") as channel:
            with pytest.raises(RuntimeError, match="a defect"):
                channel.call(VOLUME, "StatusGet", Empty())
            channel.call(VOLUME, "SnapshotList", Empty())

    with pytest.raises(RuntimeError, match="a defect"):
        use()
    open_again(where)


def test_our_sentence_is_found_in_nested_groups() -> None:
    ours = LhblockError("the sentence")
    nested = BaseExceptionGroup("a", [OSError("x"), BaseExceptionGroup("b", [ours])])
    assert first_sentence(nested) is ours
    other = OSError("x")
    assert first_sentence(BaseExceptionGroup("a", [other])) is other
    assert first_sentence(other) is other
