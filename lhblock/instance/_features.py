"""What this machine offers, tried with harmless operations."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from lhblock._native import built_with_uring, probe_fiemap
from lhblock.engine import EngineOptions, open_engine
from lhblock.errors import LhblockError
from lhblock.frontend.tgt import choose_backing
from lhblock.instance._logging import configure_logging
from lhblock.settings import BLOCK_BYTES, DataDir

_ALIGNMENTS = (512, 1024, 2048, BLOCK_BYTES)


def machine_features(data_dir: DataDir) -> dict[str, Any]:
    """Return the I/O driver an engine chooses here, and a list of features. Blocking.

    Keys: ``driver`` (``chosen``, ``reason``, ``built_with_liburing``), ``probed_dir``,
    ``features`` (each ``name``, ``available``, ``text``). A feature that could not be tried has
    ``available`` null and says why.
    """
    directory = _nearest(data_dir.path)
    features = [_nbd_module(), _iscsi()]
    try:
        with _scratch_file(directory) as fd:
            features = [_fiemap(fd), _nowait(fd), _direct(fd), *features]
    except OSError as error:
        text = f"cannot be tried in {directory}: {error.strerror}"
        features.append({"name": "file system", "available": None, "text": text})
    return {"driver": _driver(), "probed_dir": str(directory), "features": features}


def _driver() -> dict[str, Any]:
    configure_logging(quiet=True)

    async def probe() -> tuple[str, str]:
        async with open_engine(EngineOptions(queues=1, workers=1)) as engine:
            return engine.driver, engine.driver_reason

    try:
        chosen, reason = trio.run(probe)
    except LhblockError as error:
        chosen, reason = "none", str(error)
    return {"chosen": chosen, "reason": reason, "built_with_liburing": built_with_uring()}


def _nearest(path: Path) -> Path:
    while not path.is_dir():
        path = path.parent
    return path


@contextlib.contextmanager
def _scratch_file(directory: Path) -> Iterator[int]:
    """A file of one block in `directory` that has no name where the file system can do that."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        file.write(bytes(BLOCK_BYTES))
        os.fsync(file.fileno())
        yield file.fileno()


def _fiemap(fd: int) -> dict[str, Any]:
    error = probe_fiemap(fd)
    if error:
        text = f"missing ({os.strerror(error)}); volumes need it: use ext4 or xfs"
        return {"name": "FIEMAP", "available": False, "text": text}
    return {"name": "FIEMAP", "available": True, "text": "works"}


def _nowait(fd: int) -> dict[str, Any]:
    try:
        os.preadv(fd, [bytearray(BLOCK_BYTES)], 0, os.RWF_NOWAIT)
        works = True
    except OSError as error:
        works = error.errno == errno.EAGAIN
    text = "works" if works else "missing; every read goes through the I/O driver"
    return {"name": "RWF_NOWAIT", "available": works, "text": text}


def _direct(fd: int) -> dict[str, Any]:
    name = "O_DIRECT"
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        text = f"missing ({error.strerror}); --cache none will not work"
        return {"name": name, "available": False, "text": text}
    try:
        for alignment in _ALIGNMENTS:
            # An anonymous map begins on a page, so only length and offset are tried.
            with mmap.mmap(-1, BLOCK_BYTES) as memory:
                view = memoryview(memory)[:alignment]
                try:
                    os.preadv(direct, [view], 0)
                    text = f"works, in units of {alignment} bytes"
                    return {"name": name, "available": True, "text": text}
                except OSError:
                    continue
                finally:
                    view.release()
    finally:
        os.close(direct)
    text = f"refuses {BLOCK_BYTES} bytes; --cache none will not work"
    return {"name": name, "available": False, "text": text}


def _nbd_module() -> dict[str, Any]:
    name = "nbd kernel module"
    if Path("/sys/module/nbd").exists():
        return {"name": name, "available": True, "text": "loaded"}
    release = os.uname().release
    modules = Path("/lib/modules") / release
    for listing in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(OSError):
            if "/nbd.ko" in (modules / listing).read_text():
                return {"name": name, "available": True, "text": "present; load it: modprobe nbd"}
    text = f"not found for {release}; lhblock attach needs it, qemu and nbdcopy do not"
    return {"name": name, "available": False, "text": text}


def _iscsi() -> dict[str, Any]:
    name = "iSCSI"
    try:
        backing = choose_backing()
    except LhblockError as error:
        return {"name": name, "available": False, "text": str(error)}
    how = "a module in tgtd" if backing.name == "module" else "files of a FUSE mount"
    return {"name": name, "available": True, "text": f"through {how} ({backing.reason})"}
