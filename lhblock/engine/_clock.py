"""The time of day, as records have it."""

from __future__ import annotations

import time

from lhblock.replica import created_text


def utc_now() -> str:
    """The time as disk records hold it: UTC, RFC 3339, whole seconds."""
    return created_text(time.time())
