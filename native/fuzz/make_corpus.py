"""Write the seed corpora of the fuzz targets: ``python make_corpus.py``, in any directory.

A seed is one connection, or one pair of layers, that reaches code which random bytes would take
long to find. The files are checked in, so that fuzzing and replaying need no Python.
"""

from __future__ import annotations

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MAGIC = 0x25609513
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
STRUCTURED, BASE_ALLOCATION, READ_ONLY = 1, 2, 4
SIZE = 257 * 4096


def request(
    kind: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
) -> bytes:
    """One request; the target numbers the cookies."""
    return struct.pack(">IHHQQI", MAGIC, flags, kind, 0, offset, length or len(data)) + data


def every_command() -> bytes:
    """One of each, with data of several alignments."""
    return b"".join(
        [
            request(WRITE, 0, data=b"w" * 4096),
            request(WRITE, 4097, flags=FUA, data=b"u" * 100),
            request(READ, 0, 8192),
            request(READ, SIZE - 5, 5),
            request(FLUSH),
            request(TRIM, 4096, 4096),
            request(CACHE, 0, SIZE),
            request(ZEROES, 100, 9000),
            request(ZEROES, 8192, 8192, NO_HOLE | FUA),
            request(ZEROES, 0, 65536, FAST_ZERO),
            request(STATUS, 0, SIZE),
            request(STATUS, 77, 40000, REQ_ONE),
            request(DISC),
        ]
    )


def wrong_requests() -> bytes:
    """All are answered with an error."""
    return b"".join(
        [
            request(READ, SIZE, 1),
            request(READ, 2**64 - 1, 2**32 - 1),
            request(READ, 0, 33 << 20),
            request(READ, 0, 10, DF),
            request(READ, 0, 10, 1 << 15),
            request(WRITE, SIZE - 10, data=b"x" * 20),
            request(WRITE),
            request(FLUSH, 1, 1),
            request(TRIM, SIZE, 1),
            request(ZEROES, 0, 0),
            request(8, 0, 1),
            request(65535, 5, 2**32 - 1),
            request(READ, 0, 1),
        ]
    )


def nbd_seeds() -> dict[str, bytes]:
    """Name to input of fuzz_nbd."""
    streams = {
        "every-command": every_command(),
        "wrong-requests": wrong_requests(),
        "bad-magic": request(READ, 0, 512) + b"\x25\x60\x95\x14" + bytes(24),
        "half-header": request(TRIM, 0, 4096)[:20],
        "half-payload": request(WRITE, 0, data=b"y" * 5000)[:-1],
        "half-skip": request(WRITE, SIZE, data=b"y" * 5000)[:-1],
        "too-large": request(READ, 0, 1) + request(WRITE, 0, 65 << 20),
        "pipelined-reads": request(READ, 0, 4096) * 300,
        "pipelined-large-reads": request(READ, 1, SIZE - 1) * 12,
        "overlapping-writes": b"".join(
            request(WRITE, 512 * i, data=bytes([i]) * 600) for i in range(30)
        ),
        "zero-and-write": b"".join(
            request(ZEROES if i % 2 else TRIM, 3000 * i, 20000)
            + request(WRITE, 4096 * i, data=b"z" * 512)
            for i in range(16)
        ),
        "status-of-stripes": b"".join(request(WRITE, 8192 * i, data=b"s" * 16) for i in range(40))
        + request(STATUS, 0, SIZE) * 3,
        "nothing": b"",
    }
    seeds = {f"{name}-simple": b"\x00" + data for name, data in streams.items()}
    for name in ("every-command", "wrong-requests", "pipelined-large-reads", "status-of-stripes"):
        seeds[f"{name}-structured"] = bytes([STRUCTURED | BASE_ALLOCATION]) + streams[name]
        seeds[f"{name}-read-only"] = bytes([STRUCTURED | READ_ONLY]) + streams[name]
    return seeds


def layers(base: int, head: int, change: int, base_bits: bytes, head_bits: bytes) -> bytes:
    """One input of fuzz_layers."""
    header = struct.pack("<QQBH", base, head, len(base_bits), change)
    return header + base_bits + head_bits


def layer_seeds() -> dict[str, bytes]:
    """Name to input of fuzz_layers."""
    stripes = 0x5555_5555_5555_5555
    return {
        "no-discards": layers(stripes, 0xFF00FF00, 0x1234, b"", b""),
        "all-discarded": layers(2**64 - 1, 0, 0xFFFF, b"", b"\xff" * 8),
        "short-discards": layers(2**64 - 1, stripes, 0x0301, b"\x0f", b"\xf0\x01"),
        "long-discards": layers(stripes, 3, 0x8081, b"\xaa" * 30, b"\xff" * 200),
    }


def reply(
    sequence: int, kind: int, size: int, payload: bytes = b"", *, magic: int = 0x1B01
) -> bytes:
    """One frame of a replica."""
    return struct.pack("<HIIqII", magic, sequence, kind, 0, size, len(payload)) + payload


def peer_seeds() -> dict[str, bytes]:
    """Name to input of fuzz_peer, which says what these answer."""
    small, large = reply(0, 2, 4096, b"s" * 4096), reply(0x101, 2, 70000, b"l" * 70000)
    write, flush = reply(0x202, 2, 4096), reply(0x303, 2, 0)
    full = reply(0x202, 3, 0, b"no space left on device")
    return {
        "all-in-order": small + large + write + flush,
        "all-backwards": flush + write + large + small,
        "errors": full + reply(0, 3, 18, b"input/output error") + reply(0x101, 4, 9, b"e" * 9),
        "twice": small + small,
        "cut-in-payload": large[:40000],
        "cut-in-header": small + write[:13],
        "unknown-sequence": reply(0x7F, 2, 0),
        "short-read": reply(0, 2, 4095, b"s" * 4095),
        "write-with-payload": reply(0x202, 2, 4096, b"x"),
        "long-text": reply(0, 3, 5000, b"t" * 5000),
        "bad-magic": reply(0, 2, 4096, magic=0x1B02),
        "goodbye": write + reply(0, 5, 0, magic=0),
    }


def main() -> None:
    """Replace the checked-in seeds."""
    targets = {"nbd": nbd_seeds(), "layers": layer_seeds(), "peer": peer_seeds()}
    for target, seeds in targets.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
