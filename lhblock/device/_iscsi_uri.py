"""``iscsi://HOST[:PORT]/TARGET/LUN``, the address of a logical unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lhblock.errors import UsageError
from lhblock.settings import ISCSI_PORT, Listen

SCHEME = "iscsi://"
_URI = re.compile(
    r"iscsi://(?:\[([0-9a-fA-F:]+)\]|([^/\[\]:@%]+))(?::(\d{1,5}))?/([a-zA-Z0-9.:-]+)/(\d{1,5})"
)


@dataclass(frozen=True)
class IscsiUri:
    """Where a unit is."""

    portal: Listen
    target: str
    lun: int

    def __str__(self) -> str:
        return f"{SCHEME}{self.portal}/{self.target}/{self.lun}"


def parse_iscsi_uri(text: str) -> IscsiUri:
    """Take an address apart.

    Raises:
      UsageError: it is none. Names and secrets have no place in it, where everybody sees them.
    """
    match = _URI.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no address of an iSCSI unit: iscsi://HOST[:PORT]/TARGET/LUN")
    host = match[1] or match[2]
    return IscsiUri(Listen(host, int(match[3] or ISCSI_PORT)), match[4], int(match[5]))
