"""One way to work on a volume, served or not: the calls of its control services.

When a process serves the volume the calls go to its control socket. When none does, the volume
is opened here, and the same handlers answer the same messages in a thread of this process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import trio
from google.protobuf.message import Message

from lhblock.errors import ControlError, LhblockError, NotServing, VolumeBusy
from lhblock.instance._registry import Registry, VolumeRecord
from lhblock.instance._serving import answering_address, serving
from lhblock.rpc import (
    CONTROLLER,
    VOLUME,
    Call,
    CallFailed,
    Handler,
    Handlers,
    method,
    unimplemented,
)
from lhblock.settings import DataDir

CALL_TIMEOUT_S = 60.0


class VolumeChannel(Protocol):
    """Calls about one volume.

    Attributes:
      served: a serving process answers; False when the volume is open in this process.
    """

    served: bool

    def call(
        self, service: str, name: str, request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Call one method and return its reply. Blocking.

        Raises:
          ControlError: the answer is an error.
        """
        ...


@contextmanager
def open_channel(
    data_dir: DataDir, name: str, *, read_only: bool = False
) -> Iterator[VolumeChannel]:
    """Reach a volume for as long as the block lasts.

    Args:
      read_only: how a stopped volume is opened.

    Raises:
      VolumeNotFound: none of this name is recorded.
      VolumeBusy: a process has it open and does not answer.
      LhblockError: a stopped volume cannot be opened.
    """
    registry = Registry(data_dir)
    record = registry.get(name)
    address = answering_address(data_dir, name)
    if address is not None:
        with served_channel(address, name) as channel:
            yield channel
        return
    holder = serving(data_dir, record)
    if holder is not None:
        raise VolumeBusy(name, f"{holder} has it open and answers no control calls")
    with _Offline(registry, record, read_only=read_only) as channel:
        yield channel


@contextmanager
def served_channel(address: str, name: str) -> Iterator[VolumeChannel]:
    """Reach a volume through a control socket that answers."""
    from lhblock.rpc import RpcClient

    with RpcClient(address, metadata={"volume-name": name}) as client:
        yield _Served(client, name)


class _Served:
    served = True

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name

    def call(
        self, service: str, name: str, request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        try:
            return self._client.call(service, name, request, timeout_s=timeout_s)
        except ControlError as error:
            if error.code == "UNAVAILABLE":
                raise NotServing(
                    self._name, f"the serving process went away during {name} ({error})"
                ) from error
            raise _about(self._name, error.code, str(error)) from error


class _Offline:
    """The volume, open in a trio thread of this process."""

    served = False

    def __init__(self, registry: Registry, record: VolumeRecord, *, read_only: bool) -> None:
        self._registry = registry
        self._record = record
        self._read_only = read_only
        self._stop = trio.CancelScope()
        self._running = threading.Event()
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="volume")

    def __enter__(self) -> _Offline:
        self._thread.start()
        try:
            self._opened.wait()
        except BaseException:
            # Ctrl-C while it opens: the thread must end too, or the process would stay.
            self._cancel()
            raise
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._cancel()
        if self._failure is not None and error is None:
            raise self._failure

    def call(
        self, service: str, name: str, request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        target = method(service, name)
        handler = self._services[service].get(name)
        try:
            if handler is None:
                raise unimplemented(target)
            call = Call(target, {"volume-name": (self._record.name,)})
            outcome: Future[Message] = Future()
            self._token.run_sync_soon(self._start, handler, request, call, outcome)
            return outcome.result()
        except CallFailed as failed:
            raise _about(self._record.name, failed.code, str(failed)) from failed
        except (CancelledError, trio.RunFinishedError):
            # Only the end of the volume ends a call, and the thread knows why it ended.
            self._thread.join()
            assert self._failure is not None
            raise self._failure from None

    def _start(
        self, handler: Handler, request: Message, call: Call, outcome: Future[Message]
    ) -> None:
        try:
            self._nursery.start_soon(self._answer, handler, request, call, outcome)
        except RuntimeError:  # the nursery is closed
            outcome.cancel()

    async def _answer(
        self, handler: Handler, request: Message, call: Call, outcome: Future[Message]
    ) -> None:
        # In the nursery, so that the volume is not closed under a handler after a Ctrl-C.
        try:
            outcome.set_result(await handler(request, call))
        except Exception as error:
            outcome.set_exception(error)
        finally:
            # The volume ends: a defect, or a Ctrl-C for which nobody waits any more.
            outcome.cancel()

    def _cancel(self) -> None:
        """Close the volume and wait for the thread. It may have ended by itself."""
        self._running.wait()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._stop.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failure = first_sentence(error)
        finally:
            self._opened.set()

    async def _main(self) -> None:
        from lhblock.engine import EngineOptions, open_engine
        from lhblock.instance._controller import Choice, ControllerService
        from lhblock.instance._served import open_served
        from lhblock.instance._volume_service import VolumeService

        self._token = trio.lowlevel.current_trio_token()
        self._running.set()
        with self._stop:
            async with (
                open_engine(EngineOptions(queues=1, workers=4)) as engine,
                open_served(engine, self._record, read_only=self._read_only) as served,
                trio.open_nursery() as self._nursery,
            ):
                await served.refresh_record(self._registry)
                choice = Choice({served.name: served})
                driver = (engine.driver, engine.driver_reason)
                self._services: dict[str, Handlers] = {
                    CONTROLLER: ControllerService(choice, self._registry).handlers,
                    VOLUME: VolumeService(
                        choice,
                        registry=self._registry,
                        serving=False,
                        driver=driver,
                        clients=tuple,
                    ).handlers,
                }
                self._opened.set()
                await trio.sleep_forever()


def first_sentence(error: BaseException) -> BaseException:
    """Return what a user should be told of an exception that may be a group.

    An error of ours if there is one, else the first leaf: the others mostly follow from it.
    """
    leaves: list[BaseException] = []
    pending = [error]
    while pending:
        one = pending.pop(0)
        if isinstance(one, BaseExceptionGroup):
            pending[:0] = one.exceptions
        else:
            leaves.append(one)
    return next((leaf for leaf in leaves if isinstance(leaf, LhblockError)), leaves[0])


def _about(volume: str, code: str, sentence: str) -> ControlError:
    named = sentence.startswith(("volume ", "replica ", "invalid "))
    return ControlError(code, sentence if named else f"volume {volume}: {sentence}")
