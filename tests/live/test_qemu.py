"""qemu-img and qemu-io against ``lhblock serve``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.live.serving import MIB, cli, serve, tool

pytestmark = [pytest.mark.live, pytest.mark.interop]


def test_qcow2_converts_in_and_out_and_compares_equal(tmp_path: Path) -> None:
    raw, qcow2, back = (tmp_path / name for name in ("in.raw", "in.qcow2", "back.qcow2"))
    content = bytearray(12 * MIB)
    content[MIB : 3 * MIB] = random.Random(2).randbytes(2 * MIB)
    content[7 * MIB + 512 : 7 * MIB + 1024] = b"s" * 512
    raw.write_bytes(content)
    tool("qemu-img", "convert", "-O", "qcow2", str(raw), str(qcow2))
    with serve(tmp_path / "d", "db", "--size", "12M") as process:
        tool("qemu-img", "convert", "-n", "-O", "raw", str(qcow2), process.uri())
        compared = tool(
            "qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(qcow2), process.uri()
        )
        assert "identical" in compared.stdout
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", process.uri(), str(back))
        tool("qemu-img", "compare", str(raw), str(back))
        info = json.loads(tool("qemu-img", "info", "--output=json", process.uri()).stdout)
        assert (info["virtual-size"], info["format"]) == (12 * MIB, "raw")


def test_qemu_io_writes_discards_and_zeroes_ranges_of_any_alignment(tmp_path: Path) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 1000 777",
        "read -P 0x11 0 1000",
        "read -P 0x22 1000 777",
        "read -P 0x11 1777 1000",
        "write -z 5000 9000",
        "read -P 0 5000 9000",
        "read -P 0x11 14000 100",
        "write -z -u 64k 64k",
        "read -P 0 64k 64k",
        "discard 128k 64k",
        "read -P 0 128k 64k",
        "read -P 0x11 192k 64k",
        "write -f -P 0x33 4095 2",
        "flush",
        "read -P 0x33 4095 2",
        "aio_write -P 0x44 256k 64k",
        "aio_write -P 0x55 320k 64k",
        "aio_flush",
        "read -P 0x44 256k 64k",
        "read -P 0x55 320k 64k",
    ]
    words = [word for line in commands for word in ("-c", line)]
    with serve(tmp_path / "d", "db", "--size", "4M") as process:
        done = tool("qemu-io", "-f", "raw", "--discard=unmap", *words, process.uri())
        # A wrong pattern is said in words, the exit status stays 0.
        assert "Pattern verification failed" not in done.stdout
        assert done.stdout.count("read ") == sum(line.startswith("read") for line in commands)
        mapped = json.loads(tool("qemu-img", "map", "--output=json", process.uri()).stdout)
        holes = {(item["start"], item["length"]) for item in mapped if item["zero"]}
        assert any(start <= 128 << 10 and start + length >= 192 << 10 for start, length in holes)


def test_qemu_keeps_a_snapshot_apart_from_the_volume(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "2M") as process:
        tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 2M", process.uri())
        cli(data, "snapshot", "create", "db", "s1")
        tool("qemu-io", "-f", "raw", "-c", "write -P 2 0 1M", process.uri())
        image = tmp_path / "s1.qcow2"
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", process.uri("db@s1"), str(image))
        seen = tool("qemu-io", "-r", "-c", "read -P 1 0 2M", str(image))
        assert "verification failed" not in seen.stdout
