"""Build recipe of the native core: one cffi module (API mode) over one static library.

``setup.py`` hands ``ffibuilder`` to cffi and ``LIBRARY`` to setuptools' ``build_clib``. Ours is
compiled apart from what cffi generates because only ours is held to the strict warnings.

Environment:
  LHB_SANITIZE: ``address,undefined`` or ``thread`` makes a sanitised module. It is loaded into an
    ordinary Python, so the run needs ``LD_PRELOAD`` of the sanitiser's runtime.
  CC: the compiler, as everywhere.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import cffi

HERE = Path("native")  # setuptools runs every build from the directory of setup.py
HEADERS = sorted([str(HERE / "cdef.h"), *map(str, (HERE / "include").glob("*.h"))])
HEADERS += sorted(map(str, (HERE / "src").glob("*.h")))
SOURCES = sorted(map(str, (HERE / "src").glob("*.c")))


def has_liburing() -> bool:
    """Whether the compiler finds ``liburing.h``. The core runs without it, on its worker pool."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    probe = subprocess.run(
        [*compiler, "-E", "-x", "c", "-"],
        input=b"#include <liburing.h>\n",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return probe.returncode == 0


def sanitizer_flags() -> list[str]:
    """Flags for compiling and linking, from ``LHB_SANITIZE``."""
    names = os.environ.get("LHB_SANITIZE", "")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


SANITIZE = sanitizer_flags()
URING = has_liburing()

# Python's own flags come first on the command line and switch assertions off; ours stay on in
# release builds.
COMMON_FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-UNDEBUG", "-pthread"]
COMMON_FLAGS += ["-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
COMMON_FLAGS += SANITIZE or ["-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
STRICT_FLAGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]

LIBRARY: tuple[str, dict[str, Any]] = (
    "lhb",
    {
        "sources": SOURCES,
        "obj_deps": {"": HEADERS},
        "include_dirs": [str(HERE), str(HERE / "include")],
        "macros": [("LHB_HAVE_URING", "1")] if URING else [],
        "cflags": COMMON_FLAGS + STRICT_FLAGS,
    },
)

ffibuilder = cffi.FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "lhblock._lhblock",
    '#include "cdef.h"',
    include_dirs=[str(HERE)],
    depends=[*HEADERS, *SOURCES],
    extra_compile_args=COMMON_FLAGS,
    # Last on the command line, so after the static library that needs it.
    extra_link_args=["-pthread", *SANITIZE, *(["-luring"] if URING else [])],
)
