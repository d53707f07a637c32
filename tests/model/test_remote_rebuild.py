"""The tests of rebuilds again, with replicas that replica processes serve."""

from __future__ import annotations

import pytest

from tests.model import test_volume_rebuild as again
from tests.model.test_volume_rebuild import *  # noqa: F403
from tests.model.volumes import VolumeFiles

pytestmark = again.pytestmark


@pytest.fixture(
    autouse=True, params=[frozenset({0, 1, 2}), frozenset({0}), frozenset({1})], ids=str
)
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the replicas are not directories of the engine's own."""
    monkeypatch.setattr(VolumeFiles, "REMOTE", request.param)
