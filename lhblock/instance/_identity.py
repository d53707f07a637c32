"""Whether a caller means this process: the metadata that Longhorn's clients send."""

from __future__ import annotations

from collections.abc import Callable

from lhblock.rpc import Call, CallFailed


def check_identity(kind: str, volume: str, instance: str) -> Callable[[Call], None]:
    """What `serve_rpc` calls before every handler. Values that are empty are not checked.

    Args:
      kind: of the process, for the message.
    """

    def check(call: Call) -> None:
        for key, what, own in (
            ("volume-name", "volume name", volume),
            ("instance-name", "instance name", instance),
        ):
            sent = call.value(key)
            if own and sent and sent != own:
                raise CallFailed(
                    "FAILED_PRECONDITION", f"incorrect {what} {sent}; check {kind} address"
                )

    return check
