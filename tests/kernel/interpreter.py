"""Python and ``lhblock attach`` for the guest: the interpreter and the modules that loads, no more.

The files keep their places, so that the interpreter finds itself as it does on the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.kernel.initramfs import Archive

LISTING = """
import encodings.idna, json, os, runpy, sys
import lhblock.cli, lhblock.cli._main, lhblock.cli._attach
from lhblock.instance import Notifier
modules = [m for m in sys.modules.values() if getattr(m, "__file__", None)]
files = [[m.__file__, getattr(m, "__cached__", None)] for m in modules]
print(json.dumps({"files": files, "path": [p for p in sys.path if p]}))
"""


def interpreter_archive() -> bytes:
    """A cpio archive with the interpreter, its modules, and ``/bin/lhblock``."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING], capture_output=True, text=True, check=True
    )
    listing = json.loads(done.stdout)
    files = {Path(name) for pair in listing["files"] for name in pair if name}
    for name in ("lhblock.__main__", "lhblock.device.__main__"):
        module = find_spec(name)
        assert module is not None
        assert module.origin is not None
        files.add(Path(module.origin))
    archive = Archive()
    python = Path(sys.executable).resolve()
    archive.add_program(str(python).lstrip("/"), python)
    for path in sorted(files):
        if path.suffix == ".so":
            archive.add_program(str(path).lstrip("/"), path)
        elif path.exists():
            archive.add_file(str(path).lstrip("/"), path)
    search = os.pathsep.join(listing["path"])
    script = f'#!/bin/sh\nPYTHONPATH={search} exec {python} -m lhblock "$@"\n'
    archive.add("bin/lhblock", 0o100755, script.encode())
    return archive.finish()
