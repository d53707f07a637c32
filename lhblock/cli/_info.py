"""``lhblock info`` and ``lhblock version``: what runs here, and what the kernel gives."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lhblock import __version__
from lhblock.cli._app import App, common_options
from lhblock.cli._output import print_fields, print_json

_LIBRARIES = ("trio", "cffi", "grpcio", "protobuf", "pydantic-settings", "structlog", "click")


@click.command()
@common_options
def version(app: App) -> None:
    """Print the version."""
    if app.json:
        print_json({"version": __version__})
    else:
        click.echo(f"lhblock {__version__}")


@click.command()
@common_options
def info(app: App) -> None:
    """Show versions, the I/O driver chosen and why, and what kernel and file system offer.

    Features of the file system are tried in the data directory, or the nearest directory above
    it that exists.
    """
    from lhblock.instance import machine_features

    found = machine_features(app.data_dir)
    document: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "libraries": {name: _library(name) for name in _LIBRARIES},
        "data_dir": str(app.data_dir.path),
        **found,
    }
    if app.json:
        print_json(document)
        return
    driver = document["driver"]
    probed = document["probed_dir"]
    fields = [
        ("lhblock", document["version"]),
        ("python", f"{document['python']} ({document['executable']})"),
        ("kernel", f"{document['kernel']} {document['machine']}, {document['cpus']} CPUs"),
        ("libraries", ", ".join(f"{k} {v}" for k, v in document["libraries"].items() if v)),
        ("data directory", document["data_dir"]),
        ("I/O driver", f"{driver['chosen']}: {driver['reason']}"),
        ("built with liburing", _yes(driver["built_with_liburing"])),
        *((item["name"], item["text"]) for item in document["features"]),
    ]
    if Path(probed) != app.data_dir.path:
        fields.append(("features tried in", probed))
    print_fields(fields)


def _library(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _yes(value: bool) -> str:
    return "yes" if value else "no"
