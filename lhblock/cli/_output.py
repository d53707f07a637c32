"""Printing results: JSON with stable keys, or columns and lines for people.

Columns are laid out here and not by rich, whose import takes longer than listing all volumes;
rich draws what moves (`lhblock.cli._waiting`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> None:
    """Print columns; those whose header is in `right` (comma separated) are right-aligned."""
    aligned = set(right.split(","))
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if title in aligned else cell.ljust(width)
            for cell, width, title in zip(row, widths, header, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print ``name: value`` lines with the values in one column."""
    width = max(len(name) for name, _ in fields) + 1
    for name, value in fields:
        click.echo(f"{name + ':':<{width}} {value}")


def counted(count: int, noun: str) -> str:
    """Return ``1 layer``, ``2 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def note(sentence: str) -> None:
    """Tell people something beside the result."""
    click.echo(f"lhblock: {sentence}", err=True)
