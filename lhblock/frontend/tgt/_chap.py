"""The file with the names and secrets of CHAP."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lhblock.errors import UsageError

# RFC 7143 12.1.4: 96 bits at least where IPsec does not help. Some initiators take 16 characters.
SECRET_CHARS_MIN: Final = 12
SECRET_CHARS_MAX: Final = 64
FILE_BYTES_MAX: Final = 4096

_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,64}")
# tgtd separates its parameters by commas.
_SECRET = re.compile(r"[!-+\--~]+")


@dataclass(frozen=True)
class Chap:
    """What initiators prove, and, if mutual, what the target proves to them."""

    user: str
    secret: str = field(repr=False)
    mutual_user: str = ""
    mutual_secret: str = field(default="", repr=False)


def read_chap(path: Path | None) -> Chap | None:
    """Read ``USER SECRET`` and perhaps ``mutual USER SECRET``, each a line; ``#`` begins a comment.

    Raises:
      UsageError: no such file, others can read it, or it makes no sense. No secret is shown.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"cannot read --iscsi-chap {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"--iscsi-chap {path} can be read by others: chmod 600 {path}")
    pairs: dict[bool, tuple[str, str]] = {}
    for number, line in enumerate(raw.decode(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        mutual = len(words) == 3 and words[0] == "mutual"
        if len(words) != 2 + mutual or mutual in pairs or len(raw) > FILE_BYTES_MAX:
            raise UsageError(
                f"line {number} of --iscsi-chap {path} makes no sense: one line 'USER SECRET',"
                " and perhaps one 'mutual USER SECRET'"
            )
        _check(path, number, words[-2], words[-1])
        pairs[mutual] = (words[-2], words[-1])
    if False not in pairs:
        raise UsageError(f"--iscsi-chap {path} has no line 'USER SECRET'")
    if True in pairs and pairs[True][0] == pairs[False][0]:
        raise UsageError(f"--iscsi-chap {path}: the mutual user needs a name of its own")
    return Chap(*pairs[False], *pairs.get(True, ()))


def _check(path: Path, number: int, user: str, secret: str) -> None:
    where = f"line {number} of --iscsi-chap {path}"
    if _NAME.fullmatch(user) is None:
        raise UsageError(f"{where}: a user name has up to 64 letters, digits and . _ : @ -")
    if not SECRET_CHARS_MIN <= len(secret) <= SECRET_CHARS_MAX or not _SECRET.fullmatch(secret):
        raise UsageError(
            f"{where}: a secret has {SECRET_CHARS_MIN} to {SECRET_CHARS_MAX} printable characters,"
            " no comma among them"
        )
