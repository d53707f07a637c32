"""The arrows of docs/internals/architecture.md, read from the imports of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lhblock

PACKAGE = Path(lhblock.__file__).parent

# Who may import whom. A part may import everything that stands right of it.
LOWER = {
    "errors": frozenset[str](),
    "settings": frozenset({"errors"}),
    "_native": frozenset({"errors"}),
    "rpc": frozenset({"errors", "settings"}),
    "replica": frozenset({"_native", "errors", "settings"}),
    "engine": frozenset({"replica", "_native", "rpc", "errors", "settings"}),
    "frontend": frozenset({"engine", "replica", "_native", "errors", "settings"}),
    "device": frozenset({"frontend", "errors", "settings"}),
    "instance": frozenset(
        {"device", "frontend", "engine", "replica", "_native", "rpc", "errors", "settings"}
    ),
    "cli": frozenset({"instance", "device", "rpc", "errors", "settings"}),
    "__main__": frozenset({"cli"}),
    "__init__": frozenset[str](),
}

# Third parties that one part owns.
OWNED = {
    "grpc": "rpc",
    "grpc_tools": "rpc",
    "click": "cli",
    "rich": "cli",
    "pyfuse3": "frontend",
    "pydantic": "instance",
    "pydantic_settings": "instance",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "generated" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, at its top or inside a function."""
    package = ("lhblock", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield name
            # `from lhblock import engine` names the part in the second place.
            yield from (f"{name}.{alias.name}" for alias in node.names)


def our_parts(path: Path) -> set[str]:
    found = set()
    for name in imported(path):
        first, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if first == "lhblock" and part in LOWER:
            found.add(part)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(path)
    assert part in LOWER, f"say in this test what {part} may import"
    assert our_parts(path) - {part} <= LOWER[part]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_parties_have_one_owner(path: Path) -> None:
    for name in imported(path):
        owner = OWNED.get(name.partition(".")[0])
        assert owner is None or owner == part_of(path), f"{name} belongs to {owner}"


def test_only_native_loads_the_extension() -> None:
    users = [path for path in modules() if "lhblock._lhblock" in path.read_text()]
    assert [part_of(path) for path in users] == ["_native"]


def test_a_wrong_arrow_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    wrong = tmp_path / "replica" / "_bad.py"
    wrong.parent.mkdir()
    wrong.write_text("def f():\n    from lhblock.engine import Volume\n    from .. import cli\n")
    assert our_parts(wrong) == {"engine", "cli"}
