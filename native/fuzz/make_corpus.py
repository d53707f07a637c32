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


SERVER, LENGTH, WRITABLE, READABLE = 1, 2, 4, 8
LOOKUP, OPEN, FUSE_READ, FUSE_WRITE, FSYNC, INIT, INTERRUPT = 1, 14, 15, 16, 20, 26, 36
FALLOCATE, LSEEK, NO_HANDLE = 43, 46, 99


def part(parts: int, data: bytes) -> bytes:
    """One message of an input of fuzz_fuse."""
    return struct.pack("<BH", parts, len(data)) + data


def ask(opcode: int, body: bytes = b"", parts: int = LENGTH | WRITABLE) -> bytes:
    """A request of the kernel; the target numbers them."""
    return part(parts, struct.pack("<IIQQIIIHH", 0, opcode, 0, 2, 0, 0, 0, 0, 0) + body)


def served(body: bytes = b"", error: int = 0, parts: int = SERVER | LENGTH) -> bytes:
    """A reply of the server to what it had last."""
    return part(parts, struct.pack("<IiQ", 0, error, 0) + body)


def read_body(offset: int, size: int, handle: int = 0) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def write_body(offset: int, data: bytes, size: int | None = None, handle: int = 0) -> bytes:
    length = len(data) if size is None else size
    return struct.pack("<QQIIQII", handle, offset, length, 0, 0, 0, 0) + data


def range_body(offset: int, length: int, mode: int) -> bytes:
    return struct.pack("<QQQII", 0, offset, length, mode, 0)


def seek_body(offset: int, whence: int) -> bytes:
    return struct.pack("<QQII", 0, offset, whence, 0)


def fuse_seeds() -> dict[str, bytes]:
    """Name to input of fuzz_fuse."""
    end = 64 * 4096
    io = b"".join(
        [
            ask(FUSE_WRITE, write_body(0, b"w" * 4096)),
            ask(FUSE_WRITE, write_body(4097, b"u" * 100)),
            ask(FUSE_WRITE, write_body(end - 10, b"e" * 20)),
            ask(FUSE_READ, read_body(0, 8192)),
            ask(FUSE_READ, read_body(end - 5, 100)),
            ask(FSYNC, struct.pack("<QII", 0, 0, 0)),
            ask(FALLOCATE, range_body(4096, 4096, 3)),
            ask(FALLOCATE, range_body(100, 9000, 3)),
            ask(FALLOCATE, range_body(8192, 8192, 16)),
            ask(LSEEK, seek_body(0, 3)),
            ask(LSEEK, seek_body(50000, 4)),
        ]
    )
    refused = b"".join(
        [
            ask(FUSE_WRITE, write_body(0, b"x"), LENGTH | READABLE),
            ask(FALLOCATE, range_body(0, 1, 16), LENGTH | READABLE),
            ask(FUSE_WRITE, write_body(0, b"x" * 99, 100)),
            ask(FUSE_WRITE, write_body(0, b"x", 2**32 - 1)),
            ask(FUSE_WRITE, write_body(end, b"x")),
            ask(FUSE_READ, read_body(2**64 - 1, 100)),
            ask(FUSE_READ, read_body(0, (1 << 20) + 1)),
            ask(FUSE_READ, b"short"),
            ask(FALLOCATE, range_body(0, 0, 16)),
            ask(FALLOCATE, range_body(2**63, 2**63, 3)),
            ask(FALLOCATE, range_body(0, 1, 0)),
            ask(LSEEK, seek_body(0, 1)),
            ask(LSEEK, seek_body(2**64 - 1, 3)),
            ask(FUSE_WRITE, write_body(0, b"x", handle=NO_HANDLE), LENGTH),
            ask(FALLOCATE, range_body(0, 1, 16), LENGTH),
            ask(LSEEK, seek_body(0, 3), LENGTH),
        ]
    )
    init = struct.pack("<IIIIHHIIHHI7I", 7, 36, 0, 1 << 16, 12, 9, 8 << 20, 1, 512, 0, 0, *[0] * 7)
    server = b"".join(
        [
            ask(INIT, bytes(64), LENGTH),
            served(init),
            ask(OPEN, bytes(8), LENGTH),
            served(struct.pack("<QII", 9, 1, 0)),
            ask(FUSE_READ, read_body(0, 10, NO_HANDLE), LENGTH),
            served(b"0123456789"),
            ask(LOOKUP, b"name\0", LENGTH),
            served(error=-2),
            ask(INTERRUPT, bytes(8), LENGTH),
            served(b"nobody asked"),
            served(b"the length is wrong", parts=SERVER),
            part(SERVER, b"short"),
            ask(INIT, bytes(64), LENGTH),
            served(init[:20]),
        ]
    )
    return {
        "io": io,
        "refused": refused,
        "server": server,
        "all": io + refused + server + io,
        "wrong-length": io + ask(FUSE_READ, read_body(0, 1), WRITABLE),
        "short": part(0, b"garbage"),
        "empty": part(0, b""),
        "large-reads": ask(FUSE_READ, read_body(0, 1 << 18)) * 20,
        "nothing": b"",
    }


def main() -> None:
    """Replace the checked-in seeds."""
    targets = {
        "nbd": nbd_seeds(),
        "layers": layer_seeds(),
        "peer": peer_seeds(),
        "fuse": fuse_seeds(),
    }
    for target, seeds in targets.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
