"""The handshake half of the NBD protocol: its numbers, and how replies are packed.

Names are those of the specification, ``doc/proto.md`` of the reference server. Numbers of the
transmission phase live in the C core, which speaks it alone. All integers are big endian.
"""

from __future__ import annotations

import struct
from typing import Final

NBD_DEFAULT_PORT: Final = 10809

NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
NBD_IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC: Final = 0x0003E889045565A9

# Handshake flags (server) and client flags.
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags.
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

# Options.
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

# Option replies.
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9

# Information types of NBD_OPT_INFO and NBD_OPT_GO.
NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_MAX_STRING: Final = 4096  # bytes of any string of the protocol
BASE_ALLOCATION: Final = "base:allocation"

# What we promise about request sizes. The maximum is also what a client that never asks assumes.
BLOCK_SIZE_MIN_BYTES: Final = 1
BLOCK_SIZE_PREFERRED_BYTES: Final = 4096
BLOCK_SIZE_MAX_BYTES: Final = 32 << 20

# How much of a handshake we put up with.
OPTION_BYTES_MAX: Final = 64 << 10  # longest option that is looked at
OPTION_SKIP_BYTES_MAX: Final = 1 << 20  # longest option that is read past, and refused
OPTIONS_MAX: Final = 1000  # per connection
META_QUERIES_MAX: Final = 64  # per option

GREETING: Final = struct.pack(
    ">QQH", NBD_MAGIC, NBD_IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
)
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")  # magic, option, length of its data
REPLY_HEADER: Final = struct.Struct(">QIII")  # magic, option, reply type, length of its data
EXPORT_NAME_ZEROES: Final = bytes(124)


def transmission_flags(*, read_only: bool, structured: bool) -> int:
    """What an export can do, for a client that did or did not negotiate structured replies."""
    flags = (
        NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_SEND_FLUSH
        | NBD_FLAG_SEND_FUA
        | NBD_FLAG_SEND_CACHE
        | NBD_FLAG_CAN_MULTI_CONN
    )
    if read_only:
        flags |= NBD_FLAG_READ_ONLY
    else:
        flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
    if structured:
        flags |= NBD_FLAG_SEND_DF
    return flags


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One option reply, ready to send."""
    return REPLY_HEADER.pack(NBD_REP_MAGIC, option, kind, len(data)) + data


def error_reply(option: int, kind: int, sentence: str) -> bytes:
    """An error reply whose data is a sentence for the user, cut to what a string may hold."""
    assert kind & NBD_REP_FLAG_ERROR
    text = sentence.replace("\0", "").encode("utf-8", "replace")[:NBD_MAX_STRING]
    # The cut may have split a character.
    return reply(option, kind, text.decode("utf-8", "ignore").encode())


def server_reply(name: str, description: str) -> bytes:
    """One entry of the answer to ``NBD_OPT_LIST``."""
    raw = name.encode()
    data = struct.pack(">I", len(raw)) + raw + description.encode()
    return reply(NBD_OPT_LIST, NBD_REP_SERVER, data)


def info_reply(option: int, kind: int, payload: bytes) -> bytes:
    """One ``NBD_REP_INFO``; ``kind`` is an ``NBD_INFO_*``."""
    return reply(option, NBD_REP_INFO, struct.pack(">H", kind) + payload)


def export_payload(size_bytes: int, flags: int) -> bytes:
    """Size and transmission flags, as ``NBD_INFO_EXPORT`` and ``NBD_OPT_EXPORT_NAME`` send it."""
    return struct.pack(">QH", size_bytes, flags)


def block_size_payload() -> bytes:
    """The payload of ``NBD_INFO_BLOCK_SIZE``."""
    return struct.pack(
        ">III", BLOCK_SIZE_MIN_BYTES, BLOCK_SIZE_PREFERRED_BYTES, BLOCK_SIZE_MAX_BYTES
    )
