"""Contestants that are files of a FUSE mount, driven with O_DIRECT through libaio."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import passthrough
from tests.bench.contestants import EXPORT, Contestant, Running, make_image
from tests.bench.ours import serve_command
from tests.bench.settings import REPOSITORY

_START_TIMEOUT_S = 30.0
_POLL_S = 0.05


@dataclass(frozen=True)
class FuseContestant(Contestant):
    """`command` mounts, and the file that `file` names is the image."""

    file: Callable[[Path], Path] = lambda directory: directory / "image"

    @contextmanager
    def start(self, directory: Path, bytes_: int, *, tcp: bool) -> Iterator[Running]:
        """Start the server and wait for its file to have the right size."""
        self.prepare(directory, bytes_)
        mount = directory / "mnt"
        mount.mkdir()
        assert self.command is not None
        command = list(map(str, self.command(directory, bytes_)))
        file = self.file(directory)
        with (
            (directory / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY) as server,
        ):
            try:
                limit_s = time.monotonic() + _START_TIMEOUT_S
                while not (file.exists() and file.stat().st_size == bytes_):
                    if time.monotonic() > limit_s or server.poll() is not None:
                        raise RuntimeError(f"{self.name}: {(directory / 'log').read_text()}")
                    time.sleep(_POLL_S)
                options = ["--ioengine=libaio", "--direct=1", f"--filename={file}"]
                yield Running(self.name, [*options, f"--size={bytes_}"], server.pid)
            finally:
                server.terminate()
                server.wait(_START_TIMEOUT_S)
                for place in (file, mount):
                    quiet = ["fusermount3", "-u", "-z", "-q", str(place)]
                    subprocess.run(quiet, check=False, capture_output=True)


def _qemu_command(directory: Path, _bytes: int) -> Sequence[str | Path]:
    (directory / "mnt" / "file").touch()
    node = "driver=file,node-name=image,filename="
    export = "type=fuse,id=fuse,node-name=image,writable=on,mountpoint="
    return [
        "qemu-storage-daemon",
        *("--blockdev", f"{node}{directory / 'image'}"),
        *("--export", f"{export}{directory / 'mnt' / 'file'}"),
    ]


def fuse_contestants() -> list[Contestant]:
    """A pass-through on the same library, qemu's export, and us."""

    def serve(directory: Path, bytes_: int) -> Sequence[str | Path]:
        options: list[str | Path] = ["--frontend", "fuse", "--fuse-dir", directory / "mnt"]
        return serve_command(directory / "data", [EXPORT], bytes_, options)

    return [
        FuseContestant(
            "pyfuse3 file",
            lambda directory, _: [
                *(sys.executable, "-m", passthrough.__name__),
                *(directory / "image", directory / "mnt"),
            ],
            make_image,
            file=lambda directory: directory / "mnt" / passthrough.NAME.decode(),
        ),
        FuseContestant(
            "qemu fuse", _qemu_command, make_image, file=lambda directory: directory / "mnt/file"
        ),
        FuseContestant(
            "lhblock", serve, file=lambda directory: directory / "mnt" / EXPORT / "volume"
        ),
    ]
