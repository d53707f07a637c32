"""The server side of grpcio: a few threads that wait, handlers that run in trio.

grpcio's own loop is a thread, so a handler starts on one of its pool threads. It does nothing
there but hand the call to the trio nursery of `serve_rpc` and wait for the outcome; everything
a handler touches is therefore touched from one thread. The pool and the number of calls at once
are bounded; a call beyond that is answered RESOURCE_EXHAUSTED.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

# grpcio's C core writes its own log lines to stderr unless told otherwise before the import.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import trio
from google.protobuf.message import Message

from lhblock.errors import LhblockError
from lhblock.rpc._methods import HEALTH, Call, CallFailed, Handlers, Method, methods, unimplemented
from lhblock.rpc.generated import health_pb2

THREADS_MAX = 8
CALLS_MAX = 64
MESSAGE_BYTES_MAX = 4 << 20
STOP_GRACE_S = 2.0
PING_INTERVAL_MS_MIN = 500

_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", -1),
    # Engines look whether a replica is there while it works on a long call.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
]


async def serve_rpc(
    address: str,
    services: Mapping[str, Handlers],
    *,
    check: Callable[[Call], None] | None = None,
    unexpected: Callable[[Call, Exception], None] | None = None,
    threads_max: int = THREADS_MAX,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `services` and the health service on `address` until cancelled.

    Declared methods without a handler answer UNIMPLEMENTED. A handler that raises `CallFailed`
    answers its code; any other `LhblockError` answers UNKNOWN with the sentence.

    Args:
      address: ``unix:/absolute/path`` or ``host:port``.
      check: called in trio before every unary handler, health included; raises `CallFailed`
        to refuse the call.
      threads_max: calls that are answered at a time.
      message_bytes_max: a request beyond this is refused.
      unexpected: told about exceptions that are no `LhblockError`, to log them.
      task_status: started with the TCP port, or 1 for a Unix socket, once calls are answered.

    Raises:
      LhblockError: the address cannot be bound.

    Cancelled: calls in progress are cancelled and answered UNAVAILABLE, then the server ends,
    within `STOP_GRACE_S` at most.
    """
    pool = ThreadPoolExecutor(threads_max, thread_name_prefix="rpc")
    options = [*_OPTIONS, ("grpc.max_receive_message_length", message_bytes_max)]
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=CALLS_MAX)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        pool.shutdown(wait=False)
        raise LhblockError(f"cannot listen for control calls on {address}") from error
    async with trio.open_nursery() as nursery:
        bridge = _Bridge(nursery, check, unexpected)
        for service, handlers in services.items():
            server.add_generic_rpc_handlers((bridge.handler(service, handlers),))
        server.add_generic_rpc_handlers((bridge.health(),))
        if address.startswith("unix:"):
            os.chmod(address.removeprefix("unix:"), 0o600)  # noqa: PTH101
        server.start()
        try:
            task_status.started(port)
            await trio.sleep_forever()
        finally:
            nursery.cancel_scope.cancel()
            stopped = server.stop(STOP_GRACE_S)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stopped.wait)
            pool.shutdown(wait=False)


class _Bridge:
    """Turns trio handlers into what grpcio calls on its pool threads."""

    def __init__(
        self,
        nursery: trio.Nursery,
        check: Callable[[Call], None] | None,
        unexpected: Callable[[Call, Exception], None] | None,
    ) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._check = check
        self._unexpected = unexpected

    def handler(self, service: str, handlers: Handlers) -> Any:
        declared = methods(service)
        assert set(handlers) <= set(declared), set(handlers) - set(declared)
        return grpc.method_handlers_generic_handler(
            service,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    partial(self._serve, handlers, method),
                    request_deserializer=method.request.FromString,
                    response_serializer=method.reply.SerializeToString,
                )
                for name, method in declared.items()
            },
        )

    def health(self) -> Any:
        declared = methods(HEALTH)
        handlers: Handlers = {"Check": _health_check, "List": _health_list}
        table = {
            name: grpc.unary_unary_rpc_method_handler(
                partial(self._serve, handlers, declared[name]),
                request_deserializer=declared[name].request.FromString,
                response_serializer=declared[name].reply.SerializeToString,
            )
            for name in handlers
        }
        table["Watch"] = grpc.unary_stream_rpc_method_handler(
            _health_watch,
            request_deserializer=declared["Watch"].request.FromString,
            response_serializer=declared["Watch"].reply.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(HEALTH, table)

    def _serve(self, handlers: Handlers, method: Method, request: Message, context: Any) -> Message:
        """On a pool thread: run one call in trio and give back its reply."""
        metadata: dict[str, tuple[str, ...]] = {}
        for key, value in context.invocation_metadata():
            text = value if isinstance(value, str) else ""
            metadata[key] = (*metadata.get(key, ()), text)
        call = Call(method, metadata)
        outcome: Future[Message] = Future()
        scope = trio.CancelScope()
        # The client went away or its deadline passed.
        context.add_callback(partial(self._soon, scope.cancel))
        try:
            trio.from_thread.run_sync(
                self._nursery.start_soon,
                partial(self._run, handlers, request, call, scope, outcome),
                trio_token=self._token,
            )
            return outcome.result()
        except CallFailed as failed:
            context.abort(getattr(grpc.StatusCode, failed.code), str(failed))
        except (trio.RunFinishedError, RuntimeError):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the serving process is stopping")
        raise AssertionError("abort raises")

    async def _run(
        self,
        handlers: Handlers,
        request: Message,
        call: Call,
        scope: trio.CancelScope,
        outcome: Future[Message],
    ) -> None:
        """In trio: run one handler; `outcome` is set whatever happens."""
        try:
            with scope:
                outcome.set_result(await self._answer(handlers, request, call))
        except Exception as error:
            outcome.set_exception(self._failure(call, error))
        finally:
            if not outcome.done():
                sentence = "the call was cancelled"
                outcome.set_exception(CallFailed("UNAVAILABLE", sentence))

    async def _answer(self, handlers: Handlers, request: Message, call: Call) -> Message:
        if self._check is not None:
            self._check(call)
        handler = handlers.get(call.method.name)
        if handler is None:
            raise unimplemented(call.method)
        return await handler(request, call)

    def _failure(self, call: Call, error: Exception) -> CallFailed:
        if isinstance(error, CallFailed):
            return error
        if isinstance(error, LhblockError):
            return CallFailed("UNKNOWN", str(error))
        if self._unexpected is not None:
            self._unexpected(call, error)
        return CallFailed("UNKNOWN", f"unexpected {type(error).__name__}: {error}")

    def _soon(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return


def _serving() -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def _health_check(_request: object, _call: Call) -> Message:
    return _serving()


async def _health_list(_request: object, _call: Call) -> Message:
    return health_pb2.HealthListResponse(statuses={"grpc": _serving()})


def _health_watch(_request: object, _context: object) -> Iterator[Message]:
    # One answer, then the end: a stream held open would hold a pool thread.
    yield _serving()
