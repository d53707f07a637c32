"""Long work on a volume that a client starts and asks about later: hashes and scrubs."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from lhblock.errors import LhblockError, VolumeBusy
from lhblock.rpc.generated import volume_pb2 as pb

JOBS_RUNNING_MAX = 4
JOBS_REMEMBERED_MAX = 32

_log = structlog.get_logger("lhblock.instance")


@dataclass
class Job:
    """One piece of work. `message` is what a client is shown; its owner fills in the results."""

    message: pb.Job
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    finished: trio.Event = field(default_factory=trio.Event)


Work = Callable[[pb.Job], Awaitable[None]]


class Jobs:
    """The jobs of one volume, running in `nursery`; the oldest finished ones are forgotten."""

    def __init__(self, volume: str, nursery: trio.Nursery) -> None:
        self._volume = volume
        self._nursery = nursery
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def messages(self) -> list[pb.Job]:
        return [job.message for job in self._jobs.values()]

    def get(self, job_id: str) -> Job:
        """Return a job. KeyError: none of this id, or forgotten."""
        return self._jobs[job_id]

    def start(self, kind: str, subject: str, work: Work) -> Job:
        """Start `work`, which fills in the job's message, or join the same job if it runs.

        Raises:
          VolumeBusy: too many run.
        """
        running = [job for job in self._jobs.values() if job.message.state == "running"]
        for job in running:
            if (job.message.kind, job.message.subject) == (kind, subject):
                return job
        if len(running) >= JOBS_RUNNING_MAX:
            raise VolumeBusy(
                self._volume, f"{JOBS_RUNNING_MAX} jobs are running; wait for one to end"
            )
        message = pb.Job(id=secrets.token_hex(8), kind=kind, subject=subject, state="running")
        job = Job(message)
        self._jobs[message.id] = job
        self._forget()
        self._nursery.start_soon(partial(self._run, job, work))
        return job

    async def _run(self, job: Job, work: Work) -> None:
        message = job.message
        try:
            with job.scope:
                await work(message)
                message.state = "complete"
            if job.scope.cancelled_caught:
                message.state = "cancelled"
        except LhblockError as error:
            message.state, message.error = "error", str(error)
        except Exception as error:
            _log.exception("job failed", volume=self._volume, kind=message.kind)
            message.state = "error"
            message.error = f"unexpected {type(error).__name__}: {error}"
        finally:
            if message.state == "running":
                message.state = "cancelled"
            job.finished.set()

    def _forget(self) -> None:
        for job_id, job in list(self._jobs.items()):
            if len(self._jobs) <= JOBS_REMEMBERED_MAX:
                return
            if job.message.state != "running":
                del self._jobs[job_id]
