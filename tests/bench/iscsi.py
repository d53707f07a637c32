"""iSCSI: our tgtd, with either backing, beside stock tgtd on a plain file.

fio speaks no iSCSI, so the load is libiscsi's ``iscsi-perf`` for random reads, and ``qemu-img
bench``, which goes from block to block, for the rest.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.contestants import EXPORT
from tests.bench.ours import serve_command
from tests.bench.settings import REPOSITORY, BenchSettings
from tests.live.tgt import PlainTgtd

STOCK, MODULE, FUSE = "stock tgtd, rdwr on a file", "lhblock, module", "lhblock, fuse"
_TIMEOUT_S = 120.0
# Images in MiB: dirty pages stay below the kernel's background limit.
_IMAGE_MIB_MAX = 512
# Name, and what qemu-img bench is told: block, depth, write.
_QEMU = {
    "seqread-4k-1": (4096, 1, False),
    "seqread-4k-32": (4096, 32, False),
    "seqwrite-4k-1": (4096, 1, True),
    "seqwrite-4k-32": (4096, 32, True),
    "read-1m-8": (1 << 20, 8, False),
    "write-1m-8": (1 << 20, 8, True),
}
_PERF = {"randread-4k-32": 32}


def iscsi_throughput(settings: BenchSettings) -> dict[str, Any]:
    """Requests a second by point and contestant: the median, and every round."""
    bytes_ = min(settings.image_mib, _IMAGE_MIB_MAX) << 20
    samples: dict[str, dict[str, list[float]]] = {}
    settings.directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        root = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="bench-", dir=settings.directory)
            )
        )
        uris = {
            STOCK: stack.enter_context(_stock(root / "s", bytes_)),
            MODULE: stack.enter_context(_ours(root / "m", bytes_, "module")),
            FUSE: stack.enter_context(_ours(root / "f", bytes_, "fuse")),
        }
        for uri in uris.values():
            # Every block is there and warm.
            _qemu_bench(uri, 1 << 20, 8, write=True, requests=bytes_ >> 20)
        for round_ in range(settings.rounds):
            names = list(uris)
            first = round_ % len(names)
            for point in (*_PERF, *_QEMU):
                for name in names[first:] + names[:first]:
                    os.sync()  # nobody pays for what another has left dirty
                    value = _measure(uris[name], point, bytes_, settings.seconds)
                    samples.setdefault(point, {}).setdefault(name, []).append(value)
            print(f"iscsi: round {round_ + 1} of {settings.rounds}", flush=True)
    return {
        point: {
            name: {"median": statistics.median(values), "rounds": values}
            for name, values in by_name.items()
        }
        for point, by_name in samples.items()
    }


def table(document: dict[str, Any]) -> str:
    """The medians, and what they are of stock tgtd's."""
    lines = [f"{'requests a second':<18}" + "".join(f"{n:>30}" for n in (STOCK, MODULE, FUSE))]
    for point, by_name in document.items():
        stock = by_name[STOCK]["median"]
        cells = [f"{by_name[STOCK]['median']:.0f}"] + [
            f"{by_name[name]['median']:.0f} ({by_name[name]['median'] / stock:.2f})"
            for name in (MODULE, FUSE)
        ]
        lines.append(f"{point:<18}" + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def _measure(uri: str, point: str, bytes_: int, seconds: float) -> float:
    if point in _PERF:
        return _iscsi_perf(uri, _PERF[point], max(1, round(seconds)))
    block, depth, write = _QEMU[point]
    # About as long as asked for, from a first guess; never beyond the image.
    guess = min(2000 if block == 4096 else 64, bytes_ // block)
    rate = _qemu_bench(uri, block, depth, write=write, requests=guess)
    requests = max(guess, min(round(rate * seconds), bytes_ // block))
    return _qemu_bench(uri, block, depth, write=write, requests=requests)


def _qemu_bench(uri: str, block: int, depth: int, *, write: bool, requests: int) -> float:
    command = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-s", str(block)]
    command += ["-d", str(depth), "-c", str(requests), *(["-w"] if write else []), uri]
    match = re.search(r"Run completed in ([\d.]+) seconds", _run(command))
    assert match
    return requests / float(match[1])


def _iscsi_perf(uri: str, depth: int, seconds: int) -> float:
    command = ["iscsi-perf", "-r", "-b", "8", "-m", str(depth), "-t", str(seconds), uri]
    found = re.findall(r"iops average (\d+)", _run(command))
    assert found
    return float(found[-1])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


@contextmanager
def _stock(directory: Path, bytes_: int) -> Iterator[str]:
    directory.mkdir()
    with (directory / "image").open("wb") as image:
        os.truncate(image.fileno(), bytes_)
    with PlainTgtd(directory).running() as tgtd:
        yield tgtd.offer(directory / "image")


@contextmanager
def _ours(directory: Path, bytes_: int, backing: str) -> Iterator[str]:
    directory.mkdir()
    options = ["--no-tcp", "--frontend", "tgt-iscsi", "--iscsi-listen", "127.0.0.1:0"]
    options += ["--iscsi-backing", backing, "--json"]
    command = list(map(str, serve_command(directory / "data", [EXPORT], bytes_, options)))
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY
        ) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"lhblock: {(directory / 'log').read_text()}")
            uris = json.loads(line)["volumes"][0]["uris"]
            yield next(uri for uri in uris if uri.startswith("iscsi:"))
        finally:
            server.terminate()
            server.wait(_TIMEOUT_S)
