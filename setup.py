"""What is compiled: the native core and its cffi module. All else is in pyproject.toml."""

from __future__ import annotations

import os
import runpy

from setuptools import setup

# `make venv` installs the package without compiling; `make native` compiles in place afterwards.
if os.environ.get("LHB_NATIVE", "yes") == "no":
    setup()
else:
    setup(
        libraries=[runpy.run_path("native/build.py")["LIBRARY"]],
        cffi_modules=["native/build.py:ffibuilder"],
    )
