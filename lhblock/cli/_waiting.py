"""Waiting for work that a control call only started: expansions, merges, jobs.

The process that does the work is asked every `POLL_S`; on a terminal a bar shows how far it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.empty_pb2 import Empty

from lhblock.errors import LhblockError, VolumeError
from lhblock.instance import VolumeChannel
from lhblock.rpc import CONTROLLER, VOLUME
from lhblock.rpc.generated import volume_pb2

POLL_S = 0.05

Advance = Callable[[int, int], None]


def wait_expanded(channel: VolumeChannel, volume: str) -> int:
    """Wait for the end of an expansion and return the size. VolumeError: it failed."""
    while (found := channel.call(CONTROLLER, "VolumeGet", Empty())).isExpanding:
        time.sleep(POLL_S)
    if found.last_expansion_error:
        raise VolumeError(volume, f"cannot be expanded: {found.last_expansion_error}")
    return int(found.size)


def wait_merged(channel: VolumeChannel, *, show: bool) -> None:
    """Wait until nothing is left that can be merged now.

    An interrupt ends the waiting only: others may wait with the same job.
    """
    wait_job(channel, channel.call(VOLUME, "MergeWait", Empty()), show=show, cancel=False)


def wait_job(channel: VolumeChannel, job: Any, *, show: bool, cancel: bool = True) -> Any:
    """Wait for a job and return it. LhblockError: it failed.

    Args:
      show: a bar, on a terminal.
      cancel: on an interrupt, which is raised.
    """
    request = volume_pb2.JobGetRequest(id=job.id)
    try:
        with progress(job.kind, show=show) as advance:
            while job.state == "running":
                time.sleep(POLL_S)
                job = channel.call(VOLUME, "JobGet", request)
                advance(job.done_bytes, job.total_bytes)
    except KeyboardInterrupt:
        if cancel:
            channel.call(VOLUME, "JobCancel", request)
        raise
    if job.state != "complete":
        raise LhblockError(job.error or f"the {job.kind} was {job.state}")
    return job


@contextmanager
def progress(title: str, *, show: bool) -> Iterator[Advance]:
    """Yield a function of (done, total) that moves a bar on stderr, if `show` and a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
