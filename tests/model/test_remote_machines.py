"""The machines again, with replicas that replica processes serve."""

from __future__ import annotations

import pytest

from tests.model.test_rebuild_machine import (
    test_replicas_come_and_go_and_are_all_alike as test_rebuild_machine,
)
from tests.model.volumes import VolumeFiles

__all__ = ["test_rebuild_machine"]

pytestmark = pytest.mark.model


@pytest.fixture(
    autouse=True, params=[((0, 1), True), ((0, 1), False), ((), True)], ids=["all", "old", "new"]
)
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the replicas that there are, and whether those that come, are in processes."""
    indexes, added = request.param
    monkeypatch.setattr(VolumeFiles, "REMOTE", frozenset(indexes))
    monkeypatch.setattr(VolumeFiles, "ADDED_REMOTE", added)
