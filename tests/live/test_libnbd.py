"""nbdinfo, nbdcopy and nbdsh against ``lhblock serve``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.live.serving import MIB, ToolFailed, cli, nbdsh, serve, tool

pytestmark = [pytest.mark.live, pytest.mark.interop]


def test_nbdinfo_shows_what_an_export_is_and_can_do(tmp_path: Path) -> None:
    with serve(tmp_path / "d", "db", "--size", "8M") as process:
        shown = json.loads(tool("nbdinfo", "--json", process.uri()).stdout)
        assert (shown["protocol"], shown["structured"]) == ("newstyle-fixed", True)
        (export,) = shown["exports"]
        assert export["export-size"] == 8 * MIB
        assert export["contexts"] == ["base:allocation"]
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        for ability in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache"):
            assert export[f"can_{ability}"] is True, ability


def test_nbdinfo_maps_data_and_holes_of_the_volume_and_its_snapshot(tmp_path: Path) -> None:
    data = tmp_path / "d"

    def extents(uri: str) -> list[tuple[int, int, int]]:
        found = json.loads(tool("nbdinfo", "--map", "--json", uri).stdout)
        return [(item["offset"], item["length"], item["type"]) for item in found]

    with serve(data, "db", "--size", "8M") as process:
        nbdsh(process.uri(), "h.pwrite(b'x' * 65536, 1 << 20)")
        cli(data, "snapshot", "create", "db", "s1")
        # Half of what the snapshot has is discarded in the volume.
        nbdsh(process.uri(), "h.trim(32768, 1 << 20)")
        assert extents(process.uri("db@s1")) == [
            (0, MIB, 3),
            (MIB, 65536, 0),
            (MIB + 65536, 7 * MIB - 65536, 3),
        ]
        assert extents(process.uri()) == [
            (0, MIB + 32768, 3),
            (MIB + 32768, 32768, 0),
            (MIB + 65536, 7 * MIB - 65536, 3),
        ]


def test_nbdcopy_brings_an_image_in_and_out_again(tmp_path: Path) -> None:
    source, target = tmp_path / "in.img", tmp_path / "out.img"
    content = bytearray(16 * MIB)
    choose = random.Random(1)
    for place in range(0, len(content), 3 * MIB):
        content[place : place + MIB] = choose.randbytes(MIB)
    source.write_bytes(content)
    replicas = [word for n in range(3) for word in ("--replica", str(tmp_path / f"r{n}"))]
    with serve(tmp_path / "d", "db", "--size", "16M", *replicas) as process:
        tool("nbdcopy", "--flush", str(source), process.uri())
        tool("nbdcopy", process.uri(), str(target))
        assert target.read_bytes() == content
        address = process.ready["listen"][0]
        tool("nbdcopy", f"nbd://{address}/db", str(target))
        assert target.read_bytes() == content


def test_nbdcopy_goes_from_one_volume_of_the_process_to_another(tmp_path: Path) -> None:
    with serve(tmp_path / "d", "old", "new", "--size", "8M") as process:
        nbdsh(process.uri("old"), "h.pwrite(b'moved' * 3000, 77777)")
        tool("nbdcopy", process.uri("old"), process.uri("new"))
        read = "print(h.pread(15002, 77776)[:6])"
        assert nbdsh(process.uri("new"), read) == "bytearray(b'\\x00moved')\n"


def test_requests_of_every_alignment_are_exact(tmp_path: Path) -> None:
    script = """
import random
choose = random.Random(5)
model = bytearray(1 << 20)
for n in range(400):
    offset = choose.randrange(len(model) - 20000)
    length = choose.choice([1, 2, 511, 513, 4095, 4096, 4097, 20000])
    kind = choose.randrange(4)
    if kind < 2:
        data = choose.randbytes(length)
        h.pwrite(data, offset, nbd.CMD_FLAG_FUA if n % 7 == 0 else 0)
        model[offset:offset + length] = data
    elif kind == 2:
        h.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if n % 2 else 0)
        model[offset:offset + length] = bytes(length)
    else:
        assert h.pread(length, offset) == model[offset:offset + length], n
assert h.pread(len(model), 0) == model
print('same')
"""
    with serve(tmp_path / "d", "db", "--size", "1M", "--cache", "none") as process:
        assert nbdsh(process.uri(), script) == "same\n"


def test_errors_are_those_of_the_specification_and_the_connection_goes_on(tmp_path: Path) -> None:
    script = """
h.set_strict_mode(0)
def refused(function, *arguments):
    try:
        function(*arguments)
    except nbd.Error as error:
        return error.errno
    return 'done'
size = h.get_size()
print(refused(h.pread, 2, size - 1), refused(h.pwrite, b'xx', size - 1))
print(refused(h.trim, 2, size - 1), refused(h.zero, 2, size - 1))
print(refused(h.pwrite, b'x', 0, 0x100), refused(h.pread, 0, 0))
h.pwrite(b'alive', 0)
print(h.pread(5, 0))
"""
    with serve(tmp_path / "d", "db", "--size", "1M") as process:
        assert nbdsh(process.uri(), script).splitlines() == [
            "EINVAL ENOSPC",
            "EINVAL ENOSPC",
            "EINVAL EINVAL",
            "bytearray(b'alive')",
        ]


def test_snapshot_export_takes_no_writes(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "1M") as process:
        cli(data, "snapshot", "create", "db", "s1")
        # The client itself refuses first unless told not to.
        with pytest.raises(ToolFailed, match="Operation not permitted"):
            nbdsh(process.uri("db@s1"), "h.set_strict_mode(0)", "h.pwrite(b'x', 0)")


def test_flush_on_one_connection_covers_writes_of_another(tmp_path: Path) -> None:
    with serve(tmp_path / "d", "db", "--size", "1M") as process:
        uri = process.uri()
        script = f"""
other = nbd.NBD()
other.connect_uri({uri!r})
assert h.can_multi_conn()
h.pwrite(b'one', 0)
assert other.pread(3, 0) == b'one'
other.flush()
other.shutdown()
print('ok')
"""
        assert nbdsh(uri, script) == "ok\n"
