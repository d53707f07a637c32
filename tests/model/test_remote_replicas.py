"""The tests of replica sets again, with replicas that replica processes serve."""

from __future__ import annotations

import pytest

from tests.model import test_volume_replicas as again
from tests.model.test_volume_replicas import *  # noqa: F403
from tests.model.volumes import VolumeFiles

pytestmark = again.pytestmark


@pytest.fixture(autouse=True, params=[frozenset({0, 1, 2}), frozenset({1})], ids=str)
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the replicas are not directories of the engine's own."""
    monkeypatch.setattr(VolumeFiles, "REMOTE", request.param)


# These are about directories, or end the replica process with the engine.
del test_replica_that_fails_once_more_after_it_was_left_behind_holds_nothing_up  # noqa: F821
del test_replica_given_twice_is_refused  # noqa: F821
del test_volume_without_a_usable_replica_lists_every_reason  # noqa: F821
del test_cancelled_block_closes_cleanly  # noqa: F821
