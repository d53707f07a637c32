"""A hundred thousand writes that overlap, from four connections to three replica processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.live.hosts import options, start_hosts
from tests.live.serving import serve, tool
from tests.model.volumes import VolumeFiles

pytestmark = [pytest.mark.live, pytest.mark.interop]

CONNECTIONS = 4
WRITES = 100_000
SIZE_KIB = 1024  # so that of the 64 writes in flight some always overlap


def test_replicas_are_alike_after_writes_that_overlap(tmp_path: Path) -> None:
    with start_hosts(tmp_path, 3, "--size", f"{SIZE_KIB}K") as hosts:
        with serve(tmp_path / "d", "db", "--size", f"{SIZE_KIB}K", *options(hosts)) as served:
            tool(
                *("fio", "--name=job", "--ioengine=nbd", f"--uri={served.uri()}"),
                *(f"--numjobs={CONNECTIONS}", f"--number_ios={WRITES // CONNECTIONS}"),
                *("--iodepth=16", "--rw=randwrite", "--norandommap", "--randrepeat=0"),
                *("--bsrange=512-12k", "--bs_unaligned", "--refill_buffers"),
                *(f"--size={SIZE_KIB}k", "--io_size=1t"),
            )
            assert served.stop()[0] == 0
        paths = [host.path for host in hosts]
    files = VolumeFiles(paths, SIZE_KIB << 10)
    first, *others = trio.run(files.contents)
    assert first.count(0) < len(first) // 2
    assert others == [first] * 2
