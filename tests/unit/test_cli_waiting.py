"""Waiting for jobs of a serving process, and giving up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import Message

from lhblock.cli._waiting import wait_job, wait_merged
from lhblock.errors import LhblockError
from lhblock.rpc.generated import volume_pb2


@dataclass
class Channel:
    """Answers with a job that runs until the user has had enough."""

    served: bool = True
    states: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)

    def call(self, service: str, name: str, request: Message, *, timeout_s: float = 1.0) -> Any:
        self.called.append(name)
        if name == "JobGet" and not self.states:
            raise KeyboardInterrupt
        state = self.states.pop(0) if name == "JobGet" else "running"
        return volume_pb2.Job(id="1", kind="merge", state=state, error="disk on fire")


def test_an_interrupt_leaves_the_job_that_others_wait_for() -> None:
    channel = Channel(states=["running"])
    with pytest.raises(KeyboardInterrupt):
        wait_merged(channel, show=False)
    assert channel.called == ["MergeWait", "JobGet", "JobGet"]


def test_an_interrupt_cancels_work_that_was_asked_for() -> None:
    channel = Channel()
    with pytest.raises(KeyboardInterrupt):
        wait_job(channel, channel.call("", "Scrub", volume_pb2.Job()), show=False)
    assert channel.called == ["Scrub", "JobGet", "JobCancel"]


def test_a_job_that_failed_says_why() -> None:
    channel = Channel(states=["running", "error"])
    with pytest.raises(LhblockError, match="disk on fire"):
        wait_merged(channel, show=False)
