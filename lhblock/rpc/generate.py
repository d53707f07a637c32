"""Generate the Python code of ``protos/*.proto`` into ``generated/``.

    python -m lhblock.rpc.generate [DIRECTORY]

``make proto`` runs it; a test runs it into a scratch directory and compares. The directory is
`lhblock/rpc/generated` of the tree this module belongs to unless another is given. Only messages
are generated: calls are made and served from the service descriptors (`lhblock.rpc._methods`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

_PACKAGE = "lhblock/rpc/generated"
_HEADER = '"""Generated from lhblock/rpc/protos by lhblock.rpc.generate. Do not edit."""\n'


def generate(target: Path) -> list[Path]:
    """Write the modules and stubs into `target` and return their paths.

    Raises:
      RuntimeError: protoc refused a file; it has told why on stderr.
      ImportError: grpcio-tools is not installed.
    """
    from grpc_tools import protoc  # type: ignore[import-untyped]  # a development dependency

    protos = Path(__file__).parent / "protos"
    well_known = Path(protoc.__file__).parent / "_proto"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # The virtual path makes the generated modules import each other by their full name.
        status = protoc.main(
            [
                "protoc",
                f"-I{_PACKAGE}={protos}",
                f"-I{well_known}",
                f"--python_out={scratch}",
                f"--pyi_out={scratch}",
                *sorted(f"{_PACKAGE}/{path.name}" for path in protos.glob("*.proto")),
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc ended with status {status}")
        written = []
        for source in sorted((Path(scratch) / _PACKAGE).iterdir()):
            path = target / source.name
            path.write_bytes(source.read_bytes())
            written.append(path)
    package = target / "__init__.py"
    package.write_text(_HEADER)
    return [package, *written]


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "generated"
    for generated in generate(chosen):
        print(generated)
