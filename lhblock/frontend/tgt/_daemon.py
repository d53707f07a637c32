"""tgtd: one of our own, started and watched, or one that runs already."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from lhblock.errors import FrontendError
from lhblock.frontend._child import Child, keep_running
from lhblock.settings import Listen

from ._backing import MODULE_STORE, Backing, find_tgtd
from ._management import Management, Mode, Operation
from ._plan import Plan, open_portal, portal_of

CONTROL_PORT: Final = 0
FILES_MAX: Final = 65536
RETRY_S: Final = 0.02
SHARED_RETRY_S: Final = 1.0
REMOVE_TIMEOUT_S: Final = 5.0
# tgtd would open every address of the host; this one nobody knows, and it is closed at once.
_NOWHERE: Final = "portal=127.0.0.1:0"

_log = structlog.get_logger("lhblock.frontend.tgt")


@dataclass
class Tgt:
    """A tgtd that offers our targets.

    Attributes:
      portal: where initiators find it.
    """

    portal: Listen
    _child: Child | None = None

    def restart(self) -> None:
        """Kill a tgtd of our own; it is started again. Initiators notice a pause."""
        if self._child is not None:
            self._child.kill()


async def keep_tgtd(
    plan: Plan,
    listen: Listen,
    directory: Path,
    backing: Backing,
    *,
    task_status: trio.TaskStatus[Tgt] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a tgtd of our own running until cancelled; started when initiators can log in.

    Its targets are complete before its address is open, so an initiator that comes back after
    tgtd was killed never meets one that does not know its target.

    Args:
      directory: private; tgtd's management socket is made there.

    Raises:
      FrontendError: there is no tgtd, or it does not start; its own words are in the sentence.

    Cancelled: tgtd has ended.
    """
    socket = directory / "tgtd"
    environment: Mapping[str, str] = {"TGT_IPC_SOCKET": str(socket)}
    if backing.module is not None:
        environment = {**environment, "LD_PRELOAD": str(backing.module)}
    child = Child(
        "tgtd",
        [find_tgtd(), "-f", "-C", str(CONTROL_PORT), "--iscsi", _NOWHERE],
        files_max=FILES_MAX,
        environment=environment,
        # It does not end by SIGTERM. What it has answered is in the engine already.
        stop_signal=signal.SIGKILL,
        # It talks of all that it does.
        level="info",
        log=_log,
    )
    tgt = Tgt(listen, child)
    management = Management(f"{socket}.{CONTROL_PORT}")

    async def come_up(alive: trio.lowlevel.FdStream) -> bool:
        if not await _answers(management, alive):
            return False
        await plan.apply(management, shared=False)
        tgt.portal = await open_portal(management, tgt.portal)
        return True

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(keep_running, child, come_up, problem="cannot serve iSCSI"))
        task_status.started(tgt)


async def _answers(management: Management, alive: trio.lowlevel.FdStream) -> bool:
    """Wait until tgtd answers; False: it has ended."""
    answered = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await alive.receive_some(1)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        while not answered:
            try:
                await management.call(Mode.SYSTEM, Operation.SHOW, what="its state")
                answered = True
            except FrontendError:
                await trio.sleep(RETRY_S)
        nursery.cancel_scope.cancel()
    return answered


async def share_tgtd(
    plan: Plan,
    socket: str,
    *,
    task_status: trio.TaskStatus[Tgt] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Offer the targets in a tgtd that runs already, until cancelled.

    When it is started anew, they are made again.

    Args:
      socket: of its management.

    Raises:
      FrontendError: there is none, or it refuses.

    Cancelled: the targets are gone again, if tgtd answers.
    """
    management = Management(socket)
    was_up = False
    try:
        while True:
            try:
                await plan.apply(management, shared=True)
                portal = await portal_of(management)
            except FrontendError as error:
                if not was_up:
                    raise FrontendError(f"cannot serve iSCSI: {error}") from error
                await trio.sleep(SHARED_RETRY_S)
                continue
            if not was_up:
                was_up = True
                task_status.started(Tgt(portal))
            else:
                _log.info("the targets are in tgtd again")
            await management.wait_gone()
            _log.error("tgtd ended; its clients wait for the next one")
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + REMOVE_TIMEOUT_S):
            try:
                if was_up:
                    await plan.remove(management)
            except FrontendError as error:
                _log.warning("targets stay in tgtd", reason=str(error))


async def shared_backing(wanted: str, socket: str) -> Backing:
    """As `choose_backing`, for a tgtd that runs already.

    Raises:
      FrontendError: nobody answers, or it has no module and that was asked for.
    """
    if wanted == "fuse":
        return Backing("fuse", "asked for")
    text = await Management(socket).call(Mode.SYSTEM, Operation.SHOW, what="its state")
    if re.search(rf"^ +{MODULE_STORE}$", text, re.MULTILINE):
        return Backing("module", "the tgtd that runs has loaded it")
    missing = "the tgtd that runs has not loaded it: make install-tgt-plugin, and start it anew"
    if wanted == "module":
        raise FrontendError(f"cannot serve iSCSI from a module in tgtd: {missing}")
    return Backing("fuse", missing)
