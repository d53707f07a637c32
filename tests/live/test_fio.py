"""fio writes with checksums and reads them back, through snapshots, crashes and failing disks."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.serving import (
    TIMEOUT_S,
    TOOL_ENVIRONMENT,
    cli,
    cli_json,
    nbdsh,
    requires,
    serve,
    tool,
)
from tests.loop import require_loop_devices

pytestmark = [pytest.mark.live, pytest.mark.interop]


def job(uri: str, *options: str) -> list[str]:
    """Arguments of a job that writes every block of the volume once and verifies checksums."""
    return [
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        "--bsrange=512-16k",
        "--bs_unaligned",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randseed=7",
        "--verify_state_save=0",
        *options,
    ]


@contextmanager
def fio(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run fio in the background; the block may wait for it."""
    process = subprocess.Popen(
        [requires("fio"), *arguments],
        env=TOOL_ENVIRONMENT,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def wait_until_written(uri: str) -> None:
    """Read the beginning until something is in it. Each read is an answer of the server."""
    nbdsh(uri, "while h.pread(65536, 0) == bytes(65536): pass")


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("driver", ["auto", "pool"])
def test_checksums_hold_over_three_replicas(tmp_path: Path, driver: str, cache: str) -> None:
    replicas = [word for n in range(3) for word in ("--replica", str(tmp_path / f"r{n}"))]
    options = ("--driver", driver, "--cache", cache)
    with serve(tmp_path / "d", "db", "--size", "8M", *replicas, *options) as process:
        tool("fio", *job(process.uri(), "--size=8M"))


def test_volumes_of_one_process_do_not_mix(tmp_path: Path) -> None:
    with serve(tmp_path / "d", "one", "two", "three", "--size", "4M") as process:
        jobs = [
            word
            for number, name in enumerate(("one", "two", "three"), 1)
            for word in job(
                process.uri(name), "--size=4M", f"--verify_pattern={number}", "--verify=pattern"
            )
        ]
        tool("fio", *jobs)


def test_snapshots_merges_and_expansion_go_on_under_verified_load(tmp_path: Path) -> None:
    data = tmp_path / "d"
    replicas = [word for n in range(2) for word in ("--replica", str(tmp_path / f"r{n}"))]
    with serve(data, "db", "--size", "16M", *replicas) as process:
        looping = job(process.uri(), "--size=16M", "--loops=1000", "--verify_backlog=64")
        with fio(tmp_path, *looping) as load:
            wait_until_written(process.uri())
            for number in range(4):
                cli(data, "snapshot", "create", "db", f"s{number}")
                if number:
                    cli(data, "snapshot", "rm", "db", f"s{number - 1}")
            cli(data, "volume", "expand", "db", "24M")
            cli(data, "snapshot", "rm", "db", "s3", "--wait")
            assert load.poll() is None, load.communicate(timeout=TIMEOUT_S)[0]
            refused = cli(data, "snapshot", "revert", "db", "s3", status=1)
            assert refused.stderr
            # SIGINT ends fio after it has verified what it has begun.
            load.send_signal(signal.SIGINT)
            said = load.communicate(timeout=TIMEOUT_S)[0]
            assert "verify:" not in said, said
        assert cli_json(data, "volume", "info", "db")["state"] == "healthy"
        assert cli_json(data, "scrub", "db")["mismatches"] == []


def test_revert_brings_back_verified_content(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with serve(data, "db", "--size", "4M") as process:
        tool("fio", *job(process.uri(), "--size=4M"))
        cli(data, "snapshot", "create", "db", "good")
        nbdsh(process.uri(), "h.pwrite(b'x' * (4 << 20), 0)")
        cli(data, "snapshot", "revert", "db", "good")
        tool("fio", *job(process.uri(), "--size=4M", "--verify_only=1"))


def test_killed_server_has_everything_it_acknowledged(tmp_path: Path) -> None:
    data = tmp_path / "d"
    # One request at a time, so that at most the last one of those begun was not acknowledged.
    options = ("--size=64M", "--iodepth=1", "--bsrange=4k-4k")

    def requests(document: str, kind: str) -> int:
        (counted,) = json.loads((tmp_path / document).read_text())["jobs"]
        number: int = counted[kind]["total_ios"]
        return number

    with serve(data, "db", "--size", "64M") as process:
        uri = process.uri()
        writing = ("--verify_state_save=1", "--output-format=json", "--output=written.json")
        with fio(tmp_path, *job(uri, *options, *writing)) as load:
            wait_until_written(uri)
            process.stop(signal.SIGKILL)
            load.communicate(timeout=TIMEOUT_S)
        assert load.returncode != 0, "fio was done before the server was killed"
    with serve(data, "db") as process:
        reading = ("--verify_state_load=1", "--verify_only=1", "--output-format=json")
        again = job(process.uri(), *options, *reading, "--output=verified.json")
        with fio(tmp_path, *again) as check:
            check.communicate(timeout=TIMEOUT_S)
    # The first wrong block ends the verification, and only that of the last write may be wrong.
    wrong = 1 if check.returncode else 0
    begun = requests("written.json", "write")
    assert begun > 1
    assert requests("verified.json", "read") - wrong >= begun - 1


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own, on a loop device."""
    require_loop_devices()
    image, mounted = directory / "disk.img", directory / "disk"
    mounted.mkdir()
    tool("truncate", "-s", size, str(image))
    tool("mkfs.ext4", "-q", "-m", "0", str(image))
    tool("mount", "-o", "loop", str(image), str(mounted))
    try:
        yield mounted
    finally:
        tool("umount", str(mounted))


def fill(uri: str, size_mib: int) -> list[str]:
    """Write MiB after MiB, flushed; say which errors came, in order, and which MiB hold."""
    script = f"""
done = []
for n in range({size_mib}):
    try:
        h.pwrite(bytes([n + 1]) * (1 << 20), n << 20)
        done.append(n)
    except nbd.Error as error:
        print(error.errno)
try:
    h.flush()
except nbd.Error as error:
    print('flush', error.errno)
print(all(h.pread(1 << 20, n << 20) == bytes([n + 1]) * (1 << 20) for n in done), len(done))
"""
    return nbdsh(uri, script).splitlines()


def test_full_disk_of_the_only_replica_is_said_and_loses_nothing(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with small_disk(tmp_path, "24M") as disk:
        with serve(data, "db", "--size", "48M", "--replica", str(disk / "r")) as process:
            *errors, held = fill(process.uri(), 48)
            assert errors
            assert set(errors) == {"ENOSPC"}
            assert held.startswith("True ")
            # Room that is given back can be used again.
            nbdsh(process.uri(), "h.trim(8 << 20, 0)", "h.pwrite(b'again', 1 << 20)")
            assert process.stop()[0] == 0
        with serve(data, "db") as process:
            read = "print(h.pread(5, 1 << 20), h.pread(3, 9 << 20))"
            said = nbdsh(process.uri(), read)
            assert said == "bytearray(b'again') bytearray(b'\\n\\n\\n')\n"


def test_replica_whose_disk_is_full_is_dropped_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = tmp_path / "d"
    with small_disk(tmp_path, "24M") as disk:
        paths = [tmp_path / "r0", disk / "r1", tmp_path / "r2"]
        replicas = [word for path in paths for word in ("--replica", str(path))]
        with serve(data, "db", "--size", "40M", *replicas) as process:
            assert fill(process.uri(), 40) == ["True 40"]
            shown = cli_json(data, "volume", "info", "db")
            assert shown["state"] == "degraded"
            assert [item["mode"] for item in shown["replicas"]] == ["RW", "ERR", "RW"]
            assert "No space left" in shown["replicas"][1]["error"]
            assert process.stop()[0] == 0
        with serve(data, "db") as process:
            assert process.ready["volumes"][0]["state"] == "degraded"
            assert nbdsh(process.uri(), "print(h.pread(2, 39 << 20))") == "bytearray(b'((')\n"
