"""The wrapper of grpcio: calls into trio, errors with codes, deadlines, the end."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.empty_pb2 import Empty

from lhblock.errors import ControlError, LhblockError, VolumeBusy
from lhblock.rpc import CONTROLLER, HEALTH, Call, CallFailed, Handlers, RpcClient, serve_rpc
from lhblock.rpc.generated import controller_pb2 as pb
from lhblock.rpc.generated import health_pb2

TIMEOUT_S = 30.0

CallIt = Callable[..., Any]


@asynccontextmanager
async def served(
    tmp_path: Path, handlers: Handlers, metadata: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[CallIt]:
    """A server, and a function that calls it from a thread."""
    address = f"unix:{tmp_path / 'rpc.sock'}"
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_rpc, address, {CONTROLLER: handlers}, **options))
        with RpcClient(address, metadata=metadata) as client:

            async def call(
                name: str, request: Any = None, *, service: str = CONTROLLER, timeout_s: float = 30
            ) -> Any:
                return await trio.to_thread.run_sync(
                    partial(client.call, service, name, request or Empty(), timeout_s=timeout_s),
                    abandon_on_cancel=True,
                )

            yield call
        nursery.cancel_scope.cancel()


async def test_a_handler_runs_in_the_trio_thread(tmp_path: Path) -> None:
    seen = []

    async def get(_request: Any, call: Call) -> pb.Volume:
        seen.append(trio.lowlevel.current_task())
        return pb.Volume(name=call.value("volume-name"))

    async with served(tmp_path, {"VolumeGet": get}, {"volume-name": "db"}) as call:
        assert (await call("VolumeGet")).name == "db"
    assert len(seen) == 1


async def test_empty_metadata_is_not_sent(tmp_path: Path) -> None:
    async def get(_request: Any, call: Call) -> pb.Volume:
        return pb.Volume(name=str("volume-name" in call.metadata))

    async with served(tmp_path, {"VolumeGet": get}, {"volume-name": ""}) as call:
        assert (await call("VolumeGet")).name == "False"


async def test_the_socket_is_private(tmp_path: Path) -> None:
    async with served(tmp_path, {}):
        assert stat.S_IMODE((tmp_path / "rpc.sock").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (CallFailed("NOT_FOUND", "cannot find it"), "NOT_FOUND", "cannot find it"),
        (VolumeBusy("db", "two clients"), "UNKNOWN", "volume db: two clients"),
        (ZeroDivisionError("x"), "UNKNOWN", "unexpected ZeroDivisionError: x"),
    ],
)
async def test_errors_have_a_code_and_a_sentence(
    tmp_path: Path, error: Exception, code: str, sentence: str
) -> None:
    unexpected = []

    async def fail(_request: Any, _call: Call) -> pb.Volume:
        raise error

    async with served(
        tmp_path, {"VolumeGet": fail}, unexpected=lambda _call, error: unexpected.append(error)
    ) as call:
        with pytest.raises(ControlError, match=f"^{sentence}$") as caught:
            await call("VolumeGet")
    assert caught.value.code == code
    assert unexpected == ([] if isinstance(error, LhblockError | CallFailed) else [error])


async def test_a_declared_method_without_handler_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, {}) as call:
        with pytest.raises(ControlError, match=r"^method VolumeIO not implemented$") as caught:
            await call("VolumeIO", pb.VolumeIORequest())
    assert caught.value.code == "UNIMPLEMENTED"


async def test_health_is_serving_for_any_name_and_listed(tmp_path: Path) -> None:
    async with served(tmp_path, {}) as call:
        request = health_pb2.HealthCheckRequest(service="whatever")
        reply = await call("Check", request, service=HEALTH)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        listed = await call("List", health_pb2.HealthListRequest(), service=HEALTH)
        assert list(listed.statuses) == ["grpc"]


async def test_every_unary_call_is_checked_health_too(tmp_path: Path) -> None:
    def refuse(_call: Call) -> None:
        raise CallFailed("FAILED_PRECONDITION", "not you")

    async with served(tmp_path, {}, check=refuse) as call:
        for service, name in ((HEALTH, "Check"), (CONTROLLER, "VolumeGet")):
            request = health_pb2.HealthCheckRequest() if service == HEALTH else Empty()
            with pytest.raises(ControlError, match=r"^not you$"):
                await call(name, request, service=service)


async def test_a_deadline_cancels_the_handler(tmp_path: Path) -> None:
    cancelled = trio.Event()

    async def wait(_request: Any, _call: Call) -> pb.Volume:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with served(tmp_path, {"VolumeGet": wait}) as call:
        with pytest.raises(ControlError) as caught:
            await call("VolumeGet", timeout_s=0.05)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        with trio.fail_after(TIMEOUT_S):
            await cancelled.wait()


async def test_the_end_of_the_server_answers_calls_in_progress(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'rpc.sock'}"
    entered = trio.Event()
    codes = []

    async def wait(_request: Any, _call: Call) -> pb.Volume:
        entered.set()
        await trio.sleep_forever()
        raise AssertionError

    def call_it() -> None:
        with RpcClient(address) as client:
            try:
                client.call(CONTROLLER, "VolumeGet", Empty(), timeout_s=TIMEOUT_S)
            except ControlError as error:
                codes.append(error.code)

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
            await nursery.start(serve_rpc, address, {CONTROLLER: {"VolumeGet": wait}})
            outer.start_soon(trio.to_thread.run_sync, call_it)
            await entered.wait()
            nursery.cancel_scope.cancel()
    assert codes == ["UNAVAILABLE"]


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'none.sock'}"
    with RpcClient(address) as client, pytest.raises(ControlError) as caught:
        await trio.to_thread.run_sync(
            partial(client.call, CONTROLLER, "VolumeGet", Empty(), timeout_s=5)
        )
    assert caught.value.code == "UNAVAILABLE"


async def test_an_address_that_cannot_be_bound_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LhblockError, match="cannot listen for control"):
        await serve_rpc(f"unix:{tmp_path / 'missing' / 'rpc.sock'}", {})
