"""The systemd units: what is written, and what systemd thinks of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lhblock.cli._install_units import quoted

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "operating" / "systemd.md"
GENERATOR = Path("/lib/systemd/system-generators/systemd-fstab-generator")
STOCK_UNITS = "/lib/systemd/system"
SYSTEM = {
    "lhblock@.service",
    "lhblock@.socket",
    "lhblock-replica@.service",
    "lhblock-controller@.service",
    "lhblock-mount-fuse.service",
    "lhblock-attach@.service",
}


def run(
    *arguments: str | Path, status: int = 0, environment: Mapping[str, str] | None = None
) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lhblock", "install-units", *map(str, arguments)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def verify(directory: Path, *units: str) -> subprocess.CompletedProcess[str]:
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("requires systemd-analyze: run `make packages`")
    return subprocess.run(
        [command, "verify", "--man=no", *(directory / unit for unit in units)],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{directory}:{STOCK_UNITS}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_units_name_this_installation_and_its_data(tmp_path: Path) -> None:
    units = tmp_path / "units"
    written = json.loads(run("--dir", units, "--data-dir", tmp_path / "d", "--json"))
    assert {Path(path).name for path in written["units"]} == SYSTEM
    assert written["changed"] is True
    for path in map(Path, written["units"]):
        text = path.read_text()
        assert not re.findall(r"@[A-Z_]+@", text)
        assert path.suffix == ".socket" or f"LHBLOCK_DATA_DIR={tmp_path}/d" in text
    again = json.loads(run("--dir", units, "--data-dir", tmp_path / "d", "--json"))
    assert again == written | {"changed": False}


def test_a_unit_of_somebody_else_stays(tmp_path: Path) -> None:
    other = tmp_path / "lhblock@.socket"
    other.write_text("[Socket]\n")
    assert "was not written by lhblock" in run("--dir", tmp_path, status=1)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert other.read_text() == "[Socket]\n"


def test_a_users_units_go_to_the_users_place(tmp_path: Path) -> None:
    run("--user", environment={"XDG_CONFIG_HOME": str(tmp_path)})
    directory = tmp_path / "systemd" / "user"
    assert {path.name for path in directory.iterdir()} == SYSTEM - {"lhblock-attach@.service"}
    assert "CapabilityBoundingSet" not in (directory / "lhblock@.service").read_text()
    assert "WantedBy=default.target" in (directory / "lhblock-replica@.service").read_text()


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    # Signs that mean something to systemd, where a user may have them.
    run("--dir", tmp_path, "--data-dir", tmp_path / "a b%c$d")
    units = ("lhblock@db.service", "lhblock@db.socket", "lhblock-attach@db.service")
    more = (
        "lhblock-replica@r1.service",
        "lhblock-controller@db.service",
        "lhblock-mount-fuse.service",
    )
    done = verify(tmp_path, *units, *more)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_complain(tmp_path: Path) -> None:
    run("--dir", tmp_path)
    unit = tmp_path / "lhblock@.service"
    unit.write_text(unit.read_text().replace("ExecStart=", "ExecStart=/none"))
    assert "/none" in verify(tmp_path, "lhblock@db.service").stderr


def test_the_documented_line_of_fstab_mounts_after_the_device(tmp_path: Path) -> None:
    if not GENERATOR.exists():
        pytest.skip("requires systemd-fstab-generator: run `make packages`")
    run("--dir", tmp_path)
    (line,) = re.findall(r"^UUID=.*$", DOCUMENTED.read_text(), re.MULTILINE)
    fstab = tmp_path / "fstab"
    fstab.write_text(line + "\n")
    made = tmp_path / "made"
    made.mkdir()
    subprocess.run(
        [GENERATOR, made, made, made], env=os.environ | {"SYSTEMD_FSTAB": str(fstab)}, check=True
    )
    # As one of the network the mount is no part of what our services wait for.
    assert (made / "remote-fs.target.wants" / "srv-db.mount").exists()
    shutil.copy(made / "srv-db.mount", tmp_path)
    mount = (tmp_path / "srv-db.mount").read_text()
    assert "After=lhblock-attach@db.service" in mount
    assert "Requires=lhblock-attach@db.service" in mount
    done = verify(tmp_path, "srv-db.mount")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("/opt/lhblock", "/opt/lhblock"),
        ("/a b", '"/a b"'),
        ("/a%b$c", "/a%%b$$c"),
        ('/a"\\b', '"/a\\"\\\\b"'),
    ],
)
def test_words_are_quoted_for_systemd(word: str, line: str) -> None:
    assert quoted(word) == line
