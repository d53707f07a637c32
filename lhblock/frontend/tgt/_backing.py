"""How tgtd reaches a volume: our module in it, or the volume's file in the FUSE mount."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lhblock.errors import FrontendError

MODULE_STORE: Final = "lhblock"
FILE_STORE: Final = "rdwr"

_HERE: Final = Path(__file__).parent
_VERSION_TIMEOUT_S: Final = 10


@dataclass(frozen=True)
class Backing:
    """What was chosen.

    Attributes:
      name: ``module`` or ``fuse``.
      reason: in words.
      module: its file, for a tgtd of our own.
    """

    name: str
    reason: str
    module: Path | None = None

    @property
    def store(self) -> str:
        return MODULE_STORE if self.name == "module" else FILE_STORE


def choose_backing(wanted: str = "auto") -> Backing:
    """Choose for a tgtd of our own. Blocking: asks tgtd for its version.

    Raises:
      FrontendError: there is no tgtd, or the module was asked for and there is none for it.
    """
    program = find_tgtd()
    if wanted == "fuse":
        return Backing("fuse", "asked for")
    version = _version(program)
    module = _HERE / f"bs_lhblock-{version}.so"
    if module.is_file():
        return Backing("module", f"built for tgt {version}", module)
    others = sorted(path.stem.partition("-")[2] for path in _HERE.glob("bs_lhblock-*.so"))
    missing = f"no module is built for tgt {version}: make tgt-plugin"
    if others:
        missing = f"the module is built for tgt {', '.join(others)}, and this is {version}"
    if wanted == "module":
        raise FrontendError(f"cannot serve iSCSI from a module in tgtd: {missing}")
    return Backing("fuse", missing)


def find_tgtd() -> str:
    """The path of tgtd. FrontendError: there is none."""
    program = shutil.which("tgtd") or shutil.which("tgtd", path="/usr/sbin:/sbin")
    if program is None:
        raise FrontendError("cannot serve iSCSI: there is no tgtd here; install the package tgt")
    return program


def _version(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FrontendError(f"cannot serve iSCSI: {program} does not run: {error}") from error
    return done.stdout.strip() or "of an unknown version"
