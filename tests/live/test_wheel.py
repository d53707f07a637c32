"""The source distribution builds a wheel, and the wheel is complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.live, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md")
BUILT_FROM_TREES = ("lhblock", "native", "docs", "plugins")


def test_wheel_built_from_the_source_distribution_installs_and_answers(tmp_path: Path) -> None:
    # A copy, because a build writes beside its sources; without what an earlier build has left.
    source = tmp_path / "source"
    source.mkdir()
    for name in BUILT_FROM:
        shutil.copy(REPOSITORY / name, source)
    for name in BUILT_FROM_TREES:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    dist = tmp_path / "dist"
    # By default the wheel is built from the source distribution, so what that lacks is missed.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    _run(*pip, "--target", site, wheel)

    assert (site / "share" / "lhblock" / "nbdkit" / "lhblock.py").exists()

    told = _run(site / "bin" / "lhblock", "info", "--json", environment={"PYTHONPATH": str(site)})
    assert '"driver"' in told
    units = ("install-units", "--dir", str(tmp_path / "units"))
    told = _run(site / "bin" / "lhblock", *units, environment={"PYTHONPATH": str(site)})
    assert "lhblock@.service" in told
    where = "import lhblock._lhblock as module; print(module.__file__)"
    told = _run(sys.executable, "-P", "-c", where, environment={"PYTHONPATH": str(site)})
    assert Path(told.strip()).is_relative_to(site)


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd="/"
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
