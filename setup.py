"""What is compiled: the native core and its cffi module. All else is in pyproject.toml."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_clib import build_clib


class BuildLibrary(build_clib):
    """Makes the archive anew: one that is there is only added to, and keeps files long renamed."""

    def build_libraries(self, libraries: list[Any]) -> None:
        for name, _ in libraries:
            Path(self.build_clib, f"lib{name}.a").unlink(missing_ok=True)
        super().build_libraries(libraries)


# `make venv` installs the package without compiling; `make native` compiles in place afterwards.
if os.environ.get("LHB_NATIVE", "yes") == "no":
    setup()
else:
    setup(
        libraries=[runpy.run_path("native/build.py")["LIBRARY"]],
        cffi_modules=["native/build.py:ffibuilder"],
        cmdclass={"build_clib": BuildLibrary},
    )
