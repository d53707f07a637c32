"""A disk in memory in nbdkit's Python, as small as one can be: what that language costs there.

Parameters: ``size``, in bytes.
"""

API_VERSION = 2

disk = bytearray()


def config(key: str, value: str) -> None:
    global disk
    assert key == "size"
    disk = bytearray(int(value))


def open(readonly: bool) -> int:
    return 1


def get_size(client: int) -> int:
    return len(disk)


def pread(client: int, buf: memoryview, offset: int, flags: int) -> None:
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(client: int, buf: memoryview, offset: int, flags: int) -> None:
    disk[offset : offset + len(buf)] = buf


def flush(client: int, flags: int) -> None:
    pass
