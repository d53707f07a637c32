"""The management socket of tgtd, spoken directly.

``tgtadm`` takes passwords as arguments, which every user of the host can read while it runs. The
protocol is one request a connection: a C struct in the byte order and alignment of the host, then
a string of parameters; the answer is an error number and a text.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import trio

from lhblock.errors import FrontendError

ANSWER_BYTES_MAX: Final = 16 << 20
REQUEST_BYTES_MAX: Final = 8000  # tgtd takes 8 KiB
TIMEOUT_S: Final = 8.0

# mode, operation, driver, length, target id, session, unit, connection, host, type, direction,
# pack, force
_REQUEST: Final = struct.Struct("@ii64sIiQQIIIIII")
_ANSWER: Final = struct.Struct("@II")
_DRIVER: Final = b"iscsi"
_DISK: Final = 0

_ERRORS: Final = (
    "success",
    "it does not say why",
    "out of memory",
    "it has no iSCSI driver",
    "no such target",
    "no such logical unit",
    "no such session",
    "no such connection",
    "no such binding",
    "the target exists already",
    "the logical unit exists already",
    "the binding exists already",
    "the access rule exists already",
    "no such access rule",
    "the account exists already",
    "no such account",
    "too many accounts",
    "invalid request",
    "there is an outgoing account already",
    "the target is in use",
    "the logical unit is in use",
    "the driver is in use",
    "not supported",
    "unknown parameter",
    "removal is prevented by an initiator",
)


class Mode(IntEnum):
    """What a request is about."""

    SYSTEM = 0
    TARGET = 1
    DEVICE = 2
    PORTAL = 3
    ACCOUNT = 7


class Operation(IntEnum):
    """What is to be done with it."""

    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UNBIND = 4
    UPDATE = 5


class Refused(FrontendError):
    """tgtd answered an error. `code`: its number."""

    def __init__(self, what: str, code: int) -> None:
        reason = _ERRORS[code] if code < len(_ERRORS) else f"error {code}"
        super().__init__(f"tgtd refuses {what}: {reason}")
        self.code = code


class Management:
    """One tgtd."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def call(
        self,
        mode: Mode,
        operation: Operation,
        parameters: str = "",
        *,
        what: str,
        tid: int = -1,
        lun: int = 0,
        outgoing: bool = False,
        force: bool = False,
    ) -> str:
        """Make one request and return the text of the answer.

        Args:
          what: the request in words, for the error; `parameters` may hold a secret and is never
            shown.

        Raises:
          Refused: tgtd says no.
          FrontendError: nobody answers, or not in time.
        """
        raw = parameters.encode() + b"\0" if parameters else b""
        if len(raw) > REQUEST_BYTES_MAX:
            raise FrontendError(f"tgtd takes no request as long as {what}")
        length = _REQUEST.size + len(raw)
        request = _REQUEST.pack(
            *(mode, operation, _DRIVER, length, tid, 0, lun, 0, 0, _DISK),
            *(int(outgoing), 0, int(force)),
        )
        try:
            with trio.fail_after(TIMEOUT_S):
                async with await trio.open_unix_socket(self.path) as stream:
                    await stream.send_all(request + raw)
                    answer = await _receive_all(stream)
        except OSError as error:
            raise FrontendError(f"tgtd does not answer at {self.path}: {error}") from error
        except (trio.TooSlowError, trio.BrokenResourceError) as error:
            raise FrontendError(f"tgtd does not answer to {what}") from error
        if len(answer) < _ANSWER.size:
            raise FrontendError(f"tgtd hung up on {what}")
        code, _ = _ANSWER.unpack_from(answer)
        if code:
            raise Refused(what, code)
        return answer[_ANSWER.size :].decode(errors="replace").rstrip("\0")

    async def wait_gone(self) -> None:
        """Wait for the end of this tgtd.

        Cancelled: nothing has changed.
        """
        try:
            async with await trio.open_unix_socket(self.path) as stream:
                await stream.receive_some(1)
        except (OSError, trio.BrokenResourceError):
            return


async def _receive_all(stream: trio.SocketStream) -> bytes:
    answer = bytearray()
    async for chunk in stream:
        answer += chunk
        if len(answer) > ANSWER_BYTES_MAX:
            raise trio.BrokenResourceError
    return bytes(answer)
