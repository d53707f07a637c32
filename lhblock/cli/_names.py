"""Arguments that name volumes and snapshots, and their completion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from lhblock.cli._app import find_app
from lhblock.errors import LhblockError
from lhblock.settings import parse_volume_size

F = TypeVar("F", bound=Callable[..., Any])

_SNAPSHOT_META = re.compile(r"volume-snap-(.+)\.img\.meta")


def complete_volume(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    taken = context.params.get("volumes") or ()
    try:
        names = find_app(context).registry.names()
    except LhblockError:
        return []
    return [
        CompletionItem(name) for name in names if name.startswith(incomplete) and name not in taken
    ]


def complete_snapshot(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Snapshot names from the first replica directory that can be listed; no process is asked."""
    try:
        record = find_app(context).registry.get(str(context.params.get("volume") or ""))
    except LhblockError:
        return []
    for path in record.paths:
        try:
            entries = sorted(entry.name for entry in path.iterdir())
        except OSError:
            continue
        names = [match[1] for entry in entries if (match := _SNAPSHOT_META.fullmatch(entry))]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return []


def volume_argument(function: F) -> F:
    return click.argument("volume", shell_complete=complete_volume)(function)


def volumes_argument(function: F) -> F:
    return click.argument(
        "volumes", metavar="VOLUME...", nargs=-1, required=True, shell_complete=complete_volume
    )(function)


def snapshot_argument(function: F) -> F:
    return click.argument("snapshot", shell_complete=complete_snapshot)(function)


class SizeType(click.ParamType[int]):
    """A volume size: ``100G``, ``512MiB``; gives bytes. Raises our own UsageError."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_volume_size(str(value))
