"""How snapshots are drawn as a tree."""

from __future__ import annotations

from typing import Any

from lhblock.cli._snapshot import tree


def drawn(parents: dict[str, str]) -> list[str]:
    documents: list[dict[str, Any]] = [
        {
            "name": name,
            "parent": parent or None,
            "children": [child for child, above in parents.items() if above == name],
        }
        for name, parent in parents.items()
    ]
    return [f"{branch}{item['name']}" for branch, item in tree(documents)]


def test_a_chain_is_flat() -> None:
    assert drawn({"a": "", "b": "a", "volume-head": "b"}) == ["a", "b", "volume-head"]


def test_a_fork_is_indented_and_the_head_comes_last() -> None:
    assert drawn({"a": "", "b": "a", "volume-head": "b", "x": "a", "y": "x"}) == [
        "a",
        "├─ x",
        "│  y",
        "└─ b",
        "   volume-head",
    ]


def test_a_chain_of_the_longest_length_is_drawn() -> None:
    names = [f"s{index}" for index in range(250)]
    parents = dict(zip(names, ["", *names], strict=False))
    assert drawn(parents) == names


def test_a_parent_that_is_not_listed_makes_a_root() -> None:
    assert drawn({"a": "gone", "volume-head": "a"}) == ["a", "volume-head"]
