"""The tests of histories again, with replicas that replica processes serve."""

from __future__ import annotations

import pytest

from tests.model import test_volume_histories as again
from tests.model.test_volume_histories import *  # noqa: F403
from tests.model.volumes import VolumeFiles

pytestmark = again.pytestmark


@pytest.fixture(autouse=True)
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the replicas is a directory of the engine's own."""
    monkeypatch.setattr(VolumeFiles, "REMOTE", frozenset({0, 1, 2}))
